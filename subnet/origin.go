package subnet

import (
	"net/netip"
	"slices"
	"time"
)

// An Origin says where a node's subnets come from.
type Origin string

// The origins of subnets.
const (
	OriginAuto     Origin = "auto"      // one of the others, as Evidence decides
	OriginNodeSpec Origin = "node-spec" // spec.podCIDRs of the node's Node, which kube-controller-manager fills
	OriginLease    Origin = "lease"     // a free subnet of the network, taken by a Claimant
)

// settlingTime is how old some Node has to be before a cluster whose Nodes all lack podCIDRs counts as one that does
// not hand them out. kube-controller-manager fills them some seconds after a Node has registered.
const settlingTime = time.Minute

// Evidence is what is known of where a cluster's subnets come from.
type Evidence struct {
	PodCIDRs    []netip.Prefix // spec.podCIDRs of this node's Node
	Recorded    []netip.Prefix // what this node's Node records as its subnets
	AnyPodCIDRs bool           // some Node has podCIDRs
	Oldest      time.Duration  // the age of the oldest Node, by the server's clock
}

// Decide says where this node's subnets come from, so that kube-controller-manager and a Claimant never both give it
// some. OriginAuto means that it is not decided: again says after how long it can be, if no Node changes until then;
// 0 means that only a change can decide it.
//
// A lease that was taken stays, also when podCIDRs appear later.
func (e Evidence) Decide() (o Origin, again time.Duration) {
	switch {
	case len(e.Recorded) > 0 && !sameSubnets(e.Recorded, e.PodCIDRs):
		return OriginLease, 0
	case len(e.PodCIDRs) > 0:
		return OriginNodeSpec, 0
	case e.AnyPodCIDRs:
		return OriginAuto, 0
	case e.Oldest > settlingTime:
		return OriginLease, 0
	}
	// Times of the API server are whole seconds, so the age has to pass the limit, not to reach it.
	return OriginAuto, settlingTime - max(e.Oldest, 0) + time.Second
}

func sameSubnets(a, b []netip.Prefix) bool {
	in := func(list []netip.Prefix) func(netip.Prefix) bool {
		return func(p netip.Prefix) bool { return !slices.Contains(list, p) }
	}
	return !slices.ContainsFunc(a, in(b)) && !slices.ContainsFunc(b, in(a))
}

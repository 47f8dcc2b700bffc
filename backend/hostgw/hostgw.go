// Package hostgw says what the kernel must hold to reach every lease where each node is one hop away.
//
// A route through the peer's own address is all: there is no device, and nothing is encapsulated.
package hostgw

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// Name is what leases call this backend.
const Name = "host-gw"

// Data is what a lease says for others to reach its node: no more than the node's addresses do.
func Data() json.RawMessage { return json.RawMessage(`{}`) }

// Judge refuses a lease that this backend cannot reach, wherever its node is. Nodes share nothing that they must not.
func Judge(l subnet.Lease) (identity string, err error) {
	if err := backend.CheckType(l, Name); err != nil {
		return "", err
	}
	if !l.NodeAddr().IsValid() {
		return "", fmt.Errorf("no address of %s is published that %s could be routed to: give its uplink one of that "+
			"family, or "+useTunnel, l.Node, l.Subnet)
	}
	return "", nil
}

// Desired is what the kernel of node must hold to reach peers, whose leases have passed Judge. One that is not on up's
// Segment is a Problem: a router between the nodes would not know where its pods are. Where nothing of a family is on
// it, the Problem is the node's own.
//
// That is not for Judge to say. Which nodes are near depends on where one asks, and which lease stands must not.
func Desired(node string, peers []subnet.Lease, up backend.Uplink) (s backend.State, problems []subnet.Problem) {
	s.Routes = make(map[backend.RouteKey]backend.Route, len(peers))
	alone := map[string]bool{} // by the family
	for _, l := range peers {
		r, near := up.Segment.Route(l)
		switch {
		case near:
			s.Routes[r.RouteKey] = r
		case up.Segment.Has(r.Via):
			problems = append(problems, subnet.Problem{Node: l.Node, Kind: subnet.KindLease, Text: fmt.Sprintf(
				"subnet %s: %s is not on a segment of this node (%s), and a router in between does not know the pods' "+
					"addresses; pods on %s cannot be reached: %s, if need be with DirectRouting",
				l.Subnet, r.Via, up.Segment, l.Node, useTunnel)})
		case !alone[family(r.Via)]:
			alone[family(r.Via)] = true
			problems = append(problems, subnet.Problem{Node: node, Kind: subnet.KindLease, Text: fmt.Sprintf(
				"by its routes, no node is near to this one with its %s address: see that %s is up, and that this node's "+
					"published address is its own and has a network (`ip route show` has it); else %s",
				family(r.Via), strings.Join(up.Devs, " or "), useTunnel)})
		}
	}
	return s, problems
}

// useTunnel is what works for nodes that are not near.
const useTunnel = `set Backend.Type to "vxlan" on all nodes`

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

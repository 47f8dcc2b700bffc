package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tweed.dev/tweed/subnet"
)

// pageSize is how many whole Nodes are asked for at once: each may be of tens of kilobytes.
const pageSize = 200

// evidence is what was last seen of all Nodes by whoever has to know where subnets come from.
type evidence struct {
	of    types.UID     // of this node's Node at that time
	given string        // a Node that has podCIDRs, "" if none has
	age   time.Duration // of the oldest Node at that time, by the server's clock
	next  time.Time     // when to look again, by the clock here; zero for never
}

// decide says where this node's subnets come from. OriginAuto means that this is open, for the reason why; then it can be
// decided after that time, or by a change if that is 0.
func (l *lessor) decide(ctx context.Context, obj object) (o subnet.Origin, again time.Duration, why error) {
	switch l.origin {
	case subnet.OriginLease:
		return subnet.OriginLease, 0, nil
	case subnet.OriginNodeSpec:
		return subnet.OriginNodeSpec, 0, l.awaited("SubnetSource in net-conf.json is node-spec")
	}
	if obj.badCIDRs != nil {
		return subnet.OriginNodeSpec, 0, nil
	}
	known := subnet.Evidence{PodCIDRs: obj.given, Recorded: obj.recorded}
	if len(known.PodCIDRs) == 0 && len(known.Recorded) == 0 {
		if err := l.look(ctx, obj.uid); err != nil {
			return subnet.OriginAuto, pauseLast, err
		}
		known.AnyPodCIDRs, known.Oldest = l.evidence.given != "", l.evidence.age
	}
	o, _ = known.Decide()
	switch {
	case o != subnet.OriginAuto:
		return o, 0, nil
	case known.AnyPodCIDRs:
		return o, 0, l.awaited("node " + l.evidence.given + " has some")
	}
	return o, max(time.Until(l.evidence.next), time.Second),
		l.awaited("unless any Node has some when the oldest is a minute old, a subnet is leased then")
}

// awaited says that the cluster has to hand out this node's subnets.
func (l *lessor) awaited(because string) error {
	return fmt.Errorf("spec.podCIDRs of node %s is empty; waiting for kube-controller-manager to fill it, which it does "+
		"when it runs with --allocate-node-cidrs=true and --cluster-cidr (%s)", l.node, because)
}

// look goes through all Nodes, page by page, for podCIDRs and ages; and only once where that shows all that can matter. Of
// the cluster nothing else is read whole.
func (l *lessor) look(ctx context.Context, uid types.UID) error {
	e := &l.evidence
	if e.of == uid && (e.next.IsZero() || time.Now().Before(e.next)) {
		return nil
	}
	seen := evidence{of: uid}
	var oldest time.Time // creation of a Node
	for options := (metav1.ListOptions{Limit: pageSize}); ; {
		page, err := l.page(ctx, options)
		if err != nil {
			return err
		}
		for _, n := range page.Items {
			if _, given := podCIDRTexts(&n); len(given) > 0 {
				seen.given = n.Name
			}
			if created := n.CreationTimestamp.Time; oldest.IsZero() || created.Before(oldest) {
				oldest = created
			}
		}
		if options.Continue = page.Continue; options.Continue == "" || seen.given != "" {
			break
		}
	}
	if oldest.IsZero() {
		return errors.New("the API server lists no Node at all, not even this one")
	}
	seen.age = l.clock.now().Sub(oldest)
	if _, again := (subnet.Evidence{AnyPodCIDRs: seen.given != "", Oldest: seen.age}).Decide(); again > 0 {
		seen.next = time.Now().Add(again)
	}
	*e = seen
	return nil
}

// page lists some Nodes, whole.
func (l *lessor) page(ctx context.Context, options metav1.ListOptions) (*corev1.NodeList, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	page := &corev1.NodeList{}
	if err := l.core.Get().Resource("nodes").VersionedParams(&options, l.params).Do(ctx).Into(page); err != nil {
		return nil, explain("list", "nodes", l.server, err)
	}
	return page, nil
}

package kube

import (
	"context"
	"fmt"
	"net/netip"

	"tweed.dev/tweed/subnet"
)

// Publish writes this node's leases to its Node, in one PATCH and only if something differs from what is there; with no
// leases it takes them away. Annotations that are not the daemon's stay as they are.
func (s *Source) Publish(ctx context.Context, leases []subnet.Lease) error {
	for _, l := range leases {
		if !l.Host.IsValid() {
			return fmt.Errorf("cannot publish %s of node %s: it has no address for the tunnel yet", l.Subnet, s.node)
		}
	}
	want := Format(leases)
	return s.write(ctx, "publish the lease of", "nodes", func(ctx context.Context, v version) (version, error) {
		if err := s.mayPublish(v, leases); err != nil {
			return v, err
		}
		return s.annotate(ctx, v, want)
	})
}

// mayPublish refuses leases that this version of the Node does not give to this node: they are of an earlier one. A leased
// subnet is never written here, for that nobody else has it is known to the lessor alone.
func (s *Source) mayPublish(v version, leases []subnet.Lease) error {
	if len(leases) == 0 {
		return nil
	}
	var want []netip.Prefix
	for _, l := range leases {
		want = append(want, l.Subnet)
	}
	has := v.given
	if s.self.decided() != subnet.OriginNodeSpec {
		has, _ = subnet.Record{Subnets: v.annotations[Subnets]}.ParseSubnets()
	}
	if !sameSet(has, want) {
		return fmt.Errorf("node %s has the subnets %v now, and not %v any more", s.node, has, want)
	}
	return nil
}

// annotate writes want to the Node at version v, unless it is there already.
func (s *Source) annotate(ctx context.Context, v version, want map[string]string) (version, error) {
	diff := difference(v.annotations, want)
	if len(diff) == 0 {
		return v, nil
	}
	m, err := s.patchAnnotations(ctx, v, diff)
	if err != nil {
		return v, err
	}
	// Of the rest nothing has changed since v, or the PATCH would have been refused.
	v.uid, v.resource, v.annotations = m.UID, m.ResourceVersion, ours(m.Annotations)
	return v, nil
}

// difference is the part of a JSON merge patch (RFC 7396) that makes want of have: nil takes an annotation away.
func difference(have, want map[string]string) map[string]any {
	diff := map[string]any{}
	for _, key := range lasting() {
		now, is := have[key]
		then, shall := want[key]
		switch {
		case is && !shall:
			diff[key] = nil
		case shall && (!is || now != then):
			diff[key] = then
		}
	}
	return diff
}

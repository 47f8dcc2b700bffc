package backend

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tweed.dev/tweed/subnet"
)

// A Way is a route of the main table, not of ours, as far as it says what is on a link.
type Way struct {
	Dst    netip.Prefix
	Metric int
	Router bool // it leads past a router
}

// A Segment is what of the underlay this host reaches by its uplinks without a router. The zero Segment is nothing.
type Segment struct{ parts []part }

// A part is on the link of the uplink dev, but for what parts before it hold. Without dev it is not on the segment.
type part struct {
	prefix netip.Prefix
	metric int
	dev    string
}

// ownMetric puts a host's own addresses before all routes to them.
const ownMetric = -1

// NewSegment reads off a host's routes what is on the links of up. As for the kernel, the longest prefix counts, then
// the smallest metric, then the order of ifaces. Nothing of a family is on the segment if what up publishes of that
// family is not an address of this host, but of a NAT: other nodes do not find it on theirs, and both ends must agree.
func NewSegment(ifaces []Interface, up Uplink) Segment {
	var all, on []part
	for _, i := range ifaces {
		carries := i.Up && !i.NoARP && slices.Contains(up.Devs, i.Name)
		for _, w := range i.Ways {
			p := part{prefix: w.Dst, metric: w.Metric}
			if carries && !w.Router && up.publishes(ifaces, w.Dst.Addr()) {
				p.dev = i.Name
				on = append(on, p)
			}
			all = append(all, p)
		}
		for _, a := range i.Addrs {
			all = append(all, part{prefix: netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), metric: ownMetric})
		}
	}
	// What is outside, such as addresses of services and containers, comes and goes, and the segment stays the same.
	parts := slices.DeleteFunc(all, func(o part) bool {
		return !slices.ContainsFunc(on, func(p part) bool { return holds(p.prefix, o.prefix) })
	})
	slices.SortStableFunc(parts, func(a, b part) int {
		return cmp.Or(b.prefix.Bits()-a.prefix.Bits(), a.prefix.Addr().Compare(b.prefix.Addr()), a.metric-b.metric)
	})
	return Segment{slices.CompactFunc(parts, func(a, b part) bool { return a.prefix == b.prefix })}
}

// holds reports whether all of b is in a.
func holds(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Contains(b.Addr()) }

// publishes reports whether the address of the family of a that u publishes is this host's.
func (u Uplink) publishes(ifaces []Interface, a netip.Addr) bool {
	here := func(published netip.Addr) bool {
		return Holder(ifaces, published) != ""
	}
	return slices.ContainsFunc(u.Addrs, func(p netip.Addr) bool { return p.Is4() == a.Is4() && here(p) })
}

// Dev is the uplink whose link a is on; "" where that is none.
func (s Segment) Dev(a netip.Addr) string {
	for _, p := range s.parts {
		if p.prefix.Contains(a) {
			return p.dev
		}
	}
	return ""
}

// Has reports whether anything of the family of a is on the segment.
func (s Segment) Has(a netip.Addr) bool {
	return slices.ContainsFunc(s.parts, func(p part) bool { return p.dev != "" && p.prefix.Addr().Is4() == a.Is4() })
}

// Route leads to l through its node itself, if that is on the segment with its address of the family of l's subnet.
func (s Segment) Route(l subnet.Lease) (Route, bool) {
	via := l.NodeAddr()
	dev := s.Dev(via)
	return Route{RouteKey: RouteKey{Table: MainTable, Dst: l.Subnet}, Dev: dev, Via: via, Peer: l.Node}, dev != ""
}

// String lists the segment's prefixes: "192.0.2.0/24 on eth0".
func (s Segment) String() string {
	var on []string
	for _, p := range s.parts {
		if p.dev != "" {
			on = append(on, fmt.Sprintf("%s on %s", p.prefix, p.dev))
		}
	}
	return cmp.Or(strings.Join(on, ", "), "nothing")
}

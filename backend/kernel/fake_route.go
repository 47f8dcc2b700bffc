package kernel

import (
	"context"
	"maps"
	"net/netip"
	"slices"

	"tweed.dev/tweed/backend"
)

// RouteTo is as in Kernel. Besides the routes that were made there are those to the links of interfaces, and the default
// ones that the interfaces tell of.
func (f *Fake) RouteTo(ctx context.Context, addr netip.Addr) (backend.Path, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.local(addr) {
		return backend.Path{Dev: "lo", Src: addr}, ctx.Err()
	}
	var best backend.Route
	for _, r := range f.routes() {
		if _, up := f.link(r.Dev); !up || r.Table != backend.MainTable || !r.Dst.Contains(addr) {
			continue
		}
		if best.Dev == "" || r.Dst.Bits() > best.Dst.Bits() || r.Dst.Bits() == best.Dst.Bits() && r.Metric < best.Metric {
			best = r
		}
	}
	path := backend.Path{Dev: best.Dev, Src: best.Src}
	if !path.Src.IsValid() && path.Dev != "" {
		path.Src = f.sourceOn(best.Dev, addr, best.Via)
	}
	return path, ctx.Err()
}

// routes lists all routes, those of other people first.
func (f *Fake) routes() []backend.Route {
	all := slices.Collect(maps.Values(f.others.Routes))
	for _, name := range slices.Sorted(maps.Keys(f.uplinks)) {
		i := f.uplinks[name]
		add := func(dst netip.Prefix) {
			all = append(all, backend.Route{
				RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: dst.Masked()}, Dev: name})
		}
		for _, p := range i.Addrs {
			add(p)
		}
		if i.Default4 {
			add(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
		}
		if i.Default6 {
			add(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
		}
	}
	return slices.AppendSeq(all, maps.Values(f.own.Routes))
}

// ways are the interface's own, those to the networks of its addresses, and those of other people's routes.
func (f *Fake) ways(i backend.Interface) []backend.Way {
	ways := slices.Clone(i.Ways)
	for _, p := range i.Addrs {
		switch {
		case !i.Up:
		case p.Addr().Is6():
			ways = append(ways, backend.Way{Dst: p.Masked(), Metric: prefixMetric6})
		case !p.IsSingleIP():
			ways = append(ways, backend.Way{Dst: p.Masked()})
		}
	}
	near := func(dst netip.Prefix) bool {
		for _, i := range f.uplinks {
			if slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return isNear(p, dst) }) {
				return true
			}
		}
		return false
	}
	for _, r := range f.others.Routes {
		if r.Dev == i.Name && r.Table == backend.MainTable && (!r.Via.IsValid() || near(r.Dst)) {
			ways = append(ways, backend.Way{Dst: r.Dst, Metric: r.Metric, Router: r.Via.IsValid()})
		}
	}
	return ways
}

// prefixMetric6 is the metric of the route that the kernel adds for an IPv6 address (IP6_RT_PRIO_ADDRCONF).
const prefixMetric6 = 256

// sourceOn is the address on dev toward via, else the first of the family of addr.
func (f *Fake) sourceOn(dev string, addr, via netip.Addr) (src netip.Addr) {
	for _, p := range f.uplinks[dev].Addrs {
		if family(p.Addr()) == family(addr) {
			return p.Addr()
		}
	}
	for _, k := range f.added {
		a := k.Prefix.Addr()
		switch {
		case k.Dev != dev || family(a) != family(addr):
		case k.Toward.IsValid() && k.Toward == via:
			return a
		case !src.IsValid():
			src = a
		}
	}
	return src
}

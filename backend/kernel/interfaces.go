package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// Interfaces lists this host's network devices in the order of their indexes, for the choice of an uplink. Addresses that
// should not be used any more, or that change by themselves (RFC 8981), are left out.
func (k *Kernel) Interfaces(ctx context.Context) ([]backend.Interface, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	links, err := k.links("")
	if err != nil {
		return nil, err
	}
	addrs, err := k.globalAddrs()
	if err != nil {
		return nil, err
	}
	default4, ways4, err := k.mainRoutes(unix.AF_INET, addrs)
	if err != nil {
		return nil, err
	}
	default6, ways6, err := k.mainRoutes(unix.AF_INET6, addrs)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(links, func(a, b link) int { return cmp.Compare(a.index, b.index) })
	var out []backend.Interface
	for _, l := range links {
		out = append(out, backend.Interface{
			Name: l.name, MTU: l.mtu, Up: l.up, Ours: l.group == backend.Owner, Addrs: addrs[l.index],
			Default4: slices.Contains(default4, l.index), Default6: slices.Contains(default6, l.index),
			Stub: l.name == "lo" || l.is("dummy"), NoARP: l.noARP, Ways: slices.Concat(ways4[l.index], ways6[l.index]),
		})
	}
	return out, nil
}

// globalAddrs returns the usable addresses of global scope by the index of their device.
func (k *Kernel) globalAddrs() (addrs map[int][]netip.Prefix, err error) {
	m := make(message, unix.SizeofIfAddrmsg)
	err = k.conn.dump(unix.RTM_GETADDR, m, func() { addrs = map[int][]netip.Prefix{} }, func(b []byte) {
		a, ok := parseAddr(b)
		unusable := uint32(unix.IFA_F_DEPRECATED | unix.IFA_F_DADFAILED)
		if a.prefix.Addr().Is6() {
			unusable |= unix.IFA_F_TEMPORARY // the same bit says "secondary" of an IPv4 address
		}
		if ok && a.scope == unix.RT_SCOPE_UNIVERSE && a.flags&unusable == 0 {
			addrs[a.index] = append(addrs[a.index], a.prefix)
		}
	})
	return addrs, wrap(err, "listing addresses")
}

// mainRoutes returns the devices that the best default route of a family leaves by, and the ways by the index of their
// device.
func (k *Kernel) mainRoutes(family uint8, addrs map[int][]netip.Prefix) (
	defaults []int, ways map[int][]backend.Way, err error) {
	m := make(message, unix.SizeofRtMsg, 32)
	m[0] = family
	m.u32(unix.RTA_TABLE, unix.RT_TABLE_MAIN)
	var routes []route
	near := func(dst netip.Prefix) bool {
		for _, all := range addrs {
			if slices.ContainsFunc(all, func(p netip.Prefix) bool { return isNear(p, dst) }) {
				return true
			}
		}
		return false
	}
	err = k.conn.dump(unix.RTM_GETROUTE, m, func() { routes, ways = nil, map[int][]backend.Way{} }, func(b []byte) {
		// Thousands may lead to peers: they are not even parsed.
		if len(b) < unix.SizeofRtMsg || b[5] == backend.Owner {
			return
		}
		r, ok := parseRoute(b)
		switch {
		case !ok || r.family != family:
		case r.isDefault():
			routes = append(routes, r)
		case r.isWay(near):
			dev := r.devs()[0]
			ways[dev] = append(ways[dev], backend.Way{Dst: r.key.Dst, Metric: r.key.Metric, Router: r.routed()})
		}
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, nil, fmt.Errorf("listing routes: %w", err)
	}
	best := math.MaxInt
	for _, r := range routes {
		switch {
		case r.key.Metric > best:
			continue
		case r.key.Metric < best:
			best, defaults = r.key.Metric, nil
		}
		defaults = append(defaults, r.devs()...)
	}
	return defaults, ways, nil
}

// RouterAdvertised returns the names of the devices that have a route learned by router advertisement and would lose
// it, because with forwarding on the kernel heeds advertisements only where accept_ra is 2
// (Documentation/networking/ip-sysctl.rst).
func (k *Kernel) RouterAdvertised(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	routes, err := k.routes(unix.AF_INET6, unix.RTPROT_RA, unix.RT_TABLE_UNSPEC)
	if err != nil {
		return nil, err
	}
	indexes := map[int]bool{}
	for _, r := range routes {
		for _, dev := range r.devs() {
			indexes[dev] = true
		}
	}
	var names []string
	for index := range indexes {
		l, err := k.linkByIndex(index)
		if errors.Is(err, unix.ENODEV) { // gone, and with it its routes
			continue
		}
		if err != nil {
			return nil, err
		}
		value, err := k.readSysctl(filepath.Join("net/ipv6/conf", l.name, "accept_ra"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if value == "1" {
			names = append(names, l.name)
		}
	}
	slices.Sort(names)
	return names, nil
}

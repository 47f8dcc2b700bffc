package backend_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"pgregory.net/rapid"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel"
)

// host makes a host with two uplinks.
func host() *kernel.Fake {
	f := kernel.NewFake()
	for i, name := range []string{"eth0", "eth1"} {
		f.SetInterface(backend.Interface{Name: name, MTU: 9000, Up: true, Addrs: []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", 11+i)),
			netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", 11+i)),
		}})
	}
	return f
}

func emptyState() backend.State {
	return backend.State{
		Links: map[string]backend.Link{}, Addrs: map[backend.AddrKey]backend.Addr{},
		Neighs: map[backend.NeighKey]backend.Neigh{}, FDB: map[backend.FDBKey]backend.FDBEntry{},
		Routes: map[backend.RouteKey]backend.Route{}, Rules: map[backend.RuleKey]backend.Rule{},
		Sysctls: map[string]backend.Sysctl{},
	}
}

// drawState draws a state that a kernel can hold. Names and numbers are few, so that two states have much in common.
func drawState(t *rapid.T, label string) backend.State {
	return rapid.Custom(newDrawn).Draw(t, label).State
}

// drawn is a State that a failed test shows as commands.
type drawn struct{ backend.State }

func (d drawn) GoString() string {
	ops, _ := backend.Diff(d.State, backend.Observed{})
	return "\n\t" + strings.Join(commands(ops), "\n\t")
}

func newDrawn(t *rapid.T) drawn {
	s := emptyState()
	for _, name := range []string{"tweed.1", "tweed.2", "tweed0"} {
		if rapid.Bool().Draw(t, name) {
			drawLink(t, s, name)
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "rules") {
		key := backend.RuleKey{
			Priority: rapid.IntRange(500, 501).Draw(t, "priority"),
			From:     rapid.SampledFrom(append(prefixes("10.244.%d.0/24"), netip.MustParsePrefix("0.0.0.0/0"))).Draw(t, "from"),
			Mark:     rapid.SampledFrom([]uint32{0, 0x1000}).Draw(t, "mark"),
			Table:    100,
		}
		s.Rules[key] = backend.Rule{RuleKey: key}
	}
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if rapid.Bool().Draw(t, name) {
			s.Sysctls[name] = backend.Sysctl{Name: name, Value: "1"}
		}
	}
	return drawn{s}
}

// drawLink adds a link and things that hang on it.
func drawLink(t *rapid.T, s backend.State, name string) {
	l := backend.Link{
		Name: name, Type: backend.KindBridge, Up: rapid.IntRange(0, 9).Draw(t, "down") > 0,
		MAC: drawMAC(t), MTU: rapid.SampledFrom([]int{1280, 1450}).Draw(t, "mtu"),
	}
	if name == "tweed0" {
		l.Bridge = backend.Bridge{McastSnooping: rapid.Bool().Draw(t, "snooping"), CallIptables: true}
	} else {
		l.Type = backend.KindVXLAN
		l.VXLAN = drawVXLAN(t, s)
		drawNeighs(t, s, l)
	}
	s.Links[name] = l
	for _, p := range prefixes("10.244.%d.1/24", "10.244.%d.0/32", "fd00:%d::1/64") {
		if rapid.Bool().Draw(t, "address") {
			key := backend.AddrKey{Dev: name, Prefix: p}
			s.Addrs[key] = backend.Addr{
				AddrKey: key, NoDAD: p.Addr().Is6(), NoPrefixRoute: rapid.Bool().Draw(t, "noprefixroute"),
			}
		}
	}
	drawToward(t, s, name)
	if l.Up {
		drawRoutes(t, s, l)
	}
	sysctl := "net/ipv6/conf/" + name + "/accept_ra"
	if rapid.Bool().Draw(t, "accept_ra") {
		s.Sysctls[sysctl] = backend.Sysctl{Name: sysctl, Value: rapid.SampledFrom([]string{"0", "1", "2"}).Draw(t, "value")}
	}
}

// drawToward adds addresses for single gateways, behind one for all.
func drawToward(t *rapid.T, s backend.State, dev string) {
	if !slices.ContainsFunc(slices.Collect(maps.Keys(s.Addrs)), func(k backend.AddrKey) bool {
		return k.Dev == dev && k.Prefix.Addr().Is4()
	}) {
		return
	}
	for _, gateway := range []string{"10.244.17.0", "10.244.18.0"} {
		if rapid.Bool().Draw(t, "toward") {
			key := backend.AddrKey{Dev: dev, Prefix: prefixes("10.244.%d.0/32")[0], Toward: netip.MustParseAddr(gateway)}
			s.Addrs[key] = backend.Addr{AddrKey: key, NoPrefixRoute: true, Late: true, Peer: drawPeer(t)}
		}
	}
}

func drawVXLAN(t *rapid.T, s backend.State) backend.VXLAN {
	v := backend.VXLAN{
		VNI: rapid.Uint32Range(1, 2).Draw(t, "vni"), Port: rapid.SampledFrom([]uint16{4789, 8472}).Draw(t, "port"),
		Local: netip.MustParseAddr(rapid.SampledFrom([]string{"192.0.2.11", "192.0.2.12", "2001:db8::11"}).Draw(t, "local")),
		Dev:   rapid.SampledFrom([]string{"", "eth0", "eth1"}).Draw(t, "dev"), Learning: rapid.Bool().Draw(t, "learning"),
	}
	for _, o := range s.Links {
		if o.VXLAN.VNI == v.VNI { // of two devices with one VNI and port there can be only one
			v.VNI = 3 - v.VNI
		}
	}
	return v
}

func drawNeighs(t *rapid.T, s backend.State, l backend.Link) {
	for _, a := range []string{"10.244.17.0", "10.244.18.0", "fe80::17", "fe80::18"} {
		if rapid.Bool().Draw(t, a) {
			key := backend.NeighKey{Dev: l.Name, Addr: netip.MustParseAddr(a)}
			s.Neighs[key] = backend.Neigh{NeighKey: key, MAC: drawMAC(t), Peer: drawPeer(t)}
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "fdb") {
		key := backend.FDBKey{Dev: l.Name, MAC: drawMAC(t)}
		dst := rapid.SampledFrom([]string{"192.0.2.17", "192.0.2.18"}).Draw(t, "dst")
		if l.VXLAN.Local.Is6() {
			dst = rapid.SampledFrom([]string{"2001:db8::17", "2001:db8::18"}).Draw(t, "dst")
		}
		s.FDB[key] = backend.FDBEntry{FDBKey: key, Dst: netip.MustParseAddr(dst), Peer: drawPeer(t)}
	}
}

func drawRoutes(t *rapid.T, s backend.State, l backend.Link) {
	add := func(r backend.Route) {
		if rapid.Bool().Draw(t, "route") {
			r.Dev, r.Peer = l.Name, drawPeer(t)
			s.Routes[r.RouteKey] = r
		}
	}
	for _, p := range prefixes("10.244.%d.0/24", "fd00:%d::/64") {
		key := backend.RouteKey{Table: drawTable(t), Dst: p, Metric: rapid.SampledFrom([]int{0, 50}).Draw(t, "metric")}
		add(backend.Route{RouteKey: key, Src: drawSource(t, s, l.Name, p.Addr())})
	}
	for i, p := range prefixes("10.244.1%d.0/24", "fd00:1%d::/64") {
		r := backend.Route{RouteKey: backend.RouteKey{Table: drawTable(t), Dst: p}}
		r.Via, r.Onlink = netip.MustParseAddr("fe80::17"), false
		if p.Addr().Is4() {
			r.Via, r.Onlink = netip.MustParseAddr(fmt.Sprintf("10.244.%d.0", 17+i%2)), true
		}
		add(r)
	}
	// A gateway that is on the link because another route of ours says so.
	near := backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix("10.9.0.0/24")}
	if r, there := s.Routes[near]; !there || r.Dev == l.Name {
		add(backend.Route{RouteKey: near})
		if _, there := s.Routes[near]; there {
			far := backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix("10.8.0.0/24")}
			add(backend.Route{RouteKey: far, Via: netip.MustParseAddr("10.9.0.1")})
		}
	}
}

// drawSource draws an address of the interface, or none.
func drawSource(t *rapid.T, s backend.State, dev string, family netip.Addr) netip.Addr {
	own := []netip.Addr{{}}
	for _, p := range prefixes("10.244.%d.1/24", "10.244.%d.0/32", "fd00:%d::1/64") {
		if _, there := s.Addrs[backend.AddrKey{Dev: dev, Prefix: p}]; there && p.Addr().Is4() == family.Is4() {
			own = append(own, p.Addr())
		}
	}
	return rapid.SampledFrom(own).Draw(t, "src")
}

func prefixes(formats ...string) (ps []netip.Prefix) {
	for _, f := range formats {
		for i := 3; i < 5; i++ {
			ps = append(ps, netip.MustParsePrefix(fmt.Sprintf(f, i)))
		}
	}
	return ps
}

func drawMAC(t *rapid.T) backend.MAC { return mac(rapid.ByteRange(1, 3).Draw(t, "mac")) }

func mac(last byte) backend.MAC { return backend.MAC{0x0e, 5: last} }

func drawTable(t *rapid.T) int {
	return rapid.SampledFrom([]int{backend.MainTable, 100}).Draw(t, "table")
}

func drawPeer(t *rapid.T) string {
	return rapid.SampledFrom([]string{"", "node-7", "node-9"}).Draw(t, "peer")
}

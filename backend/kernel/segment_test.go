package kernel

import (
	"net/netip"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// segment is what a host with the uplink eth0 has on its link.
func segment(t *testing.T, h host) backend.Segment {
	t.Helper()
	all, err := h.Interfaces(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return backend.NewSegment(all, backend.Uplink{Devs: []string{"eth0"}, Addrs: []netip.Addr{
		netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")}})
}

func stranger(dst, via, dev string) backend.Route {
	r := backend.Route{RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix(dst)}, Dev: dev}
	if via != "" {
		r.Via = netip.MustParseAddr(via)
	}
	return r
}

func askSegment(t *testing.T, h host) {
	pass(t, h, sample())
	for _, c := range []struct {
		change     backend.Route // by somebody else, or none
		addr, want string
	}{
		{addr: "192.0.2.77", want: "eth0"},
		{addr: "2001:db8::77", want: "eth0"},
		{addr: "192.0.2.11"},
		{addr: "2001:db8::11"},
		{addr: "198.51.100.77"},
		{addr: "10.244.3.77"},
		{addr: "fd00:10:244:7::5"}, // by a route of ours
		{stranger("192.0.2.77/32", "192.0.2.1", "eth0"), "192.0.2.77", ""},
		{stranger("192.0.2.64/27", "", bridge), "192.0.2.78", ""},
		{stranger("2001:db8::70/124", "2001:db8::1", "eth0"), "2001:db8::77", ""},
		{stranger("198.51.100.77/32", "", "eth0"), "198.51.100.77", "eth0"},
		{stranger("203.0.113.0/24", "192.0.2.1", "eth0"), "203.0.113.77", ""},
		{stranger("203.0.113.128/25", "", bridge), "203.0.113.177", ""},
		{addr: "192.0.2.177", want: "eth0"},
	} {
		if c.change.Dev != "" {
			h.addStranger(c.change)
		}
		if got := segment(t, h).Dev(netip.MustParseAddr(c.addr)); got != c.want {
			t.Errorf("%s is on %q, want %q", c.addr, got, c.want)
		}
	}
}

// A pass has to follow whatever moves the border of the segment, and not be made for the routes that others keep, which
// may come and go all the time.
func TestBorderOfTheSegmentMovesWithoutABell(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip link add docker0 type bridge")
	h.ns.Run(t, "ip link set docker0 up")
	r := watch(t, h, func(dev string) bool { return dev == "eth0" })
	for _, c := range []struct {
		route string
		rings bool
	}{
		{"192.0.2.77/32 via 192.0.2.1 dev eth0", true},
		{"192.0.2.64/27 dev docker0", true},
		{"2001:db8::70/124 via 2001:db8::1 dev eth0", true},
		{"198.51.100.77/32 dev eth0", true},
		{"2001:db8:9::/64 dev eth0", true},
		{"203.0.113.0/24 via 192.0.2.1 dev eth0", false},
		{"2001:db8:7::/64 via 2001:db8::1 dev eth0", false},
		{"203.0.113.128/25 dev docker0", false},
		{"192.0.2.99/32 dev eth0 table 100", false},
	} {
		for _, do := range []string{"add ", "del "} {
			h.ns.Run(t, "ip route "+do+c.route)
			if c.rings {
				r.await(t, do+c.route)
			}
			if r.quiet() && !c.rings {
				t.Errorf("ip route %s%s rings", do, c.route)
			}
		}
	}
}

// askPlainRoute moves a peer onto the segment and off again. Each time there is one operation a family: a route that
// takes the other's place.
func askPlainRoute(t *testing.T, h host) {
	tunnel, plain := sample(), sample()
	for _, l := range []subnet.Lease{
		{Node: "node-7", Subnet: netip.MustParsePrefix("10.244.7.0/24")},
		{Node: "node-7", Subnet: netip.MustParsePrefix("fd00:10:244:7::/64")},
	} {
		l.NodeAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.17"), netip.MustParseAddr("2001:db8::17")}
		r, near := segment(t, h).Route(l)
		if !near {
			t.Fatalf("%s is not near", l.NodeAddr())
		}
		if _, there := tunnel.Routes[r.RouteKey]; !there {
			t.Fatalf("the sample has no route to %s", l.Subnet)
		}
		put(plain, r)
	}
	pass(t, h, tunnel)
	for _, want := range []backend.State{plain, tunnel, plain} {
		ops, _ := plan(t, h, want)
		if len(ops) != 2 || !strings.HasPrefix(ops[0].String(), "ip route replace 10.244.7.0/24 ") ||
			!strings.HasPrefix(ops[1].String(), "ip -6 route replace fd00:10:244:7::/64 ") {
			t.Errorf("planned %v", ops)
		}
		pass(t, h, want)
	}
}

// Whatever lies in the table, the segment is what the kernel would send to without a router.
func TestSegmentIsNotTheKernels(t *testing.T) {
	h := newRealHost(t)
	for _, c := range []string{
		"ip addr add 192.0.2.200/32 dev lo",
		"ip link add eth1 type veth peer name wire1", "ip link set eth1 up", "ip link set wire1 up",
		"ip addr add 192.0.2.12/26 dev eth1", "ip addr add 2001:db8::12/120 dev eth1 nodad",
		"ip route add 192.0.2.128/26 nexthop via 192.0.2.129 dev eth0 nexthop via 192.0.2.1 dev eth1",
		"ip route add 192.0.2.130/32 dev eth0", "ip route add blackhole 192.0.2.131/32",
		"ip route add 192.0.2.132/32 dev eth0 table 100", "ip route add 192.0.2.129/32 dev eth0",
		"ip addr add 198.51.100.11/24 dev eth0 noprefixroute", "ip route add 198.51.100.0/25 dev eth0 proto static",
		"ip addr add 2001:db8:1::11/64 dev eth0 nodad noprefixroute",
		"ip -6 route add 2001:db8:1::/65 dev eth0 proto ra metric 1024",
		"ip -6 route add 2001:db8::80/121 via 2001:db8::1 dev eth0",
		"ip route add 203.0.113.0/24 dev eth0 proto 116", // as if it were ours
	} {
		h.ns.Run(t, c)
	}
	s := segment(t, h)
	for _, prefix := range []string{"192.0.2.", "198.51.100.", "2001:db8::", "2001:db8:1::", "2001:db8:1:0:8000::"} {
		for _, last := range []string{"2", "12", "70", "77", "99", "126", "128", "129", "130", "131", "132", "200", "254"} {
			to := prefix + last
			way, err := h.ns.Try(t, "ip route get "+to)
			want := ""
			if err == nil && !strings.Contains(way, " via ") && strings.Contains(way, " dev eth0 ") {
				want = "eth0"
			}
			if got := s.Dev(netip.MustParseAddr(to)); got != want {
				t.Errorf("%s is on %q, want %q, by %s", to, got, want, way)
			}
		}
	}
	if dev := s.Dev(netip.MustParseAddr("203.0.113.7")); dev != "" {
		t.Errorf("a route of ours puts its destination on %s", dev)
	}
}

func TestTunnelIsTakenForASegment(t *testing.T) {
	h := newRealHost(t)
	for _, c := range []string{
		"ip link add tun0 type veth peer name wire0", "ip link set tun0 arp off", "ip link set tun0 up",
		"ip link set wire0 up", "ip addr add 198.51.100.11/24 dev tun0",
	} {
		h.ns.Run(t, c)
	}
	all, err := h.Interfaces(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := backend.NewSegment(all, backend.Uplink{
		Devs: []string{"tun0"}, Addrs: []netip.Addr{netip.MustParseAddr("198.51.100.11")}})
	if dev := s.Dev(netip.MustParseAddr("198.51.100.12")); dev != "" {
		t.Errorf("the other end is on a link of %s, where nobody asks who it is", dev)
	}
}

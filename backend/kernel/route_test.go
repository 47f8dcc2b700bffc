package kernel

import (
	"net/netip"
	"slices"
	"testing"

	"tweed.dev/tweed/backend"
)

func askRouteTo(t *testing.T, h host) {
	pass(t, h, sample())
	h.addStranger(backend.Route{RouteKey: backend.RouteKey{
		Table: backend.MainTable, Dst: netip.MustParsePrefix("203.0.113.0/24")}, Dev: bridge})
	for _, c := range []struct{ to, dev, src string }{
		{"192.0.2.77", "eth0", "192.0.2.11"},
		{"2001:db8::77", "eth0", "2001:db8::11"},
		{"198.51.100.77", "eth0", "192.0.2.11"},
		{"2001:db8:77::77", "eth0", "2001:db8::11"},
		{"203.0.113.77", bridge, "10.244.3.1"},
		{"10.244.7.5", vtep, "10.244.3.0"},
		{"fd00:10:244:7::5", vtep, ""},
		{"192.0.2.11", "lo", "192.0.2.11"},
		{"2001:db8::11", "lo", "2001:db8::11"},
	} {
		path := routeTo(t, h, c.to)
		if path.Dev != c.dev || c.src != "" && path.Src.String() != c.src {
			t.Errorf("a packet to %s leaves by %q from %s, want %q from %s", c.to, path.Dev, path.Src, c.dev, c.src)
		}
	}
	h.deleteUplink()
	for _, to := range []string{"192.0.2.77", "198.51.100.77", "2001:db8::77", "192.0.2.11"} {
		if path := routeTo(t, h, to); path != (backend.Path{}) {
			t.Errorf("without the uplink a packet to %s leaves by %+v", to, path)
		}
	}
}

func routeTo(t *testing.T, h host, to string) backend.Path {
	t.Helper()
	path, err := h.RouteTo(t.Context(), netip.MustParseAddr(to))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRouteChangesBetweenSeveralUplinks(t *testing.T) {
	h := newRealHost(t)
	for _, c := range []string{
		"ip link add eth1 type veth peer name wire1", "ip link set eth1 up", "ip link set wire1 up",
		"ip addr add 198.51.100.11/24 dev eth1", "ip addr add 2001:db8:1::11/64 dev eth1 nodad",
		"ip addr add 203.0.113.1/32 dev lo",
	} {
		h.ns.Run(t, c)
	}
	for _, c := range []struct {
		do, to string
		want   backend.Path
	}{
		{"ip route add 10.99.0.0/16 via 198.51.100.1", "10.99.0.9", path("eth1", "198.51.100.11")},
		{"ip route change 10.99.0.0/16 via 192.0.2.1", "10.99.0.9", path("eth0", "192.0.2.11")},
		{"ip route change 10.99.0.0/16 via 198.51.100.1 src 203.0.113.1", "10.99.0.9", path("eth1", "203.0.113.1")},
		{"ip -6 route add fd99::/64 via 2001:db8:1::1", "fd99::9", path("eth1", "2001:db8:1::11")},
		{"ip -6 route change fd99::/64 via 2001:db8::1", "fd99::9", path("eth0", "2001:db8::11")},
		{"ip rule add to 10.99.0.9 lookup 77", "10.99.0.9", path("eth1", "203.0.113.1")}, // table 77 is empty
		{"ip route add default dev eth0 table 77", "10.99.0.9", path("eth0", "192.0.2.11")},
		{"ip route add blackhole 10.98.0.0/16", "10.98.0.9", backend.Path{}},
		{"ip route add unreachable 10.97.0.0/16", "10.97.0.9", backend.Path{}},
		{"ip route add prohibit 10.96.0.0/16", "10.96.0.9", backend.Path{}},
		{"ip -6 route add unreachable fd98::/64", "fd98::9", backend.Path{}},
		{"ip route show", "192.0.2.255", backend.Path{}}, // a broadcast reaches nobody in particular
		{"ip route del default", "8.8.8.8", backend.Path{}},
		{"ip -6 route del default", "2001:db8:99::9", backend.Path{}},
	} {
		h.ns.Run(t, c.do)
		if got := routeTo(t, h, c.to); got != c.want {
			t.Errorf("after %s a packet to %s leaves by %+v, want %+v", c.do, c.to, got, c.want)
		}
	}
	all, err := h.Interfaces(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) int {
		return slices.IndexFunc(all, func(i backend.Interface) bool { return i.Name == name })
	}
	if at("lo") != 0 || at("eth0") > at("eth1") {
		t.Errorf("not in the order of their indexes: %+v", all)
	}
}

func path(dev, src string) backend.Path { return backend.Path{Dev: dev, Src: netip.MustParseAddr(src)} }

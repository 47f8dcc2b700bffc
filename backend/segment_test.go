package backend_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// nic is an interface that is up, with addresses, and with routes as ip prints them: "192.0.2.0/24 via metric 7".
func nic(name, addrs string, routes ...string) backend.Interface {
	i := backend.Interface{Name: name, MTU: 1500, Up: true}
	for _, a := range strings.Fields(addrs) {
		i.Addrs = append(i.Addrs, netip.MustParsePrefix(a))
	}
	for _, r := range routes {
		words := strings.Fields(r)
		w := backend.Way{Dst: netip.MustParsePrefix(words[0]), Router: slices.Contains(words, "via")}
		if n := slices.Index(words, "metric"); n > 0 {
			if _, err := fmt.Sscan(words[n+1], &w.Metric); err != nil {
				panic(err)
			}
		}
		i.Ways = append(i.Ways, w)
	}
	return i
}

func but(i backend.Interface, change func(*backend.Interface)) backend.Interface {
	change(&i)
	return i
}

func publishing(devs, addrs string) backend.Uplink {
	up := backend.Uplink{Devs: strings.Fields(devs)}
	for _, a := range strings.Fields(addrs) {
		up.Addrs = append(up.Addrs, netip.MustParseAddr(a))
	}
	return up
}

// eth0 is the uplink of a host as most are.
func eth0() backend.Interface {
	return nic("eth0", "192.0.2.11/24 2001:db8::11/64", "192.0.2.0/24", "2001:db8::/64 metric 256")
}

// Of hosts of many kinds it is asked where addresses are. Those that are not named are not on the segment.
func TestPeerIsTakenForANeighbour(t *testing.T) {
	type ifaces = []backend.Interface
	const both = "192.0.2.11 2001:db8::11"
	const on4 = "192.0.2.12=eth0 192.0.2.254=eth0"
	for _, c := range []struct {
		name            string
		ifaces          ifaces
		devs, published string
		on              string // what is, and on which device
	}{
		{"one network", ifaces{nic("lo", ""), eth0()}, "eth0", both, on4 + " 2001:db8::12=eth0"},
		{"no IPv6 address is published", ifaces{eth0()}, "eth0", "192.0.2.11", on4},
		{"IPv4 is published for a NAT", ifaces{eth0()}, "eth0", "2001:db8::11 198.51.100.1", "2001:db8::12=eth0"},
		{"nothing is published", ifaces{eth0()}, "eth0", "", ""},
		{"the network is another interface's", ifaces{eth0(), nic("eth1", "198.51.100.11/24")}, "eth1", both, ""},
		{"it is down", ifaces{but(eth0(), func(i *backend.Interface) { i.Up = false })}, "eth0", both, ""},
		{"it is a tunnel", ifaces{but(eth0(), func(i *backend.Interface) { i.NoARP = true })}, "eth0", both, ""},
		{"an address without a network", ifaces{nic("eth0", "192.0.2.11/32", "192.0.2.254/32")}, "eth0", both,
			"192.0.2.254=eth0"},
		{"IPv6 without a prefix route", ifaces{nic("eth0", "2001:db8::11/64")}, "eth0", both, ""},
		{"the network is behind a router",
			ifaces{nic("eth0", "192.0.2.11/24", "192.0.2.0/24 via", "192.0.2.254/32")}, "eth0", both, "192.0.2.254=eth0"},
		{"one host is behind a router", ifaces{but(eth0(), func(i *backend.Interface) {
			i.Ways = append(i.Ways, nic("", "", "192.0.2.12/32 via", "2001:db8::12/128 via").Ways...)
		})}, "eth0", both, "192.0.2.254=eth0"},
		{"containers have half of the network",
			ifaces{eth0(), nic("docker0", "192.0.2.129/25", "192.0.2.128/25")}, "eth0", "192.0.2.11", "192.0.2.12=eth0"},
		{"an own address on lo", ifaces{eth0(), nic("lo", "192.0.2.12/32")}, "eth0", "192.0.2.11", "192.0.2.254=eth0"},
		{"the address is on lo, two networks", ifaces{nic("lo", "203.0.113.1/32"),
			nic("eth0", "192.0.2.11/24", "192.0.2.0/24"), nic("eth1", "198.51.100.11/24", "198.51.100.0/24")},
			"eth0 eth1", "203.0.113.1", on4 + " 198.51.100.12=eth1"},
		{"the address is on lo, two cables to routers", ifaces{nic("lo", "203.0.113.1/32"),
			nic("eth0", "10.0.0.1/31", "10.0.0.0/31"), nic("eth1", "10.0.0.3/31", "10.0.0.2/31")},
			"eth0 eth1", "203.0.113.1", ""},
		{"two uplinks to one network, the better is second", ifaces{
			nic("eth1", "192.0.2.10/24", "192.0.2.0/24 metric 20"), nic("eth0", "192.0.2.11/24", "192.0.2.0/24 metric 10")},
			"eth0 eth1", "192.0.2.11", on4},
		{"the better way to the network is no uplink", ifaces{
			nic("eth0", "192.0.2.10/24", "192.0.2.0/24 metric 20"), nic("eth1", "192.0.2.11/24", "192.0.2.0/24 metric 10")},
			"eth0", "192.0.2.10", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			segment := backend.NewSegment(c.ifaces, publishing(c.devs, c.published))
			var on []string
			for _, a := range []string{"192.0.2.11", "192.0.2.12", "192.0.2.254", "198.51.100.12", "203.0.113.1",
				"2001:db8::11", "2001:db8::12", "2001:db8:1::12", "fe80::1"} {
				if dev := segment.Dev(netip.MustParseAddr(a)); dev != "" {
					on = append(on, a+"="+dev)
				}
			}
			if got := strings.Join(on, " "); got != c.on {
				t.Errorf("on the segment (%s) are %q, want %q", segment, got, c.on)
			}
		})
	}
}

// However a host's routes lie inside each other, the segment says of each address what one would read off them by hand.
func TestSegmentOfAnyRoutes(t *testing.T) {
	prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(rapid.IntRange(0, 31).Draw(t, "host"))})
		return netip.PrefixFrom(a, rapid.IntRange(26, 32).Draw(t, "bits"))
	})
	rapid.Check(t, func(t *rapid.T) {
		var ifaces []backend.Interface
		for _, name := range []string{"eth0", "eth1", "docker0"} {
			i := backend.Interface{Name: name, Up: rapid.Float64().Draw(t, "up") < 0.9,
				Addrs: rapid.SliceOfN(prefix, 0, 2).Draw(t, "addrs")}
			for _, p := range rapid.SliceOfN(prefix, 0, 5).Draw(t, "ways") {
				i.Ways = append(i.Ways, backend.Way{Dst: p.Masked(), Metric: rapid.IntRange(0, 2).Draw(t, "metric"),
					Router: rapid.Bool().Draw(t, "router")})
			}
			ifaces = append(ifaces, i)
		}
		up := backend.Uplink{Devs: []string{"eth0", "eth1"}}
		if a := slices.Concat(ifaces[0].Addrs, ifaces[1].Addrs); len(a) > 0 {
			up.Addrs = []netip.Addr{a[0].Addr()}
		}
		segment := backend.NewSegment(ifaces, up)
		for n := range 64 {
			a := netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})
			if got, want := segment.Dev(a), byHand(ifaces, up, a); got != want {
				t.Fatalf("%s is on %q, want %q, by %+v", a, got, want, ifaces)
			}
		}
	})
}

// byHand looks for the one route that counts.
func byHand(ifaces []backend.Interface, up backend.Uplink, a netip.Addr) (dev string) {
	if len(up.Addrs) == 0 {
		return ""
	}
	bits, metric := -1, 0
	for _, i := range ifaces {
		for _, own := range i.Addrs {
			if own.Addr() == a {
				return ""
			}
		}
		for _, w := range i.Ways {
			if !w.Dst.Contains(a) || w.Dst.Bits() < bits || w.Dst.Bits() == bits && w.Metric >= metric {
				continue
			}
			bits, metric, dev = w.Dst.Bits(), w.Metric, ""
			if i.Up && !w.Router && slices.Contains(up.Devs, i.Name) {
				dev = i.Name
			}
		}
	}
	return dev
}

// Each pass compares the segment with the one before. What comes and goes elsewhere on the host makes no other of it.
func TestServicesAndContainersChangeTheSegment(t *testing.T) {
	up := publishing("eth0", "192.0.2.11 2001:db8::11")
	before := backend.NewSegment([]backend.Interface{nic("lo", ""), eth0()}, up)
	after := backend.NewSegment([]backend.Interface{
		nic("lo", "127.0.0.53/32"), eth0(), nic("kube-ipvs0", "10.96.0.1/32 10.96.0.10/32"),
		nic("docker0", "172.17.0.1/16", "172.17.0.0/16"), nic("cali1", "", "10.1.2.3/32"),
		nic("eth1", "", "198.51.100.0/24 via metric 100"),
	}, up)
	if !reflect.DeepEqual(before, after) {
		t.Errorf("%+v became %+v", before, after)
	}
	if before.String() != "2001:db8::/64 on eth0, 192.0.2.0/24 on eth0" || (backend.Segment{}).String() != "nothing" {
		t.Errorf("they are shown as %s", before)
	}
}

func TestPlainRouteOfTheWrongFamily(t *testing.T) {
	segment := backend.NewSegment([]backend.Interface{eth0()}, publishing("eth0", "192.0.2.11 2001:db8::11"))
	for _, c := range []struct{ subnet, published, want string }{
		{"10.244.2.0/24", "192.0.2.12 2001:db8::12", "ip route add 10.244.2.0/24 via 192.0.2.12 dev eth0 proto 116"},
		{"fd00:10:244:2::/64", "192.0.2.12 2001:db8::12",
			"ip -6 route add fd00:10:244:2::/64 via 2001:db8::12 dev eth0 proto 116"},
		{"fd00:10:244:2::/64", "192.0.2.12", ""},
		{"10.244.2.0/24", "2001:db8::12", ""},
		{"10.244.2.0/24", "198.51.100.12 2001:db8::12", ""},
		{"10.244.2.0/24", "192.0.2.11", ""}, // this node's
		{"10.244.2.0/24", "", ""},
	} {
		r, got := segment.Route(subnet.Lease{
			Node: "n2", Subnet: netip.MustParsePrefix(c.subnet), NodeAddrs: publishing("", c.published).Addrs})
		if text := (backend.Op{Do: backend.Add, What: r}).String(); got != (c.want != "") || got && text != c.want {
			t.Errorf("%+v: %v, %s", c, got, text)
		}
	}
}

// BenchmarkSegment5000 is a host with many addresses of services, and thousands of peers to judge.
func BenchmarkSegment5000(b *testing.B) {
	services := backend.Interface{Name: "kube-ipvs0"}
	for n := range 5000 {
		a := netip.AddrFrom4([4]byte{10, 96, byte(n >> 8), byte(n)})
		services.Addrs = append(services.Addrs, netip.PrefixFrom(a, 32))
	}
	ifaces := []backend.Interface{nic("eth0", "10.0.0.1/16 2001:db8::11/64", "10.0.0.0/16", "2001:db8::/64"), services}
	for b.Loop() {
		s := backend.NewSegment(ifaces, publishing("eth0", "10.0.0.1 2001:db8::11"))
		for n := range 5000 {
			if s.Dev(netip.AddrFrom4([4]byte{10, 0, byte(n>>8 + 1), byte(n)})) == "" {
				b.Fatal(n)
			}
		}
	}
}

package backend_test

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/bridge"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// node is what a node with one peer wants, made anew by each call.
func node() backend.State {
	vx := vxlan.Config{Node: "node-3", VNI: 1, Port: 8472, Underlay: 4}
	up := backend.Uplink{Devs: []string{"eth0"}, Local: netip.MustParseAddr("192.0.2.11"), MTU: 1500}
	peer := vxlan.Config{Node: "node-7", VNI: 1, Port: 8472, Underlay: 4}
	lease := func(of vxlan.Config, pods, host string) subnet.Lease {
		return subnet.Lease{
			Node: of.Node, Subnet: netip.MustParsePrefix(pods), Host: netip.MustParseAddr(host),
			Backend: vxlan.Name, Data: of.Data(),
		}
	}
	own := []netip.Prefix{netip.MustParsePrefix("10.244.3.0/24"), netip.MustParsePrefix("fd00:10:244:3::/64")}
	return backend.Merge(
		vx.Desired(
			[]subnet.Lease{lease(vx, own[0].String(), "192.0.2.11"), lease(vx, own[1].String(), "192.0.2.11")},
			[]subnet.Lease{lease(peer, "10.244.7.0/24", "192.0.2.17"), lease(peer, "fd00:10:244:7::/64", "192.0.2.17")},
			up),
		bridge.Config{Name: "tweed0", Node: "node-3", MTU: 1450}.Desired(own),
	)
}

func changeLink(s backend.State, name string, change func(*backend.Link)) backend.State {
	l := s.Links[name]
	change(&l)
	s.Links[name] = l
	return s
}

// onDevice is the commands that add what hangs on the VXLAN device of node.
const onDevice = `sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0
ip addr add 10.244.3.0/32 dev tweed.1
ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad
` + neighs + fdb + routes

const fdb = "bridge fdb replace 1e:d0:b4:61:31:5a dev tweed.1 dst 192.0.2.17 self permanent\n"

const neighs = `ip neigh replace 10.244.7.0 lladdr 1e:d0:b4:61:31:5a dev tweed.1 nud permanent
ip neigh replace fe80::1cd0:b4ff:fe61:315a lladdr 1e:d0:b4:61:31:5a dev tweed.1 nud permanent
`

const routes = `ip route add 10.244.7.0/24 via 10.244.7.0 dev tweed.1 onlink proto 116
ip -6 route add fd00:10:244:7::/64 via fe80::1cd0:b4ff:fe61:315a dev tweed.1 proto 116
`

const rules = `ip rule add pref 116 from 10.244.3.0/24 fwmark 0x1000/0x1000 lookup 116 proto 116
ip -6 rule add pref 116 from fd00:10:244:3::/64 fwmark 0x1000/0x1000 lookup 116 proto 116
`

const newDevice = "ip link add tweed.1 group 116 address 46:ee:d0:cd:28:c6 mtu 1450 up type vxlan id 1 dstport 8472 " +
	"local 192.0.2.11 dev eth0 nolearning\n"

func TestChangesThatTakeOthersWithThem(t *testing.T) {
	for _, c := range []struct {
		name       string
		want, have func() backend.State
		ops        string
	}{{
		name: "nothing there",
		have: func() backend.State { return backend.State{} },
		ops: newDevice + `ip link add tweed0 group 116 address 66:4a:10:cd:b0:20 up type bridge mcast_snooping 0 ` +
			`nf_call_iptables 1 nf_call_ip6tables 1 && ip link set dev tweed0 mtu 1450
sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv4/conf/tweed0/arp_notify=1
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0
sysctl -w net/ipv6/conf/tweed0/accept_dad=0
sysctl -w net/ipv6/conf/tweed0/accept_ra=0
sysctl -w net/ipv6/conf/tweed0/ndisc_notify=1
sysctl -w net/ipv4/ip_forward=1
sysctl -w net/ipv6/conf/all/forwarding=1
ip addr add 10.244.3.0/32 dev tweed.1
ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad
ip addr add 10.244.3.1/24 dev tweed0 noprefixroute
ip addr add fd00:10:244:3::1/64 dev tweed0 nodad noprefixroute
` + neighs + fdb + `ip route add 10.244.3.0/24 dev tweed0 proto 116 src 10.244.3.1
ip -6 route add fd00:10:244:3::/64 dev tweed0 proto 116
` + routes + rules,
	}, {
		name: "underlay device re-created",
		have: func() backend.State {
			s := node()
			delete(s.Links, "tweed.1") // and what hung on it was read a moment earlier
			return s
		},
		ops: newDevice + onDevice,
	}, {
		name: "another port",
		have: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.Port = 4789 })
		},
		ops: "ip link del tweed.1\n" + newDevice + onDevice,
	}, {
		name: "another VNI",
		have: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.VNI = 2 })
		},
		ops: "ip link del tweed.1\n" + newDevice + onDevice,
	}, {
		name: "another underlay family",
		have: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.Local = netip.MustParseAddr("2001:db8::11") })
		},
		ops: "ip link del tweed.1\n" + newDevice + onDevice,
	}, {
		name: "several uplinks instead of one",
		want: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.Dev = "" })
		},
		ops: "ip link del tweed.1\n" + strings.Replace(newDevice, " dev eth0", "", 1) + onDevice,
	}, {
		name: "another uplink with another address and MTU",
		have: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) {
				l.VXLAN.Local, l.VXLAN.Dev, l.MTU = netip.MustParseAddr("192.0.2.12"), "eth1", 1350
			})
		},
		ops: `ip link set dev tweed.1 type vxlan local 192.0.2.11 dev eth0 && ip link set dev tweed.1 mtu 1450
`,
	}, {
		name: "MAC changed by hand",
		have: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.MAC[5]++ })
		},
		ops: "ip link set dev tweed.1 address 46:ee:d0:cd:28:c6\n" + neighs,
	}, {
		name: "set down by hand",
		have: func() backend.State {
			s := changeLink(node(), "tweed.1", func(l *backend.Link) { l.Up = false })
			clear(s.Neighs)
			delete(s.Addrs, addrKey("tweed.1", "fd00:10:244:3::2/128"))
			maps.DeleteFunc(s.Routes, func(_ backend.RouteKey, r backend.Route) bool { return r.Dev == "tweed.1" })
			return s
		},
		ops: "ip link set dev tweed.1 up\nip addr add fd00:10:244:3::2/128 dev tweed.1 nodad\n" + neighs + routes,
	}, {
		name: "checksum offload",
		have: func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.NoTxChecksum = true })
		},
		ops: "ethtool -K tweed.1 tx on\n",
	}, {
		name: "bridge options",
		have: func() backend.State {
			return changeLink(node(), "tweed0", func(l *backend.Link) { l.Bridge = backend.Bridge{McastSnooping: true} })
		},
		ops: "ip link set dev tweed0 type bridge mcast_snooping 0 nf_call_iptables 1 nf_call_ip6tables 1\n",
	}, {
		name: "the only IPv4 address is another",
		have: func() backend.State {
			s := node()
			delete(s.Addrs, addrKey("tweed.1", "10.244.3.0/32"))
			addAddr(s, "tweed.1", "10.244.9.0/32")
			return s
		},
		ops: `ip addr add 10.244.3.0/32 dev tweed.1
ip addr del 10.244.9.0/32 dev tweed.1
`,
	}, {
		name: "one of two IPv4 addresses goes",
		have: func() backend.State {
			s := node()
			addAddr(s, "tweed.1", "10.244.9.0/32")
			return s
		},
		ops: "ip addr del 10.244.9.0/32 dev tweed.1\n",
	}, {
		name: "gateway address with other flags",
		have: func() backend.State {
			s := node()
			addAddr(s, "tweed0", "10.244.3.1/24")
			return s
		},
		ops: `ip addr del 10.244.3.1/24 dev tweed0
ip addr add 10.244.3.1/24 dev tweed0 noprefixroute
ip route add 10.244.3.0/24 dev tweed0 proto 116 src 10.244.3.1
`,
	}, {
		name: "source of routes on another device goes for a moment",
		want: func() backend.State { return sourced(node(), "10.244.3.1", "fd00:10:244:3::1") },
		have: func() backend.State {
			s := sourced(node(), "10.244.3.1", "fd00:10:244:3::1")
			addAddr(s, "tweed0", "10.244.3.1/24")
			addAddr(s, "tweed0", "fd00:10:244:3::1/64")
			addAddr(s, "tweed0", "10.244.99.1/24") // so that the others stay
			return s
		},
		ops: `ip addr del 10.244.3.1/24 dev tweed0
ip addr del fd00:10:244:3::1/64 dev tweed0
ip addr add 10.244.3.1/24 dev tweed0 noprefixroute
ip addr add fd00:10:244:3::1/64 dev tweed0 nodad noprefixroute
ip route add 10.77.0.0/24 dev eth0 proto 116 src 10.244.3.1
ip route add 10.244.3.0/24 dev tweed0 proto 116 src 10.244.3.1
ip -6 route replace fd77::/64 dev eth0 proto 116 src fd00:10:244:3::1
ip addr del 10.244.99.1/24 dev tweed0
`,
	}, {
		name: "source of routes stays on another device",
		want: func() backend.State { return sourced(node(), "10.244.3.0", "fd00:10:244:3::2") },
		have: func() backend.State {
			s := sourced(node(), "10.244.3.0", "fd00:10:244:3::2")
			addAddr(s, "tweed0", "10.244.3.0/32")
			addAddr(s, "tweed0", "fd00:10:244:3::2/128")
			return s
		},
		ops: `ip addr del 10.244.3.0/32 dev tweed0
ip addr del fd00:10:244:3::2/128 dev tweed0
`,
	}, {
		name: "a peer leaves",
		want: func() backend.State {
			s := node()
			clear(s.FDB)
			clear(s.Neighs)
			maps.DeleteFunc(s.Routes, func(_ backend.RouteKey, r backend.Route) bool { return r.Peer != "" })
			return s
		},
		ops: `ip route del 10.244.7.0/24 via 10.244.7.0 dev tweed.1 onlink proto 116
ip -6 route del fd00:10:244:7::/64 via fe80::1cd0:b4ff:fe61:315a dev tweed.1 proto 116 metric 1024
bridge fdb del 1e:d0:b4:61:31:5a dev tweed.1 dst 192.0.2.17 self permanent
ip neigh del 10.244.7.0 dev tweed.1
ip neigh del fe80::1cd0:b4ff:fe61:315a dev tweed.1
`,
	}, {
		name: "all goes",
		want: func() backend.State { return backend.State{} },
		ops:  strings.ReplaceAll(rules, "rule add", "rule del") + "ip link del tweed.1\nip link del tweed0\n",
	}} {
		t.Run(c.name, func(t *testing.T) {
			want, have := node(), node()
			if c.want != nil {
				want = c.want()
			}
			if c.have != nil {
				have = c.have()
			}
			ops, problems := backend.Diff(want, backend.Observed{State: have})
			if got := strings.Join(commands(ops), "\n") + "\n"; got != c.ops || len(problems) > 0 {
				t.Errorf("got\n%swant\n%sproblems %v", got, c.ops, problems)
			}
			// A host may answer with a wanted map itself.
			share(&have.Neighs, want.Neighs)
			share(&have.FDB, want.FDB)
			share(&have.Routes, want.Routes)
			again, _ := backend.Diff(want, backend.Observed{State: have})
			if got := strings.Join(commands(again), "\n") + "\n"; got != c.ops {
				t.Errorf("with shared maps: got\n%swant\n%s", got, c.ops)
			}
		})
	}
}

// share makes have the map that it is equal to.
func share[K, V comparable](have *map[K]V, want map[K]V) {
	if maps.Equal(*have, want) {
		*have = want
	}
}

func addrKey(dev, prefix string) backend.AddrKey {
	return backend.AddrKey{Dev: dev, Prefix: netip.MustParsePrefix(prefix)}
}

func addAddr(s backend.State, dev, prefix string) {
	key := addrKey(dev, prefix)
	s.Addrs[key] = backend.Addr{AddrKey: key}
}

// sourced adds routes on another device that prefer addresses of ours; the last of them outlives its source.
func sourced(s backend.State, src4, src6 string) backend.State {
	for _, r := range []struct {
		dst, src string
		table    int
	}{{"10.77.0.0/24", src4, backend.MainTable}, {"fd77::/64", src6, backend.MainTable}, {"10.78.0.0/24", src4, 100}} {
		key := backend.RouteKey{Table: r.table, Dst: netip.MustParsePrefix(r.dst)}
		s.Routes[key] = backend.Route{RouteKey: key, Dev: "eth0", Src: netip.MustParseAddr(r.src)}
	}
	return s
}

func TestPlanForwardsLast(t *testing.T) {
	want := node()
	ra := "net/ipv6/conf/eth0/accept_ra"
	want.Sysctls[ra] = backend.Sysctl{Name: ra, Value: "2"}
	have := node()
	clear(have.Sysctls)
	ops, _ := backend.Diff(want, backend.Observed{State: have})
	got := strings.Join(commands(ops), "\n")
	if got != `sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv4/conf/tweed0/arp_notify=1
sysctl -w net/ipv6/conf/eth0/accept_ra=2
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0
sysctl -w net/ipv6/conf/tweed0/accept_dad=0
sysctl -w net/ipv6/conf/tweed0/accept_ra=0
sysctl -w net/ipv6/conf/tweed0/ndisc_notify=1
sysctl -w net/ipv4/ip_forward=1
sysctl -w net/ipv6/conf/all/forwarding=1` {
		t.Errorf("got\n%s", got)
	}
}

func TestStrangerHoldsOurVNI(t *testing.T) {
	// The device is ours, but the port that it should get is another device's.
	have := backend.Observed{State: changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.Port = 4789 })}
	have.Strangers = []backend.Stranger{
		{Key: "tweed.1", What: "flannel.1 has VNI 1 and port 8472; delete it (ip link del flannel.1)"},
		{Key: routeKey("10.244.7.0/24"), What: "hangs on the link, and so makes no Problem of its own"},
		{Key: "eth7", What: "is nowhere that we want to be"},
	}
	addAddr(have.State, "tweed.1", "10.244.9.0/32")
	addAddr(have.State, "tweed0", "10.244.9.1/24")
	ops, problems := backend.Diff(node(), have)
	if got := fmt.Sprint(commands(ops)); got != "[ip addr del 10.244.9.1/24 dev tweed0]" {
		t.Errorf("planned %s", got)
	}
	want := subnet.Problem{
		Kind: subnet.KindStranger,
		Text: strings.TrimSuffix(newDevice, "\n") + ": " + have.Strangers[0].What,
	}
	if len(problems) != 1 || problems[0] != want {
		t.Errorf("got %q, want %q", problems, want)
	}
}

func TestStrangersRouteToAPeer(t *testing.T) {
	have := backend.Observed{State: node()}
	have.Strangers = []backend.Stranger{
		{Key: routeKey("10.244.7.0/24"), What: "a static route is there; delete it"},
		{Key: routeKey("10.244.7.0/24"), What: "and another"},
		{Key: routeKey("10.244.3.0/24"), What: "somebody else's"},
	}
	// Ours beside the stranger's is neither changed nor taken away: the kernel cannot be told which of the two is meant.
	r := have.Routes[routeKey("10.244.7.0/24")]
	r.Via = netip.MustParseAddr("10.244.7.9")
	have.Routes[r.RouteKey] = r
	ops, problems := backend.Diff(node(), have)
	if len(ops) > 0 {
		t.Errorf("planned %v", commands(ops))
	}
	want := []subnet.Problem{{
		Kind: subnet.KindStranger,
		Text: "ip route add 10.244.3.0/24 dev tweed0 proto 116 src 10.244.3.1: somebody else's",
	}, {
		Node: "node-7", Kind: subnet.KindStranger,
		Text: "ip route add 10.244.7.0/24 via 10.244.7.0 dev tweed.1 onlink proto 116: a static route is there; delete it",
	}}
	if fmt.Sprint(problems) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", problems, want)
	}
}

func routeKey(dst string) backend.RouteKey {
	return backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix(dst)}
}

func TestOrderIsThatOfNumbers(t *testing.T) {
	want := backend.State{Routes: map[backend.RouteKey]backend.Route{}}
	for _, dst := range []string{"10.244.10.0/24", "10.244.9.0/24", "10.10.0.0/16", "10.9.0.0/16"} {
		want.Routes[routeKey(dst)] = backend.Route{RouteKey: routeKey(dst), Dev: "eth0"}
	}
	ops, _ := backend.Diff(want, backend.Observed{})
	if got := strings.Join(commands(ops), "\n"); got != `ip route add 10.9.0.0/16 dev eth0 proto 116
ip route add 10.10.0.0/16 dev eth0 proto 116
ip route add 10.244.9.0/24 dev eth0 proto 116
ip route add 10.244.10.0/24 dev eth0 proto 116` {
		t.Errorf("got\n%s", got)
	}
}

func TestMergeKeepsTheLater(t *testing.T) {
	a, b := node(), node()
	changeLink(b, "tweed0", func(l *backend.Link) { l.MTU = 1280 })
	clear(b.FDB)
	delete(b.Links, "tweed.1")
	m := backend.Merge(a, b, backend.State{}) // a is larger than b in some maps, and not in others
	if m.Links["tweed0"].MTU != 1280 || len(m.Links) != 2 || len(m.FDB) != 1 {
		t.Errorf("merged %+v", m)
	}
	if m.Len() != node().Len() {
		t.Errorf("%d objects merged, want %d", m.Len(), node().Len())
	}
}

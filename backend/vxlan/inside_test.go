package vxlan_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

func addrs(texts ...string) (all []netip.Addr) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

// peerInside is a dual-stack node that holds the addresses that it publishes.
func peerInside(node, number string, held ...string) []subnet.Lease {
	c := config(node, 4)
	c.Held = addrs(held...)
	one := published(lease(node, "10.244."+number+".0/24", "192.0.2."+number), held...)
	two := published(lease(node, "fd00:10:244:"+number+"::/64", "192.0.2."+number), held...)
	one.Data, two.Data = c.Data(), c.Data()
	return []subnet.Lease{one, two}
}

// inside lists, of what a node must hold, what is about nodes' own addresses.
func inside(s backend.State) string {
	ops, _ := backend.Diff(s, backend.Observed{})
	var lines []string
	for _, op := range ops {
		r, isRoute := op.What.(backend.Route)
		if _, isAddr := op.What.(backend.Addr); isAddr || isRoute && (r.Table != backend.MainTable || r.Src.IsValid()) {
			lines = append(lines, op.String())
		}
	}
	return strings.Join(lines, "\n")
}

func TestNodeIsNotReachedInside(t *testing.T) {
	old := lease("node-8", "10.244.8.0/24", "192.0.2.18")
	old6 := lease("node-8", "fd00:10:244:8::/64", "192.0.2.18")
	old.Data = []byte(`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`)
	old6.Data = old.Data
	for _, c := range []struct {
		name  string
		held  []netip.Addr
		peers []subnet.Lease
		up    backend.Uplink
		want  string
	}{{
		name: "both families", held: addrs("192.0.2.11", "2001:db8::11"), up: uplink("192.0.2.11"),
		peers: peerInside("node-7", "17", "192.0.2.17", "2001:db8::17"),
		want: `ip addr add 192.0.2.11/32 dev tweed.1
ip addr add 2001:db8::11/128 dev tweed.1 nodad noprefixroute
ip route add 192.0.2.17/32 via 10.244.17.0 dev tweed.1 onlink proto 116 metric 18 table 116
ip -6 route add 2001:db8::17/128 via fe80::1cd0:b4ff:fe61:315a dev tweed.1 proto 116 table 116`,
	}, {
		name: "a NAT stands in front of this node, and one in front of the peer's IPv4 address",
		up:   uplink("192.0.2.11"),
		peers: func() []subnet.Lease {
			peers := peerInside("node-7", "17", "2001:db8::17")
			for i := range peers {
				peers[i].NodeAddrs = addrs("203.0.113.17", "2001:db8::17")
			}
			return peers
		}(),
		want: `ip addr add 10.244.3.0/32 dev tweed.1
ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad
ip -6 route add 2001:db8::17/128 via fe80::1cd0:b4ff:fe61:315a dev tweed.1 proto 116 table 116`,
	}, {
		name: "a peer of an older version", held: addrs("192.0.2.11", "2001:db8::11"), up: uplink("192.0.2.11"),
		peers: append(peerInside("node-7", "17", "192.0.2.17"), old, old6),
		want: `ip addr add 192.0.2.11/32 dev tweed.1
ip addr add 2001:db8::11/128 dev tweed.1 nodad noprefixroute
ip addr add 10.244.3.1 peer 10.244.8.0/32 dev tweed.1 noprefixroute
ip route add 192.0.2.17/32 via 10.244.17.0 dev tweed.1 onlink proto 116 metric 18 table 116
ip -6 route add fd00:10:244:8::/64 via fe80::c6b:2cff:fe01:203 dev tweed.1 proto 116 src fd00:10:244:3::1`,
	}, {
		name: "a peer of an older version, and a NAT in front of this node", up: uplink("192.0.2.11"),
		peers: []subnet.Lease{old, old6},
		want: `ip addr add 10.244.3.0/32 dev tweed.1
ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad`,
	}, {
		name: "peers on the segment", held: addrs("192.0.2.11"), up: near(uplink("192.0.2.11"), "192.0.2.11/24"),
		peers: append(peerInside("node-7", "17", "192.0.2.17"), published(old, "192.0.2.18")),
		want: `ip addr add 192.0.2.11/32 dev tweed.1
ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad`,
	}} {
		t.Run(c.name, func(t *testing.T) {
			self := config("node-3", 4)
			self.Held = c.held
			want := self.Desired(selfLeases(), c.peers, c.up)
			if got := inside(want); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
}

func selfLeases() []subnet.Lease {
	return []subnet.Lease{
		lease("node-3", "10.244.3.0/24", "192.0.2.11"), lease("node-3", "fd00:10:244:3::/64", "192.0.2.11")}
}

// Whoever publishes the address of a node that was there before does not get what pods send to it.
func TestYoungerNodeTakesTheAddressOfAnOlder(t *testing.T) {
	older, younger := peerInside("node-9", "19", "192.0.2.17"), peerInside("node-7", "17", "192.0.2.17")
	for i := range 2 {
		older[i].Since = time.Unix(1, 0)
		younger[i].Since = time.Unix(2, 0)
	}
	for _, peers := range [][]subnet.Lease{append(older, younger...), append(younger, older...)} {
		s := config("node-3", 4).Desired(nil, peers, uplink("192.0.2.11"))
		key := backend.RouteKey{Table: backend.NodesTable, Dst: netip.MustParsePrefix("192.0.2.17/32"), Metric: 18}
		if got := s.Routes[key].Peer; got != "node-9" {
			t.Errorf("192.0.2.17 is %q's", got)
		}
	}
}

func TestInsideIsMisread(t *testing.T) {
	c := config("node-7", 4)
	for _, held := range [][]netip.Addr{
		nil, addrs("192.0.2.17"), addrs("2001:db8::17"), addrs("192.0.2.17", "2001:db8::17")} {
		c.Held = held
		d, err := vxlan.ParseData(c.Data())
		if err != nil || !d.Inside.Known() {
			t.Errorf("%s: %+v, %v", c.Data(), d, err)
		}
		for _, a := range addrs("192.0.2.17", "2001:db8::17") {
			has := false
			for _, h := range held {
				has = has || h == a
			}
			if d.Inside.Has(a) != has {
				t.Errorf("%s: inside has %s: %v", c.Data(), a, !has)
			}
		}
	}
	for data, want := range map[string]bool{
		`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03","inside":[4,9]}`:  true, // of a later version
		`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03","inside":"4"}`:    false,
		`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03","inside":null}`:   false,
		`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03","inside":[[4]]}`:  false,
		`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03","inside": [ 4 ]}`: true,
	} {
		d, err := vxlan.ParseData([]byte(data))
		if (err == nil) != want || want && (!d.Inside.Known() || !d.Inside.Has(netip.MustParseAddr("192.0.2.17"))) {
			t.Errorf("%s: %+v, %v", data, d, err)
		}
	}
}

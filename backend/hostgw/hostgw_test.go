package hostgw_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/hostgw"
	"tweed.dev/tweed/subnet"
)

func lease(node, pods string, addrs ...string) subnet.Lease {
	l := subnet.Lease{Node: node, Subnet: netip.MustParsePrefix(pods), Backend: hostgw.Name, Data: hostgw.Data()}
	for _, a := range addrs {
		l.NodeAddrs = append(l.NodeAddrs, netip.MustParseAddr(a))
	}
	l.Host = l.NodeAddrs[0]
	return l
}

// uplink is that of a node with addresses of both families.
func uplink() backend.Uplink {
	up := backend.Uplink{Devs: []string{"eth0"}, Local: netip.MustParseAddr("192.0.2.11"), MTU: 1500}
	eth0 := backend.Interface{Name: "eth0", Up: true}
	for _, p := range []string{"192.0.2.11/24", "2001:db8::11/64"} {
		a := netip.MustParsePrefix(p)
		up.Addrs = append(up.Addrs, a.Addr())
		eth0.Addrs = append(eth0.Addrs, a)
		eth0.Ways = append(eth0.Ways, backend.Way{Dst: a.Masked()})
	}
	up.Segment = backend.NewSegment([]backend.Interface{eth0}, up)
	return up
}

func TestPeerBehindARouterHoldsUpTheOthers(t *testing.T) {
	s, problems := hostgw.Desired("n1", []subnet.Lease{
		lease("n2", "10.244.2.0/24", "192.0.2.12", "2001:db8::12"),
		lease("n2", "fd00:10:244:2::/64", "192.0.2.12", "2001:db8::12"),
		lease("n3", "10.244.3.0/24", "198.51.100.13", "2001:db8::13"),
		lease("n3", "fd00:10:244:3::/64", "198.51.100.13", "2001:db8::13"),
	}, uplink())
	ops, _ := backend.Diff(s, backend.Observed{})
	var lines []string
	for _, op := range ops {
		lines = append(lines, op.Peer+": "+op.String())
	}
	for _, p := range problems {
		lines = append(lines, p.Kind+", "+p.String())
	}
	const want = `n2: ip route add 10.244.2.0/24 via 192.0.2.12 dev eth0 proto 116
n2: ip -6 route add fd00:10:244:2::/64 via 2001:db8::12 dev eth0 proto 116
n3: ip -6 route add fd00:10:244:3::/64 via 2001:db8::13 dev eth0 proto 116
lease, n3: subnet 10.244.3.0/24: 198.51.100.13 is not on a segment of this node (2001:db8::/64 on eth0, ` +
		`192.0.2.0/24 on eth0), and a router in between does not know the pods' addresses; pods on n3 cannot be ` +
		`reached: set Backend.Type to "vxlan" on all nodes, if need be with DirectRouting`
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// A node whose cable is out is not to name each of thousands of others.
func TestUplinkIsDown(t *testing.T) {
	up := uplink()
	up.Segment = backend.Segment{}
	var peers []subnet.Lease
	for i := range 9 {
		peers = append(peers, lease("n2", fmt.Sprintf("10.244.%d.0/24", i), "192.0.2.12"))
	}
	peers = append(peers, lease("n2", "fd00:10:244:2::/64", "2001:db8::12"))
	s, problems := hostgw.Desired("n1", peers, up)
	const want = "n1: by its routes, no node is near to this one with its IPv4 address: see that eth0 is up, and that this " +
		"node's published address is its own and has a network (`ip route show` has it); else set Backend.Type to " +
		`"vxlan" on all nodes`
	if len(s.Routes) > 0 || len(problems) != 2 || problems[0].String() != want || problems[1].String() == want {
		t.Errorf("%v, %v", s.Routes, problems)
	}
}

func TestJudgeRefuses(t *testing.T) {
	good := lease("n2", "fd00:10:244:2::/64", "192.0.2.12", "2001:db8::12")
	for _, c := range []struct {
		spoil func(*subnet.Lease)
		want  string
	}{
		{func(*subnet.Lease) {}, "<nil>"},
		{func(l *subnet.Lease) { l.Data = []byte(`{"later":1}`) }, "<nil>"},
		{func(l *subnet.Lease) { l.Backend = "vxlan" },
			`backend "vxlan" where this node has "host-gw": all nodes must run the same backend`},
		{func(l *subnet.Lease) { l.NodeAddrs = l.NodeAddrs[:1] }, "no address of n2 is published that " +
			"fd00:10:244:2::/64 could be routed to: give its uplink one of that family, or set Backend.Type to " +
			`"vxlan" on all nodes`},
	} {
		l := good
		c.spoil(&l)
		if identity, err := hostgw.Judge(l); identity != "" || fmt.Sprint(err) != c.want {
			t.Errorf("%+v: %q, %v\nwant %s", l, identity, err, c.want)
		}
	}
}

func BenchmarkDesired5000(b *testing.B) {
	var peers []subnet.Lease
	for i := range 5000 {
		peers = append(peers,
			lease(fmt.Sprint("n", i), fmt.Sprintf("11.%d.%d.0/24", i>>8, i&255), "192.0.2.12", "2001:db8::12"),
			lease(fmt.Sprint("n", i), fmt.Sprintf("fd00:10:244:%x::/64", i), "192.0.2.12", "2001:db8::12"))
	}
	for b.Loop() {
		if s, _ := hostgw.Desired("n1", peers, uplink()); len(s.Routes) != 10000 {
			b.Fatal(len(s.Routes))
		}
	}
}

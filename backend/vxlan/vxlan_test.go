package vxlan_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

func config(node string, underlay int) vxlan.Config {
	return vxlan.Config{Node: node, VNI: 1, Port: 8472, Underlay: underlay}
}

func uplink(local string) backend.Uplink {
	return backend.Uplink{Devs: []string{"eth0"}, Local: netip.MustParseAddr(local), MTU: 1500}
}

// near has an uplink with these addresses and the networks that they are in on its link.
func near(up backend.Uplink, addrs ...string) backend.Uplink {
	eth0 := backend.Interface{Name: "eth0", Up: true}
	for _, a := range addrs {
		p := netip.MustParsePrefix(a)
		up.Addrs = append(up.Addrs, p.Addr())
		eth0.Addrs, eth0.Ways = append(eth0.Addrs, p), append(eth0.Ways, backend.Way{Dst: p.Masked()})
	}
	up.Segment = backend.NewSegment([]backend.Interface{eth0}, up)
	return up
}

func published(l subnet.Lease, addrs ...string) subnet.Lease {
	for _, a := range addrs {
		l.NodeAddrs = append(l.NodeAddrs, netip.MustParseAddr(a))
	}
	return l
}

func lease(node, pods, host string) subnet.Lease {
	return subnet.Lease{
		Node: node, Subnet: netip.MustParsePrefix(pods), Host: netip.MustParseAddr(host),
		Backend: vxlan.Name, Data: config(node, 4).Data(),
	}
}

func TestDesired(t *testing.T) {
	for _, c := range []struct {
		name        string
		config      vxlan.Config
		up          backend.Uplink
		self, peers []subnet.Lease
		want        string
	}{{
		name:   "dual stack over IPv4",
		config: config("node-3", 4),
		up:     uplink("192.0.2.11"),
		self: []subnet.Lease{
			lease("node-3", "10.244.3.0/24", "192.0.2.11"), lease("node-3", "fd00:10:244:3::/64", "192.0.2.11")},
		peers: []subnet.Lease{
			lease("node-7", "10.244.7.0/24", "192.0.2.17"), lease("node-7", "fd00:10:244:7::/64", "192.0.2.17")},
		want: `ip link add tweed.1 group 116 address 46:ee:d0:cd:28:c6 mtu 1450 up type vxlan id 1 dstport 8472 ` +
			`local 192.0.2.11 dev eth0 nolearning
sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0
ip addr add 10.244.3.0/32 dev tweed.1
ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad
node-7: ip neigh replace 10.244.7.0 lladdr 1e:d0:b4:61:31:5a dev tweed.1 nud permanent
node-7: ip neigh replace fe80::1cd0:b4ff:fe61:315a lladdr 1e:d0:b4:61:31:5a dev tweed.1 nud permanent
node-7: bridge fdb replace 1e:d0:b4:61:31:5a dev tweed.1 dst 192.0.2.17 self permanent
node-7: ip route add 10.244.7.0/24 via 10.244.7.0 dev tweed.1 onlink proto 116
node-7: ip -6 route add fd00:10:244:7::/64 via fe80::1cd0:b4ff:fe61:315a dev tweed.1 proto 116
ip rule add pref 116 from 10.244.3.0/24 fwmark 0x1000/0x1000 lookup 116 proto 116
ip -6 rule add pref 116 from fd00:10:244:3::/64 fwmark 0x1000/0x1000 lookup 116 proto 116`,
	}, {
		name: "IPv4 over IPv6, several uplinks, smaller MTU, no offload",
		config: vxlan.Config{
			Node: "node-3", VNI: 16777215, Port: 4789, MTU: 1400, NoTxChecksum: true, Underlay: 6},
		up: backend.Uplink{Devs: []string{"eth0", "eth1"}, Local: netip.MustParseAddr("2001:db8::11"), MTU: 1500},
		self: []subnet.Lease{
			lease("node-3", "10.244.3.0/24", "2001:db8::11")},
		peers: []subnet.Lease{
			lease("node-7", "10.244.7.0/24", "2001:db8::17")},
		want: `ip link add tweed.16777215 group 116 address 46:ee:d0:cd:28:c6 mtu 1330 up type vxlan id 16777215 ` +
			`dstport 4789 local 2001:db8::11 nolearning && ethtool -K tweed.16777215 tx off
sysctl -w net/ipv4/conf/tweed.16777215/src_valid_mark=1
sysctl -w net/ipv6/conf/tweed.16777215/accept_ra=0
sysctl -w net/ipv4/ip_forward_use_pmtu=1
ip addr add 10.244.3.0/32 dev tweed.16777215
node-7: ip neigh replace 10.244.7.0 lladdr 1e:d0:b4:61:31:5a dev tweed.16777215 nud permanent
node-7: bridge fdb replace 1e:d0:b4:61:31:5a dev tweed.16777215 dst 2001:db8::17 self permanent
node-7: ip route add 10.244.7.0/24 via 10.244.7.0 dev tweed.16777215 onlink proto 116
ip rule add pref 116 from 10.244.3.0/24 fwmark 0x1000/0x1000 lookup 116 proto 116`,
	}, {
		name:   "address on lo, no lease yet",
		config: config("node-3", 4),
		up:     backend.Uplink{Devs: []string{"eth1"}, Routed: true, Local: netip.MustParseAddr("192.0.2.11"), MTU: 1500},
		want: `ip link add tweed.1 group 116 address 46:ee:d0:cd:28:c6 mtu 1450 up type vxlan id 1 dstport 8472 ` +
			`local 192.0.2.11 nolearning
sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0`,
	}, {
		name:   "a neighbour of which one address is known",
		config: config("node-3", 4),
		up:     near(uplink("192.0.2.11"), "192.0.2.11/24", "2001:db8::11/64"),
		peers: []subnet.Lease{
			published(lease("node-7", "10.244.7.0/24", "192.0.2.17"), "192.0.2.17"),
			published(lease("node-7", "fd00:10:244:7::/64", "192.0.2.17"), "192.0.2.17")},
		want: `ip link add tweed.1 group 116 address 46:ee:d0:cd:28:c6 mtu 1450 up type vxlan id 1 dstport 8472 ` +
			`local 192.0.2.11 dev eth0 nolearning
sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0
node-7: ip neigh replace 10.244.7.0 lladdr 1e:d0:b4:61:31:5a dev tweed.1 nud permanent
node-7: ip neigh replace fe80::1cd0:b4ff:fe61:315a lladdr 1e:d0:b4:61:31:5a dev tweed.1 nud permanent
node-7: bridge fdb replace 1e:d0:b4:61:31:5a dev tweed.1 dst 192.0.2.17 self permanent
node-7: ip route add 10.244.7.0/24 via 192.0.2.17 dev eth0 proto 116
node-7: ip -6 route add fd00:10:244:7::/64 via fe80::1cd0:b4ff:fe61:315a dev tweed.1 proto 116`,
	}, {
		name:   "peer that was not judged",
		config: config("node-3", 4),
		up:     uplink("192.0.2.11"),
		peers: []subnet.Lease{
			{Node: "node-7", Subnet: netip.MustParsePrefix("10.244.7.0/24"), Data: json.RawMessage(`{"vni":`)}},
		want: `ip link add tweed.1 group 116 address 46:ee:d0:cd:28:c6 mtu 1450 up type vxlan id 1 dstport 8472 ` +
			`local 192.0.2.11 dev eth0 nolearning
sysctl -w net/ipv4/conf/tweed.1/src_valid_mark=1
sysctl -w net/ipv6/conf/tweed.1/accept_ra=0`,
	}} {
		t.Run(c.name, func(t *testing.T) {
			for i := range c.peers {
				if c.peers[i].Host.IsValid() {
					peer := c.config
					peer.Node = c.peers[i].Node
					c.peers[i].Data = peer.Data()
					if _, err := c.config.Judge(c.peers[i]); err != nil {
						t.Fatal(err)
					}
				}
			}
			want := c.config.Desired(c.self, c.peers, c.up)
			ops, _ := backend.Diff(want, backend.Observed{})
			var lines []string
			for _, op := range ops {
				lines = append(lines, strings.TrimPrefix(op.Peer+": "+op.String(), ": "))
			}
			if got := strings.Join(lines, "\n"); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
			accept(t, want, ops)
		})
	}
}

// accept has a kernel make a state, and have nothing left to do.
func accept(t *testing.T, want backend.State, ops []backend.Op) {
	t.Helper()
	ctx, f := context.Background(), kernel.NewFake()
	for _, dev := range []string{"eth0", "eth1"} {
		f.SetInterface(backend.Interface{Name: dev, MTU: 1500, Up: true,
			Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.11/24")}})
	}
	for _, op := range ops {
		if err := f.Apply(ctx, op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	have, err := f.Observe(ctx, want)
	if err != nil {
		t.Fatal(err)
	}
	if rest, _ := backend.Diff(want, have); len(rest) > 0 {
		t.Errorf("still to do: %v", rest)
	}
}

func TestPeerWithOtherSpelling(t *testing.T) {
	c := config("node-3", 4)
	plain := lease("node-7", "10.244.7.0/24", "192.0.2.17")
	odd := plain
	odd.Data = json.RawMessage(fmt.Sprintf(` { "mac": %q, "later": [{}], "port": 8472, "vni": 1 } `,
		strings.ToUpper(vxlan.MAC("node-7").String())))
	for _, l := range []subnet.Lease{plain, odd} {
		identity, err := c.Judge(l)
		if err != nil || identity != vxlan.MAC("node-7").String() {
			t.Errorf("%s: identity %q, error %v", l.Data, identity, err)
		}
		if s := c.Desired(nil, []subnet.Lease{l}, uplink("192.0.2.11")); s.Len() != 6 {
			t.Errorf("%s: %+v", l.Data, s)
		}
	}
}

func TestJudgeRefuses(t *testing.T) {
	good := lease("node-7", "10.244.7.0/24", "192.0.2.17")
	data := func(json string) func(*subnet.Lease) {
		return func(l *subnet.Lease) { l.Data = []byte(json) }
	}
	for _, c := range []struct {
		spoil func(*subnet.Lease)
		want  string
	}{
		{func(l *subnet.Lease) { l.Backend = "host-gw" },
			`backend "host-gw" where this node has "vxlan": all nodes must run the same backend`},
		{func(l *subnet.Lease) { l.Host = netip.MustParseAddr("2001:db8::17") },
			`host 2001:db8::17 where this node sends over IPv4: the underlay must have the same family on all nodes`},
		{data(`{"vni":2,"port":8472,"mac":"0e:6b:2c:01:02:03"}`),
			`VNI 2 where this node has 1: Backend.VNI must be the same on all nodes`},
		{data(`{"vni":1,"port":4789,"mac":"0e:6b:2c:01:02:03"}`),
			`UDP port 4789 where this node has 8472: Backend.Port must be the same on all nodes`},
		{data(``), `"" is not a JSON object like {"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`},
		{data(`null`), `null is not a JSON object like {"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`},
		{data("[\x1b[31m"), `"[\x1b[31m" is not a JSON object like {"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`},
		{data(`{}`), `{} has no "vni"`},
		{data(`{"VNI":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`),
			`{"VNI":1,"port":8472,"mac":"0e:6b:2c:01:02:03"} has no "vni"`},
		{data(`{"vni":"1","port":8472,"mac":"0e:6b:2c:01:02:03"}`), `"vni" is "1", not a VNI from 1 to 16777215`},
		{data(`{"vni":null,"port":8472,"mac":"0e:6b:2c:01:02:03"}`), `"vni" is null, not a VNI from 1 to 16777215`},
		{data(`{"vni":16777216,"port":8472,"mac":"0e:6b:2c:01:02:03"}`), `"vni" is 16777216, not a VNI from 1 to 16777215`},
		{data(`{"vni":1,"port":65536,"mac":"0e:6b:2c:01:02:03"}`), `"port" is 65536, not a UDP port from 1 to 65535`},
		{data(`{"vni":1,"port":8472,"mac":"02:zz"}`),
			`"mac" is "02:zz", not one interface's MAC address such as 0e:6b:2c:01:02:03`},
		{data(`{"vni":1,"port":8472,"mac":null}`),
			`"mac" is null, not one interface's MAC address such as 0e:6b:2c:01:02:03`},
		{data(`{"vni":1,"port":8472,"mac":"ff:ff:ff:ff:ff:ff"}`),
			`"mac" is "ff:ff:ff:ff:ff:ff", not one interface's MAC address such as 0e:6b:2c:01:02:03`},
		{data(`{"vni":1,"port":8472,"mac":"00:00:00:00:00:00"}`),
			`"mac" is "00:00:00:00:00:00", not one interface's MAC address such as 0e:6b:2c:01:02:03`},
		{data(`{"vni":1,"port":8472,"mac":"` + strings.Repeat("0", 1000) + `"}`),
			`"mac" is "\"` + strings.Repeat("0", 79) + `"..., not one interface's MAC address such as 0e:6b:2c:01:02:03`},
	} {
		l := good
		c.spoil(&l)
		identity, err := config("node-3", 4).Judge(l)
		if err == nil || strings.TrimPrefix(err.Error(), "backend-data: ") != c.want || identity != "" {
			t.Errorf("%s %.80s: %q, %v\nwant %s", l.Backend, l.Data, identity, err, c.want)
		}
	}
}

func TestNamesOfNodesMakeDifferentMACs(t *testing.T) {
	seen := map[backend.MAC]int{}
	for i := range 20000 {
		m := vxlan.MAC(fmt.Sprintf("node-%d", i))
		if other, twice := seen[m]; twice {
			t.Fatalf("node-%d and node-%d have one MAC", i, other)
		}
		if !m.IsUnicast() || m[0]&2 == 0 {
			t.Fatalf("%s is not locally administered and unicast", m)
		}
		seen[m] = i
	}
}

func TestDeviceNameFitsTheKernel(t *testing.T) {
	const most = 15 // IFNAMSIZ - 1
	if name := vxlan.DeviceName(1<<24 - 1); len(name) > most {
		t.Errorf("%s is longer than %d bytes", name, most)
	}
}

func TestMTULeavesRoom(t *testing.T) {
	for _, c := range []struct {
		configured, uplink int
		local              string
		want               int
	}{
		{0, 1500, "192.0.2.11", 1450},
		{0, 1500, "2001:db8::11", 1430},
		{1400, 1500, "192.0.2.11", 1350},
		{9000, 1500, "192.0.2.11", 1450}, // the kernel would refuse 8950
		{9000, 0, "2001:db8::11", 8930},
	} {
		got := vxlan.Config{MTU: c.configured}.DeviceMTU(backend.Uplink{Local: netip.MustParseAddr(c.local), MTU: c.uplink})
		if got != c.want {
			t.Errorf("%+v: got %d", c, got)
		}
	}
}

// Whatever a lease says, it is read or refused in few words that name the key; and Judge, which has a short way for
// what is written as this node writes it, agrees.
func FuzzParseData(f *testing.F) {
	f.Add([]byte(`{"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`))
	f.Add([]byte(`{"vni":1,"port":8472,"mac":"0e-6b-2c-01-02-03","x":{}}`))
	f.Add([]byte(`{"vni":1,"port":8472,"mac":"01:00:5e:00:00:01"}`))
	f.Add([]byte(`{"vni":1e0}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := vxlan.ParseData(raw)
		l := lease("node-7", "10.244.7.0/24", "192.0.2.17")
		l.Data = raw
		identity, judged := config("node-3", 4).Judge(l)
		if err != nil {
			if !fitToPrint(err) || judged == nil || !fitToPrint(judged) {
				t.Fatalf("unfit to print: %q, judged %v", err, judged)
			}
			return
		}
		if here := d.VNI == 1 && d.Port == 8472; here != (judged == nil) || here && identity != d.MAC.String() {
			t.Fatalf("%+v is judged %q, %v", d, identity, judged)
		}
		text, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := vxlan.ParseData(text); err != nil || again != d {
			t.Fatalf("%s became %+v, %v", text, again, err)
		}
	})
}

// fitToPrint reports whether an error about Data is one short line that names a key or wants an object.
func fitToPrint(err error) bool {
	text := err.Error()
	names := func(what string) bool { return strings.Contains(text, what) }
	return len(text) < 500 && !slices.ContainsFunc([]byte(text), func(b byte) bool { return b < ' ' }) &&
		slices.ContainsFunc([]string{`"vni"`, `"port"`, `"mac"`, "is not a JSON object"}, names)
}

// cluster makes the leases of dual-stack nodes.
func cluster(nodes int) (leases []subnet.Lease) {
	for i := range nodes {
		host := fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)
		name := fmt.Sprintf("node-%d", i)
		leases = append(leases,
			lease(name, fmt.Sprintf("11.%d.%d.0/24", i>>8, i&255), host),
			lease(name, fmt.Sprintf("fd00:10:244:%x::/64", i), host))
	}
	return leases
}

func BenchmarkDesired5000(b *testing.B) {
	peers := cluster(5000)
	for b.Loop() {
		if s := config("self", 4).Desired(nil, peers, uplink("192.0.2.11")); len(s.Routes) != 10000 {
			b.Fatal(len(s.Routes))
		}
	}
}

func BenchmarkJudge5000(b *testing.B) {
	peers := cluster(5000)
	for b.Loop() {
		for _, l := range peers {
			if _, err := config("self", 4).Judge(l); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkDiff5000(b *testing.B) {
	want := config("self", 4).Desired(nil, cluster(5000), uplink("192.0.2.11"))
	have := config("self", 4).Desired(nil, cluster(5000), uplink("192.0.2.11"))
	b.Run("nothing to do", func(b *testing.B) {
		for b.Loop() {
			if ops, _ := backend.Diff(want, backend.Observed{State: have}); len(ops) > 0 {
				b.Fatal(ops)
			}
		}
	})
	b.Run("from nothing", func(b *testing.B) {
		for b.Loop() {
			if ops, _ := backend.Diff(want, backend.Observed{}); len(ops) != want.Len() {
				b.Fatal(len(ops))
			}
		}
	})
}

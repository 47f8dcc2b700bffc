package backend_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
)

// newHost makes a network namespace with the uplinks that node needs.
func newHost(t *testing.T) *netnstest.NS {
	ns := netnstest.New(t)
	for i, dev := range []string{"eth0", "eth1"} {
		ns.Run(t, fmt.Sprintf("ip link add %s mtu 9000 type veth peer name %s-peer", dev, dev))
		ns.Run(t, fmt.Sprintf("ip link set %s-peer up", dev))
		ns.Run(t, fmt.Sprintf("ip link set %s up", dev))
		ns.Run(t, fmt.Sprintf("ip addr add 192.0.2.%d/24 dev %s noprefixroute", 11+i, dev))
		ns.Run(t, fmt.Sprintf("ip addr add 2001:db8::%d/64 dev %s nodad noprefixroute", 11+i, dev))
	}
	return ns
}

// shell runs the commands of operations as a person would.
func shell(t *testing.T, ns *netnstest.NS, ops []backend.Op) {
	t.Helper()
	for _, line := range commands(ops) {
		var out []byte
		var err error
		ns.Do(t, func() { out, err = exec.Command("sh", "-c", line).CombinedOutput() })
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
}

// look is what a person would see on the host.
func look(t *testing.T, ns *netnstest.NS) string {
	t.Helper()
	var b strings.Builder
	for _, dev := range []string{"tweed.1", "tweed0"} {
		for _, command := range []string{"ip -d link show dev ", "ip addr show dev ", "ip neigh show nud permanent dev "} {
			out, _ := ns.Try(t, command+dev)
			b.WriteString(out)
		}
	}
	out, _ := ns.Try(t, "bridge fdb show dev tweed.1")
	b.WriteString(out)
	out, _ = ns.Try(t, "ethtool -k tweed.1")
	b.WriteString(regexp.MustCompile(`tx-checksumming: \S+`).FindString(out) + "\n")
	for _, command := range []string{
		"ip -4 route show proto 116 table all", "ip -6 route show proto 116 table all", "ip -4 rule", "ip -6 rule",
		"cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding",
	} {
		b.WriteString(ns.Run(t, command))
	}
	seen := regexp.MustCompile(`(?m)^\d+: |(g?tso|gro)_(ipv4_)?max_\w+ \d+|\S+_timer +[0-9.]+| *inet6 fe80.*\n.*\n`).
		ReplaceAllString(b.String(), "")
	return regexp.MustCompile(` +`).ReplaceAllString(seen, " ")
}

// other is a state that differs from node's in each kind of object.
func other() backend.State {
	s := node()
	changeLink(s, "tweed.1", func(l *backend.Link) {
		l.MTU, l.MAC[5], l.VXLAN.Local, l.VXLAN.Dev = 8950, 0x77, netip.MustParseAddr("192.0.2.12"), "eth1"
		l.VXLAN.Learning, l.VXLAN.NoTxChecksum = true, true
	})
	changeLink(s, "tweed0", func(l *backend.Link) {
		l.MTU, l.MAC[5], l.Bridge = 8950, 0x77, backend.Bridge{McastSnooping: true}
	})
	for _, a := range []backend.Addr{
		{AddrKey: addrKey("tweed.1", "10.244.3.0/32"), NoPrefixRoute: true},
		{AddrKey: backend.AddrKey{Dev: "tweed.1", Prefix: netip.MustParsePrefix("10.244.3.1/32"),
			Toward: netip.MustParseAddr("10.244.7.0")}, NoPrefixRoute: true, Late: true},
		{AddrKey: addrKey("tweed0", "fd00:10:244:3::1/64"), NoDAD: true},
		{AddrKey: addrKey("tweed0", "10.244.99.1/24")},
	} {
		s.Addrs[a.AddrKey] = a
	}
	for k, n := range s.Neighs {
		n.MAC[5]++
		s.Neighs[k] = n
	}
	for k, e := range s.FDB {
		e.Dst = netip.MustParseAddr("192.0.2.18")
		s.FDB[k] = e
	}
	for k, r := range s.Routes {
		switch {
		case r.Via.Is4():
			r.Via = netip.MustParseAddr("10.244.7.9")
		case r.Via.Is6():
			r.Via = netip.MustParseAddr("fe80::9")
		case r.Dst.Addr().Is4():
			r.Src = netip.Addr{}
		default:
			r.Src = netip.MustParseAddr("fd00:10:244:3::1")
		}
		s.Routes[k] = r
		r.Table, r.Metric, r.Src = 100, 50, netip.Addr{}
		s.Routes[r.RouteKey] = r
		r.Metric = 70
		s.Routes[r.RouteKey] = r
	}
	s.Rules = map[backend.RuleKey]backend.Rule{}
	for _, key := range []backend.RuleKey{
		{Priority: 500, From: netip.MustParsePrefix("10.244.3.0/24"), To: netip.MustParsePrefix("10.0.0.0/8"), Table: 100},
		{Priority: 501, To: netip.MustParsePrefix("fd00::/16"), Table: 100},
		{Priority: 502, From: netip.MustParsePrefix("::/0"), Table: 100},
		{Priority: 503, Table: 100},
	} {
		s.Rules[key] = backend.Rule{RuleKey: key}
	}
	return s
}

func TestCommandsDoWhatTheySay(t *testing.T) {
	clean := func(s backend.State) backend.State {
		s.Sysctls = nil // what they were before is not known
		return s
	}
	diff := func(want, have backend.State) []backend.Op {
		ops, problems := backend.Diff(want, backend.Observed{State: have})
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return ops
	}
	for _, c := range []struct {
		name     string
		from, to func() backend.State
	}{
		{"there", node, other},
		{"and back", other, node},
		{"to another port", node, func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.VXLAN.Port = 4789 })
		}},
		{"to IPv6 underlay without device", other, func() backend.State {
			s := changeLink(node(), "tweed.1", func(l *backend.Link) {
				l.VXLAN.Local, l.VXLAN.Dev = netip.MustParseAddr("2001:db8::11"), ""
			})
			for k, e := range s.FDB {
				e.Dst = netip.MustParseAddr("2001:db8::17")
				s.FDB[k] = e
			}
			return s
		}},
		{"to another MTU", node, func() backend.State {
			return changeLink(node(), "tweed.1", func(l *backend.Link) { l.MTU = 1400 })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			changed, fresh := newHost(t), newHost(t)
			empty := look(t, changed)
			shell(t, changed, diff(c.from(), backend.State{}))
			shell(t, changed, diff(c.to(), c.from()))
			shell(t, fresh, diff(c.to(), backend.State{}))
			if a, b := look(t, changed), look(t, fresh); a != b {
				t.Errorf("changed\n%s\nmade anew\n%s", a, b)
			}
			shell(t, changed, diff(clean(backend.State{}), c.to()))
			changed.Run(t, "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0")
			if left := look(t, changed); left != empty {
				t.Errorf("before\n%s\nafter all was deleted\n%s", empty, left)
			}
		})
	}
}

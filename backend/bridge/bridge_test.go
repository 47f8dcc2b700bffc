package bridge_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/bridge"
	"tweed.dev/tweed/backend/kernel"
)

const link = `ip link add tweed0 group 116 address 66:4a:10:cd:b0:20 up type bridge mcast_snooping 0 ` +
	`nf_call_iptables 1 nf_call_ip6tables 1 && ip link set dev tweed0 mtu 1450
sysctl -w net/ipv4/conf/tweed0/arp_notify=1
sysctl -w net/ipv6/conf/tweed0/accept_dad=0
sysctl -w net/ipv6/conf/tweed0/accept_ra=0
sysctl -w net/ipv6/conf/tweed0/ndisc_notify=1
`

func TestDesired(t *testing.T) {
	for _, c := range []struct {
		name    string
		subnets []string
		own     []netip.Addr
		want    string
	}{{
		name:    "IPv4",
		subnets: []string{"10.244.3.0/24"},
		want: link + `sysctl -w net/ipv4/ip_forward=1
ip addr add 10.244.3.1/24 dev tweed0 noprefixroute
ip route add 10.244.3.0/24 dev tweed0 proto 116 src 10.244.3.1`,
	}, {
		name:    "IPv6",
		subnets: []string{"fd00:10:244:3::/64"},
		want: link + `sysctl -w net/ipv6/conf/all/forwarding=1
ip addr add fd00:10:244:3::1/64 dev tweed0 nodad noprefixroute
ip -6 route add fd00:10:244:3::/64 dev tweed0 proto 116`,
	}, {
		name:    "both, with a subnet that living pods are left of",
		subnets: []string{"10.244.3.0/24", "fd00:10:244:3::/64", "10.244.9.4/30"},
		want: link + `sysctl -w net/ipv4/ip_forward=1
sysctl -w net/ipv6/conf/all/forwarding=1
ip addr add 10.244.3.1/24 dev tweed0 noprefixroute
ip addr add 10.244.9.5/30 dev tweed0 noprefixroute
ip addr add fd00:10:244:3::1/64 dev tweed0 nodad noprefixroute
ip route add 10.244.3.0/24 dev tweed0 proto 116 src 10.244.3.1
ip route add 10.244.9.4/30 dev tweed0 proto 116 src 10.244.9.5
ip -6 route add fd00:10:244:3::/64 dev tweed0 proto 116`,
	}, {
		name:    "both, on a node that others know by its own addresses",
		subnets: []string{"10.244.3.0/24", "fd00:10:244:3::/64"},
		own:     []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")},
		want: link + `sysctl -w net/ipv4/ip_forward=1
sysctl -w net/ipv6/conf/all/forwarding=1
ip addr add 10.244.3.1/24 dev tweed0 noprefixroute
ip addr add 192.0.2.11/32 dev tweed0 noprefixroute
ip addr add 2001:db8::11/128 dev tweed0 nodad noprefixroute
ip addr add fd00:10:244:3::1/64 dev tweed0 nodad noprefixroute
ip route add 10.244.3.0/24 dev tweed0 proto 116 src 192.0.2.11
ip -6 route add fd00:10:244:3::/64 dev tweed0 proto 116 src 2001:db8::11`,
	}, {
		name: "no subnet yet",
		want: strings.TrimSuffix(link, "\n"),
	}} {
		t.Run(c.name, func(t *testing.T) {
			var subnets []netip.Prefix
			for _, s := range c.subnets {
				subnets = append(subnets, netip.MustParsePrefix(s))
			}
			want := bridge.Config{Name: "tweed0", Node: "node-3", MTU: 1450, Own: c.own}.Desired(subnets)
			ctx, f := context.Background(), kernel.NewFake()
			ops, _ := backend.Diff(want, backend.Observed{})
			var lines []string
			for _, op := range ops {
				lines = append(lines, op.String())
				if err := f.Apply(ctx, op); err != nil {
					t.Errorf("%s: %v", op, err)
				}
			}
			if got := strings.Join(lines, "\n"); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
			have, err := f.Observe(ctx, want)
			if err != nil {
				t.Fatal(err)
			}
			if rest, _ := backend.Diff(want, have); len(rest) > 0 {
				t.Errorf("still to do: %v", rest)
			}
		})
	}
}

func TestNodesHaveDifferentBridges(t *testing.T) {
	a, b := bridge.MAC("node-3"), bridge.MAC("node-7")
	if a == b || !a.IsUnicast() || a[0]&2 == 0 {
		t.Errorf("%s and %s", a, b)
	}
}

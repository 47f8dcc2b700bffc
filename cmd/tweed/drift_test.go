package main

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"tweed.dev/tweed/backend/vxlan"
)

// How many repairs there are where nobody can say.
const (
	some  = -1 // at least one
	maybe = -2 // or none
)

// A fault is what somebody does by hand on n1.
type fault struct {
	does string         // a shell's
	want map[string]int // the repairs, by kind
	// silent is set where the kernel tells nobody.
	silent bool
}

func faults() []fault {
	mac := vxlan.MAC("n2")
	link6 := mac.LinkLocal()
	f := fmt.Sprintf
	return []fault{
		{does: "ip route del 10.244.2.0/24", want: map[string]int{"route": 1}},
		{does: "ip -6 route del fd00:10:244:2::/64", want: map[string]int{"route": 1}},
		{does: "ip route replace 10.244.2.0/24 via 10.244.2.9 dev tweed.1 onlink proto 116",
			want: map[string]int{"route": 1}},
		{does: "ip -6 route replace fd00:10:244:2::/64 via fe80::99 dev tweed.1 proto 116",
			want: map[string]int{"route": 1}},
		{does: "ip route replace 10.244.2.0/24 via 192.0.2.99 dev eth0 proto 116",
			want: map[string]int{"route": 1}},
		{does: "ip route replace blackhole 10.244.2.0/24 proto 116", want: map[string]int{"route": 1}},
		{does: "ip route add 10.99.0.0/24 dev eth0 proto 116", want: map[string]int{"route": 1}},
		{does: "ip route del 10.244.1.0/24", want: map[string]int{"route": 1}},
		{does: "ip -6 route del fd00:10:244:1::/64", want: map[string]int{"route": 1}},
		{does: "ip route flush proto 116", want: map[string]int{"route": some}},
		{does: "ip rule add pref 100 from 10.99.0.0/24 lookup main proto 116", want: map[string]int{"rule": 1}},

		{does: "ip neigh del 10.244.2.0 dev tweed.1", want: map[string]int{"neighbour": 1}},
		{does: f("ip neigh del %v dev tweed.1", link6), want: map[string]int{"neighbour": 1}},
		{does: "ip neigh replace 10.244.2.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
			want: map[string]int{"neighbour": 1}},
		{does: "ip neigh add 10.244.9.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
			want: map[string]int{"neighbour": 1}},
		{does: f("bridge fdb del %v dev tweed.1", mac), want: map[string]int{"fdb": 1}},
		{does: f("bridge fdb replace %v dev tweed.1 dst 192.0.2.99 self permanent", mac),
			want: map[string]int{"fdb": 1}},
		{does: "bridge fdb add 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.7 self permanent", want: map[string]int{"fdb": 1}},

		// With the last IPv4 address of a device, its routes and neighbours go.
		{does: "ip addr del 192.0.2.11/32 dev tweed.1",
			want: map[string]int{"address": 1, "neighbour": 1, "route": 2}},
		{does: "ip addr del fd00:10:244:1::2/128 dev tweed.1", want: map[string]int{"address": 1}},
		{does: "ip addr del 10.244.1.1/24 dev tweed0", want: map[string]int{"address": 1}},
		{does: "ip addr del 192.0.2.11/32 dev tweed0", want: map[string]int{"address": 1}},
		{does: "ip addr del fd00:10:244:1::1/64 dev tweed0", want: map[string]int{"address": 1}},
		{does: "ip addr add 10.244.1.77/24 dev tweed0 noprefixroute", want: map[string]int{"address": 1}},
		{does: "ip addr add 10.244.1.77/32 dev tweed.1", want: map[string]int{"address": 1}},

		{does: "ip link set tweed.1 mtu 1400", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 mtu 1300", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 address 0e:00:00:00:00:55", want: map[string]int{"link": 1, "neighbour": 2}},
		// Pods learn the wrong address, and then the right one.
		{does: "ip link set tweed0 address 0e:00:00:00:00:55", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 type vxlan id 1 learning", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 type vxlan id 1 local 192.0.2.99", want: map[string]int{"link": 1}},
		{does: "ethtool -K tweed.1 tx off", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 type bridge mcast_snooping 1", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 type bridge nf_call_iptables 0", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 type bridge nf_call_ip6tables 0", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 down",
			want: map[string]int{"link": 1, "address": 1, "neighbour": 2, "route": 3}},
		{does: "ip link set tweed0 down", want: map[string]int{"link": 1, "address": 1, "route": 2}},
		{does: "ip link set tweed.1 down; ip link set tweed.1 up",
			want: map[string]int{"link": maybe, "address": 1, "neighbour": 2, "route": 3}},
		{does: "ip link del tweed.1",
			want: map[string]int{"link": 1, "address": 2, "neighbour": 2, "fdb": 1, "route": 3, "sysctl": 2}},
		// The pod's veth is a port of it.
		{does: "ip link del tweed0", want: map[string]int{"link": 1, "address": 3, "route": 2, "sysctl": 4, "port": 1}},
		{does: "ip link set " + podVeth + " nomaster", want: map[string]int{"port": 1}, silent: true},
		{does: "ip link set " + podVeth + " type bridge_slave hairpin off", want: map[string]int{"port": 1}, silent: true},
		{does: "ip link set " + podVeth + " down", want: map[string]int{"port": 1}, silent: true},
		// It is still ours by its group, and no device of ours has that name.
		{does: "ip link set tweed.1 name renamed",
			want: map[string]int{"link": 2, "address": 2, "neighbour": 2, "fdb": 1, "route": 3, "sysctl": 2}},

		{does: "ip rule del pref 116", want: map[string]int{"rule": 1}},
		{does: "ip -6 rule del pref 116", want: map[string]int{"rule": 1}},
		{does: "sysctl -w net.ipv4.conf.tweed/1.src_valid_mark=0", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv4.ip_forward=0", want: map[string]int{"sysctl": 1}},
		{does: "sysctl -w net.ipv6.conf.all.forwarding=0", want: map[string]int{"sysctl": 1}},
		{does: "sysctl -w net.ipv6.conf.tweed/1.accept_ra=1", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv6.conf.tweed0.accept_ra=1", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv6.conf.tweed0.accept_dad=1", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv6.conf.tweed0.ndisc_notify=0", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv4.conf.tweed0.arp_notify=0", want: map[string]int{"sysctl": 1}, silent: true},
	}
}

// spoofFaults let a pod send as others than itself.
func spoofFaults(mac string) []fault {
	one, port := map[string]int{"spoof": 1}, map[string]int{"port": 1}
	return []fault{
		{does: "nft delete table bridge tweed", want: map[string]int{"spoof": 2}}, // the table, and the pod in it
		{does: "nft insert rule bridge tweed prerouting accept", want: map[string]int{"spoof": 2}},
		{does: "nft flush chain bridge tweed pod-arp", want: map[string]int{"spoof": 2}},
		{does: "nft flush set bridge tweed ports", want: one},
		{does: "nft add element bridge tweed ipv4 '{ " + podVeth + " . " + mac + " . 10.244.1.1 }'", want: one},
		{does: "ip link set " + podVeth + " type bridge_slave locked off", want: port},
		{does: "ip link set " + podVeth + " type bridge_slave learning on flood on", want: port},
		{does: "bridge fdb del " + mac + " dev " + podVeth + " master", want: port},
		{does: "bridge fdb add 02:00:00:00:00:09 dev " + podVeth + " master static", want: port, silent: true},
	}
}

// allAtOnce is what nobody survives.
func allAtOnce(form string) fault {
	filter, moved := "nft flush ruleset", map[string]int{"link": some, "address": some, "neighbour": some, "fdb": some,
		"route": some, "sysctl": some, "filter": some, "port": some}
	if form == "nftables" {
		filter = "nft delete table ip tweed; nft delete table ip6 tweed; nft flush chain ip filter FORWARD"
		moved["set"] = some
	} else {
		moved["spoof"] = 2
	}
	return fault{
		does: `
			sysctl -w net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0
			ip route flush proto 116; ip -6 route flush proto 116
			ip link set tweed.1 down; ip link set tweed0 down
			ip link set tweed0 type bridge mcast_snooping 1 nf_call_iptables 0 nf_call_ip6tables 0
			ip addr flush dev tweed.1; ip addr flush dev tweed0
			ip link del tweed.1; ip link del tweed0; ` + filter,
		want: moved,
	}
}

// filterFaults are those of one form of packet filter.
func filterFaults(form string) []fault {
	one, many, sets := map[string]int{"filter": 1}, map[string]int{"filter": some}, map[string]int{"set": 1}
	if form == "iptables" {
		return []fault{
			{does: "iptables -t nat -D POSTROUTING 1", want: one},
			{does: "ip6tables -D FORWARD 1", want: one},
			{does: "ip6tables -D TWEED-FWD 1", want: one},
			{does: "iptables -I TWEED-FWD -j DROP", want: one},
			{does: "iptables -t nat -F TWEED-POSTRTG", want: many},
			{does: "iptables -F", want: many},
			{does: "iptables -t nat -F POSTROUTING; iptables -t nat -F TWEED-POSTRTG; iptables -t nat -X TWEED-POSTRTG",
				want: many},
			{does: "nft delete table ip filter", want: many},
			{does: "iptables -t mangle -F TWEED-MARK", want: many},
			{does: "iptables -t raw -F", want: many},
			{does: "ipset flush tweed-peers4", want: sets, silent: true},
			{does: "ipset add tweed-peers4 203.0.113.9", want: sets, silent: true},
		}
	}
	all := map[string]int{"filter": some, "set": some}
	return []fault{
		{does: "nft insert rule ip tweed translate accept", want: one},
		{does: "nft flush chain ip6 tweed translate", want: many},
		{does: "nft flush chain ip tweed postrouting", want: many},
		{does: "nft flush table ip tweed", want: many},
		{does: "nft delete table ip tweed", want: all},
		{does: "nft delete table ip tweed; nft delete table ip6 tweed", want: all},
		{does: "nft flush chain ip filter FORWARD", want: many},
		{does: "nft flush set ip tweed peers", want: sets},
		{does: "nft add element ip tweed peers '{ 203.0.113.9 }'", want: sets},
	}
}

// Each object of ours is deleted and changed by hand, while the slow timer does not come round: the kernel tells of it.
// Nothing else goes on beside this, for looking at a node takes more of the processor than repairing it.
func TestDriftThatTheKernelTellsOf(t *testing.T) {
	for _, form := range []string{"iptables", "nftables"} {
		t.Run(form, func(t *testing.T) {
			v := newVictim(t, form, intervalVar+"=1h")
			for _, f := range append(slices.Concat(filterFaults(form), spoofFaults(v.podMAC()), faults()), allAtOnce(form)) {
				if !f.silent {
					v.suffers(f)
				}
			}
		})
	}
}

// The same with the kernel's words withheld: the slow timer finds it, faster than it would be in a real daemon.
func TestDriftThatNobodyTellsOf(t *testing.T) {
	const form = "nftables" // what is read by iptables is not read anew for half a minute
	v := newVictim(t, form, intervalVar+"=250ms", deafVar+"=1")
	v.within = 30 * time.Second
	for _, f := range append(slices.Concat(filterFaults(form), spoofFaults(v.podMAC()), faults()), allAtOnce(form)) {
		if len(f.want) > 1 {
			// A pass that was under way when it happened has seen a part of it, and what that pass mends the next one may have
			// to mend again: neighbours go when the link gets its MAC back.
			for kind, n := range f.want {
				if n > 0 {
					f.want[kind] = some
				}
			}
		}
		v.suffers(f)
	}
}

// The device below the tunnel goes down, loses its address, and is taken out altogether. Each time it comes back later.
func TestUnderlayGoesAndComesBack(t *testing.T) {
	t.Parallel()
	v := newVictim(t, "nftables", intervalVar+"=1h")
	for _, c := range []struct{ gone, back string }{
		{"ip link set eth0 down", "ip link set eth0 up"},
		{"ip addr del 192.0.2.11/24 dev eth0", "ip addr add 192.0.2.11/24 dev eth0"},
		{"ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"},
	} {
		v.Run(t, c.gone)
		v.pass()
		v.Run(t, c.back)
		v.restored(c.gone)
	}
	v.Run(t, "ip link del eth0")
	v.pass()
	if out, err := v.Try(t, "ip link show tweed.1"); err == nil {
		t.Errorf("the tunnel outlives what is below it: %s", out)
	}
	plugIn(v.host, v.two)
	v.restored("ip link del eth0")
}

// What somebody has taken our mark off is not ours any more: it is named, left alone, and taken back with its mark.
func TestDeviceIsTakenFromUs(t *testing.T) {
	t.Parallel()
	v := newVictim(t, "nftables", intervalVar+"=1h")
	v.Run(t, "ip link set tweed.1 group 7")
	v.awaitShows("curl -s http://127.0.0.1:9479/report", "a device called tweed.1 is there and is not ours")
	v.shows("ip link show tweed.1", "group 7")
	v.Run(t, "ip link set tweed.1 group 116")
	v.restored("ip link set tweed.1 group 7")
}

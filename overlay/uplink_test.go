package overlay

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
)

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func iface(name string, mtu int, prefixes ...string) backend.Interface {
	i := backend.Interface{Name: name, MTU: mtu, Up: true}
	for _, p := range prefixes {
		i.Addrs = append(i.Addrs, netip.MustParsePrefix(p))
	}
	return i
}

func TestUplinkIsFound(t *testing.T) {
	lo := iface("lo", 65536)
	eth0 := iface("eth0", 1500, "192.0.2.11/24", "2001:db8::11/64")
	eth1 := iface("eth1", 9000, "198.51.100.11/24")
	ours := iface("tweed0", 1450, "10.244.1.1/24")
	ours.Ours = true
	gateway := eth1
	gateway.Default4 = true

	cases := map[string]struct {
		choice UplinkChoice
		ifaces []backend.Interface
		node   []netip.Addr
		want   backend.Uplink
	}{
		"by the node's address, although the default route leaves elsewhere": {
			ifaces: []backend.Interface{lo, gateway, eth0, ours}, node: addrs("192.0.2.11"),
			want: backend.Uplink{Devs: []string{"eth0"}, Local: addrs("192.0.2.11")[0],
				Addrs: addrs("192.0.2.11", "2001:db8::11"), MTU: 1500},
		},
		"over IPv6, because the node's first address is": {
			ifaces: []backend.Interface{lo, eth0}, node: addrs("2001:db8::11", "192.0.2.11"),
			want: backend.Uplink{Devs: []string{"eth0"}, Local: addrs("2001:db8::11")[0],
				Addrs: addrs("2001:db8::11", "192.0.2.11"), MTU: 1500},
		},
		"over IPv6, because the configuration says so": {
			choice: UplinkChoice{Family: 6}, ifaces: []backend.Interface{lo, eth0}, node: addrs("192.0.2.11"),
			want: backend.Uplink{Devs: []string{"eth0"}, Local: addrs("2001:db8::11")[0],
				Addrs: addrs("2001:db8::11", "192.0.2.11"), MTU: 1500},
		},
		"by the default route, where the cluster knows no address": {
			ifaces: []backend.Interface{lo, eth0, gateway},
			want: backend.Uplink{Devs: []string{"eth1"}, Local: addrs("198.51.100.11")[0],
				Addrs: addrs("198.51.100.11"), MTU: 9000},
		},
		"by --iface, although the node's address is elsewhere": {
			choice: UplinkChoice{Iface: "eth1"}, ifaces: []backend.Interface{lo, eth0, eth1}, node: addrs("192.0.2.11"),
			want: backend.Uplink{Devs: []string{"eth1"}, Local: addrs("198.51.100.11")[0],
				Addrs: addrs("198.51.100.11"), MTU: 9000},
		},
		"without a default route, where there is only one": {
			ifaces: []backend.Interface{lo, eth1, ours},
			want: backend.Uplink{Devs: []string{"eth1"}, Local: addrs("198.51.100.11")[0],
				Addrs: addrs("198.51.100.11"), MTU: 9000},
		},
		"by the default routes, where the node's address is on lo": {
			ifaces: []backend.Interface{iface("lo", 65536, "203.0.113.1/32"), gateway, eth0}, node: addrs("203.0.113.1"),
			want: backend.Uplink{Devs: []string{"eth1"}, Local: addrs("203.0.113.1")[0],
				Addrs: addrs("203.0.113.1"), MTU: 9000},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := chooseUplink(c.choice, c.ifaces, c.node)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("uplink is\n%+v, want\n%+v", got, c.want)
			}
		})
	}
}

func TestUplinkCannotBeFound(t *testing.T) {
	eth0, eth1 := iface("eth0", 1500, "192.0.2.11/24"), iface("eth1", 1500, "198.51.100.11/24")
	cases := map[string]struct {
		choice UplinkChoice
		ifaces []backend.Interface
		node   []netip.Addr
		says   string
	}{
		"an interface that does not exist": {UplinkChoice{Iface: "eth7"}, []backend.Interface{eth0}, nil,
			`--iface "eth7": no such interface here; there are eth0`},
		"an uplink without address": {UplinkChoice{Iface: "eth2"}, []backend.Interface{iface("eth2", 1500)}, nil,
			"uplink eth2 (chosen by --iface) has no global IPv4 or IPv6 address"},
		"an uplink without address of the family": {UplinkChoice{Family: 6, Iface: "eth0"}, []backend.Interface{eth0}, nil,
			"has no global IPv6 address"},
		"several interfaces and no hint": {UplinkChoice{}, []backend.Interface{eth0, eth1}, nil,
			"2 interfaces have an address; choose one with --iface"},
		"an address that this host does not have": {UplinkChoice{}, []backend.Interface{eth0, eth1}, addrs("203.0.113.9"),
			"no interface holds 203.0.113.9"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := chooseUplink(c.choice, c.ifaces, c.node)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %+v, %v; want an error that says %q", got, err, c.says)
			}
		})
	}
}

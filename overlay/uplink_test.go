package overlay

import (
	"net/netip"
	"reflect"
	"regexp"
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

// with returns i as change makes it.
func with(i backend.Interface, change func(*backend.Interface)) backend.Interface {
	change(&i)
	return i
}

func stub(i *backend.Interface)     { i.Stub = true }
func default4(i *backend.Interface) { i.Default4 = true }
func default6(i *backend.Interface) { i.Default6 = true }

func uplink(mtu int, devs string, local string, more ...string) backend.Uplink {
	return backend.Uplink{Devs: strings.Fields(devs), Local: netip.MustParseAddr(local),
		Addrs: append(addrs(local), addrs(more...)...), MTU: mtu}
}

// The interfaces of one host, in the order of their indexes; pods is ours.
func lo() backend.Interface   { return with(iface("lo", 65536), stub) }
func eth0() backend.Interface { return iface("eth0", 1500, "192.0.2.11/24", "2001:db8::11/64") }
func eth1() backend.Interface { return iface("eth1", 9000, "198.51.100.11/24") }
func eth2() backend.Interface {
	return iface("eth2", 1400, "203.0.113.11/24", "10.9.0.11/24", "2001:db8:2::11/64")
}
func pods() backend.Interface {
	return with(iface("tweed0", 1450, "10.244.1.1/24"), func(i *backend.Interface) { i.Ours = true })
}

func several() []backend.Interface {
	return []backend.Interface{lo(), eth0(), with(eth1(), default4), pods(), eth2()}
}

// unnumbered is a host with its address on lo, and two uplinks that have none or one of their own.
func unnumbered(change func(*backend.Interface)) []backend.Interface {
	return []backend.Interface{
		with(iface("lo", 65536, "203.0.113.1/32", "2001:db8:9::1/128"), stub),
		with(iface("eth0", 9000), change), with(iface("eth1", 1500, "198.51.100.1/31"), change), pods(),
		with(iface("eth2", 1200), func(i *backend.Interface) { i.Up = false }),
	}
}

func TestUplinkIsFound(t *testing.T) {
	cases := map[string]struct {
		finder
		want backend.Uplink
	}{
		"by the node's address, although the default route leaves elsewhere": {
			finder{ifaces: several(), nodeAddrs: addrs("192.0.2.11")},
			uplink(1500, "eth0", "192.0.2.11", "2001:db8::11"),
		},
		"by the node's second address, where the first is nowhere": {
			finder{ifaces: several(), nodeAddrs: addrs("192.0.2.99", "10.9.0.11")},
			uplink(1400, "eth2", "10.9.0.11", "2001:db8:2::11"),
		},
		"over IPv6, because the node's first address is": {
			finder{ifaces: several(), nodeAddrs: addrs("2001:db8::11", "192.0.2.11")},
			uplink(1500, "eth0", "2001:db8::11", "192.0.2.11"),
		},
		"over IPv6, because the configuration says so": {
			finder{family: 6, ifaces: []backend.Interface{lo(), with(eth0(), default6)}, nodeAddrs: addrs("192.0.2.11")},
			uplink(1500, "eth0", "2001:db8::11", "192.0.2.11"),
		},
		"by the default route, where the cluster knows no address": {
			finder{ifaces: several()}, uplink(9000, "eth1", "198.51.100.11"),
		},
		"by the default route of the family": {
			finder{family: 6, ifaces: []backend.Interface{lo(), with(eth0(), default4), with(eth2(), default6)}},
			uplink(1400, "eth2", "2001:db8:2::11", "203.0.113.11"),
		},
		"without a default route, where there is only one": {
			finder{ifaces: []backend.Interface{unnumbered(stub)[0], eth1(), pods()}},
			uplink(9000, "eth1", "198.51.100.11"),
		},
		"without a default route, by the node's address": {
			finder{ifaces: []backend.Interface{lo(), eth0(), eth1()}, nodeAddrs: addrs("198.51.100.11")},
			uplink(9000, "eth1", "198.51.100.11"),
		},

		"by --iface, although the node's address is elsewhere": {
			finder{UplinkChoice: UplinkChoice{Iface: "eth2"}, ifaces: several(), nodeAddrs: addrs("192.0.2.11")},
			uplink(1400, "eth2", "203.0.113.11", "2001:db8:2::11"),
		},
		"by --iface, with the address that the cluster knows": {
			finder{UplinkChoice: UplinkChoice{Iface: "eth2"}, ifaces: several(), nodeAddrs: addrs("10.9.0.11")},
			uplink(1400, "eth2", "10.9.0.11", "2001:db8:2::11"),
		},
		"by --iface, over IPv6": {
			finder{UplinkChoice: UplinkChoice{Iface: "eth2"}, family: 6, ifaces: several()},
			uplink(1400, "eth2", "2001:db8:2::11", "203.0.113.11"),
		},
		"by --iface-regex, of two names the first": {
			finder{UplinkChoice: matching("^eth[12]$"), ifaces: several(), nodeAddrs: addrs("192.0.2.11")},
			uplink(9000, "eth1", "198.51.100.11"),
		},
		"by --iface-regex, with the address that it is for": {
			finder{UplinkChoice: matching(`^10\.9\.`), ifaces: several(), nodeAddrs: addrs("192.0.2.11")},
			uplink(1400, "eth2", "10.9.0.11", "2001:db8:2::11"),
		},
		"by --iface-regex for an IPv6 address, over IPv4": {
			finder{UplinkChoice: matching("^2001:db8:2:"), ifaces: several(), nodeAddrs: addrs("192.0.2.11")},
			uplink(1400, "eth2", "203.0.113.11", "2001:db8:2::11"),
		},
		"by --iface-regex that would match what is ours": {
			finder{UplinkChoice: matching("^(tweed0|eth2)$"), ifaces: several()},
			uplink(1400, "eth2", "203.0.113.11", "2001:db8:2::11"),
		},
		"by --iface-can-reach, with the source that the kernel would take": {
			finder{UplinkChoice: reaching("10.9.0.1"), ifaces: several(), nodeAddrs: addrs("192.0.2.11"),
				path: path("eth2", "10.9.0.11")},
			uplink(1400, "eth2", "10.9.0.11", "2001:db8:2::11"),
		},
		"by --iface-can-reach, with a source that only the kernel knows": {
			finder{UplinkChoice: reaching("2001:db8::99"), ifaces: several(), nodeAddrs: addrs("192.0.2.11"),
				path: path("eth0", "2001:db8::dead")},
			uplink(1500, "eth0", "192.0.2.11", "2001:db8::11"),
		},
		"by --iface-can-reach on the host that has that address": {
			finder{UplinkChoice: reaching("10.9.0.11"), ifaces: several(), path: path("lo", "10.9.0.11")},
			uplink(1400, "eth2", "10.9.0.11", "2001:db8:2::11"),
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) { c.check(t, c.want) })
	}
}

func TestUplinkHasItsAddressOnLo(t *testing.T) {
	cases := map[string]struct {
		finder
		want backend.Uplink
	}{
		"which is the node's; the default routes carry it": {
			finder{ifaces: unnumbered(default4), nodeAddrs: addrs("203.0.113.1")},
			uplink(1500, "eth0 eth1", "203.0.113.1", "2001:db8:9::1"),
		},
		"and IPv6's default routes carry it": {
			finder{ifaces: unnumbered(default6), nodeAddrs: addrs("2001:db8:9::1")},
			uplink(1500, "eth0 eth1", "2001:db8:9::1", "203.0.113.1"),
		},
		"and no default route says what carries it": {
			finder{ifaces: unnumbered(func(*backend.Interface) {}), nodeAddrs: addrs("203.0.113.1")},
			uplink(1500, "eth0 eth1", "203.0.113.1", "2001:db8:9::1"),
		},
		"because --iface says so": {
			finder{UplinkChoice: UplinkChoice{Iface: "lo"}, ifaces: unnumbered(default4)},
			uplink(1500, "eth0 eth1", "203.0.113.1", "2001:db8:9::1"),
		},
		"because --iface-regex says so": {
			finder{UplinkChoice: matching(`^203\.0\.113\.`), ifaces: unnumbered(default4)},
			uplink(1500, "eth0 eth1", "203.0.113.1", "2001:db8:9::1"),
		},
		"because the way that --iface-can-reach finds has it": {
			finder{UplinkChoice: reaching("192.0.2.9"), ifaces: unnumbered(default4), path: path("eth1", "203.0.113.1")},
			uplink(1500, "eth0 eth1", "203.0.113.1", "2001:db8:9::1"),
		},
		"but only one interface leads anywhere": {
			finder{ifaces: append(unnumbered(stub)[:1], with(eth1(), default4), eth0()), nodeAddrs: addrs("203.0.113.1")},
			uplink(9000, "eth1", "203.0.113.1", "2001:db8:9::1"),
		},
	}
	for name, c := range cases {
		c.want.Routed, c.want.Holder = true, "lo"
		t.Run(name, func(t *testing.T) { c.check(t, c.want) })
	}
}

// A device that moved to the uplink that is left would go when that goes, and pods would be cut off until the next pass.
func TestDeviceMovesWhenOneOfTwoUplinksGoesDown(t *testing.T) {
	n := newNode(t)
	n.cluster.self.Addrs = addrs("203.0.113.1")
	n.cluster.set()
	n.kern.SetInterface(unnumbered(default4)[0])
	for _, name := range []string{"eth0", "eth1"} {
		n.kern.SetInterface(with(iface(name, 1500), default4))
	}
	n.step(t)
	link := n.state(t).Links["tweed.1"]
	if link.VXLAN.Dev != "" || link.VXLAN.Local.String() != "203.0.113.1" || link.MTU != 1450 {
		t.Errorf("the device is %+v", link)
	}
	before := len(n.kern.Ops())
	n.kern.RemoveInterface("eth0")
	if rep := n.step(t); !rep.Converged {
		t.Errorf("without eth0 the report is %+v", rep)
	}
	if ops := n.kern.Ops()[before:]; len(ops) > 0 {
		t.Errorf("did %v", ops)
	}
}

func (f finder) check(t *testing.T, want backend.Uplink) {
	t.Helper()
	got, err := f.uplink()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("uplink is\n%+v, want\n%+v", got, want)
	}
}

func matching(pattern string) UplinkChoice { return UplinkChoice{Match: regexp.MustCompile(pattern)} }
func reaching(addr string) UplinkChoice    { return UplinkChoice{Reach: netip.MustParseAddr(addr)} }
func path(dev, src string) backend.Path {
	return backend.Path{Dev: dev, Src: netip.MustParseAddr(src)}
}

func TestUplinkCannotBeFound(t *testing.T) {
	cases := map[string]struct {
		finder
		says string
	}{
		"an interface that does not exist": {
			finder{UplinkChoice: UplinkChoice{Iface: "eth7"}, ifaces: several()},
			`--iface "eth7": no such interface here; there are lo, eth0, eth1, eth2`,
		},
		"ours asked for": {
			finder{UplinkChoice: UplinkChoice{Iface: "tweed0"}, ifaces: several()},
			`--iface "tweed0": no such interface here`,
		},
		"an uplink without address": {
			finder{UplinkChoice: UplinkChoice{Iface: "eth7"}, ifaces: []backend.Interface{iface("eth7", 1500)}},
			"uplink eth7 (chosen by --iface) has no global IPv4 or IPv6 address",
		},
		"an uplink without address of the family": {
			finder{UplinkChoice: UplinkChoice{Iface: "eth1"}, family: 6, ifaces: several()},
			"uplink eth1 (chosen by --iface) has no global IPv6 address",
		},
		"a pattern for an interface without address of the family": {
			finder{UplinkChoice: matching("^198.51"), ifaces: several(), nodeAddrs: addrs("2001:db8::11")},
			"uplink eth1 (its address 198.51.100.11 is matched by --iface-regex) has no global IPv6 address",
		},
		"a pattern that matches nothing": {
			finder{UplinkChoice: matching("^ens"), ifaces: []backend.Interface{lo(), eth0(), pods()}},
			`--iface-regex "^ens": matches no interface's name and no address here; there are lo, eth0 192.0.2.11 2001:db8::11`,
		},
		"an address that no route leads to": {
			finder{UplinkChoice: reaching("8.8.8.8"), ifaces: several()},
			`--iface-can-reach "8.8.8.8": no route leads there`,
		},
		"an address of the pod network": {
			finder{UplinkChoice: reaching("10.244.7.5"), ifaces: several(), path: path("tweed.1", "10.244.1.0")},
			`--iface-can-reach "10.244.7.5": packets to it leave by tweed.1, which is of the pod network itself`,
		},
		"an address that is reached by an interface without the family": {
			finder{UplinkChoice: reaching("198.51.100.1"), family: 6, ifaces: several(), path: path("eth1", "198.51.100.11")},
			"uplink eth1 (packets to 198.51.100.1 of --iface-can-reach leave by it) has no global IPv6 address",
		},
		"several interfaces and no hint": {
			finder{ifaces: []backend.Interface{lo(), eth0(), eth1()}},
			"2 interfaces have an address; choose one with --iface",
		},
		"an address that this host does not have": {
			finder{ifaces: []backend.Interface{lo(), eth0(), eth1()}, nodeAddrs: addrs("203.0.113.9")},
			"no interface holds 203.0.113.9",
		},
		"an address on lo, and nothing else": {
			finder{ifaces: append(unnumbered(stub)[:1], pods()), nodeAddrs: addrs("203.0.113.1")},
			"the node's address 203.0.113.1 is on lo, and no interface is up",
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := c.uplink()
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %+v, %v; want an error that says %q", got, err, c.says)
			}
		})
	}
}

// The uplink may come back as any device, and the address on lo may change: who does not listen there finds out late.
func TestUplinkComesBackAndNobodyListens(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	if !n.isUplink("eth0") || n.isUplink("eth1") {
		t.Error("not the uplink alone is listened to")
	}
	n.kern.RemoveInterface("eth0")
	if n.step(t); !n.isUplink("eth1") {
		t.Error("without an uplink, not every device is listened to")
	}
	n.kern.SetInterface(eth1())
	if n.step(t); !n.isUplink("eth1") || n.isUplink("eth0") || n.isUplink("lo") {
		t.Error("not the new uplink alone is listened to")
	}
	n.planner.Choice.Iface = "lo"
	n.kern.SetInterface(with(iface("lo", 65536, "203.0.113.1/32"), stub))
	if n.step(t); !n.isUplink("eth1") || !n.isUplink("lo") || n.isUplink("eth0") {
		t.Error("not the device with the address and those that carry its packets are listened to")
	}
}

package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
)

func TestFlagsOfTheUplinkAreRefused(t *testing.T) {
	cases := []struct {
		flags UplinkFlags
		says  string
	}{
		{UplinkFlags{Iface: "eth0", Match: "^eth"}, `--iface "eth0" and --iface-regex "^eth" each choose the uplink`},
		{UplinkFlags{Iface: "eth0", Reach: "192.0.2.1"}, `--iface "eth0" and --iface-can-reach "192.0.2.1" each`},
		{UplinkFlags{Match: "^eth", Reach: "192.0.2.1"}, `--iface-regex "^eth" and --iface-can-reach "192.0.2.1" each`},
		{UplinkFlags{Match: "eth(0"}, `--iface-regex "eth(0": error parsing regexp: missing closing )`},
		{UplinkFlags{Reach: "gateway"}, `--iface-can-reach "gateway": want an IP address`},
		{UplinkFlags{Reach: "192.0.2.0/24"}, `--iface-can-reach "192.0.2.0/24": want an IP address`},
		{UplinkFlags{Reach: "fe80::1%eth0"}, `--iface-can-reach "fe80::1%eth0": want an IP address`},
		{UplinkFlags{Reach: "127.0.0.1"}, `--iface-can-reach "127.0.0.1": 127.0.0.1 is an address that other hosts cannot`},
		{UplinkFlags{PublicIP: "198.51.100.7/32"}, `--public-ip "198.51.100.7/32": want an IP address`},
		{UplinkFlags{PublicIP: "198.51.100.7,"}, `--public-ip "198.51.100.7,": want an IP address`},
		{UplinkFlags{PublicIP: "198.51.100.7, 2001:db8::7"}, `: want an IP address`},
		{UplinkFlags{PublicIP: "::ffff:198.51.100.7"}, `--public-ip "::ffff:198.51.100.7": want an IP address`},
		{UplinkFlags{PublicIP: "198.51.100.7,198.51.100.8"}, `--public-ip "198.51.100.7,198.51.100.8": these are two IPv4`},
		{UplinkFlags{PublicIP: "2001:db8::7,2001:db8::8"}, `these are two IPv6 addresses`},
		{UplinkFlags{PublicIP: "0.0.0.0"}, `--public-ip "0.0.0.0": 0.0.0.0 is an address that other hosts cannot send to`},
		{UplinkFlags{PublicIP: "198.51.100.7,::"}, `:: is an address that other hosts cannot send to`},
		{UplinkFlags{PublicIP: "127.0.0.1"}, `cannot send to`},
		{UplinkFlags{PublicIP: "::1"}, `cannot send to`},
		{UplinkFlags{PublicIP: "224.0.0.1"}, `cannot send to`},
		{UplinkFlags{PublicIP: "ff02::1"}, `cannot send to`},
		{UplinkFlags{PublicIP: "169.254.0.1"}, `cannot send to`},
		{UplinkFlags{PublicIP: "fe80::1"}, `cannot send to`},
		{UplinkFlags{PublicIP: "255.255.255.255"}, `cannot send to`},
	}
	for _, c := range cases {
		if got, err := c.flags.Parse(); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: got %+v, %v; want an error that says %q", c.flags, got, err, c.says)
		}
	}
}

func TestFlagsOfTheUplinkAreRead(t *testing.T) {
	for _, f := range []UplinkFlags{
		{}, {Iface: "eth0"}, {Match: "^eth"}, {Reach: "192.0.2.1"}, {PublicIP: "2001:db8::7,198.51.100.7"},
	} {
		c, err := f.Parse()
		if err != nil {
			t.Errorf("%+v: %v", f, err)
		}
		var back UplinkFlags
		back.Iface = c.Iface
		if c.Match != nil {
			back.Match = c.Match.String()
		}
		if c.Reach.IsValid() {
			back.Reach = c.Reach.String()
		}
		back.PublicIP = listing(c.Public, ",")
		if back != f {
			t.Errorf("%+v is read as %+v", f, c)
		}
	}
}

// Behind a NAT others must send elsewhere than where the device is, and the device must stay where it is.
func TestPublishedAddressIsNotTheDevices(t *testing.T) {
	for name, c := range map[string]struct {
		public, override string
		local            string // of the device
		published        string
	}{
		"nothing is in front":          {"", "", "192.0.2.11", "192.0.2.11,2001:db8::11"},
		"the underlay's":               {"198.51.100.7", "", "192.0.2.11", "198.51.100.7,2001:db8::11"},
		"the other family's":           {"2001:db8:7::7", "", "192.0.2.11", "192.0.2.11,2001:db8:7::7"},
		"both":                         {"2001:db8:7::7,198.51.100.7", "", "192.0.2.11", "198.51.100.7,2001:db8:7::7"},
		"by the Node":                  {"", "198.51.100.9", "192.0.2.11", "198.51.100.9,2001:db8::11"},
		"by both, and the Node counts": {"198.51.100.7", "198.51.100.9", "192.0.2.11", "198.51.100.9,2001:db8::11"},
		"by each for its family":       {"198.51.100.7", "2001:db8:7::9", "192.0.2.11", "198.51.100.7,2001:db8:7::9"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.kern.SetInterface(eth0())
			n.cluster.set()
			n.planner.Choice.Public = parseList(c.public)
			for _, a := range parseList(c.override) {
				n.cluster.self.HostOverride = a
			}
			n.step(t)
			if v := n.state(t).Links["tweed.1"].VXLAN; v.Local.String() != c.local || v.Dev != "eth0" {
				t.Errorf("the device is at %s on %q, want %s on eth0", v.Local, v.Dev, c.local)
			}
			for _, l := range n.cluster.look().published {
				if want := parseList(c.published); l.Host != want[0] || !slices.Equal(l.NodeAddrs, want) {
					t.Errorf("%s is published at %s, of %s; want %s", l.Subnet, l.Host, l.NodeAddrs, want)
				}
			}
			if len(n.cluster.look().published) != 2 {
				t.Errorf("published %+v", n.cluster.look().published)
			}
		})
	}
}

func TestPublishedAddressOfAFamilyThatTheUplinkLacks(t *testing.T) {
	got := inPlace(addrs("192.0.2.11"), addrs("2001:db8::7"))
	if want := addrs("192.0.2.11", "2001:db8::7"); !slices.Equal(got, want) {
		t.Errorf("published %s, want %s", got, want)
	}
}

func TestPublishedAddressIsInsideThePodNetwork(t *testing.T) {
	for _, by := range []string{"flag", "annotation"} {
		n := newNode(t)
		n.cluster.set()
		if a := netip.MustParseAddr("10.244.9.9"); by == "flag" {
			n.planner.Choice.Public = []netip.Addr{a}
		} else {
			n.cluster.self.HostOverride = a
		}
		rep := n.step(t)
		if !strings.Contains(rep.Waiting, "10.244.9.9 of this node is inside the pod network 10.0.0.0/8") ||
			rep.lack.reason != reasonOverlap {
			t.Errorf("by %s: waiting for %q, reason %q", by, rep.Waiting, rep.lack.reason)
		}
	}
}

// A NAT that stands in front does not make an address that pods have the node's own any better.
func TestOwnAddressInsideThePodNetworkBehindAPublicOne(t *testing.T) {
	n := newNode(t)
	n.cluster.self.Addrs = nil
	n.kern.SetInterface(iface("eth0", 1500, "10.244.9.9/24"))
	n.cluster.set()
	n.planner.Choice.Public = addrs("198.51.100.7")
	if rep := n.step(t); !strings.Contains(rep.Waiting, "10.244.9.9 of this node is inside the pod network") {
		t.Errorf("waiting for %q", rep.Waiting)
	}
}

func TestAnnotationChangesWhatIsPublished(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	host := func() string { return n.cluster.look().published[0].Host.String() }
	if host() != "192.0.2.11" {
		t.Fatalf("published %s", host())
	}
	before := n.state(t)
	n.cluster.with(func(c *cluster) { c.self.HostOverride = netip.MustParseAddr("198.51.100.9") })
	n.step(t)
	if host() != "198.51.100.9" {
		t.Errorf("published %s after the annotation was set", host())
	}
	// What is not its own address it has nowhere, and in the tunnel it has one of its subnet.
	own := fmt.Sprint(n.state(t).Addrs)
	if strings.Contains(own, "198.51.100.9") || !strings.Contains(own, "10.244.1.0") {
		t.Errorf("with an address of a NAT published it has %s", own)
	}
	n.cluster.with(func(c *cluster) { c.self.HostOverride = netip.Addr{} })
	n.step(t)
	if host() != "192.0.2.11" {
		t.Errorf("published %s after the annotation went", host())
	}
	if after := n.state(t); !before.Equal(after) {
		t.Errorf("the kernel held %v and holds %v", before, after)
	}
}

// The uplink follows the route to the address of --iface-can-reach; while there is none, what was in force stays.
func TestRouteToTheReachedAddressMoves(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.kern.SetInterface(eth1())
	n.planner.Choice.Reach = netip.MustParseAddr("10.99.0.1")
	if rep := n.step(t); !strings.Contains(rep.Waiting, `--iface-can-reach "10.99.0.1": no route leads there`) ||
		rep.lack.reason != reasonNoUplink {
		t.Fatalf("without a route: waiting for %q, reason %q", rep.Waiting, rep.lack.reason)
	}
	route := func(dev string) backend.Route {
		return backend.Route{Dev: dev, RouteKey: backend.RouteKey{
			Table: backend.MainTable, Dst: netip.MustParsePrefix("10.99.0.0/16")}}
	}
	at := func(dev, local string) {
		t.Helper()
		if v := n.state(t).Links["tweed.1"].VXLAN; v.Dev != dev || v.Local.String() != local {
			t.Errorf("the device is at %s on %s, want %s on %s", v.Local, v.Dev, local, dev)
		}
		if l := n.cluster.look().published[0]; l.Host.String() != local {
			t.Errorf("published %s, want %s", l.Host, local)
		}
	}
	n.kern.AddStranger(route("eth0"))
	n.step(t)
	at("eth0", "192.0.2.11")
	n.kern.RemoveStranger(route("eth0"))
	n.step(t)
	at("eth0", "192.0.2.11")
	n.kern.AddStranger(route("eth1"))
	n.step(t)
	at("eth1", "198.51.100.11")
}

func parseList(text string) (list []netip.Addr) {
	if text != "" {
		list = addrs(strings.Split(text, ",")...)
	}
	return list
}

package overlay

import (
	"net/netip"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/hostgw"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// dual gives a node, n1, an uplink with both families and a backend.
func dual(t *testing.T, b BackendConfig) *node {
	t.Helper()
	n := newNode(t)
	n.kern.SetInterface(on("192.0.2.11/24", "2001:db8::11/64"))
	cfg := n.planner.Config
	b.VNI, b.Port, b.ChecksumOffload = cfg.Backend.VNI, cfg.Backend.Port, cfg.Backend.ChecksumOffload
	n.planner.Config.Backend = b
	return n
}

func on(prefixes ...string) backend.Interface { return iface("eth0", 1500, prefixes...) }

// at are the leases of a dual-stack node with these addresses, by the backend of n1.
func (n *node) at(name, number string, addrs ...string) (leases []subnet.Lease) {
	for _, prefix := range []string{"10.244." + number + ".0/24", "fd00:10:244:" + number + "::/64"} {
		l := peer(name, prefix, addrs[0])
		l.NodeAddrs = parseList(strings.Join(addrs, ","))
		if n.planner.Config.Backend.Type == hostgw.Name {
			l.Backend, l.Data = hostgw.Name, hostgw.Data()
		}
		leases = append(leases, l)
	}
	return leases
}

// ways lists the routes to other nodes' pods as "10.244.2.0/24 dev eth0 via 192.0.2.12".
func (n *node) ways(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for k, r := range n.state(t).Routes {
		if r.Via.IsValid() {
			out[k.Dst.String()] = r.Dev + " via " + r.Via.String()
		}
	}
	return out
}

// wants compares the routes to 10.244.<number>.0/24 and fd00:10:244:<number>::/64.
func (n *node) wants(t *testing.T, when, number, via4, via6 string) {
	t.Helper()
	ways := n.ways(t)
	for prefix, want := range map[string]string{
		"10.244." + number + ".0/24": via4, "fd00:10:244:" + number + "::/64": via6,
	} {
		if got := ways[prefix]; !strings.HasPrefix(got, want) || (got == "") != (want == "") {
			t.Errorf("%s: the route to %s is %q, want %q", when, prefix, got, want)
		}
	}
}

const (
	plain4, plain6   = "eth0 via 192.0.2.12", "eth0 via 2001:db8::12"
	tunnel4, tunnel6 = "tweed.1 via 10.244.2.0", "tweed.1 via fe80::"
)

// Each change is followed in one pass, by one operation for each family that it is for, and those on the packet filter: a
// node that is near comes into a set there (with a rule that names it, three operations; to take both away, two).
func TestPeerMovesBetweenSegmentAndTunnel(t *testing.T) {
	n := dual(t, BackendConfig{Type: "vxlan", DirectRouting: true})
	n.cluster.set(n.at("n2", "2", "192.0.2.12", "2001:db8::12")...)
	n.step(t)
	n.wants(t, "at the start", "2", plain4, plain6)
	router := backend.Route{RouteKey: backend.RouteKey{
		Table: backend.MainTable, Dst: netip.MustParsePrefix("192.0.2.12/32")},
		Dev: "eth0", Via: netip.MustParseAddr("192.0.2.1")}
	for _, c := range []struct {
		when       string
		change     func()
		via4, via6 string
		ops        int
	}{
		{"another address, elsewhere", func() {
			n.cluster.set(n.at("n2", "2", "198.51.100.12", "2001:db8:1::12")...)
		}, tunnel4, tunnel6, 3 + 2*2}, // the FDB entry
		{"back", func() { n.cluster.set(n.at("n2", "2", "192.0.2.12", "2001:db8::12")...) }, plain4, plain6, 3 + 2*3},
		{"it publishes no IPv6 address", func() { n.cluster.set(n.at("n2", "2", "192.0.2.12")...) }, plain4, tunnel6, 1 + 2},
		{"its IPv6 address is elsewhere", func() {
			n.cluster.set(n.at("n2", "2", "192.0.2.12", "2001:db8:1::12")...)
		}, plain4, tunnel6, 0},
		{"both families", func() { n.cluster.set(n.at("n2", "2", "192.0.2.12", "2001:db8::12")...) }, plain4, plain6, 1 + 3},
		{"the uplink's prefix is longer", func() { n.kern.SetInterface(on("192.0.2.11/32", "2001:db8::11/64")) },
			tunnel4, plain6, 1 + 2},
		{"it is as before", func() { n.kern.SetInterface(on("192.0.2.11/24", "2001:db8::11/64")) }, plain4, plain6, 1 + 3},
		{"a router stands between", func() { n.kern.AddStranger(router) }, tunnel4, plain6, 1 + 2},
		{"it is gone", func() { n.kern.RemoveStranger(router) }, plain4, plain6, 1 + 3},
		{"what this node publishes is a NAT's", func() {
			n.cluster.with(func(c *cluster) { c.self.HostOverride = netip.MustParseAddr("198.51.100.1") })
		}, tunnel4, plain6, 1 + 2 + 5}, // its own address leaves tunnel and bridge, and is masqueraded
	} {
		c.change()
		rep := n.step(t)
		n.wants(t, c.when, "2", c.via4, c.via6)
		if rep.Done != c.ops || rep.Failed != 0 || !rep.Converged {
			t.Errorf("%s: %d operations, want %d: %+v", c.when, rep.Done, c.ops, rep)
		}
		if rep := n.step(t); rep.Done != 0 {
			t.Errorf("%s: the next pass does %d", c.when, rep.Done)
		}
	}
	if l := n.state(t).Links["tweed.1"]; l.MTU != 1450 || n.info(t).MTU != 1450 || n.info(t).Device != "tweed.1" {
		t.Errorf("the device is %+v, pods get %+v", l, n.info(t))
	}
}

func (n *node) info(t *testing.T) podnet.NodeInfo {
	t.Helper()
	info, err := podnet.ReadNodeInfo(n.planner.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestTunnelIsUsedAlthoughDirectRoutingIsOff(t *testing.T) {
	n := dual(t, BackendConfig{Type: "vxlan"})
	n.cluster.set(n.at("n2", "2", "192.0.2.12", "2001:db8::12")...)
	n.step(t)
	n.wants(t, "off", "2", tunnel4, tunnel6)
}

func TestHostGatewayLeavesSomethingOfATunnel(t *testing.T) {
	n := dual(t, BackendConfig{Type: "vxlan"})
	n.cluster.set(n.at("n2", "2", "192.0.2.12", "2001:db8::12")...)
	n.step(t)

	again := dual(t, BackendConfig{Type: "host-gw"}) // the daemon restarts with another configuration
	again.kern, again.planner.Kernel, again.cluster = n.kern, n.kern, n.cluster
	again.planner.Leases, again.planner.Publisher = n.cluster, n.cluster
	n.cluster.set(append(again.at("n2", "2", "192.0.2.12", "2001:db8::12"), again.at("n3", "3", "198.51.100.13")...)...)
	rep := again.step(t)
	again.wants(t, "host-gw", "2", plain4, plain6)
	again.wants(t, "behind a router", "3", "", "")
	s := again.state(t)
	if _, there := s.Links["tweed.1"]; there || len(s.FDB)+len(s.Neighs) > 0 || !rep.Converged {
		t.Errorf("left are %+v of %+v", s, rep)
	}
	if !hasProblem(rep, "n3", `198.51.100.13 is not on a segment of this node`) ||
		!hasProblem(rep, "n3", `set Backend.Type to "vxlan"`) || !hasProblem(rep, "n3", "no address of n3 is published") {
		t.Errorf("problems are %v", rep.Problems)
	}
	if info := again.info(t); info.MTU != 1500 || info.Device != "" {
		t.Errorf("pods get %+v", info)
	}
	for _, l := range n.cluster.look().published {
		if l.Backend != "host-gw" || string(l.Data) != "{}" || len(l.NodeAddrs) != 2 {
			t.Errorf("published is %+v", l)
		}
	}
	rules, err := n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
	if err != nil {
		t.Fatal(err)
	}
	for chain, rules := range rules.Chains {
		for _, r := range rules {
			if r.UDP {
				t.Errorf("%+v minds a tunnel's port: %+v", chain, r)
			}
		}
	}
	if rep := again.step(t); rep.Done != 0 {
		t.Errorf("the next pass does %d", rep.Done)
	}
}

// What an administrator is shown is judged as the nodes judge it.
func TestAdministratorIsToldOtherwiseThanNodesJudge(t *testing.T) {
	for _, c := range []struct{ ours, theirs string }{
		{"vxlan", "vxlan"}, {"vxlan", "host-gw"}, {"host-gw", "vxlan"}, {"host-gw", "host-gw"},
	} {
		ours, theirs := dual(t, BackendConfig{Type: c.ours}), dual(t, BackendConfig{Type: c.theirs})
		for _, l := range theirs.at("n2", "2", "192.0.2.12", "2001:db8::12") {
			if _, err := ours.planner.Config.Judge(4)(l); (err == nil) != (c.ours == c.theirs) {
				t.Errorf("%s judges a lease of %s: %v", c.ours, c.theirs, err)
			}
		}
	}
}

func TestPeerHasAnotherBackend(t *testing.T) {
	for _, c := range []struct{ ours, theirs string }{{"vxlan", "host-gw"}, {"host-gw", "vxlan"}} {
		n := dual(t, BackendConfig{Type: c.ours})
		other := dual(t, BackendConfig{Type: c.theirs})
		n.cluster.set(append(other.at("n2", "2", "192.0.2.12", "2001:db8::12"),
			n.at("n3", "3", "192.0.2.13", "2001:db8::13")...)...)
		rep := n.step(t)
		n.wants(t, c.ours, "2", "", "")
		if ways := n.ways(t); len(ways) != 2 || !hasProblem(rep, "n2",
			`backend "`+c.theirs+`" where this node has "`+c.ours+`": all nodes must run the same backend`) {
			t.Errorf("%s: %v, %v", c.ours, ways, rep.Problems)
		}
	}
}

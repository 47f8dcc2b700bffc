package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// problem is what the node's daemon says of another node; "" if nothing.
func (h host) problem(of string) string {
	h.t.Helper()
	for part := range strings.SplitSeq(h.Run(h.t, "curl -s http://127.0.0.1:9479/report"), "{") {
		if strings.Contains(part, fmt.Sprintf(`"node":%q`, of)) || strings.Contains(part, fmt.Sprintf(`"node": %q`, of)) {
			return part
		}
	}
	return ""
}

// awaitProblem waits until the node's daemon says something of another node, or nothing any more.
func (h host) awaitProblem(of, want string) {
	h.t.Helper()
	got := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(every) {
		if got = h.problem(of); (got == "") == (want == "") && strings.Contains(got, want) {
			return
		}
	}
	h.t.Fatalf("after 30 s the problem of %s is %q, want %q", of, got, want)
}

// All nodes have to agree on VNI, port and the underlay's family. Two that have not both changed yet are cut off from
// each other, and say so; those that have are not, and those that have not are not either.
func TestNodesChangeTheirTunnelOneByOne(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string]struct{ now, device, says string }{
		"VNI":      {`"Backend": {"VNI": 7}`, "tweed.7", "VNI 1 where this node has 7"},
		"port":     {`"Backend": {"Port": 4789}`, "tweed.1", "UDP port 8472 where this node has 4789"},
		"underlay": {`"Underlay": "ipv6"`, "tweed.1", "host 192.0.2.12 where this node sends over IPv6"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.run(`{}`)
			for _, pair := range [][2]int{{1, 2}, {1, 3}, {2, 3}} {
				c.reaches(pair[0], pair[1])
			}
			change := func(n int) {
				c.daemons[n].configure(confOf(keys.now))
				if keys.device != "tweed.1" {
					c.nodes[n].awaitNot("ip -o link show type vxlan", "tweed.1:")
				}
				c.nodes[n].await("ip link show " + keys.device)
			}
			others := c.pings(2, 3)
			c.allAnswered(others)
			change(1)
			c.nodes[1].awaitProblem("n2", keys.says)
			c.nodes[2].awaitProblem("n1", "where this node ")
			c.cut(1, 2)
			c.cut(1, 3)
			if lost := c.lost(others); lost > 2*every {
				t.Errorf("n2 and n3, which have not changed, lose each other for %v", lost)
			}
			c.isBack(1, 2, change)
			c.nodes[1].awaitProblem("n2", "")
			c.cut(2, 3)
			c.isBack(1, 3, change)
			c.reaches(2, 3)
			for n := 1; n <= 3; n++ {
				for other := 1; other <= 3; other++ {
					c.nodes[n].awaitProblem(fmt.Sprintf("n%d", other), "")
				}
			}
			c.leavesNothing(1, 2, 3)
		})
	}
}

// awaitNot repeats a command until its output does not hold a text any more.
func (h host) awaitNot(command, unwanted string) {
	h.t.Helper()
	out := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		if out, _ = h.Try(h.t, command); !strings.Contains(out, unwanted) {
			return
		}
	}
	h.t.Fatalf("%s: after 30 s there still is %q in\n%s", command, unwanted, out)
}

// cut checks that two nodes have nothing that leads to the pods of the other.
func (c *threeNodes) cut(a, b int) {
	c.router.t.Helper()
	for _, way := range [][2]int{{a, b}, {b, a}} {
		for i, addr := range podAddrs(way[1]) {
			family := []string{"-4", "-6"}[i]
			c.nodes[way[0]].awaitNot("ip "+family+" route show proto 116", strings.TrimSuffix(addr, "5")+"0/24")
			c.nodes[way[0]].awaitNot("ip "+family+" route show proto 116", strings.TrimSuffix(addr, "5")+"/64")
		}
		if out, err := c.pods[way[0]].Try(c.router.t, "ping -c 1 -W 0.2 "+podAddrs(way[1])[0]); err == nil {
			c.router.t.Errorf("n%d still reaches the pod of n%d:\n%s", way[0], way[1], out)
		}
	}
}

// isBack has the second of two nodes change as the first has, and measures how long it then takes until they reach each
// other.
func (c *threeNodes) isBack(first, second int, change func(n int)) {
	c.router.t.Helper()
	start := time.Now()
	change(second)
	for _, way := range [][2]int{{first, second}, {second, first}} {
		for _, addr := range podAddrs(way[1]) {
			c.pods[way[0]].await("ping -c 1 -W 0.2 " + addr)
		}
	}
	took := time.Since(start)
	c.router.t.Logf("n%d has changed as n%d: they reach each other after %v", second, first, took)
	if took > soon() {
		c.router.t.Errorf("n%d has changed as n%d: they reach each other after %v, want %v", second, first, took, soon())
	}
}

// Whatever nodes need not agree on comes into force under calls that go on.
func TestNetConfIsFollowedUnderTraffic(t *testing.T) {
	t.Parallel()
	c := newThreeNodes(t)
	for n := 1; n <= 3; n++ { // for the moment in which one of two nodes routes directly already
		c.nodes[n].types("sysctl -w net.ipv4.conf.all.rp_filter=2")
	}
	plain := confOf(`"Backend": {}`)
	c.runAs(plain)
	c.reaches(1, 2)
	c.daemons[1].settles()
	before := c.daemons[1].ours()
	devices := []string{c.nodes[1].index("tweed.1"), c.nodes[1].index("tweed0")}
	bothHave := func(conf string) {
		for n := 1; n <= 2; n++ {
			c.daemons[n].configure(conf)
		}
	}
	for _, change := range []struct {
		keys, command, shows string
	}{
		{`"PacketFilter": "nftables"`, "nft list tables", "table ip6 tweed"},
		{`"NonMasqueradeCIDRs": ["203.0.113.0/24", "2001:db8:77::/64"]`, "iptables-save", "203.0.113.0/24"},
		{`"Backend": {"MTU": 1400}`, "ip link show tweed0", "mtu 1350 "},
		{`"Backend": {"ChecksumOffload": "off"}`, "ethtool -k tweed.1", "tx-checksumming: off"},
		{`"Backend": {"DirectRouting": true}`, "ip -6 route show proto 116", "via 2001:db8::12 dev eth0"},
		{`"Backend": {}`, "ip -6 route show proto 116", "dev tweed.1"},
	} {
		pings := c.pings(1, 2)
		c.allAnswered(pings)
		start := time.Now()
		bothHave(confOf(change.keys))
		for n := 1; n <= 2; n++ {
			c.nodes[n].awaitShows(change.command, strings.Replace(change.shows, "8::12", fmt.Sprintf("8::1%d", 3-n), 1))
		}
		if took := time.Since(start); took > soon() {
			t.Errorf("%s: in force after %v, want %v at most", change.keys, took, soon())
		}
		bothHave(plain)
		c.isAsBefore(1, before)
		c.allAnswered(pings)
		lost := c.lost(pings)
		t.Logf("%s and back: calls are unanswered for %v", change.keys, lost)
		if lost > 2*every {
			t.Errorf("%s and back: calls are unanswered for %v", change.keys, lost)
		}
	}
	c.refused(1, plain, `"Backend": {"VNI": 0}`, "Backend.VNI 0")
	c.refused(1, plain, `"Backend": {"VNI": 7}, "SubnetLen": 25`, "SubnetLen is 24 in force and 25 in the file")
	if now := []string{c.nodes[1].index("tweed.1"), c.nodes[1].index("tweed0")}; !slices.Equal(now, devices) {
		t.Errorf("the devices are others, %v instead of %v", now, devices)
	}
}

// refused gives a node a net-conf.json that cannot come into force, awaits that it says so, and restores the one that
// is.
func (c *threeNodes) refused(n int, inForce, keys, why string) {
	c.router.t.Helper()
	c.daemons[n].settles()
	before := c.daemons[n].ours()
	c.daemons[n].configure(confOf(keys))
	c.nodes[n].awaitProblem(fmt.Sprintf("n%d", n), why)
	c.nodes[n].awaitProblem(fmt.Sprintf("n%d", n), "what was in force stays")
	same(c.router.t, "while the file is refused", before, c.daemons[n].ours())
	c.daemons[n].configure(inForce)
	c.nodes[n].awaitProblem(fmt.Sprintf("n%d", n), "")
}

// isAsBefore waits until a node has settled, and compares what it has with what it had.
func (c *threeNodes) isAsBefore(n int, before string) {
	c.router.t.Helper()
	c.daemons[n].settles()
	same(c.router.t, fmt.Sprintf("on n%d", n), before, c.daemons[n].ours())
}

// From a tunnel to none and back: calls of nodes on one segment go on once both have changed.
func TestBackendChangesItsType(t *testing.T) {
	t.Parallel()
	c := newThreeNodes(t)
	c.run(`{}`)
	c.reaches(1, 2)
	c.daemons[1].settles()
	before := c.daemons[1].ours()
	bothHave := func(backend, command, shows string) func() {
		return func() {
			for n := 1; n <= 3; n++ {
				c.daemons[n].configure(confOf(`"Backend": ` + backend))
			}
			for n := 1; n <= 2; n++ {
				c.nodes[n].awaitShows(command, shows)
			}
		}
	}
	c.follows(1, 2, "host-gw", bothHave(`{"Type": "host-gw"}`, "ip link show tweed0", "mtu 1500 "))
	c.goes(1, 2, plainly(2)...)
	if out := c.nodes[1].Run(t, "ip link show type vxlan"); out != "" {
		t.Errorf("there still is a tunnel:\n%s", out)
	}
	c.leavesNothing(1, 2)
	c.follows(1, 2, "vxlan", bothHave(`{}`, "ip link show tweed0", "mtu 1450 "))
	c.goes(1, 2, tunnelled(2)...)
	c.isAsBefore(1, before)
}

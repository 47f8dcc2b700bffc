package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend/masq"
)

// get takes in what arrives until text has, and reports whether it has in time.
func (v *target) get(text string, within time.Duration) bool {
	v.t.Helper()
	buf := make([]byte, 2000)
	_ = v.conn.SetReadDeadline(time.Now().Add(within))
	for !v.got[text] {
		n, err := v.conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		if err != nil {
			v.t.Fatal(err)
		}
		v.got[string(buf[:n])] = true
	}
	return true
}

// A siege is a cluster under attack: nodes n1 and n2 and a stranger share a segment. The attacker's pod is on n1; on
// each node is a pod that must not get anything. Of a node n3 there is nothing but its lease.
type siege struct {
	t        *testing.T
	family   masq.Family
	nodes    map[string]host
	stranger host
	attacker host
	victims  map[string]*target // by node
	leases   string
	lan      host
	made     int // attempts
}

// victimAddr is the address of the victim on a node.
func victimAddr(node string) string {
	return map[string]string{"n1": "10.244.1.6", "n2": "10.244.2.5"}[node]
}

// forgedAddr is one that an attacker would like to have there.
func forgedAddr(node string) string {
	return map[string]string{"n1": "10.244.2.66", "n2": "10.244.1.66"}[node]
}

// addr chooses what is of the underlay's family.
func (c *siege) addr(four, six string) string {
	if c.family == masq.IPv6 {
		return six
	}
	return four
}

func (c *siege) of(n int) string {
	return c.addr(fmt.Sprintf("192.0.2.%d", n), fmt.Sprintf("2001:db8::%d", n))
}

// port is a place to send to.
func port(addr string, n uint16) string {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), n).String()
}

// A keep is how the nodes of a siege are configured.
type keep struct {
	form   masq.Form
	family masq.Family
	extra1 string // keys of net-conf.json, on n1
	extra2 string // and on n2
}

const (
	guardOn  = `"Backend": {}`
	guardOff = `"Backend": {"Guard": false}`
)

func newSiege(t *testing.T, k keep) *siege {
	t.Helper()
	c := &siege{
		t: t, family: k.family, leases: t.TempDir(), lan: newHost(t), victims: map[string]*target{}, nodes: map[string]host{},
	}
	c.lan.types(`
		ip link add lan type bridge mcast_snooping 0
		ip link set lan up`)
	c.nodes["n1"], c.nodes["n2"], c.stranger = c.plug(11), c.plug(12), c.plug(99)
	c.lease3("")
	for n, extra := range []string{k.extra1, k.extra2} {
		daemon(c.nodes[fmt.Sprintf("n%d", n+1)], c.leases, n+1, fmt.Sprintf(`{
			"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",
			"Underlay": "ipv%d", "PacketFilter": %q, %s}`, k.family, k.form, extra))
	}
	c.attacker = pod(c.nodes["n1"], 1)
	c.victims["n1"], c.victims["n2"] = newTarget(t, c.neighbour()), newTarget(t, pod(c.nodes["n2"], 2))
	for _, addr := range append(podAddrs(2), victimAddr("n1")) {
		c.attacker.await("ping -c 1 -W 1 " + addr)
	}
	return c
}

func (c *siege) plug(n int) host {
	h := newHost(c.t)
	cable(h, "eth0", c.lan, fmt.Sprintf("n%d", n))
	c.lan.types(fmt.Sprintf("ip link set n%d master lan up", n))
	h.types(fmt.Sprintf(`
		ip link set eth0 up
		ip addr add 192.0.2.%[1]d/24 dev eth0
		ip addr add 2001:db8::%[1]d/64 dev eth0 nodad`, n))
	return h
}

// lease3 writes the lease of n3, with more fields.
func (c *siege) lease3(more string) {
	c.t.Helper()
	text := fmt.Sprintf(`{"node":"n3","since":"2026-01-02T03:04:09Z","subnets":"10.244.3.0/24","host":%q,
		"backend":"vxlan","backend-data":{"vni":1,"port":8472,"mac":"0e:00:00:00:00:03"}%s}`, c.of(13), more)
	if err := os.WriteFile(filepath.Join(c.leases, "n3.json"), []byte(text), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

// neighbour is a second pod on n1.
func (c *siege) neighbour() host {
	p := newHost(c.t)
	cable(c.nodes["n1"], "pod2", p, "eth0")
	c.nodes["n1"].Run(c.t, "ip link set pod2 master tweed0 up")
	p.types(`
		ip link set eth0 up
		ip addr add 10.244.1.6/24 dev eth0
		ip route add default via 10.244.1.1`)
	return p
}

// An attempt is a way to a node's pods that has to be closed.
type attempt struct {
	what     string
	by       host
	from, to string // as forge takes them
	on       string // the node whose pod would get it
	reason   string // for which it is dropped
}

// attempts are what each attacker can try. What an administrator or a Service would translate is prepared.
func (c *siege) attempts() []attempt {
	c.t.Helper()
	dnat := func(node, addr string, at int, to string) {
		c.iptables(node, fmt.Sprintf("-t nat -A PREROUTING -p udp -d %s --dport %d -j DNAT --to-destination %s",
			addr, at, port(to, 8472)))
	}
	one, two, three := c.of(11), c.of(12), c.of(13)
	service := c.addr("198.51.100.80", "2001:db8:5::80")
	dnat("n1", service, 80, two)
	dnat("n1", service, 81, one)
	dnat("n2", two, 30080, two)
	dnat("n2", two, 30081, one)
	c.iptables("n2", "-t nat -A POSTROUTING -p udp --dport 8472 -m conntrack --ctstate DNAT -j MASQUERADE")
	c.attacker.Run(c.t, "ip addr add "+three+" dev lo")
	bridge1, bridge2 := c.addr("10.244.1.1", "fd00:10:244:1::1"), c.addr("10.244.2.1", "fd00:10:244:2::1")
	pod, translated := masq.DroppedPod, masq.DroppedTranslated
	return []attempt{
		{"a pod to another node, with its node's address", c.attacker, "-", port(two, 8472), "n2", pod},
		{"a pod to its own node", c.attacker, "-", port(one, 8472), "n1", pod},
		{"a pod to its own node, with another node's address", c.attacker, three, port(one, 8472), "n1", pod},
		{"a pod to its own bridge", c.attacker, "-", port(bridge1, 8472), "n1", pod},
		{"a pod through the tunnel", c.attacker, "-", port(bridge2, 8472), "n2", pod},
		{"a pod by a service to another node", c.attacker, "-", port(service, 80), "n2", pod},
		{"a pod by a service to its own node", c.attacker, "-", port(service, 81), "n1", pod},
		{"a pod by a node port", c.attacker, "-", port(two, 30080), "n2", pod},
		{"a pod by a node port that leads back", c.attacker, "-", port(two, 30081), "n1", pod},
		{"a stranger by a node port", c.stranger, "-", port(two, 30080), "n2", translated},
		{"a stranger", c.stranger, "-", port(two, 8472), "n2", masq.DroppedStranger},
	}
}

// iptables types a rule of an administrator's.
func (c *siege) iptables(node, rule string) {
	c.t.Helper()
	c.nodes[node].Run(c.t, c.addr("iptables ", "ip6tables ")+rule)
}

// make makes an attempt with a datagram of a size, and returns what the victim would get.
func (c *siege) make(a attempt, size int) (text string) {
	c.t.Helper()
	c.made++
	text = fmt.Sprintf("attempt %d", c.made)
	a.by.Run(c.t, fmt.Sprintf("forge %s %s %s", a.from, a.to,
		frame{node: a.on, from: forgedAddr(a.on), to: victimAddr(a.on), text: text, size: size}.encapsulated()))
	return text
}

// sizes are those of a datagram that goes as it is, and of one that goes in fragments.
func sizes() map[string]int { return map[string]int{"whole": 0, "in fragments": 2500} }

// drops reads the guard's counters of both nodes.
func (c *siege) drops() map[string]int {
	c.t.Helper()
	n := map[string]int{}
	for _, node := range c.nodes {
		for line := range strings.Lines(node.Run(c.t, "curl -sf http://127.0.0.1:9479/metrics")) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			if reason, is := strings.CutPrefix(name, `tweed_guard_drops_total{reason="`); is {
				count, err := strconv.Atoi(value)
				if err != nil {
					c.t.Fatal(err)
				}
				n[strings.TrimSuffix(reason, `"}`)] += count
			}
		}
	}
	return n
}

// fails makes an attempt, and looks whether it was dropped and counted.
func (c *siege) fails(a attempt, how string, size int) {
	c.t.Helper()
	before := c.drops()[a.reason]
	text := c.make(a, size)
	if c.drops()[a.reason] == before {
		c.t.Errorf("%s, %s: not counted as %s", a.what, how, a.reason)
	}
	if c.victims[a.on].get(text, time.Millisecond) {
		c.t.Errorf("%s, %s: a pod on %s got it", a.what, how, a.on)
	}
}

// succeeds makes an attempt until the victim gets it.
func (c *siege) succeeds(a attempt, how string, size int) {
	c.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if c.victims[a.on].get(c.make(a, size), 500*time.Millisecond) {
			return
		}
	}
	c.t.Errorf("%s, %s: no pod on %s got it, so that the guard keeps nothing out", a.what, how, a.on)
}

// still has pods talk through the tunnel, in small packets and large.
func (c *siege) still() {
	c.t.Helper()
	for _, addr := range podAddrs(2) {
		c.attacker.await("ping -c 1 -W 1 " + addr)
		c.attacker.await("ping -c 1 -W 1 -s 3000 " + addr)
	}
}

// tracks reports whether a node keeps a connection for what n1 sends others.
func (c *siege) tracks(node string) bool {
	c.t.Helper()
	list := c.addr("conntrack -f ipv4", "conntrack -f ipv6") + " -L -p udp --orig-port-dst 8472 -s " + c.of(11)
	return strings.Contains(c.nodes[node].Run(c.t, list), "dport=8472")
}

// inEachSiege runs a test with the packet filter in each form and over each underlay.
func inEachSiege(t *testing.T, test func(t *testing.T, form masq.Form, family masq.Family)) {
	for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
		for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
			besiege(t, form, family, test)
		}
	}
}

// inTwoSieges does it for half of these, where the other half would tell little more.
func inTwoSieges(t *testing.T, test func(t *testing.T, form masq.Form, family masq.Family)) {
	besiege(t, masq.IPTables, masq.IPv6, test)
	besiege(t, masq.NFTables, masq.IPv4, test)
}

func besiege(t *testing.T, form masq.Form, family masq.Family, test func(*testing.T, masq.Form, masq.Family)) {
	t.Run(fmt.Sprintf("%s IPv%d", form, family), func(t *testing.T) {
		t.Parallel()
		test(t, form, family)
	})
}

// TestAttackerGetsAFrameIntoAPod tries all that a pod without rights, and a stranger, can do.
func TestAttackerGetsAFrameIntoAPod(t *testing.T) {
	inEachSiege(t, func(t *testing.T, form masq.Form, family masq.Family) {
		c := newSiege(t, keep{form, family, guardOn, guardOn})
		for _, a := range c.attempts() {
			for how, size := range sizes() {
				c.fails(a, how, size)
			}
		}
		c.still()
		if c.tracks("n1") || c.tracks("n2") {
			t.Error("connections are tracked")
		}
	})
}

// TestAttacksProveNothing makes the same attempts where nothing is guarded: each has to succeed.
func TestAttacksProveNothing(t *testing.T) {
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) {
			t.Parallel()
			c := newSiege(t, keep{masq.NFTables, family, guardOff, guardOff})
			for _, a := range c.attempts() {
				for how, size := range sizes() {
					c.succeeds(a, how, size)
				}
			}
			if n := c.drops(); len(n) > 0 {
				t.Errorf("counted without a guard: %v", n)
			}
			if !c.tracks("n1") {
				t.Error("no connection is tracked, and that would not be seen")
			}
		})
	}
}

// TestPodOfAnUnguardedNodeIsLetIn has the attacker's own node send on what it sends, as it is.
func TestPodOfAnUnguardedNodeIsLetIn(t *testing.T) {
	inTwoSieges(t, func(t *testing.T, form masq.Form, family masq.Family) {
		c := newSiege(t, keep{form, family, `"NonMasqueradeCIDRs": ["192.0.2.0/24", "2001:db8::/64"], ` + guardOff, guardOn})
		a := attempt{"a pod, with its own address", c.attacker, "-", port(c.of(12), 8472), "n2", masq.DroppedPod}
		for how, size := range sizes() {
			c.fails(a, how, size)
		}
	})
}

// TestPlainRouteLeadsToThePort has a pod send to another node's bridge past the tunnel, with its node's address.
func TestPlainRouteLeadsToThePort(t *testing.T) {
	for guard, form := range map[bool]masq.Form{true: masq.IPTables, false: masq.NFTables} {
		t.Run(fmt.Sprintf("guard %v", guard), func(t *testing.T) {
			t.Parallel()
			direct := fmt.Sprintf(`"Backend": {"DirectRouting": true, "Guard": %v}`, guard)
			c := newSiege(t, keep{form, masq.IPv4, direct, direct})
			c.attacker.Run(t, "ip addr add 192.0.2.13/32 dev lo")
			a := attempt{"a pod", c.attacker, "192.0.2.13", "10.244.2.1:8472", "n2", masq.DroppedPod}
			for how, size := range sizes() {
				if guard {
					c.fails(a, how, size)
				} else {
					c.succeeds(a, how, size)
				}
			}
		})
	}
}

// TestPeerIsTakenForAStranger has n3 send from its address, and from one that an operator says is n3's too.
func TestPeerIsTakenForAStranger(t *testing.T) {
	inTwoSieges(t, func(t *testing.T, form masq.Form, family masq.Family) {
		c := newSiege(t, keep{form, family, guardOn, guardOn})
		three := c.of(13)
		c.stranger.await("ip addr replace " + three + c.addr("/24", "/64") + " dev eth0 nodad")
		a := attempt{"n3", c.stranger, three, port(c.of(12), 8472), "n2", masq.DroppedStranger}
		c.succeeds(a, "from its address", 0)
		a.from = c.of(99)
		c.fails(a, "from another address", 0)
		c.lease3(fmt.Sprintf(`,"sources":%q`, c.of(98)+","+c.of(99)))
		c.succeeds(a, "from an address that was named", 2500)
		c.lease3("")
		c.awaitFails(a, "from an address that is named no more")
	})
}

// awaitFails makes an attempt until it is dropped.
func (c *siege) awaitFails(a attempt, how string) {
	c.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		before := c.drops()[a.reason]
		if c.make(a, 0); c.drops()[a.reason] > before {
			return
		}
	}
	c.t.Errorf("%s, %s: not dropped after 10 s", a.what, how)
}

// TestHostDropsWhatItDoesNotKnow has the nodes' own filter close the tunnel's port.
func TestHostDropsWhatItDoesNotKnow(t *testing.T) {
	inTwoSieges(t, func(t *testing.T, form masq.Form, family masq.Family) {
		c := newSiege(t, keep{form, family, `"Backend": {"AcceptPeers": true}`, guardOn})
		closed := func(node string) {
			c.iptables(node, "-A INPUT -i lo -j ACCEPT")
			c.iptables(node, "-A INPUT -p "+c.addr("icmp", "icmpv6")+" -j ACCEPT")
			c.iptables(node, "-A INPUT -m comment --comment firewall -j DROP")
		}
		closed("n1")
		c.still()
		a := attempt{"a stranger", c.stranger, "-", port(c.of(11), 8472), "n1", masq.DroppedStranger}
		c.fails(a, "where peers are accepted", 0)
		closed("n2")
		if out, err := c.attacker.Try(t, "ping -c 1 -W 1 "+victimAddr("n2")); err == nil {
			t.Errorf("the nodes' own filter closes nothing:\n%s", out)
		}
	})
}

// TestPacketsComeByAnotherCableThanTheyLeave has each of two nodes, with addresses on lo, prefer another cable.
func TestPacketsComeByAnotherCableThanTheyLeave(t *testing.T) {
	for _, u := range underlays() {
		for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
			t.Run(fmt.Sprintf("%s %s", form, u.family), func(t *testing.T) {
				t.Parallel()
				one, two, leases := newHost(t), newHost(t), t.TempDir()
				for _, h := range []host{one, two} {
					h.types(`
						sysctl -w net.ipv4.conf.all.rp_filter=0
						sysctl -w net.ipv4.conf.default.rp_filter=0`)
				}
				u.join(one, two)
				one.Run(t, "ip route replace "+u.of(2)+" src "+u.of(1)+" via "+fmt.Sprintf(u.cable, 1)+" dev eth0")
				two.Run(t, "ip route replace "+u.of(1)+" src "+u.of(2)+" via "+fmt.Sprintf(u.cable, 2)+" dev eth1")
				conf := strings.Replace(u.conf(), "{", fmt.Sprintf(`{"PacketFilter": %q,`, form), 1)
				daemon(one, leases, 1, conf, "--iface", "lo")
				daemon(two, leases, 2, conf, "--iface", "lo")
				reach(pod(one, 1), pod(two, 2))
			})
		}
	}
}

package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// follows has the pods of two nodes call each other while something changes, which change awaits, and checks that they
// do again soon.
func (c *threeNodes) follows(a, b int, what string, change func()) {
	c.router.t.Helper()
	c.reaches(a, b)
	pings := c.pings(a, b)
	c.allAnswered(pings)
	change()
	c.allAnswered(pings)
	lost := c.lost(pings)
	c.router.t.Logf("%s: calls are unanswered for %v", what, lost)
	if lost > soon() {
		c.router.t.Errorf("%s: calls are unanswered for %v, want %v at most", what, lost, soon())
	}
}

// index is the number of a device. It stays as long as the device is the same one.
func (h host) index(dev string) string {
	h.t.Helper()
	number, _, _ := strings.Cut(h.Run(h.t, "ip -o link show dev "+dev), ":")
	return number
}

// inconstant is what says nothing about what is there: numbers of devices, counts, times, and in which order tables of
// nftables were made.
var inconstant = regexp.MustCompile(`(?m)^\d+: |^#.*$| \[\d+:\d+\]$|_timer +[\d.]+| tentative\b`)

// ours is all that a person can see of tweed on the node.
func (d *running) ours() string {
	d.t.Helper()
	var all []string
	for _, c := range []string{
		"ip -d -o link show group 116", "ip -o addr show dev tweed0", "ip -o addr show type vxlan",
		"ip -4 route show table all proto 116", "ip -6 route show table all proto 116", "ip -4 rule", "ip -6 rule",
		"ip -4 neigh show nud permanent", "ip -6 neigh show nud permanent", "bridge fdb show",
		"iptables-nft-save", "ip6tables-nft-save", "nft -s list ruleset",
	} {
		for line := range strings.Lines(inconstant.ReplaceAllString(d.Run(d.t, c), "")) {
			if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, " dev pod ") {
				all = append(all, c+": "+line)
			}
		}
	}
	slices.Sort(all)
	return strings.Join(all, "\n")
}

// leavesNothing compares what is on a node after all changes with what a daemon makes of a node that has nothing.
// Others are those that its pod then reaches.
func (c *threeNodes) leavesNothing(n int, others ...int) {
	c.router.t.Helper()
	d := c.daemons[n]
	d.settles()
	before := d.ours()
	d.stop()
	run, cni := filepath.Join(d.dir, "run"), filepath.Join(d.dir, "cni")
	cleanup := d.tweed("cleanup", "--run-dir", run, "--cni-conf-dir", cni, "--cni-bin-dir", d.dir)
	if out, err := cleanup.CombinedOutput(); err != nil {
		d.t.Fatalf("cleanup: %v\n%s", err, out)
	}
	d.start()
	d.types("ip link set pod master tweed0")
	d.settles()
	same(d.t, fmt.Sprintf("after the changes, on n%d", n), d.ours(), before)
	for _, other := range others {
		c.reaches(n, other)
	}
}

// A change is made to the addresses of an underlay of one family.
func eachUnderlay(t *testing.T, test func(t *testing.T, c *threeNodes, v6 bool)) {
	t.Parallel()
	for _, family := range []string{"ipv4", "ipv6"} {
		t.Run(family, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.runAs(confOf(fmt.Sprintf(`"Underlay": %q`, family)))
			c.reaches(1, 2)
			c.reaches(1, 3)
			test(t, c, family == "ipv6")
		})
	}
}

// pick is one of two, by the family.
func pick(v6 bool, four, six string) string {
	if v6 {
		return six
	}
	return four
}

func TestOwnAddressMovesToAnother(t *testing.T) {
	eachUnderlay(t, func(t *testing.T, c *threeNodes, v6 bool) {
		device, was := c.nodes[1].index("tweed.1"), pick(v6, "192.0.2.11", "2001:db8::11")
		now := pick(v6, "192.0.2.21", "2001:db8::21")
		c.follows(1, 2, "own address", func() {
			c.nodes[1].types(`
				ip addr flush dev eth0 scope global
				ip addr add 192.0.2.21/24 dev eth0
				ip addr add 2001:db8::21/64 dev eth0 nodad
				ip route replace default via 192.0.2.1
				ip -6 route replace default via 2001:db8::1`)
			c.nodes[2].awaitShows("bridge fdb show dev tweed.1", "dst "+now+" ")
		})
		c.nodes[1].shows("ip -d link show tweed.1", "local "+now+" dev eth0")
		if got := c.nodes[1].index("tweed.1"); got != device {
			t.Errorf("the device is another, %s instead of %s", got, device)
		}
		if out := c.nodes[2].Run(t, "bridge fdb show dev tweed.1"); strings.Contains(out, "dst "+was+" ") {
			t.Errorf("n2 still sends to %s:\n%s", was, out)
		}
		c.leavesNothing(1, 2)
	})
}

// The address goes to another device of the node. Then that one is deleted, which the VXLAN device does not survive.
func TestUplinkIsReplaced(t *testing.T) {
	eachUnderlay(t, func(t *testing.T, c *threeNodes, v6 bool) {
		node := c.nodes[1]
		device, local := node.index("tweed.1"), pick(v6, "192.0.2.11", "2001:db8::11")
		second := func(dev, port string) {
			cable(node, dev, c.router, port)
			c.router.types("ip link set " + port + " master lan up")
			node.types("ip link set " + dev + " up")
		}
		address := func(dev string) {
			node.types(fmt.Sprintf(`
				ip addr add 192.0.2.11/24 dev %[1]s
				ip addr add 2001:db8::11/64 dev %[1]s nodad
				ip route replace default via 192.0.2.1
				ip -6 route replace default via 2001:db8::1`, dev))
			node.awaitShows("ip -d link show tweed.1", "local "+local+" dev "+dev)
		}
		second("eth1", "n1b")
		c.follows(1, 2, "address goes to eth1", func() {
			node.types(`
				ip addr flush dev eth0 scope global
				ip link set eth0 down`)
			address("eth1")
		})
		if got := node.index("tweed.1"); got != device {
			t.Errorf("the device is another, %s instead of %s", got, device)
		}
		c.follows(1, 2, "eth1 is replaced", func() {
			node.types("ip link del eth1")
			second("eth2", "n1c")
			address("eth2")
		})
		c.leavesNothing(1, 2)
	})
}

// A stream is a TCP connection that carries as much as it can.
type stream struct {
	ends []io.Closer
	got  atomic.Int64 // bytes
}

// stream opens one from a pod to another's address, until the test ends.
func (h host) stream(to host, addr string) *stream {
	h.t.Helper()
	s := &stream{}
	var l net.Listener
	var near, far net.Conn
	var err error
	fail := func(what string) {
		if err != nil {
			h.t.Fatalf("%s %s: %v", what, addr, err)
		}
	}
	to.Do(h.t, func() { l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")) })
	fail("listening at")
	defer l.Close()
	h.Do(h.t, func() { near, err = net.DialTimeout("tcp", l.Addr().String(), soon()) })
	fail("calling")
	far, err = l.Accept()
	fail("accepting at")
	s.ends = []io.Closer{near, far}
	h.t.Cleanup(func() { near.Close(); far.Close() })
	go func() {
		for chunk := make([]byte, 1<<16); ; {
			if _, err := near.Write(chunk); err != nil {
				return
			}
		}
	}()
	go func() {
		for chunk := make([]byte, 1<<16); ; {
			n, err := far.Read(chunk)
			s.got.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return s
}

// goesOn waits until more has arrived than can have been under way, and returns how long that took.
func (s *stream) goesOn(t *testing.T, when string) {
	t.Helper()
	const most = 16 << 20 // bytes in buffers of sender and receiver
	start, before := time.Now(), s.got.Load()
	for s.got.Load() < before+most {
		if time.Since(start) > 30*time.Second {
			t.Fatalf("%s, a large transfer stands still after %d bytes", when, s.got.Load()-before)
		}
		time.Sleep(every)
	}
	took := time.Since(start)
	t.Logf("%s, a large transfer has gone on for 16 MiB after %v", when, took)
	if took > soon() {
		t.Errorf("%s, a large transfer has gone on for 16 MiB after %v, want %v", when, took, soon())
	}
}

// The underlay is narrowed, widened and narrowed again under a connection of pods that have the largest MTU of all.
func TestUnderlayIsNarrowedUnderALargeTransfer(t *testing.T) {
	eachUnderlay(t, func(t *testing.T, c *threeNodes, v6 bool) {
		headers := map[bool]int{false: 50, true: 70}[v6]
		devices := []string{c.nodes[1].index("tweed.1"), c.nodes[1].index("tweed0")}
		for n := 1; n <= 2; n++ {
			c.nodes[n].types("ip link set pod mtu 9000")
			c.pods[n].types("ip link set eth0 mtu 9000")
		}
		var streams []*stream
		for _, addr := range podAddrs(2) {
			streams = append(streams, c.pods[1].stream(c.pods[2], addr))
		}
		for _, mtu := range []int{1500, 1400, 9000, 1500} {
			for n := 1; n <= 3; n++ {
				c.nodes[n].types(fmt.Sprintf("ip link set eth0 mtu %d", mtu))
				c.router.types(fmt.Sprintf("ip link set n%d mtu %d", n, mtu))
			}
			c.router.types(fmt.Sprintf("ip link set lan mtu %d", mtu))
			for n := 1; n <= 2; n++ {
				for _, dev := range []string{"tweed.1", "tweed0"} {
					c.nodes[n].awaitShows("ip link show "+dev, fmt.Sprintf("mtu %d ", mtu-headers))
				}
			}
			for _, s := range streams {
				s.goesOn(t, fmt.Sprintf("with an MTU of %d", mtu))
			}
		}
		if now := []string{c.nodes[1].index("tweed.1"), c.nodes[1].index("tweed0")}; !slices.Equal(now, devices) {
			t.Errorf("the devices are others, %v instead of %v", now, devices)
		}
		c.leavesNothing(1, 2)
	})
}

// A handmade peer is node n2, without a daemon: a person has typed what a peer needs, and changes it. The pod that is
// called has its addresses on the node's lo.
type handmade struct {
	host
	c             *threeNodes
	subnet, host4 string
	mac           string
	neighs        string // commands for n1's, which another MAC takes away
	four, six     bool
}

// says writes the peer's lease.
func (p *handmade) says() {
	p.t.Helper()
	var subnets []string
	if p.four {
		subnets = append(subnets, "10.244."+p.subnet+".0/24")
	}
	if p.six {
		subnets = append(subnets, "fd00:10:244:"+p.subnet+"::/64")
	}
	text := fmt.Sprintf(`{"node":"n2","since":"2026-01-02T03:04:05Z","subnets":%q,"host":%q,"backend":"vxlan",`+
		`"backend-data":{"vni":1,"port":8472,"mac":%q}}`, strings.Join(subnets, ","), p.host4, p.mac)
	path := filepath.Join(p.c.leases, "n2.json")
	err := os.WriteFile(path+".new", []byte(text), 0o644)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// build makes the peer's device, and what leads to n1.
func (p *handmade) build() {
	one := p.c.nodes[1]
	mac := regexp.MustCompile(`link/ether (\S+)`).FindStringSubmatch(one.Run(p.t, "ip link show tweed.1"))[1]
	ll := regexp.MustCompile(`inet6 (fe80::\S+)/64`).FindStringSubmatch(one.Run(p.t, "ip -6 addr show tweed.1"))[1]
	p.neighs = fmt.Sprintf(`
		ip neigh replace 10.244.1.0 lladdr %[1]s dev vx nud permanent
		ip neigh replace %[2]s lladdr %[1]s dev vx nud permanent`, mac, ll)
	p.types(fmt.Sprintf(`
		ip link add vx address %[3]s mtu 1450 type vxlan id 1 dstport 8472 local %[4]s dev eth0 nolearning
		ip link set vx up
		bridge fdb append %[1]s dev vx dst 192.0.2.11
		ip route add 10.244.1.0/24 via 10.244.1.0 dev vx onlink
		ip route add fd00:10:244:1::/64 via %[2]s dev vx
		ip addr add 10.244.%[5]s.5/32 dev lo
		ip addr add fd00:10:244:%[5]s::5/128 dev lo`, mac, ll, p.mac, p.host4, p.subnet) + p.neighs)
}

// followed checks that n1's pod reaches what the peer has, soon, and that n1 has nothing else of the peer.
func (p *handmade) followed(what string, start time.Time) {
	p.t.Helper()
	one, pod := p.c.nodes[1], p.c.pods[1]
	want := 0
	for _, f := range []struct {
		has  bool
		addr string
	}{{p.four, "10.244." + p.subnet + ".5"}, {p.six, "fd00:10:244:" + p.subnet + "::5"}} {
		if f.has {
			want++
			pod.await("ping -c 1 -W 0.2 " + f.addr)
		}
	}
	took := time.Since(start)
	p.t.Logf("%s: it is reached after %v", what, took)
	if took > soon() {
		p.t.Errorf("%s: it is reached after %v, want %v at most", what, took, soon())
	}
	awaitLines := func(command, with string, want int) {
		p.t.Helper()
		out, have := "", []string(nil)
		for deadline := time.Now().Add(soon()); time.Now().Before(deadline); {
			out, have = one.Run(p.t, command), nil
			for line := range strings.Lines(out) {
				if strings.Contains(line, with) {
					have = append(have, line)
				}
			}
			if len(have) == want {
				return
			}
		}
		p.t.Errorf("%s: %s: want %d lines with %q in\n%s", what, command, want, with, out)
	}
	awaitLines("bridge fdb show dev tweed.1", "dst", 1)
	awaitLines("bridge fdb show dev tweed.1", p.mac+" dst "+p.host4+" ", 1)
	awaitLines("ip neigh show dev tweed.1 nud permanent", p.mac, want)
	awaitLines("ip neigh show dev tweed.1 nud permanent", "", want)
	awaitLines("ip -4 route show dev tweed.1 proto 116", "", want-btoi(p.six))
	awaitLines("ip -6 route show dev tweed.1 proto 116", "", want-btoi(p.four))
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// What a peer says about itself changes, one thing after the other.
func TestPeerChangesWhatItPublishes(t *testing.T) {
	t.Parallel()
	c := newThreeNodes(t)
	c.daemons[1] = daemon(c.nodes[1], c.leases, 1, confOf(`"Underlay": "ipv4"`))
	c.pods[1] = pod(c.nodes[1], 1)
	p := &handmade{host: c.nodes[2], c: c, subnet: "2", host4: "192.0.2.12", mac: "0e:00:00:00:00:02"}
	p.four, p.six = true, true
	p.build()
	p.says()
	p.followed("joined", time.Now())
	for _, change := range []struct {
		what, commands string
		change         func()
	}{
		{"host", "ip addr add 192.0.2.22/24 dev eth0\nip link set vx type vxlan id 1 local 192.0.2.22 dev eth0",
			func() { p.host4 = "192.0.2.22" }},
		{"MAC", "ip link set vx address 0e:00:00:00:00:22" + p.neighs, func() { p.mac = "0e:00:00:00:00:22" }},
		{"subnet", "ip addr add 10.244.22.5/32 dev lo\nip addr add fd00:10:244:22::5/128 dev lo",
			func() { p.subnet = "22" }},
		{"IPv6 goes", "", func() { p.six = false }},
		{"IPv6 comes, IPv4 goes", "", func() { p.six, p.four = true, false }},
		{"IPv4 comes", "", func() { p.four = true }},
	} {
		start := time.Now()
		p.types(change.commands)
		change.change()
		p.says()
		p.followed(change.what, start)
	}
}

// Only the family whose address goes, or comes back, is sent another way.
func TestNodeLosesTheAddressOfOneFamily(t *testing.T) {
	t.Parallel()
	c := newThreeNodes(t)
	c.run(`{"DirectRouting": true}`)
	c.goes(1, 2, plainly(2)...)
	c.goes(2, 1, plainly(1)...)
	c.follows(1, 2, "IPv6 goes", func() {
		c.nodes[2].types("ip addr del 2001:db8::12/64 dev eth0")
		c.goes(1, 2, plainly(2)[0], tunnelled(2)[1])
		c.goes(2, 1, plainly(1)[0], tunnelled(1)[1])
	})
	c.follows(1, 2, "IPv6 comes", func() {
		c.nodes[2].types("ip addr add 2001:db8::12/64 dev eth0 nodad")
		c.goes(1, 2, plainly(2)...)
		c.goes(2, 1, plainly(1)...)
	})
	c.leavesNothing(2, 1)
}

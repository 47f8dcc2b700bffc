package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Three nodes: n1 and n2 on one segment, n3 behind a router, which knows nothing of pods.
type threeNodes struct {
	router host
	nodes  [4]host // by number
	pods   [4]host
	leases string

	daemons [4]*running
}

// newThreeNodes lays the cables. Nodes check strictly whether a packet comes from where one to its source would go.
func newThreeNodes(t *testing.T) *threeNodes {
	t.Helper()
	c := &threeNodes{router: newHost(t), leases: t.TempDir()}
	c.router.types(`
		ip link add lan type bridge mcast_snooping 0
		ip link set lan up
		ip addr add 192.0.2.1/24 dev lan
		ip addr add 2001:db8::1/64 dev lan nodad
		sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.send_redirects=0`)
	for n := 1; n <= 3; n++ {
		node := newHost(t)
		c.nodes[n] = node
		cable(node, "eth0", c.router, fmt.Sprintf("n%d", n))
		c.router.types(fmt.Sprintf("ip link set n%d up", n))
		node.types(`
			sysctl -w net.ipv4.conf.all.rp_filter=1
			ip link set eth0 up`)
	}
	c.nearby(1)
	c.nearby(2)
	c.far(3, "198.51.100", "2001:db8:1::")
	return c
}

// nearby plugs node n into the segment, with the address 192.0.2.1<n>.
func (c *threeNodes) nearby(n int) {
	c.router.types(fmt.Sprintf(`
		ip addr flush dev n%[1]d scope global
		ip link set n%[1]d master lan`, n))
	c.readdress(n, "192.0.2", "2001:db8::")
}

// far plugs node n into a network of its own, that the router routes to.
func (c *threeNodes) far(n int, net4, net6 string) {
	c.router.types(fmt.Sprintf(`
		ip link set n%[1]d nomaster
		ip addr add %[2]s.1/24 dev n%[1]d
		ip addr add %[3]s1/64 dev n%[1]d nodad`, n, net4, net6))
	c.readdress(n, net4, net6)
}

func (c *threeNodes) readdress(n int, net4, net6 string) {
	c.nodes[n].types(fmt.Sprintf(`
		ip addr flush dev eth0 scope global
		ip addr add %[2]s.1%[1]d/24 dev eth0
		ip addr add %[3]s1%[1]d/64 dev eth0 nodad
		ip route replace default via %[2]s.1
		ip -6 route replace default via %[3]s1`, n, net4, net6))
}

// run starts the daemons, with one pod each.
func (c *threeNodes) run(backend string) { c.runAs(confOf(`"Backend": ` + backend)) }

// confOf is a net-conf.json of both families with these keys besides.
func confOf(keys string) string {
	return `{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", ` + keys + "}"
}

// runAs is run with a whole net-conf.json.
func (c *threeNodes) runAs(conf string) {
	for n := 1; n <= 3; n++ {
		c.daemons[n] = daemon(c.nodes[n], c.leases, n, conf)
		c.pods[n] = pod(c.nodes[n], n)
	}
}

// podAddrs are those of the pod on node n.
func podAddrs(n int) []string {
	return []string{fmt.Sprintf("10.244.%d.5", n), fmt.Sprintf("fd00:10:244:%d::5", n)}
}

// reaches has the pods of two nodes call each other.
func (c *threeNodes) reaches(a, b int) {
	for i := range 2 {
		c.pods[a].await("ping -c 1 -W 1 " + podAddrs(b)[i])
		c.pods[b].await("ping -c 1 -W 1 " + podAddrs(a)[i])
	}
}

// goes waits until packets from node a to the pod of b leave the way that is given, in both families.
func (c *threeNodes) goes(a, b int, ways ...string) {
	c.router.t.Helper()
	for i, addr := range podAddrs(b) {
		c.nodes[a].awaitShows("ip route get "+addr, ways[i])
	}
}

// awaitShows repeats a command until its output holds a text.
func (h host) awaitShows(command, want string) {
	h.t.Helper()
	out := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		if out, _ = h.Try(h.t, command); strings.Contains(out, want) {
			return
		}
	}
	h.t.Fatalf("%s: after 30 s there is no %q in\n%s", command, want, out)
}

// plainly and tunnelled are what ip route get says of packets to the pod of a node.
func plainly(n int) []string {
	return []string{fmt.Sprintf("via 192.0.2.1%d dev eth0", n), fmt.Sprintf("via 2001:db8::1%d dev eth0", n)}
}

func tunnelled(n int) []string {
	return []string{fmt.Sprintf("via 10.244.%d.0 dev tweed.1", n), "dev tweed.1"}
}

// counting has a node count, from now on, the packets that arrive from others: those of tunnels, and those of pods as
// they are.
func (h host) counting() {
	h.types(`
		iptables -t raw -A PREROUTING -i eth0 -p udp --dport 8472 -m comment --comment tunnelled
		iptables -t raw -A PREROUTING -i eth0 -s 10.244.0.0/16 -m comment --comment plain
		ip6tables -t raw -A PREROUTING -i eth0 -s fd00:10:244::/48 -m comment --comment plain`)
}

// counted reads the counts, and begins anew.
func (h host) counted() (tunnelled, plain4, plain6 int) {
	h.t.Helper()
	read := func(iptables, what string) int {
		for line := range strings.Lines(h.Run(h.t, iptables+" -t raw -nvx -L PREROUTING")) {
			if strings.Contains(line, "/* "+what+" */") {
				n, err := strconv.Atoi(strings.Fields(line)[0])
				if err != nil {
					h.t.Fatal(err)
				}
				return n
			}
		}
		h.t.Fatalf("%s does not count what is %s", iptables, what)
		return 0
	}
	tunnelled, plain4, plain6 = read("iptables", "tunnelled"), read("iptables", "plain"), read("ip6tables", "plain")
	h.types(`
		iptables -t raw -Z
		ip6tables -t raw -Z`)
	return tunnelled, plain4, plain6
}

// every is the time between two pings.
const every = 20 * time.Millisecond

// A pinger calls a pod again and again.
type pinger struct {
	cmd *exec.Cmd

	mu  sync.Mutex
	out bytes.Buffer
}

// Write keeps what ping prints.
func (p *pinger) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// answered says how often the pod has answered.
func (p *pinger) answered() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.Count(p.out.Bytes(), []byte(" bytes from "))
}

// pings starts to call the pod of node b from that of a and the other way round, in both families.
func (c *threeNodes) pings(a, b int) (all []*pinger) {
	for i := range 2 {
		for _, way := range []struct{ from, to int }{{a, b}, {b, a}} {
			p := &pinger{cmd: exec.CommandContext(c.router.t.Context(), "nsenter", "--net="+c.pods[way.from].Path(), "--",
				"ping", "-i", fmt.Sprint(every.Seconds()), podAddrs(way.to)[i])}
			p.cmd.Stdout, p.cmd.Stderr = p, p
			if err := p.cmd.Start(); err != nil {
				c.router.t.Fatal(err)
			}
			all = append(all, p)
		}
	}
	return all
}

// allAnswered waits until each of the calls has been answered once more.
func (c *threeNodes) allAnswered(all []*pinger) {
	c.router.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for _, p := range all {
		for before := p.answered(); p.answered() == before; time.Sleep(every) {
			if time.Now().After(deadline) {
				c.router.t.Fatalf("%v is not answered", p.cmd.Args)
			}
		}
	}
}

// lost ends the calls, and returns for how long none was answered, at most, on all occasions together.
func (c *threeNodes) lost(all []*pinger) (longest time.Duration) {
	c.router.t.Helper()
	for _, p := range all {
		_ = p.cmd.Process.Signal(unix.SIGINT)
		_ = p.cmd.Wait() // with 1 where one was lost
		m := pingSummary.FindStringSubmatch(p.out.String())
		if m == nil {
			c.router.t.Fatalf("ping says %s", p.out.String())
		}
		sent, _ := strconv.Atoi(m[1])
		answered, _ := strconv.Atoi(m[2])
		if answered == 0 {
			c.router.t.Errorf("%v was never answered: %s", p.cmd.Args, p.out.String())
		}
		longest = max(longest, time.Duration(sent-answered)*every)
	}
	return longest
}

var pingSummary = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)

// What is near goes without a tunnel, what is far does not, and each sees the other's own address.
func TestNodeBehindARouterIsSentPlainPackets(t *testing.T) {
	c := newThreeNodes(t)
	c.run(`{"DirectRouting": true}`)
	for _, pair := range [][2]int{{1, 2}, {1, 3}, {2, 3}} {
		c.reaches(pair[0], pair[1])
	}
	c.goes(1, 2, plainly(2)...)
	c.goes(2, 1, plainly(1)...)
	c.goes(1, 3, tunnelled(3)...)
	c.goes(3, 1, tunnelled(1)...)
	c.nodes[1].shows("ip link show tweed.1", "mtu 1450 ")

	c.nodes[2].counting()
	c.reaches(1, 2)
	if tunnel, plain4, plain6 := c.nodes[2].counted(); tunnel > 0 || plain4 == 0 || plain6 == 0 {
		t.Errorf("between n1 and n2 %d packets are tunnelled, %d and %d plain", tunnel, plain4, plain6)
	}
	c.reaches(3, 2)
	if tunnel, plain4, plain6 := c.nodes[2].counted(); tunnel < 4 || plain4+plain6 > 0 {
		t.Errorf("between n3 and n2 %d packets are tunnelled, %d and %d plain", tunnel, plain4, plain6)
	}
}

// n2 stays where it is, and routing alone says that a router is in between, and that it is not any more. A pod that is
// being called does not miss a call while nodes replace one route by another.
func TestCallIsMissedWhenANeighbourBecomesFar(t *testing.T) {
	c := newThreeNodes(t)
	for n := 1; n <= 3; n++ { // for the moment in which one of two nodes knows already
		c.nodes[n].types("sysctl -w net.ipv4.conf.all.rp_filter=2")
	}
	c.run(`{"DirectRouting": true}`)
	c.reaches(1, 2)
	c.goes(1, 2, plainly(2)...)
	c.goes(2, 1, plainly(1)...)
	pings := c.pings(1, 2)
	c.allAnswered(pings)
	for range 3 {
		for n, other := range map[int]int{1: 2, 2: 1} {
			c.nodes[n].types(fmt.Sprintf(`
				ip route add 192.0.2.1%[1]d via 192.0.2.1
				ip route add 2001:db8::1%[1]d via 2001:db8::1`, other))
			c.goes(n, other, tunnelled(other)...)
		}
		for n, other := range map[int]int{1: 2, 2: 1} {
			c.nodes[n].types(fmt.Sprintf(`
				ip route del 192.0.2.1%[1]d via 192.0.2.1
				ip route del 2001:db8::1%[1]d via 2001:db8::1`, other))
			c.goes(n, other, plainly(other)...)
		}
	}
	if lost := c.lost(pings); lost > 2*every {
		t.Errorf("calls are unanswered for %v", lost)
	}
}

// n2 is plugged in elsewhere, gets other addresses, and comes back. Calls are missed for as long as it takes the
// daemons to hear of it from each other, and no longer.
func TestNodeIsMovedBehindARouter(t *testing.T) {
	c := newThreeNodes(t)
	c.run(`{"DirectRouting": true}`)
	c.reaches(1, 2)
	c.goes(1, 2, plainly(2)...)
	const most = 3 * time.Second // a neighbour that does not answer is asked again after one
	for _, move := range []struct {
		to     string
		move   func()
		theirs []string // how n1 then reaches n2
		ours   []string
	}{
		{"behind the router", func() { c.far(2, "203.0.113", "2001:db8:2::") }, tunnelled(2), tunnelled(1)},
		{"back onto the segment", func() { c.nearby(2) }, plainly(2), plainly(1)},
	} {
		pings := c.pings(1, 2)
		c.allAnswered(pings)
		move.move()
		c.goes(1, 2, move.theirs...)
		c.goes(2, 1, move.ours...)
		c.reaches(2, 3)
		c.allAnswered(pings)
		lost := c.lost(pings)
		t.Logf("%s: calls are unanswered for %v", move.to, lost)
		if lost > most {
			t.Errorf("%s: calls are unanswered for %v, want %v at most", move.to, lost, most)
		}
	}
}

// With host-gw there is no tunnel, n3 is told of, and nobody waits for it.
func TestHostGatewayBehindARouter(t *testing.T) {
	c := newThreeNodes(t)
	c.run(`{"Type": "host-gw"}`)
	c.reaches(1, 2)
	c.goes(1, 2, plainly(2)...)
	c.goes(2, 1, plainly(1)...)
	c.nodes[1].shows("ip link show tweed0", "mtu 1500 ")
	if out, err := c.nodes[1].Try(t, "ip link show type vxlan"); err != nil || out != "" {
		t.Errorf("there is a tunnel: %v\n%s", err, out)
	}
	c.pods[1].Run(t, "ping -c 1 -W 1 -M do -s 1472 "+podAddrs(2)[0])
	c.pods[2].Run(t, "ping -c 1 -W 1 -M do -s 1452 "+podAddrs(1)[1])
	for n, far := range map[int][]string{
		1: {"198.51.100.13 is not on a segment of this node", "2001:db8:1::13 is not on a segment"},
		3: {"192.0.2.11 is not on a segment of this node", "2001:db8::12 is not on a segment"},
	} {
		for _, want := range far {
			c.nodes[n].awaitShows("curl -s http://127.0.0.1:9479/report", want)
		}
	}
	if out := c.nodes[1].Run(t, "ip route show 10.244.3.0/24"); out != "" {
		t.Errorf("n1 has a route to the pods of n3: %s", out)
	}
	// n3 is plugged into the segment while its daemon runs.
	c.nearby(3)
	c.reaches(1, 3)
	c.goes(2, 3, plainly(3)...)
}

package lab

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What pods are held to, beside the floor.
const (
	requestsGoal    = 0.95
	connectionsGoal = 0.90
	spoofingGoal    = 0.95 // of the requests without what keeps pods from sending as others
)

// BenchmarkDataPath measures what pods reach, on one node and from node to node, in turns with the same wired by hand:
// with one rule that needs connection tracking (the floor), and with none; and with what the nodes themselves reach
// through the tunnel.
func BenchmarkDataPath(b *testing.B) {
	for b.Loop() {
		d := newDataPath(b)
		for i, l := range loads() {
			d.measure(i, l)
		}
		d.report()
		d.judge()
	}
}

// TestDataPathIsMeasured makes short rounds of the benchmark, until there was traffic of each kind on each way: on a busy
// machine one end may not get to run in so short a time.
func TestDataPathIsMeasured(t *testing.T) {
	d := newDataPath(t)
	var still []string
	for range 20 {
		for i, l := range loads() {
			l.rounds, l.turn = 1, 20*time.Millisecond
			d.measure(i, l)
		}
		if still = d.still(); len(still) == 0 {
			return
		}
	}
	t.Errorf("no traffic: %s", strings.Join(still, "; "))
}

// still names what there was no traffic of in any round.
func (d *dataPath) still() (names []string) {
	for i, l := range loads() {
		for _, p := range d.ways {
			if slices.Max(p.rates[i]) == 0 {
				names = append(names, fmt.Sprintf("%s, %s, %s", l.name, p.where, p.name))
			}
		}
	}
	return names
}

// A dataPath is the ways that are compared.
type dataPath struct {
	testing.TB
	ways []*way
}

// A way is one between two places, and what was measured on it, by load.
type way struct {
	name  string
	where string // who is compared with whom
	floor bool
	held  bool // to the goals
	route
	rates [][]float64
}

// variants are the pods' nodes that are measured, with keys for their net-conf.json. To see what a key costs, add it here.
func variants() []variant {
	return []variant{{name: "tweed"}, {name: unjudged, keys: `"PodSpoofing": "allow"`}}
}

type variant struct{ name, keys string }

// unjudged are pods that may send as others.
const unjudged = "spoofing allowed"

func newDataPath(t testing.TB) *dataPath {
	d := &dataPath{TB: t}
	for i, v := range variants() {
		d.tweed(v, i)
	}
	d.byHand("floor", "iptables -A FORWARD -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT")
	d.byHand("no rules", "")
	return d
}

// tweed builds a lab for the i-th variant.
func (d *dataPath) tweed(v variant, i int) {
	l := newLab(d)
	l.Out = io.Discard
	if i > 0 {
		l.Prefix, l.Dir = fmt.Sprint("v", i), l.Dir+strconv.Itoa(i)
	}
	l.afterStep = func(step string) error {
		if v.keys == "" || step != nodeName(1) && step != nodeName(2) {
			return nil
		}
		conf := strings.Replace(netConf("ipv4"), "{", "{ "+v.keys+",", 1)
		return os.WriteFile(l.path(step, "etc", "net-conf.json"), []byte(conf), 0o644)
	}
	if err := l.Up(d.Context(), Options{Nodes: 2, Pods: 2, Underlay: "ipv4"}); err != nil {
		d.Fatal(err)
	}
	at := func(node, pod string) (string, netip.Addr) {
		addrs, err := l.podAddrs(node, pod)
		if err != nil || len(addrs) == 0 || !addrs[0].Is4() {
			d.Fatalf("addresses of %s/%s: %v, %v", node, pod, addrs, err)
		}
		return l.netns(node, pod), addrs[0]
	}
	d.pods(v.name, i == 0, at)
	if i == 0 {
		d.nodes(l, at)
	}
}

// nodes adds the way from node to node through the tunnel, between addresses that nobody else knows.
func (d *dataPath) nodes(l *Lab, at func(node, pod string) (string, netip.Addr)) {
	addrs := []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")} // RFC 2544
	for i := range addrs {
		node, other := nodeName(i+1), nodeName(2-i)
		_, pod := at(other, "pod1")
		gateway := netip.PrefixFrom(pod, 24).Masked().Addr()
		d.must(l.ip(d.Context(), l.netns(node), fmt.Sprintf("addr add %v/32 dev lo", addrs[i]),
			fmt.Sprintf("route add %v via %v dev tweed.1 onlink src %v", addrs[1-i], gateway, addrs[i])))
	}
	d.add(&way{name: "nodes, same device", where: "another node", route: route{l.netns("n1"), l.netns("n2"), addrs[0], addrs[1]}})
}

// byHand builds what a lab has, by ip and bridge: two nodes, two pods on each, and a rule.
func (d *dataPath) byHand(name, rule string) {
	l := testLab(io.Discard)
	l.Prefix = "hand-" + strings.ReplaceAll(name, " ", "-")
	d.Cleanup(func() {
		for _, ns := range []string{"sw", "n1", "n2", "n1-pod1", "n1-pod2", "n2-pod1", "n2-pod2"} {
			_ = l.ip(context.Background(), "", "netns del "+l.netns(ns)) // what was not made needs no end
		}
	})
	d.must(l.makeSwitch(d.Context()))
	for i := 1; i <= 2; i++ {
		d.must(l.makeNode(d.Context(), i))
		d.wire(l, i, 3-i, rule)
	}
	d.pods(name, false, func(node, pod string) (string, netip.Addr) {
		return l.netns(node, pod), netip.MustParseAddr(fmt.Sprintf("10.244.%s.1%s", node[1:], pod[3:]))
	})
	for _, p := range d.ways[len(d.ways)-2:] {
		p.floor = rule != ""
	}
}

// wire is what a daemon and the plugin do on a node.
func (d *dataPath) wire(l *Lab, node, other int, rule string) {
	ns := l.netns(nodeName(node))
	mac := func(node int) string { return fmt.Sprintf("0e:00:00:00:00:%02x", node) }
	d.must(setSysctl(ns, "net/ipv4/ip_forward", "1"))
	d.must(l.ip(d.Context(), ns,
		"link add br0 address "+mac(100+node)+" mtu 1450 type bridge mcast_snooping 0",
		fmt.Sprintf("addr add 10.244.%d.1/24 dev br0", node),
		"link set br0 up",
		fmt.Sprintf("link add vx address %s mtu 1450 type vxlan id 1 local %v dev eth0 dstport 8472 nolearning",
			mac(node), nodeAddrs(node)[0]),
		fmt.Sprintf("addr add 10.244.%d.0/32 dev vx", node),
		"link set vx up",
		fmt.Sprintf("neigh add 10.244.%d.0 lladdr %s dev vx nud permanent", other, mac(other)),
		fmt.Sprintf("route add 10.244.%[1]d.0/24 via 10.244.%[1]d.0 dev vx onlink", other)))
	d.on(ns, fmt.Sprintf("bridge fdb append %s dev vx dst %v", mac(other), nodeAddrs(other)[0]))
	if rule != "" {
		d.on(ns, rule)
	}
	for i := 1; i <= 2; i++ {
		pod := l.netns(nodeName(node), podName(i))
		d.must(l.ip(d.Context(), "", "netns add "+pod))
		d.must(l.ip(d.Context(), ns,
			fmt.Sprintf("link add pod%d mtu 1450 master br0 type veth peer name eth0 mtu 1450 netns %s", i, pod),
			fmt.Sprintf("link set pod%d up", i)))
		d.must(l.ip(d.Context(), pod, "link set lo up", fmt.Sprintf("addr add 10.244.%d.1%d/24 dev eth0", node, i),
			"link set eth0 up", fmt.Sprintf("route add default via 10.244.%d.1", node)))
	}
}

func (d *dataPath) on(netns, command string) {
	var out []byte
	d.must(inNetns(netns, func() (err error) {
		args := strings.Fields(command)
		if out, err = exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			err = fmt.Errorf("%s: %w: %s", command, err, out)
		}
		return err
	}))
}

func (d *dataPath) must(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

// pods adds the ways from the first pod of the first node to the second, and to one of the other node.
func (d *dataPath) pods(name string, held bool, at func(node, pod string) (string, netip.Addr)) {
	from, source := at("n1", "pod1")
	for _, to := range []struct{ where, node, pod string }{{"same node", "n1", "pod2"}, {"another node", "n2", "pod1"}} {
		netns, addr := at(to.node, to.pod)
		d.add(&way{name: name, where: to.where, held: held, route: route{from, netns, source, addr}})
	}
}

func (d *dataPath) add(p *way) {
	p.rates = make([][]float64, len(loads()))
	d.ways = append(d.ways, p)
}

// measure makes the i-th kind of traffic on each way, in turns.
func (d *dataPath) measure(i int, l load) {
	type caller struct {
		turns chan time.Duration
		rate  chan float64
		ended chan error
	}
	callers := make([]caller, len(d.ways))
	for n, p := range d.ways {
		c := caller{make(chan time.Duration), make(chan float64), make(chan error, 1)}
		callers[n] = c
		go func() { c.ended <- l.run(p.route, c.turns, c.rate) }()
	}
	failed := func(p *way, err error) { d.Fatalf("%s, %s, %s: %v", p.name, p.where, l.name, err) }
	for range l.rounds {
		for n, p := range d.ways {
			select {
			case callers[n].turns <- l.turn:
			case err := <-callers[n].ended:
				failed(p, err)
			}
			select {
			case rate := <-callers[n].rate:
				p.rates[i] = append(p.rates[i], rate)
			case err := <-callers[n].ended:
				failed(p, err)
			}
		}
	}
	for n, p := range d.ways {
		close(callers[n].turns)
		if err := <-callers[n].ended; err != nil {
			failed(p, err)
		}
	}
}

// floorOf is what a way is compared with.
func (d *dataPath) floorOf(p *way) *way {
	i := slices.IndexFunc(d.ways, func(f *way) bool { return f.floor && f.where == p.where })
	return d.ways[i]
}

func (d *dataPath) report() {
	for i, l := range loads() {
		for _, p := range d.ways {
			d.Logf("%-15s %-12s %-25s %9.5g %s (%.5g - %.5g), of the floor %.2f", l.name, p.where, p.name,
				quantile(p.rates[i], 0.5), l.unit, quantile(p.rates[i], 0.1), quantile(p.rates[i], 0.9), d.ofFloor(p, i))
		}
	}
}

func (d *dataPath) ofFloor(p *way, load int) float64 { return of(p, d.floorOf(p), load) }

// of is the median of what was reached on a way of what another reached in the same round, for the load of the machine
// changes from one round to the next.
func of(p, other *way, load int) float64 {
	var parts []float64
	for round, rate := range p.rates[load] {
		parts = append(parts, rate/other.rates[load][round])
	}
	return quantile(parts, 0.5)
}

// judge holds pods to their goals: of requests and connections by the part of the floor, of throughput by whether the
// middle halves of what was measured meet.
func (d *dataPath) judge() {
	for _, p := range d.ways {
		if !p.held {
			continue
		}
		const tcp, request, connection = 0, 2, 3
		if upper, lower := quantile(p.rates[tcp], 0.75), quantile(d.floorOf(p).rates[tcp], 0.25); upper < lower {
			d.Errorf("%s, %s: throughput is below the floor's: %.2f Gbit/s and less, beside %.2f and more", p.name, p.where,
				upper, lower)
		}
		for load, goal := range map[int]float64{request: requestsGoal, connection: connectionsGoal} {
			if part := d.ofFloor(p, load); part < goal {
				d.Errorf("%s, %s: %s are %.2f of the floor's; they are to be %.2f", p.name, p.where, loads()[load].name, part, goal)
			}
		}
		free := slices.IndexFunc(d.ways, func(f *way) bool { return f.name == unjudged && f.where == p.where })
		part := of(p, d.ways[free], request)
		d.Logf("%s: requests of those where spoofing is allowed: %.2f", p.where, part)
		if part < spoofingGoal {
			d.Errorf("%s: requests are %.2f of those where spoofing is allowed; they are to be %.2f", p.where, part, spoofingGoal)
		}
	}
}

func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1))]
}

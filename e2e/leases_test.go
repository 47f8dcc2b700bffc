package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/faults"
	"tweed.dev/tweed/e2e/probe"
)

// sixty is a network with exactly as many subnets.
const (
	sixty        = 60
	sixtySubnets = `{"Network": "10.244.0.0/18", "SubnetMax": "10.244.59.0", "SubnetSource": "lease"}`
)

// A crowd is a cluster in which nodes lease their subnets.
type crowd struct{ *cluster.Cluster }

func (c *crowd) step(t *testing.T, name string, f func(*testing.T)) { step(t, c, name, f) }

// Dump prints what a person would look at.
func (c *crowd) Dump(t testing.TB) {
	for _, n := range c.Nodes {
		if n.Daemon != nil {
			t.Logf("%s: the daemon's log ends with\n%s", n.Name, n.Daemon.Tail(10))
		}
	}
	out, err := c.TryKubectl("get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name} {.metadata.annotations}{"\n"}{end}`)
	t.Logf("Nodes: %v\n%s", err, out)
}

// TestSixtyNodesLeaseAtOnce has as many daemons as there are subnets begin at the same moment, and then one more.
func TestSixtyNodesLeaseAtOnce(t *testing.T) {
	c := &crowd{cluster.Start(t, programs(t))}
	for i := range sixty {
		n := c.AddMachine(t, fmt.Sprintf("n%d", i+1))
		n.Configure(t, sixtySubnets)
		n.StartDaemon(t)
	}
	c.Progress("daemons are started")
	for _, n := range c.Nodes {
		awaitUnready(t, n, "node "+n.Name+" does not exist")
	}
	c.Progress("daemons wait for their Nodes")
	c.step(t, "AllGetOne", c.allGetOne)
	c.step(t, "AllReachAll", c.allReachAll)
	c.step(t, "DaemonsAreRestarted", c.restarted)
	c.step(t, "OneNodeTooMany", c.oneTooMany)
}

func awaitUnready(t *testing.T, n *cluster.Node, words ...string) {
	t.Helper()
	cluster.Await(t, fmt.Sprintf("%s to say %q", n.Name, words), func() error {
		err := n.Ready()
		if err == nil {
			return errors.New("it is ready")
		}
		if lacks := contains(err.Error(), words...); lacks != nil {
			return fmt.Errorf("%w: %w", err, lacks)
		}
		return nil
	})
}

func (c *crowd) allGetOne(t *testing.T) {
	begun := time.Now()
	c.Register(t, c.Nodes...)
	registered := time.Since(begun)
	var leases map[string][]netip.Prefix
	cluster.AwaitLong(t, "a lease of every node", 100*time.Second, func() (err error) {
		leases, err = c.leases(t.Context())
		return err
	})
	c.Progress("  %d nodes, registered in %v, have their leases after %v", sixty, registered.Round(time.Millisecond),
		time.Since(begun).Round(100*time.Millisecond))
	holders := map[netip.Prefix]string{}
	for node, subnets := range leases {
		for _, p := range subnets {
			if other := holders[p]; other != "" {
				t.Errorf("%s is leased by %s and by %s", p, other, node)
			}
			holders[p] = node
			if p.Bits() != 24 || !netip.MustParsePrefix("10.244.0.0/18").Contains(p.Addr()) {
				t.Errorf("%s has %s", node, p)
			}
		}
	}
	if len(holders) != sixty {
		t.Errorf("%d subnets are leased", len(holders))
	}
	c.countClaims(t)
}

// countClaims prints how many claims the nodes needed.
func (c *crowd) countClaims(t *testing.T) {
	said := regexp.MustCompile(`msg="subnet leased" .* claims=(\d+)`)
	var claims []int
	for _, n := range c.Nodes {
		cluster.Await(t, n.Name+" to log its lease", func() error { return n.Daemon.LogContains("subnet leased") })
		if found := said.FindStringSubmatch(n.Daemon.Tail(100)); found != nil {
			number, err := strconv.Atoi(found[1])
			if err != nil {
				t.Error(err)
			}
			claims = append(claims, number)
		}
	}
	if len(claims) != len(c.Nodes) {
		t.Fatalf("%d of %d nodes logged their claims", len(claims), len(c.Nodes))
	}
	slices.Sort(claims)
	c.Progress("  claims a node: %d in the median, %d at most", claims[len(claims)/2], claims[len(claims)-1])
}

// leases returns each Node's, or an error that names a Node without one.
func (c *crowd) leases(ctx context.Context) (map[string][]netip.Prefix, error) {
	nodes, err := c.API.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	leases, without := map[string][]netip.Prefix{}, []string(nil)
	for _, n := range nodes.Items {
		text := n.Annotations["tweed.dev/subnets"]
		if text == "" || n.Annotations["tweed.dev/claim"] != "" {
			without = append(without, n.Name)
			continue
		}
		for _, subnet := range strings.Split(text, ",") {
			p, err := netip.ParsePrefix(subnet)
			if err != nil {
				return nil, fmt.Errorf("Node %s: %w", n.Name, err)
			}
			leases[n.Name] = append(leases[n.Name], p)
		}
	}
	if len(without) > 0 {
		return nil, fmt.Errorf("%d Nodes have no lease, or a claim: %s", len(without), strings.Join(without, ", "))
	}
	return leases, nil
}

func (c *crowd) allReachAll(t *testing.T) {
	for _, n := range c.Nodes {
		n.AwaitReady(t)
		awaitPeerCount(t, n, sixty-1)
	}
}

// awaitPeerCount waits until a node reaches so many leases of others.
func awaitPeerCount(t *testing.T, n *cluster.Node, want int) {
	t.Helper()
	cluster.Await(t, fmt.Sprintf("%d peer leases on %s", want, n.Name), func() error {
		r, err := n.Report()
		if err == nil && (r.Peers != want || !r.Converged) {
			err = fmt.Errorf("it has %d, converged %v, problems %v", r.Peers, r.Converged, r.Problems)
		}
		return err
	})
}

// restarted has daemons that know a lease write nothing when they start.
func (c *crowd) restarted(t *testing.T) {
	some := c.Nodes[:5]
	before := map[string]string{}
	for _, n := range some {
		before[n.Name] = c.version(t, n.Name)
	}
	for _, n := range some {
		n.Daemon.Stop(t, syscall.SIGKILL)
		n.StartDaemon(t)
	}
	for _, n := range some {
		n.AwaitReady(t)
		if now := c.version(t, n.Name); now != before[n.Name] {
			t.Errorf("Node %s was written to: resourceVersion %s, before %s", n.Name, now, before[n.Name])
		}
	}
}

func (c *crowd) version(t *testing.T, node string) string {
	t.Helper()
	n, err := c.API.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return n.ResourceVersion
}

// oneTooMany has no subnet left for a node, until another node goes.
func (c *crowd) oneTooMany(t *testing.T) {
	late := c.AddNode(t, "late")
	late.Configure(t, sixtySubnets)
	late.StartDaemon(t)
	words := []string{"no subnet is free for node late", "all 60 of length /24 in 10.244.0.0/18 are taken", "60 by leases",
		"the oldest: 10.244."}
	awaitUnready(t, late, words...)
	awaitCondition(t, c.Cluster, late.Name, corev1.ConditionTrue, "NoPodSubnet", words...)
	awaitEvent(t, c.Cluster, late.Name, "NoPodSubnet", words...)
	c.RemoveNode(t, c.Nodes[0])
	gone := time.Now()
	cluster.AwaitLong(t, "a lease after a Node went", 25*time.Second, func() error {
		_, err := c.leases(t.Context())
		return err
	})
	c.Progress("  the node that was too many has its lease %v after another went", time.Since(gone).Round(10*time.Millisecond))
	late.AwaitReady(t)
	awaitCondition(t, c.Cluster, late.Name, corev1.ConditionFalse, "TweedIsUp")
}

// awaitCondition waits for a Node's NetworkUnavailable.
func awaitCondition(t *testing.T, c *cluster.Cluster, node string, want corev1.ConditionStatus, reason string, words ...string) {
	t.Helper()
	cluster.Await(t, fmt.Sprintf("NetworkUnavailable of %s to be %s (%s)", node, want, reason), func() error {
		n, err := c.API.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, cond := range n.Status.Conditions {
			if cond.Type == corev1.NodeNetworkUnavailable && cond.Status == want && cond.Reason == reason {
				return contains(cond.Message, words...)
			}
		}
		return fmt.Errorf("conditions: %v", n.Status.Conditions)
	})
}

// awaitEvent waits for an Event about a Node.
func awaitEvent(t *testing.T, c *cluster.Cluster, node, reason string, words ...string) {
	t.Helper()
	cluster.Await(t, fmt.Sprintf("an Event %s about %s", reason, node), func() error {
		events, err := c.API.CoreV1().Events("").List(t.Context(), metav1.ListOptions{
			FieldSelector: "involvedObject.kind=Node,involvedObject.name=" + node})
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range events.Items {
			if e.Reason == reason && contains(e.Message, words...) == nil {
				return nil
			}
			seen = append(seen, e.Reason+": "+e.Message)
		}
		return fmt.Errorf("there are %q", seen)
	})
}

// What TestLeases has for net-conf.json, one after the other.
const (
	leasedSubnets = `{"Network": "10.244.0.0/22", "IPv6Network": "fd00:10:244::/62", "EnableIPv6": true, "SubnetSource": "lease"}`
	grownSubnets  = `{"Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "EnableIPv6": true, "IPv6SubnetLen": 64,
		"SubnetSource": "lease"}`
	movedSubnets = `{"Network": "10.96.0.0/12", "IPv6Network": "fd00:10:244::/48", "EnableIPv6": true, "IPv6SubnetLen": 64,
		"SubnetSource": "lease"}`
)

// A leasing is three nodes that lease for themselves, in both families, with a pod on each.
type leasing struct{ crowd }

// TestLeases is about what happens to leases of nodes with pods.
func TestLeases(t *testing.T) {
	l := &leasing{crowd{cluster.Start(t, programs(t))}}
	for i := range 3 {
		n := l.AddNode(t, fmt.Sprintf("n%d", i+1))
		n.Configure(t, leasedSubnets)
		n.StartDaemon(t)
	}
	for _, n := range l.Nodes {
		n.AwaitReady(t)
		awaitPeerCount(t, n, 4)
		n.AddPod(t, "pod1")
	}
	l.step(t, "EveryPodReachesEveryOther", l.podsReach)
	l.step(t, "NodeIsRecreated", l.nodeIsRecreated)
	l.step(t, "DaemonIsRestartedWhileAPIServerIsAway", l.restartedAlone)
	l.step(t, "AnswersAreLostWhileANodeLeases", l.answersLost)
	l.step(t, "PodCIDRsAppearLater", l.podCIDRsAppear)
	l.step(t, "RecordOfTheLeaseIsRemoved", l.recordRemoved)
	l.step(t, "NetworkGrows", l.networkGrows)
	l.step(t, "NetworkMoves", l.networkMoves)
	l.step(t, "NodeIsRecreatedAndItsSubnetIsGone", l.subnetIsGone)
}

func (l *leasing) podsReach(t *testing.T) {
	t.Helper()
	var pods []*cluster.Pod
	for _, n := range l.Nodes {
		pods = append(pods, n.Pods...)
	}
	for _, from := range pods {
		for _, to := range pods {
			for _, addr := range to.Addrs {
				if err := probe.Ping(from.NetNS, addr); err != nil {
					t.Errorf("%s to %s at %s: %v", from, to, addr, err)
				}
			}
		}
	}
}

// undisturbed calls f while datagrams flow from n1's pod to n3's; none may be lost.
func (l *leasing) undisturbed(t *testing.T, f func()) {
	t.Helper()
	l.podsReach(t)
	from, to := l.Nodes[0].Pods[0], l.Nodes[2].Pods[0]
	var streams []*probe.Stream
	for _, addr := range to.Addrs {
		stream, err := probe.StartStream(from.NetNS, to.NetNS, addr)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, stream)
	}
	f()
	for i, stream := range streams {
		sent, err := stream.Stop()
		if err != nil {
			t.Errorf("to %s: %v", to.Addrs[i], err)
		}
		l.Progress("  %d datagrams to %s", sent, to.Addrs[i])
	}
}

// subnets is what a Node records.
func (l *leasing) subnets(t *testing.T, n *cluster.Node) string {
	t.Helper()
	return l.Annotations(t, n.Name)["tweed.dev/subnets"]
}

func (l *leasing) nodeIsRecreated(t *testing.T) {
	n := l.Nodes[2]
	before := l.subnets(t, n)
	l.DeleteNode(t, n.Name)
	awaitUnready(t, n, "node n3 does not exist")
	l.Register(t, n)
	l.awaitLeaseAgain(t, n, before)
}

// awaitLeaseAgain waits until n has the subnets that it had, and everybody reaches everybody.
func (l *leasing) awaitLeaseAgain(t *testing.T, n *cluster.Node, before string) {
	t.Helper()
	cluster.Await(t, "the same lease", func() error {
		if now := l.subnets(t, n); now != before {
			return fmt.Errorf("it is %q, and was %q", now, before)
		}
		return n.Ready()
	})
	for _, n := range l.Nodes {
		awaitPeerCount(t, n, 4)
	}
	l.podsReach(t)
}

func (l *leasing) restartedAlone(t *testing.T) {
	n := l.Nodes[2]
	before := l.subnets(t, n)
	l.undisturbed(t, func() {
		l.StopAPIServer(t)
		n.Daemon.Stop(t, syscall.SIGKILL)
		n.StartDaemon(t)
		awaitUnready(t, n, l.URL())
		l.StartAPIServer(t)
		n.AwaitReady(t)
	})
	if now := l.subnets(t, n); now != before {
		t.Errorf("the lease is %q, and was %q", now, before)
	}
}

// answersLost has each write land and its answer go missing, and then all answers to lists as well for a while.
func (l *leasing) answersLost(t *testing.T) {
	late := l.AddMachine(t, "n4")
	late.Configure(t, leasedSubnets)
	detour := l.NewDetour(t, 7443)
	late.GoBy(t, detour.URL)
	var lists atomic.Int32
	detour.Impose(
		faults.Rule{For: func(r faults.Request) bool { return r.Verb == "patch" }, Do: faults.LoseAnswer},
		faults.Rule{For: func(r faults.Request) bool {
			if r.Verb != "list" {
				return false
			}
			n := lists.Add(1)
			return n == 2 || n == 3
		}, Do: faults.CutAfter(100)},
	)
	late.StartDaemon(t)
	awaitUnready(t, late, "node n4 does not exist")
	l.Register(t, late)
	cluster.Await(t, "a lease of n4", func() error {
		_, err := l.leases(t.Context())
		return err
	})
	leases, err := l.leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range l.Nodes[:3] {
		for _, p := range leases[n.Name] {
			if slices.ContainsFunc(leases[late.Name], p.Overlaps) {
				t.Errorf("%s has %v, and %s has %s", late.Name, leases[late.Name], n.Name, p)
			}
		}
	}
	if err := detour.Lift(); err != nil {
		t.Error(err)
	}
	late.AwaitReady(t)
	l.RemoveNode(t, late)
}

func (l *leasing) podCIDRsAppear(t *testing.T) {
	n := l.Nodes[1]
	before := l.subnets(t, n)
	l.undisturbed(t, func() {
		l.PatchNode(t, n.Name, `{"spec":{"podCIDR":"10.244.77.0/24","podCIDRs":["10.244.77.0/24"]}}`)
		words := []string{"spec.podCIDRs of node n2 is 10.244.77.0/24", "has leased is " + before, "which stays"}
		awaitProblem(t, n, n.Name, words...)
		awaitEvent(t, l.Cluster, n.Name, "LeaseProblem", words...)
	})
	if now := l.subnets(t, n); now != before {
		t.Errorf("the lease is %q, and was %q", now, before)
	}
}

func (l *leasing) recordRemoved(t *testing.T) {
	n := l.Nodes[2]
	before := l.subnets(t, n)
	l.PatchNode(t, n.Name, `{"metadata":{"annotations":{"tweed.dev/subnets":null}}}`)
	l.awaitLeaseAgain(t, n, before)
}

// networkGrows fills the network first. What has grown is leased from once all nodes accept it.
func (l *leasing) networkGrows(t *testing.T) {
	for i, subnets := range []string{
		"10.244.0.0/24,fd00:10:244::/64", "10.244.1.0/24,fd00:10:244:1::/64", "10.244.2.0/24,fd00:10:244:2::/64",
	} {
		l.CreateNode(t, fmt.Sprintf("gone%d", i), nil, nil, map[string]string{"tweed.dev/subnets": subnets})
	}
	l.CreateNode(t, "gone3", nil, nil, map[string]string{"tweed.dev/claim": "10.244.3.0/24,fd00:10:244:3::/64 x"})
	late := l.AddNode(t, "n4")
	late.Configure(t, grownSubnets)
	late.StartDaemon(t)
	awaitUnready(t, late, "n4 is leasing a subnet", "not all nodes accept yet", "n1, n2, n3")
	l.undisturbed(t, func() {
		for _, n := range l.Nodes[:3] {
			n.Configure(t, grownSubnets)
		}
		late.AwaitReady(t)
		for _, n := range l.Nodes {
			cluster.Await(t, n.Name+" to have n4 as a peer", func() error {
				_, err := n.NetNS.Try("ip route show " + strings.Split(l.subnets(t, late), ",")[0])
				return err
			})
		}
	})
	if p := netip.MustParsePrefix(strings.Split(l.subnets(t, late), ",")[0]); netip.MustParsePrefix("10.244.0.0/22").Overlaps(p) {
		t.Errorf("n4 has leased %s", p)
	}
	late.AddPod(t, "pod1")
	l.podsReach(t)
	l.RemoveNode(t, late)
	for i := range 4 {
		l.DeleteNode(t, fmt.Sprintf("gone%d", i))
	}
	for _, n := range l.Nodes {
		awaitPeerCount(t, n, 4)
	}
}

func (l *leasing) networkMoves(t *testing.T) {
	n := l.Nodes[0]
	state := n.State(t)
	l.undisturbed(t, func() {
		n.Configure(t, movedSubnets)
		awaitProblem(t, n, n.Name, "10.244.0.0/16", "10.96.0.0/12")
		n.Daemon.Stop(t, syscall.SIGTERM)
		n.StartDaemon(t)
		awaitUnready(t, n, "10.244.0.0/16", "10.96.0.0/12")
	})
	if now := n.State(t); now != state {
		t.Errorf("the data path was\n%s\nand is\n%s", state, now)
	}
	n.Configure(t, grownSubnets)
	n.Daemon.Stop(t, syscall.SIGTERM)
	n.StartDaemon(t)
	n.AwaitReady(t)
}

// subnetIsGone has another Node lease what a Node had while that is away.
func (l *leasing) subnetIsGone(t *testing.T) {
	n := l.Nodes[2]
	before := l.subnets(t, n)
	l.DeleteNode(t, n.Name)
	l.CreateNode(t, "heir", nil, nil, map[string]string{"tweed.dev/subnets": before})
	l.Register(t, n)
	words := []string{"pods on this node still have addresses of", strings.Split(before, ",")[0], "restart these pods"}
	awaitProblem(t, n, n.Name, words...)
	awaitEvent(t, l.Cluster, n.Name, "PodsAffected", words...)
	if now := l.subnets(t, n); now == before || now == "" {
		t.Errorf("the lease is %q, which another Node has", now)
	}
	pod := n.Pods[0]
	if err := pod.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	n.AddPod(t, "pod2")
	l.podsReach(t)
}

// TestControllerManagerHandsOutSubnets starts a cluster ten times. The first Nodes of each have no podCIDRs yet when their
// daemons look, and those must not take that for a cluster where nodes lease.
func TestControllerManagerHandsOutSubnets(t *testing.T) {
	c := &crowd{cluster.Start(t, programs(t))}
	for i := range 3 {
		c.AddMachine(t, fmt.Sprintf("n%d", i+1))
	}
	const starts = 10
	for i := range starts {
		c.step(t, fmt.Sprintf("Start%d", i+1), func(t *testing.T) { c.start(t, time.Duration(i)*500*time.Millisecond) })
		c.StopControllers(t)
		for _, n := range c.Nodes {
			n.Daemon.Stop(t, syscall.SIGKILL)
			n.ForgetRun(t)
			c.DeleteNode(t, n.Name)
		}
	}
}

// start has the controller manager come after the daemons by so long.
func (c *crowd) start(t *testing.T, late time.Duration) {
	for _, n := range c.Nodes {
		n.StartDaemon(t)
	}
	c.Register(t, c.Nodes...)
	for _, n := range c.Nodes {
		awaitUnready(t, n, "spec.podCIDRs of node "+n.Name+" is empty", "unless any Node has some when the oldest is a minute old")
	}
	time.Sleep(late) // what is tried is this very time
	c.StartControllers(t, cluster.ControllerOptions{PodCIDRs: []string{"10.244.0.0/16", "fd00:10:244::/48"}})
	for _, n := range c.Nodes {
		n.AwaitReady(t)
		node, err := c.API.CoreV1().Nodes().Get(t.Context(), n.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got := node.Annotations["tweed.dev/subnets"]; got == "" || got != strings.Join(node.Spec.PodCIDRs, ",") {
			t.Errorf("%s publishes %q, and has podCIDRs %v", n.Name, got, node.Spec.PodCIDRs)
		}
		if n.Daemon.LogContains("subnet leased") == nil {
			t.Errorf("%s has leased a subnet", n.Name)
		}
	}
}

// TestLeasesOfOtherSizes has two nodes lease from networks that are not of the usual sizes and families.
func TestLeasesOfOtherSizes(t *testing.T) {
	for name, c := range map[string]struct {
		netConf  string
		possible []string // both are taken
	}{
		"SixOfThirtyAddresses": {`{"Network": "192.168.64.0/24", "SubnetLen": 27, "SubnetMin": "192.168.64.32",
			"SubnetMax": "192.168.64.192", "Reserved": ["192.168.64.64/26", "192.168.64.128/26"], "SubnetSource": "lease"}`,
			[]string{"192.168.64.32/27", "192.168.64.192/27"}},
		"IPv6Alone": {`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/79", "IPv6SubnetLen": 80,
			"SubnetSource": "lease"}`,
			[]string{"fd00:10:244::/80", "fd00:10:244:0:1::/80"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := &leasing{crowd{cluster.Start(t, programs(t))}}
			for i := range 2 {
				n := l.AddNode(t, fmt.Sprintf("n%d", i+1))
				n.Configure(t, c.netConf)
				n.StartDaemon(t)
			}
			var got []string
			for _, n := range l.Nodes {
				n.AwaitReady(t)
				awaitPeerCount(t, n, 1)
				n.AddPod(t, "pod1")
				got = append(got, l.subnets(t, n))
			}
			slices.Sort(got)
			slices.Sort(c.possible)
			if !slices.Equal(got, c.possible) {
				t.Errorf("leased are %v, want %v", got, c.possible)
			}
			l.podsReach(t)
		})
	}
}

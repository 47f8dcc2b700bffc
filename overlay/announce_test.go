package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// board is a Node object, with what was written to it.
type board struct {
	mu sync.Mutex
	notes
	refuse error // of writes to the Node
	deaf   error // of events
}

type notes struct {
	network string // status and reason
	tainted bool
	events  []string
	writes  int
	tries   int // of events
}

func (b *board) look() notes {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.notes
	n.events = slices.Clone(n.events)
	return n
}

// with changes the board under a running daemon.
func (b *board) with(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

func (b *board) SetNetwork(_ context.Context, up bool, reason, _ string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	say := fmt.Sprintf("%v %s", !up, reason)
	if b.network == say {
		return nil
	}
	if b.refuse == nil {
		b.network = say
		b.writes++
	}
	return b.refuse
}

func (b *board) Admit(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tainted && b.refuse == nil {
		b.tainted = false
		b.writes++
	}
	return b.refuse
}

func (b *board) Tell(_ context.Context, reason, message string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tries++
	if b.deaf == nil {
		b.events = append(b.events, reason+": "+message)
	}
	return b.deaf
}

func (b *board) told(part string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.events {
		if strings.Contains(e, part) {
			n++
		}
	}
	return n
}

// announced runs a node's daemon, but for what needs a host, in time that passes as fast as f waits.
func announced(t *testing.T, f func(n *node, b *board)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n, b := newNode(t), &board{notes: notes{tainted: true}}
		n.planner.SysctlRoot = sysctlsWithNetfilter(t)
		n.Announcer = b
		ctx, cancel := context.WithCancel(t.Context())
		var daemon sync.WaitGroup
		for _, part := range []func(context.Context) error{n.Passes, n.Publish, n.Declare, n.TellEvents} {
			daemon.Go(func() {
				if err := part(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		f(n, b)
		cancel()
		daemon.Wait()
	})
}

func sysctlsWithNetfilter(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "net/bridge")
	err := errors.Join(os.MkdirAll(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "bridge-nf-call-iptables"), []byte("1"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestNodeThatIsUpIsSaidToBeOnce(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
		n.Ring()
		after(5 * time.Second)
		if b.look().network != "false TweedIsUp" || b.look().tainted || b.look().writes != 2 {
			t.Errorf("the Node says %q, tainted %v, after %d writes", b.look().network, b.look().tainted, b.look().writes)
		}
		after(10 * time.Minute)
		if b.look().writes != 2 || len(b.look().events) != 0 {
			t.Errorf("at rest there were %d writes and events %q", b.look().writes, b.look().events)
		}
	})
}

func TestServerIsAwayOrDaemonRestartsUnderANetworkThatIsUp(t *testing.T) {
	announced(t, func(n *node, b *board) {
		b.with(func() { b.network, b.tainted = "false TweedIsUp", false })
		n.cluster.with(func(c *cluster) { c.away = errors.New("connection refused") })
		after(10 * time.Minute)
		if b.look().writes != 0 || b.look().tries != 0 {
			t.Errorf("%d writes and events %q by a daemon that knows nothing", b.look().writes, b.look().events)
		}
	})
}

func TestNodeGetsNoSubnet(t *testing.T) {
	announced(t, func(n *node, b *board) {
		good := n.cluster.self.Subnets
		n.cluster.with(func(c *cluster) { c.self.Subnets = []netip.Prefix{netip.MustParsePrefix("172.16.1.0/24")} })
		n.cluster.set()
		n.Ring()
		after(grace - time.Second)
		if b.look().network != "" || len(b.look().events) != 0 {
			t.Errorf("said at once: %q, %q", b.look().network, b.look().events)
		}
		after(2 * time.Second)
		if b.look().network != "true NoPodSubnet" ||
			b.told("172.16.1.0/24 of node n1 is outside the pod network 10.0.0.0/8") != 1 {
			t.Errorf("the Node says %q, events %q", b.look().network, b.look().events)
		}
		after(10 * time.Minute)
		if b.look().writes != 1 || b.look().tries != 1 || !b.look().tainted {
			t.Errorf("while nothing changed there were %d writes, events %q", b.look().writes, b.look().events)
		}
		n.cluster.with(func(c *cluster) { c.self.Subnets = good })
		n.Ring()
		after(5 * time.Second)
		if b.look().network != "false TweedIsUp" || b.look().tainted {
			t.Errorf("with a subnet the Node says %q", b.look().network)
		}
	})
}

func TestLeaseOfAnEarlierRunStandsWhileThisOneCannotPlan(t *testing.T) {
	announced(t, func(n *node, b *board) {
		b.with(func() { b.network = "false TweedIsUp" })
		n.cluster.with(func(c *cluster) { c.self.Addrs = []netip.Addr{netip.MustParseAddr("10.1.2.3")} })
		n.cluster.set(peer("n1", "10.244.1.0/24", "192.0.2.11"))
		n.Ring()
		after(time.Minute)
		if b.look().network != "false TweedIsUp" || b.told("NetworkHoldsNode: ") != 1 {
			t.Errorf("the Node says %q, events %q", b.look().network, b.look().events)
		}
	})
}

func TestEventComesOnceForEachOccurrence(t *testing.T) {
	announced(t, func(n *node, b *board) {
		stranger := backend.Link{Name: "tweed.1", Type: backend.KindVXLAN, MTU: 1450}
		n.cluster.set()
		for round := 1; round <= 2; round++ {
			n.kern.AddStranger(stranger)
			n.Ring()
			for range 100 {
				after(time.Second)
				n.Ring()
			}
			if got := b.told("tweed.1 exists and is not ours; delete it: ip link del tweed.1"); got != round {
				t.Fatalf("%d events in round %d: %q", got, round, b.look().events)
			}
			n.kern.RemoveStranger(stranger)
			n.Ring()
			after(time.Minute)
			link := n.state(t).Links["tweed.1"]
			if link.Name == "" {
				t.Fatal("the device did not come back")
			}
			if err := n.kern.ByHand(backend.Op{Do: backend.Delete, What: link, Was: link}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestPeersFaultIsNoEventHere(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.cluster.set(peer("n2", "172.16.2.0/24", "192.0.2.12"))
		n.Ring()
		after(time.Minute)
		if !hasProblem(n.Report(), "n2", "172.16.2.0/24") || b.look().tries != 0 {
			t.Errorf("problems %v, events %q", n.Report().Problems, b.look().events)
		}
	})
}

func TestKernelMakesNoVXLAN(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.kern.Fail(func(op backend.Op) error {
			if l, ok := op.What.(backend.Link); ok && l.Type == backend.KindVXLAN {
				return errors.New("operation not supported")
			}
			return nil
		})
		n.cluster.set()
		n.Ring()
		after(10 * time.Minute)
		if b.told("KernelRefused: ip link add tweed.1 ") != 1 || len(b.look().events) != 1 || n.Report().Ready() {
			t.Errorf("events %q; ready %v", b.look().events, n.Report().Ready())
		}
		if b.look().network != "" {
			t.Errorf("the Node says %q; it has a lease and is not up", b.look().network)
		}
	})
}

func TestEventsCannotBeWritten(t *testing.T) {
	announced(t, func(n *node, b *board) {
		b.with(func() { b.deaf = errors.New("forbidden") })
		n.cluster.with(func(c *cluster) { c.self.Addrs = []netip.Addr{netip.MustParseAddr("10.1.2.3")} })
		n.cluster.set()
		n.Ring()
		after(time.Hour)
		if b.look().tries != mostTries {
			t.Errorf("tried %d times, want %d", b.look().tries, mostTries)
		}
		if b.look().network != "true NetworkHoldsNode" {
			t.Errorf("the Node says %q; events must not keep it from that", b.look().network)
		}
		n.cluster.with(func(c *cluster) { c.self.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.11")} })
		n.Ring()
		after(5 * time.Second)
		if b.look().network != "false TweedIsUp" {
			t.Errorf("the Node says %q", b.look().network)
		}
	})
}

func TestNodeCannotBeWritten(t *testing.T) {
	announced(t, func(n *node, b *board) {
		b.with(func() { b.refuse = errors.New("ValidatingAdmissionPolicy 'tweed-own-node' denied request: not this") })
		n.cluster.set()
		n.Ring()
		after(time.Minute)
		rep := n.Report()
		if !hasProblem(rep, "n1", "denied request: not this") || !rep.Ready() {
			t.Errorf("ready %v, problems %v", rep.Ready(), rep.Problems)
		}
		if b.told("NotPublished: ValidatingAdmissionPolicy") != 1 {
			t.Errorf("events %q", b.look().events)
		}
		b.with(func() { b.refuse = nil })
		after(2 * slow)
		if rep := n.Report(); b.look().network != "false TweedIsUp" || b.look().tainted || len(rep.Problems) != 0 {
			t.Errorf("the Node says %q, tainted %v, problems %v", b.look().network, b.look().tainted, rep.Problems)
		}
	})
}

func TestAnotherNetworksConfigurationComesFirst(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.cluster.set()
		n.Ring()
		after(time.Second)
		rival := filepath.Join(n.conf, "05-other.conflist")
		for _, name := range []string{"05-other.conflist", "05-notes.txt", "20-later.conf"} {
			if err := os.WriteFile(filepath.Join(n.conf, name), []byte("{}"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Mkdir(filepath.Join(n.conf, "00.json"), 0o755); err != nil {
			t.Fatal(err)
		}
		after(time.Minute)
		if got := n.Report().Problems; len(got) != 1 || !strings.HasPrefix(got[0].Text, rival+" sorts before "+ConflistName) {
			t.Errorf("problems are %v", got)
		}
		if b.told("PodsAffected: "+rival) != 1 || len(b.look().events) != 1 {
			t.Errorf("events are %q", b.look().events)
		}
		if err := os.Remove(rival); err != nil {
			t.Fatal(err)
		}
		after(time.Minute)
		if got := n.Report().Problems; len(got) != 0 {
			t.Errorf("problems are %v", got)
		}
	})
}

func TestOwnNodeGoesAndComesBack(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
		n.Ring()
		after(5 * time.Second)
		known, before := n.cluster.self, n.state(t)
		n.cluster.with(func(c *cluster) { c.self, c.selfErr = subnet.Node{Name: "n1"}, errors.New("node n1 does not exist") })
		n.cluster.with(func(c *cluster) { c.published = nil })
		n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
		link := before.Links["tweed.1"]
		if err := n.kern.ByHand(backend.Op{Do: backend.Delete, What: link, Was: link}); err != nil {
			t.Fatal(err)
		}
		n.Ring()
		after(time.Minute)
		if got := n.routes(t); got["10.244.2.0/24"] == "" || got["10.244.3.0/24"] == "" {
			t.Errorf("routes are %v: drift is repaired and peers are followed without the own Node", got)
		}
		rep := n.Report()
		if rep.Ready() || !strings.Contains(rep.Waiting, "node n1 does not exist") ||
			!hasProblem(rep, "n1", "what was in force stays") {
			t.Errorf("report is %+v", rep)
		}
		if n.cluster.look().published != nil || n.cluster.look().writes != 1 || !n.hasConflist() {
			t.Errorf("published %+v; conflist %v", n.cluster.look(), n.hasConflist())
		}
		// It comes back with a subnet that is none of the pod network's, and then with its own.
		n.cluster.with(func(c *cluster) { c.self, c.selfErr = known, nil })
		n.cluster.with(func(c *cluster) { c.self.Subnets = []netip.Prefix{netip.MustParsePrefix("172.16.1.0/24")} })
		b.with(func() { b.network = "" }) // of a new Node
		n.Ring()
		after(time.Minute)
		if n.cluster.look().published != nil || b.look().network != "true NoPodSubnet" || n.routes(t)["10.244.2.0/24"] == "" {
			t.Errorf("published %v, the Node says %q, routes %v", n.cluster.look().published, b.look().network, n.routes(t))
		}
		n.cluster.with(func(c *cluster) { c.self = known })
		n.Ring()
		after(5 * time.Second)
		if len(n.cluster.look().published) != 2 || b.look().network != "false TweedIsUp" || !n.Report().Ready() {
			t.Errorf("published %v, the Node says %q, report %+v", n.cluster.look().published, b.look().network, n.Report())
		}
	})
}

// TestUplinkIsLost is no matter of the lease: others know it, and it is not written anew from memory.
func TestUplinkIsLost(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.cluster.set()
		n.Ring()
		after(5 * time.Second)
		n.kern.RemoveInterface("eth0")
		n.cluster.with(func(c *cluster) { c.published = nil }) // an operator removes it, say
		n.cluster.set()
		n.Ring()
		after(time.Minute)
		if n.cluster.look().published != nil || b.told("NoUplink: ") != 1 || b.look().network != "true NoUplink" {
			t.Errorf("published %v, the Node says %q, events %q", n.cluster.look().published, b.look().network, b.look().events)
		}
	})
}

func TestConvergedNodeLosesItsLease(t *testing.T) {
	announced(t, func(n *node, b *board) {
		n.cluster.set()
		n.Ring()
		after(5 * time.Second)
		n.cluster.with(func(c *cluster) {
			c.self.Addrs = append(c.self.Addrs, netip.MustParseAddr("10.1.2.3"))
			c.published = nil
		})
		n.cluster.set()
		n.Ring()
		after(time.Minute)
		rep := n.Report()
		if rep.Ready() || !rep.Converged || b.look().network != "true NetworkHoldsNode" || !n.hasConflist() {
			t.Errorf("the Node says %q, conflist %v, report %+v", b.look().network, n.hasConflist(), rep)
		}
	})
}

func TestAnswerToAWrittenLeaseIsLost(t *testing.T) {
	n := newNode(t)
	n.planner.SysctlRoot = sysctlsWithNetfilter(t)
	n.cluster.set()
	n.step(t)
	why := "no answer in 10s"
	n.unpublished.Store(&why)
	if rep := n.step(t); len(rep.Problems) != 0 {
		t.Errorf("the lease stands; problems %v", rep.Problems)
	}
}

func TestMuchIsWrongAtOnce(t *testing.T) {
	rep := Report{node: "n1"}
	for i := range 20 {
		text := fmt.Sprint("fault ", i)
		rep.Problems = append(rep.Problems, subnet.Problem{Node: "n1", Kind: subnet.KindKernel, Text: text},
			subnet.Problem{Node: "n1", Kind: subnet.KindKernel, Text: text})
	}
	var v vigil
	start := time.Now()
	if a, next := v.watch(rep, start); len(a.events) != 0 || next != grace {
		t.Errorf("at once %v, next in %v", a.events, next)
	}
	a, next := v.watch(rep, start.Add(grace))
	if len(a.events) != mostEvents || next != 0 {
		t.Errorf("told %v, next in %v", a.events, next)
	}
}

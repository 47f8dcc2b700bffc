package kernel

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// The tests in this file run the daemon's passes against the real kernel, with calls to it that fail. Time is that of
// package synctest: it stands still while a pass is made, and a pause costs nothing.

const (
	aPass  = 250 * time.Millisecond // in which a pass that was rung for is over
	aRetry = time.Second            // from a pass that failed to the next
)

// errnos are what a kernel says that is at work on something else, has no memory, was asked by others before, and has a
// guard.
var errnos = []syscall.Errno{unix.EBUSY, unix.ENOBUFS, unix.EEXIST, unix.ENOENT, unix.EPERM}

// A cluster is what the nodes of a cluster have published.
type cluster struct {
	mu        sync.Mutex
	list      subnet.List
	published []subnet.Lease
}

func (c *cluster) Run(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }
func (c *cluster) Err() error                              { return nil }
func (c *cluster) Grow(subnet.Network)                     {}

func (c *cluster) List() (subnet.List, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.list
	l.Leases = slices.Concat(l.Leases, c.published)
	return l, true
}

func (c *cluster) holds(node string) bool {
	list, _ := c.List()
	return slices.ContainsFunc(list.Leases, func(l subnet.Lease) bool { return l.Node == node })
}

func (c *cluster) Self() (subnet.Node, error) {
	return subnet.Node{
		Name: "n1", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.11")},
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
	}, nil
}

func (c *cluster) Publish(_ context.Context, own []subnet.Lease) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.published = own
	c.list.Generation++
	return nil
}

// hold makes these the other nodes.
func (c *cluster) hold(nodes ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list.Leases = nil
	c.list.Generation++
	for _, n := range nodes {
		name, host := fmt.Sprintf("n%d", n), netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", n+10))
		for _, p := range []string{fmt.Sprintf("10.244.%d.0/24", n), fmt.Sprintf("fd00:10:244:%d::/64", n)} {
			c.list.Leases = append(c.list.Leases, subnet.Lease{
				Node: name, Subnet: netip.MustParsePrefix(p), Host: host, Backend: vxlan.Name,
				Data: vxlan.Config{Node: name, VNI: 1, Port: 8472, Underlay: 4}.Data(),
			})
		}
	}
}

// A victim is a node whose daemon has a Kernel with spoilers in it.
type victim struct {
	t       *testing.T
	host    *realHost // whose own Kernel works
	config  overlay.Config
	runDir  string
	cluster *cluster
	judge   *overlay.Planner // says what is still to be done

	kern   *Kernel
	decide *decide
	rec    *overlay.Reconciler
	stop   func()
	cancel func() // has passes end
}

func newVictim(t *testing.T, form masq.Form, options string) *victim {
	t.Helper()
	config, err := overlay.ParseConfig(fmt.Appendf(nil, `{"Network": "10.244.0.0/16", "EnableIPv6": true,
		"IPv6Network": "fd00:10:244::/48", "PacketFilter": %q%s}`, form, options))
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{t: t, host: newRealHost(t), config: config, runDir: t.TempDir(), cluster: &cluster{}, stop: func() {}}
	v.cluster.hold(2, 3)
	v.host.ns.Run(t, "ip -6 route add 2001:db8:1::/48 via fe80::1 dev eth0 proto ra")
	v.judge = v.planner(nil)
	v.restart()
	return v
}

func (v *victim) planner(k overlay.Kernel) *overlay.Planner {
	return &overlay.Planner{
		Config: v.config, Leases: v.cluster, Publisher: v.cluster, Kernel: k, RunDir: v.runDir,
		SysctlRoot: DefaultSysctlRoot,
	}
}

// restart makes a daemon that knows nothing, and has not begun yet. What it asks of the kernel will work.
func (v *victim) restart() {
	v.t.Helper()
	v.stop()
	var err error
	v.host.ns.Do(v.t, func() { v.kern, err = New(Options{}) })
	if err != nil {
		v.t.Fatal(err)
	}
	v.decide = spoil(v.kern)
	cni := overlay.CNIConf{Dir: filepath.Join(v.runDir, "cni"), RunDir: v.runDir}
	v.rec = overlay.NewReconciler(v.planner(v.kern), cni, "test", slog.New(slog.DiscardHandler))
	v.stop = v.kern.Close
}

// begin has the daemon make passes.
func (v *victim) begin() {
	ctx, cancel := context.WithCancel(context.Background())
	v.cancel = cancel
	var g sync.WaitGroup
	g.Go(func() { v.host.ns.Do(v.t, func() { _ = v.rec.Passes(ctx) }) })
	g.Go(func() { _ = v.rec.Publish(ctx) })
	kern := v.kern
	v.stop = func() {
		cancel()
		g.Wait()
		kern.Close()
		v.stop = func() {}
	}
	time.Sleep(aPass)
}

// after rings, and returns the report of the pass that follows.
func (v *victim) after() overlay.Report {
	v.rec.Ring()
	time.Sleep(aPass)
	return v.rec.Report()
}

// left returns what is still to be done, as a Kernel sees it that works.
func (v *victim) left() []backend.Op {
	v.t.Helper()
	var plan overlay.Plan
	var k *Kernel
	var err error
	v.host.ns.Do(v.t, func() {
		if k, err = New(Options{}); err == nil {
			defer k.Close()
			v.judge.Kernel = k
			plan, err = v.judge.Plan(v.t.Context())
		}
	})
	if err != nil {
		v.t.Fatalf("planning: %v", err)
	}
	return plan.Ops
}

// clear takes away all that is ours, and from links that stay what hangs on them.
func (v *victim) clear(stay map[string]backend.Link) {
	v.t.Helper()
	filters, err := v.host.ObserveAllFilters(v.t.Context())
	if err != nil {
		v.t.Fatal(err)
	}
	ops, _ := backend.Diff(backend.State{Links: stay}, backend.Observed{State: v.state()})
	v.apply(append(masq.Diff(masq.Ruleset{}, filters), ops...)...)
}

func (v *victim) apply(ops ...backend.Op) {
	v.t.Helper()
	for _, op := range ops {
		if err := v.host.Apply(v.t.Context(), op); err != nil {
			v.t.Fatalf("%s: %v", op, err)
		}
	}
}

// state is all that is ours, and no filter's.
func (v *victim) state() backend.State {
	v.t.Helper()
	have, err := v.host.ObserveAll(v.t.Context())
	if err != nil {
		v.t.Fatal(err)
	}
	return have
}

// bare leaves nothing but links, with another MTU.
func (v *victim) bare() {
	links := v.state().Links
	for name, l := range links {
		l.MTU = 1400
		links[name] = l
	}
	v.clear(links)
	v.apply(backend.Op{Do: backend.Change, What: backend.Sysctl{Name: "net/ipv6/conf/eth0/accept_ra", Value: "1"}})
}

// lively is a victim that has converged once, and whose lease stands.
func lively(t *testing.T, form masq.Form, options string) *victim {
	t.Helper()
	v := newVictim(t, form, options)
	v.begin()
	if rep := v.rec.Report(); !rep.Ready() {
		t.Fatalf("not ready without a fault: %+v", rep)
	}
	return v
}

// said returns all that a report says is wrong.
func said(rep overlay.Report) string {
	lines := []string{rep.Waiting}
	for _, p := range rep.Problems {
		lines = append(lines, p.Text)
	}
	return strings.Join(lines, "\n")
}

// check sees to it that a report does not hide what a fault has left undone, and says why.
func (v *victim) check(rep overlay.Report, f fate) (left []backend.Op) {
	v.t.Helper()
	left = v.left()
	if rep.Failed == 0 && len(left) > 0 {
		v.t.Errorf("not done, and nobody says so: %v", left)
	}
	// What the kernel says is there, or is not, is believed first, and then found to be otherwise.
	believed := f.refused == unix.EEXIST || f.refused == unix.ENOENT
	if rep.Failed > 0 && !believed && !strings.Contains(said(rep), f.reason().Error()) {
		v.t.Errorf("the reason is not given: %q", said(rep))
	}
	if rep.Failed > 0 && rep.Ready() && slices.ContainsFunc(left, func(op backend.Op) bool { return op.Peer == "" }) {
		v.t.Errorf("ready without what this node itself needs: %v", left)
	}
	return left
}

// healed sees to it that all is right after the next retry.
func (v *victim) healed(within time.Duration) {
	v.t.Helper()
	if rep := v.rec.Report(); rep.Failed == 0 && isAmiss(rep) { // what could not be told is looked at when there is time
		within = 31 * time.Second
	}
	time.Sleep(within)
	if rep := v.rec.Report(); !rep.Ready() || rep.Failed > 0 || isAmiss(rep) {
		v.t.Errorf("%v later: failed %d, %s", within, rep.Failed, said(rep))
	}
	if left := v.left(); len(left) > 0 {
		v.t.Errorf("%v later still to be done: %v", within, left)
	}
}

// isAmiss reports whether rep names something of this host's kernel.
func isAmiss(rep overlay.Report) bool {
	return slices.ContainsFunc(rep.Problems, func(p subnet.Problem) bool {
		return p.Kind == subnet.KindKernel || p.Kind == subnet.KindPods
	})
}

// peersOf lists the other nodes that operations are for.
func peersOf(ops []backend.Op) (peers []string) {
	for _, op := range ops {
		if op.Peer != "" {
			peers = append(peers, op.Peer)
		}
	}
	slices.Sort(peers)
	return slices.Compact(peers)
}

// fates are all that can become of one call.
func fates() (all []fate) {
	for _, errno := range errnos {
		all = append(all, fate{refused: errno})
	}
	return append(all, fate{unanswered: true})
}

// reason is what the daemon says of it.
func (f fate) reason() error {
	switch {
	case f.unanswered:
		return unix.ENOBUFS
	case f.interrupted:
		return errInterrupted
	}
	return f.refused
}

func (f fate) String() string {
	if f.unanswered {
		return "no answer"
	}
	return f.reason().Error()
}

// at is a fate of the nth call alone.
func at(n int, f fate) func(int, call) fate {
	return func(i int, _ call) fate {
		if i == n {
			return f
		}
		return fate{}
	}
}

// A life is something that happens again and again to one victim: ready is what comes before the pass.
type life struct {
	ready func()
	pass  func() overlay.Report
}

// change is a peer that leaves as another comes, and an entry and a route of a third that somebody has deleted.
func (v *victim) change() life {
	return life{func() {
		if v.cluster.holds("n3") {
			v.cluster.hold(2, 4)
		} else {
			v.cluster.hold(2, 3)
		}
		have := v.state()
		for _, e := range have.FDB {
			if e.Dst == netip.MustParseAddr("192.0.2.12") {
				v.apply(backend.Op{Do: backend.Delete, What: e, Was: e})
			}
		}
		for k, r := range have.Routes {
			if k.Dst == netip.MustParsePrefix("fd00:10:244:2::/64") {
				v.apply(backend.Op{Do: backend.Delete, What: r, Was: r})
			}
		}
	}, v.after}
}

// start is a daemon that starts after what lose took away.
func (v *victim) start(lose func()) life {
	return life{func() { v.stop(); lose(); v.restart() }, func() overlay.Report { v.begin(); return v.rec.Report() }}
}

func (v *victim) startBare() life { return v.start(v.bare) }
func (v *victim) startNew() life  { return v.start(func() { v.clear(nil) }) }
func (v *victim) startFull() life { return v.start(func() {}) }

// failOnce has each call of a life fail once, in each way that pick wants to see.
func (v *victim) failOnce(l life, pick func(n int, c call, f fate) bool) {
	v.t.Helper()
	calls := v.calls(l)
	cells := 0
	for n, c := range calls {
		for _, f := range fates() {
			if pick(n, c, f) && !v.t.Failed() {
				v.failAt(l, n+1, f)
				cells++
			}
		}
	}
	v.t.Logf("%d calls, %d failures", len(calls), cells)
}

// calls lists the calls of a life in which nothing fails.
func (v *victim) calls(l life) []call {
	v.t.Helper()
	l.ready()
	v.decide.begin(func(int, call) fate { return fate{} })
	l.pass()
	calls, _ := v.decide.end()
	v.healed(aRetry)
	return calls
}

func (v *victim) failAt(l life, n int, f fate) {
	v.t.Helper()
	l.ready()
	v.decide.begin(at(n, f))
	rep := l.pass()
	calls, hits := v.decide.end()
	if hits == 0 { // how many there are varies a little
		return
	}
	c := calls[n-1]
	peers := peersOf(v.check(rep, f))
	if !c.reads() && len(peers) > 1 && c.String() != "NEWLINK" {
		v.t.Errorf("%v are not reached because of one call", peers)
	}
	v.healed(aRetry)
	if v.t.Failed() {
		v.t.Errorf("call %d of %d, %s: %s", n, len(calls), c, f)
	}
}

func TestCallFailsOnceAndTheNextPassMendsIt(t *testing.T) {
	for name, c := range map[string]struct {
		life func(*victim) life
		pick func(n int, c call, f fate) bool
	}{
		"peers change":           {(*victim).change, each},
		"all but links is gone":  {(*victim).startBare, inTurn()},
		"a node's first pass":    {(*victim).startNew, ofNewLinks},
		"nothing has to be done": {(*victim).startFull, inTurn()},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			withVictim(t, masq.NFTables, "", func(v *victim) { v.failOnce(c.life(v), c.pick) })
		})
	}
}

// withVictim calls f where time stands still.
func withVictim(t *testing.T, form masq.Form, options string, f func(v *victim)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		v := lively(t, form, options)
		defer func() { v.stop() }()
		f(v)
	})
}

func each(int, call, fate) bool             { return true }
func ofNewLinks(_ int, c call, _ fate) bool { return c.String() == "NEWLINK" }

// oneOf picks one fate for each call, another one for the next.
func oneOf(n int, _ call, f fate) bool { return f == fates()[n%len(fates())] }

// inTurn is oneOf, but for the first call of each type, which it picks every fate for.
func inTurn() func(n int, c call, f fate) bool {
	first := map[string]int{}
	return func(n int, c call, f fate) bool {
		if _, known := first[c.String()]; !known {
			first[c.String()] = n
		}
		return first[c.String()] == n || oneOf(n, c, f)
	}
}

// undone says which kinds of object may not be as they should when the kernel refuses all changes of one type.
func undone(typ string) []string {
	switch typ {
	case "NEWLINK":
		return []string{"link"}
	case "NEWADDR":
		return []string{"address", "route"} // a route from the address cannot be without
	case "NEWNEIGH", "DELNEIGH":
		return []string{"neighbour"}
	case "NEWNEIGH of bridge", "DELNEIGH of bridge":
		return []string{"fdb"}
	case "NEWROUTE", "DELROUTE":
		return []string{"route"}
	case "NEWRULE", "DELRULE":
		return []string{"rule"}
	case "nft transaction": // the packet filter's
		hosts := []string{"link", "address", "neighbour", "fdb", "route", "rule", "sysctl", "port"}
		return slices.DeleteFunc(backend.Kinds(), func(kind string) bool { return slices.Contains(hosts, kind) })
	}
	return nil
}

func TestCallThatNeverWorksIsNamedAndHoldsUpNothingElse(t *testing.T) {
	for _, errno := range errnos {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			withVictim(t, masq.NFTables, "", func(v *victim) {
				tried := map[string]bool{}
				for _, l := range []life{v.change(), v.startBare()} {
					for _, c := range v.calls(l) {
						if !tried[c.String()] {
							tried[c.String()] = true
							v.failAlways(l, c, fate{refused: errno})
						}
					}
				}
			})
		})
	}
}

// failAlways has all calls of one type fail for two passes of a life.
func (v *victim) failAlways(l life, c call, f fate) {
	v.t.Helper()
	if v.t.Failed() {
		return
	}
	l.ready()
	before := v.state()
	v.decide.begin(func(_ int, other call) fate {
		if other.String() == c.String() {
			return f
		}
		return fate{}
	})
	rep := l.pass()
	left := v.check(rep, f)
	meanwhile := v.state()
	time.Sleep(aRetry)
	v.check(v.rec.Report(), f)
	if _, hits := v.decide.end(); hits == 0 || hits > 2000 { // ten readings for each operation
		v.t.Errorf("%d calls failed", hits)
	}
	v.healed(2 * aRetry)
	for _, op := range left {
		if (!c.reads() || c.isLook()) && !slices.Contains(undone(c.String()), op.What.Kind()) {
			v.t.Errorf("held up: %s", op)
		}
	}
	lost, _ := backend.Diff(common(before, v.state()), backend.Observed{State: meanwhile})
	for _, op := range lost {
		if op.Do != backend.Delete {
			v.t.Errorf("lost: %s", op)
		}
	}
	if v.t.Failed() {
		v.t.Errorf("%s: %s always; it said %q", c, f, said(rep))
	}
}

func TestLinksThatCannotBeMadeHoldUpOnlyWhatHangsOnThem(t *testing.T) {
	withVictim(t, masq.NFTables, "", func(v *victim) {
		l := v.startNew()
		for _, errno := range errnos {
			l.ready()
			v.decide.begin(func(_ int, c call) fate {
				if c.String() == "NEWLINK" {
					return fate{refused: errno}
				}
				return fate{}
			})
			for _, op := range v.check(l.pass(), fate{refused: errno}) {
				if _, isLink := op.What.(backend.Link); !isLink && backend.Device(op.What) == "" {
					v.t.Errorf("%s: held up: %s", errno, op)
				}
			}
			v.decide.end()
			v.healed(aRetry)
		}
	})
}

// common is what a and b both hold.
func common(a, b backend.State) backend.State {
	return backend.State{
		Links: both(a.Links, b.Links), Addrs: both(a.Addrs, b.Addrs), Neighs: both(a.Neighs, b.Neighs),
		FDB: both(a.FDB, b.FDB), Routes: both(a.Routes, b.Routes),
	}
}

func both[K, V comparable](a, b map[K]V) map[K]V {
	maps.DeleteFunc(a, func(k K, v V) bool { return b[k] != v })
	return a
}

// A list that others change while it is read is read again, in the same pass.
func TestListThatOthersChangeOnceDelaysNothing(t *testing.T) {
	withVictim(t, masq.NFTables, "", func(v *victim) {
		l := v.startBare()
		for n, c := range v.calls(l) {
			if !c.isDump() || v.t.Failed() {
				continue
			}
			l.ready()
			v.decide.begin(at(n+1, fate{interrupted: true}))
			rep := l.pass()
			v.decide.end()
			if left := v.left(); rep.Failed > 0 || isAmiss(rep) || len(left) > 0 {
				v.t.Errorf("call %d, %s: failed %d, said %q, left %v", n+1, c, rep.Failed, said(rep), left)
			}
		}
	})
}

func TestListThatOthersChangeAgainAndAgainIsNamedAndNothingIsLost(t *testing.T) {
	withVictim(t, masq.NFTables, "", func(v *victim) {
		tried := map[string]bool{}
		for _, l := range []life{v.change(), v.startBare()} {
			for _, c := range v.calls(l) {
				if c.isDump() && !tried[c.String()] {
					tried[c.String()] = true
					v.failAlways(l, c, fate{interrupted: true})
				}
			}
		}
	})
}

// A daemon that is ended in mid pass says nothing to the plugin, and the next one goes on where it was.
func TestPassThatIsCutOffIsFinishedByTheNextDaemon(t *testing.T) {
	withVictim(t, masq.NFTables, "", func(v *victim) {
		l := v.start(func() {
			v.bare()
			if err := os.RemoveAll(v.runDir); err != nil {
				v.t.Error(err)
			}
		})
		tried := map[string]bool{}
		for n, c := range v.calls(l) {
			if c.reads() && tried[c.String()] {
				continue
			}
			tried[c.String()] = true
			l.ready()
			v.decide.begin(func(i int, _ call) fate {
				if i == n+1 {
					v.cancel()
				}
				return fate{}
			})
			v.begin()
			v.stop()
			_, err := podnet.ReadNodeInfo(v.runDir)
			if left := v.left(); err == nil && len(left) > 0 || v.rec.Report().Ready() {
				v.t.Errorf("it said that all is done, and left %v", left)
			}
			v.restart()
			v.begin()
			v.healed(0)
			if v.t.Failed() {
				v.t.Fatalf("(cut off at call %d, %s)", n+1, c)
			}
		}
	})
}

func TestReadOnlySysctlsAreNamedAndHoldUpNothingElse(t *testing.T) {
	withVictim(t, masq.NFTables, "", func(v *victim) {
		dir := v.t.TempDir()
		v.host.ns.Run(t, "mount --bind /proc/sys "+dir)
		v.t.Cleanup(func() { v.host.ns.Run(t, "umount "+dir) })
		v.startBare().ready()
		v.apply(backend.Op{Do: backend.Change, What: backend.Sysctl{Name: "net/ipv4/ip_forward", Value: "0"}})
		v.host.ns.Run(t, "mount -o remount,bind,ro "+dir)
		v.kern.root = dir
		v.begin()
		for _, op := range v.check(v.rec.Report(), fate{refused: unix.EROFS}) {
			if op.What.Kind() != "sysctl" {
				v.t.Errorf("held up: %s", op)
			}
		}
		v.host.ns.Run(t, "mount -o remount,bind,rw "+dir)
		v.healed(aRetry)
	})
}

func TestOffloadThatCannotBeSwitchedIsNamedAndHoldsUpNothingElse(t *testing.T) {
	withVictim(t, masq.NFTables, `, "Backend": {"Type": "vxlan", "ChecksumOffload": "off"}`, func(v *victim) {
		v.startNew().ready()
		works := v.kern.ioctl
		null, err := os.Open(os.DevNull)
		if err != nil {
			v.t.Fatal(err)
		}
		defer null.Close()
		v.kern.ioctl = int(null.Fd())
		v.begin()
		time.Sleep(aRetry)
		for _, op := range v.check(v.rec.Report(), fate{refused: unix.ENOTTY}) {
			if op.What.Kind() != "link" {
				v.t.Errorf("held up: %s", op)
			}
		}
		v.kern.ioctl = works
		v.healed(2 * aRetry)
	})
}

package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/faults"
	"tweed.dev/tweed/e2e/probe"
)

const (
	// recovery is how long after the API server's return a node may take to follow what is new.
	recovery = 5 * time.Second
	// stallNoticed is how long after its last word a watch may be silent before another is opened.
	stallNoticed = 90 * time.Second
	// calm is how often a minute a daemon may ask while nothing goes well: each of its two watches at most every 3 s, and
	// a write that is due every 5 s or so. Where a list may succeed though a watch does not, both are tried: listed.
	calm, listed = 50, 90
	// settled is how long the pauses take to become as long as they get.
	settled = 10 * time.Second
	// anyTime is longer than that by enough to count: a fault of an hour is no other.
	anyTime = 40 * time.Second
)

// A faulty is a cluster in which each node but one goes to the API server by a detour of its own.
type faulty struct {
	*cluster.Cluster
	straight *cluster.Node
	lanes    []*lane
	// bystanders are peers whose routes go missing, to be repaired. They take turns: who has one route to repair as often
	// as there are faults takes it for a fight, and tells.
	bystanders []ghostNode
}

// A lane is one node with the faults that it goes through, one after the other, beside the other lanes.
type lane struct {
	*faulty
	name   string
	node   *cluster.Node
	detour *cluster.Detour
	number int
	news   int // ghosts so far
	drifts int // routes that went missing so far
	steps  func(*lane, *testing.T)
}

// TestAPIFaults goes through what can be wrong with an API server.
func TestAPIFaults(t *testing.T) {
	s := &faulty{Cluster: cluster.Start(t, programs(t)), bystanders: []ghostNode{ghost(98), ghost(99)}}
	for _, l := range []lane{
		{name: "Away", steps: (*lane).away},
		{name: "Hole", steps: (*lane).hole},
		{name: "Silent", steps: (*lane).silent},
		{name: "Refusals", steps: (*lane).refusals},
		{name: "Slow", steps: (*lane).slow},
		{name: "Rest", steps: (*lane).rest},
	} {
		s.lanes = append(s.lanes, &l)
	}
	s.bringUp(t)
	var all sync.WaitGroup // t.Parallel would let no more of them wait at a time than there are processors
	defer all.Wait()
	for _, l := range s.lanes {
		all.Go(func() { t.Run(l.name, func(t *testing.T) { l.steps(l, t) }) })
	}
}

// Dump prints what a person would look at.
func (s *faulty) Dump(t testing.TB) {
	for _, n := range s.Nodes {
		n.Dump(t)
	}
}

// Dump prints what a person would look at.
func (l *lane) Dump(t testing.TB) { l.node.Dump(t) }

// bringUp makes the nodes and a pod on each, and ends the test unless everything is there.
func (s *faulty) bringUp(t *testing.T) {
	t.Helper()
	defer explain(t, s)
	s.straight = s.AddNode(t, "n1", podCIDRs(1)...)
	for i, l := range s.lanes {
		l.faulty, l.number = s, i+2
		l.node = s.AddNode(t, fmt.Sprintf("n%d", l.number), podCIDRs(l.number)...)
		l.detour = s.NewDetour(t, 7000+l.number)
		l.node.GoBy(t, l.detour.URL)
	}
	for _, g := range s.bystanders {
		s.CreateNode(t, g.name, nil, nil, g.annotations)
	}
	for _, n := range s.Nodes {
		n.StartDaemon(t)
	}
	for _, n := range s.Nodes {
		n.AwaitReady(t)
		for _, g := range s.bystanders {
			cluster.Await(t, "a route to the bystander on "+n.Name, func() error { return hasRoute(t, n, g) })
		}
		n.AddPod(t, "pod")
	}
	s.Progress("nodes are ready, pods are attached")
}

func hasRoute(t *testing.T, n *cluster.Node, g ghostNode) error {
	t.Helper()
	if !strings.Contains(n.NetNS.Run(t, "ip route show proto 116"), g.subnet+" ") {
		return fmt.Errorf("%s has no route to %s", n.Name, g.subnet)
	}
	return nil
}

func (l *lane) step(t *testing.T, name string, f func(*testing.T)) { step(t, l, name, f) }

// A fault is what is wrong with the API server for a while, as one node sees it.
type fault struct {
	begin func()
	hold  time.Duration
	// meanwhile is called after that, for what else is to be seen.
	meanwhile func()
	end       func()
	// most is how many requests a minute there may be once pauses are as long as they get.
	most int
	// live is whether the list of leases stays current.
	live bool
	// quiet is whether the daemon has nothing to say of it; otherwise it says once that the API server is away, and once
	// that it is back.
	quiet bool
}

// endure has the fault begin and end. As long as it lasts packets pass, the node is ready, and drift is repaired; after
// it the node follows what is new.
func (l *lane) endure(t *testing.T, f fault) {
	t.Helper()
	l.node.AwaitReady(t)
	cluster.Await(t, "a list that is current", func() error { return l.ageWithin(0, 61*time.Second) })
	logged := len(l.log(t))
	before := l.age(t)
	begun := time.Now()
	f.begin()
	l.drift(t)
	settling := min(settled, f.hold/2)
	l.isFineFor(t, settling)
	since, knocks := time.Now(), l.detour.Knocks(t)
	l.isFineFor(t, f.hold-settling)
	l.drift(t)
	if f.meanwhile != nil {
		f.meanwhile()
	}
	l.countTries(t, since, knocks, f.most)
	lasted := time.Since(begun)
	if age := l.age(t); !f.live && age < lasted-5*time.Second {
		t.Errorf("after %v without the API server /report says that the list is %v old, and %v before", lasted, age, before)
	}
	l.said(t, logged, "API server away", !f.quiet)
	f.end()
	l.followsWithin(t, recovery)
	l.said(t, logged, "API server away", !f.quiet)
	l.said(t, logged, "API server back", !f.quiet)
}

func (l *lane) isFineFor(t *testing.T, d time.Duration) {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < d; time.Sleep(250 * time.Millisecond) {
		l.isFine(t)
	}
}

// isFine pings and asks whether the node is ready.
func (l *lane) isFine(t *testing.T) {
	t.Helper()
	for _, addr := range l.straight.Pods[0].Addrs {
		if err := probe.Ping(l.node.Pods[0].NetNS, addr); err != nil {
			t.Errorf("a ping to %s: %v", addr, err)
		}
	}
	if err := l.node.Ready(); err != nil {
		t.Errorf("readiness: %v", err)
	}
}

// drift takes a route of ours away, which has to come back.
func (l *lane) drift(t *testing.T) {
	t.Helper()
	g := l.bystanders[l.drifts%len(l.bystanders)]
	l.drifts++
	l.node.NetNS.Run(t, "ip route del "+g.subnet)
	cluster.Await(t, "the route to come back on "+l.node.Name, func() error { return hasRoute(t, l.node, g) })
}

// countTries looks at how often a minute the daemon has tried since the pauses became as long as they get: by a
// request, or by a connection that was not let in.
func (l *lane) countTries(t *testing.T, since time.Time, knocks, most int) {
	t.Helper()
	window := time.Since(since)
	requests := l.detour.Requests(since)
	knocks = l.detour.Knocks(t) - knocks
	a := float64(max(len(requests), knocks)) * float64(time.Minute) / float64(window)
	l.Progress("  %s: %d requests and %d connections in %v, %.0f a minute",
		t.Name(), len(requests), knocks, window.Round(time.Second), a)
	if a > float64(most) {
		t.Errorf("%.0f requests a minute, want at most %d: %v", a, most, requests)
	}
}

// followsWithin has a Node come, whose route has to be there soon, and go.
func (l *lane) followsWithin(t *testing.T, most time.Duration) {
	t.Helper()
	begun := time.Now()
	g := l.arrive(t)
	cluster.Await(t, "a route to "+g.name+" on "+l.node.Name, func() error { return hasRoute(t, l.node, g) })
	took := time.Since(begun).Round(10 * time.Millisecond)
	l.Progress("  %s: follows after %v", t.Name(), took)
	if took > most {
		t.Errorf("what is new is followed after %v, want %v", took, most)
	}
	l.DeleteNode(t, g.name)
	cluster.Await(t, "the route to "+g.name+" to go", func() error {
		if hasRoute(t, l.node, g) == nil {
			return errors.New("it is there")
		}
		return nil
	})
}

// arrive has a Node come that no other lane has.
func (l *lane) arrive(t *testing.T) ghostNode {
	t.Helper()
	l.news++
	g := ghost(100 + 20*(l.number-2) + l.news)
	l.CreateNode(t, g.name, nil, nil, g.annotations)
	return g
}

func (l *lane) age(t *testing.T) time.Duration {
	t.Helper()
	r, err := l.node.Report()
	if err != nil {
		t.Fatalf("/report of %s: %v", l.node.Name, err)
	}
	return time.Duration(r.ListAge * float64(time.Second))
}

func (l *lane) ageWithin(least, most time.Duration) error {
	r, err := l.node.Report()
	if age := time.Duration(r.ListAge * float64(time.Second)); err == nil && (age < least || age > most) {
		err = fmt.Errorf("the list is %v old", age)
	}
	return err
}

func (l *lane) log(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(l.node.Daemon.Log)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// said checks that the daemon has logged these words once since then, or not at all.
func (l *lane) said(t *testing.T, since int, words string, once bool) {
	t.Helper()
	want := 0
	if once {
		want = 1
	}
	cluster.Await(t, "the log to have "+words, func() error {
		if n := strings.Count(l.log(t)[since:], words); n < want {
			return fmt.Errorf("it has it %d times", n)
		}
		return nil
	})
	if n := strings.Count(l.log(t)[since:], words); n != want {
		t.Errorf("%q was logged %d times, want %d:\n%s", words, n, want, l.log(t)[since:])
	}
}

// impose returns the beginning of a fault of requests. Those that are open end, so that there are requests.
func (l *lane) impose(rules ...faults.Rule) func() {
	return func() {
		l.detour.Impose(rules...)
		l.detour.Cut()
	}
}

func (l *lane) lift(t *testing.T) func() {
	return func() {
		if err := l.detour.Lift(); err != nil {
			t.Fatal(err)
		}
	}
}

func (l *lane) away(t *testing.T) {
	l.step(t, "RefusedForAnHour", func(t *testing.T) {
		l.endure(t, fault{begin: l.detour.Refuse, hold: anyTime, end: l.lift(t), most: calm})
	})
	l.step(t, "AwayAtStart", l.awayAtStart)
}

func (l *lane) awayAtStart(t *testing.T) {
	l.node.Daemon.Stop(t, syscall.SIGTERM)
	l.detour.Refuse()
	before := l.node.State(t)
	l.node.StartDaemon(t)
	cluster.Await(t, "readiness that names the API server", func() error {
		err := l.node.Ready()
		if err == nil {
			t.Fatal("the daemon says that it is ready without ever having seen the API server")
		}
		return contains(err.Error(), "503", l.detour.URL)
	})
	begun := time.Now()
	for time.Since(begun) < settled {
		for _, addr := range l.straight.Pods[0].Addrs {
			if err := probe.Ping(l.node.Pods[0].NetNS, addr); err != nil {
				t.Errorf("a ping to %s: %v", addr, err)
			}
		}
		time.Sleep(250 * time.Millisecond)
	}
	if after := l.node.State(t); after != before {
		t.Errorf("a daemon that knows nothing changed\n%s\nto\n%s", before, after)
	}
	l.lift(t)()
	begun = time.Now()
	l.node.AwaitReady(t)
	took := time.Since(begun).Round(10 * time.Millisecond)
	l.Progress("  %s: ready after %v", t.Name(), took)
	if took > recovery {
		t.Errorf("ready %v after the API server's return, want %v", took, recovery)
	}
}

func (l *lane) hole(t *testing.T) {
	l.step(t, "PacketsAreLost", func(t *testing.T) {
		var arrive func()
		l.endure(t, fault{
			begin: func() { arrive = l.detour.LosePackets(t) }, hold: anyTime, end: func() { arrive() },
			most: 2 * calm, // the kernel knocks twice for each connection
		})
	})
	l.step(t, "PacketsAreLostForSeconds", func(t *testing.T) {
		arrive := l.detour.LosePackets(t)
		l.isFineFor(t, 3*time.Second)
		arrive()
		l.followsWithin(t, recovery)
	})
	l.step(t, "NobodyAnswers", func(t *testing.T) {
		l.endure(t, fault{
			begin: l.impose(faults.Rule{Do: faults.Hold}), hold: 65 * time.Second, end: l.lift(t), most: calm,
		})
	})
}

func (l *lane) silent(t *testing.T) {
	l.step(t, "WatchStallsSilently", l.watchStalls)
	l.step(t, "ListBreaksHalfWay", func(t *testing.T) {
		l.endure(t, fault{
			begin: l.impose(faults.Rule{Do: faults.CutAfter(100)}), hold: anyTime, end: l.lift(t), most: listed,
		})
	})
}

func (l *lane) watchStalls(t *testing.T) {
	l.followsWithin(t, recovery)
	logged := len(l.log(t))
	l.detour.Silence()
	begun := time.Now()
	g := l.arrive(t)
	for hasRoute(t, l.node, g) != nil && time.Since(begun) < stallNoticed+10*time.Second {
		l.isFine(t)
		if err := l.ageWithin(time.Since(begun)-2*time.Second, stallNoticed); err != nil && hasRoute(t, l.node, g) != nil {
			t.Errorf("after %v of silence: %v", time.Since(begun), err)
		}
		time.Sleep(250 * time.Millisecond)
	}
	took := time.Since(begun).Round(10 * time.Millisecond)
	l.Progress("  %s: noticed after %v", t.Name(), took)
	if took > stallNoticed {
		t.Errorf("a stalled watch is noticed after %v, want %v", took, stallNoticed)
	}
	l.DeleteNode(t, g.name)
	l.said(t, logged, "API server away", false)
}

func (l *lane) refusals(t *testing.T) {
	for _, c := range []struct {
		name string
		with faults.Fault
		most int
	}{
		{"TooManyRequests", faults.Overloaded(), calm},
		{"Forbidden", faults.Forbidden(), listed},
	} {
		l.step(t, c.name, func(t *testing.T) {
			l.endure(t, fault{begin: l.impose(faults.Rule{Do: c.with}), hold: anyTime, end: l.lift(t), most: c.most})
		})
	}
	l.step(t, "TokenIsRotated", func(t *testing.T) {
		token := l.node.NewToken(t)
		old := func(r faults.Request) bool { return r.Auth != "Bearer "+token }
		l.endure(t, fault{
			begin: l.impose(faults.Rule{For: old, Do: faults.Unauthorized()}), hold: anyTime,
			end: func() { l.node.SetToken(t, token) }, most: calm,
		})
		l.lift(t)()
	})
	l.step(t, "WritesMeetConflicts", func(t *testing.T) {
		l.endure(t, fault{
			begin: func() {
				l.detour.Impose(faults.Rule{For: isWrite, Do: faults.Conflict()})
				l.misstate(t)
			},
			hold: anyTime, end: l.lift(t), most: calm, live: true, quiet: true,
		})
		l.stated(t, recovery)
	})
}

func isWrite(r faults.Request) bool { return r.Verb == "patch" }

// misstate changes what the node has published in a way that leaves its peers alone.
func (l *lane) misstate(t *testing.T) {
	t.Helper()
	l.PatchNode(t, l.node.Name, fmt.Sprintf(`{"metadata":{"annotations":{"tweed.dev/host":%q}}}`, l.node.Addrs[0]))
}

// stated waits until the node has published what it should.
func (l *lane) stated(t *testing.T, most time.Duration) {
	t.Helper()
	begun := time.Now()
	want := l.node.Addrs[0].String() + "," + l.node.Addrs[1].String()
	cluster.AwaitLong(t, "the daemon to publish again", 2*time.Minute, func() error {
		if got := l.Annotations(t, l.node.Name)["tweed.dev/host"]; got != want {
			return fmt.Errorf("it says %s, want %s", got, want)
		}
		return nil
	})
	if took := time.Since(begun); took > most {
		t.Errorf("it is published after %v, want %v", took, most)
	}
}

func (l *lane) slow(t *testing.T) {
	l.step(t, "WriteLandsAndTheAnswerIsLost", func(t *testing.T) {
		l.endure(t, fault{
			begin: func() {
				l.detour.Impose(faults.Rule{For: isWrite, Do: faults.LoseAnswer})
				l.misstate(t)
			},
			hold: settled, meanwhile: func() { l.stated(t, recovery) }, end: l.lift(t), most: calm, live: true, quiet: true,
		})
		l.hasNoProblem(t)
	})
	l.step(t, "VersionIsExpired", func(t *testing.T) {
		opens := func(r faults.Request) bool { return r.Verb == "watch" }
		logged := len(l.log(t))
		l.impose(faults.Rule{For: opens, Do: faults.Gone()})()
		l.followsWithin(t, recovery+4*time.Second) // by lists alone
		l.lift(t)()
		l.followsWithin(t, recovery)
		if err := l.detour.Expire(); err != nil {
			t.Error(err)
		}
		l.followsWithin(t, recovery)
		l.said(t, logged, "API server away", false)
	})
	l.step(t, "AnswersTakeHalfAMinute", func(t *testing.T) {
		l.endure(t, fault{
			begin: func() {
				l.impose(faults.Rule{Do: faults.Delay(30 * time.Second)})()
				l.misstate(t)
			},
			hold: 35 * time.Second, meanwhile: func() { l.stated(t, time.Minute) }, end: l.lift(t), most: calm, live: true,
			quiet: true,
		})
		l.hasNoProblem(t)
	})
}

func (l *lane) hasNoProblem(t *testing.T) {
	t.Helper()
	cluster.Await(t, l.node.Name+" to have no problem", func() error {
		r, err := l.node.Report()
		if err == nil && len(r.Names(l.node.Name)) > 0 {
			err = fmt.Errorf("it has %v", r.Names(l.node.Name))
		}
		return err
	})
}

// rest is without faults: two watches that go on ask for nothing.
func (l *lane) rest(t *testing.T) {
	l.step(t, "NothingIsAskedAtRest", func(t *testing.T) {
		l.followsWithin(t, recovery)
		begun := time.Now()
		for time.Since(begun) < 3*time.Minute {
			l.isFine(t)
			time.Sleep(time.Second)
		}
		asked := l.detour.Requests(begun)
		l.Progress("  %s: %d requests in 3 minutes", t.Name(), len(asked))
		other := func(r faults.Request) bool { return r.Verb != "watch" }
		if len(asked) > 2 || slices.ContainsFunc(asked, other) { // a watch ends after five to ten minutes
			t.Errorf("at rest it asks for %v", asked)
		}
	})
}

package overlay

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

func routeTo(dst string) backend.Route {
	return backend.Route{
		RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix(dst)},
		Dev:      "tweed.1", Via: netip.MustParsePrefix(dst).Addr(), Onlink: true,
	}
}

func tunnelLink() backend.Link {
	return backend.Link{Name: "tweed.1", Type: backend.KindVXLAN}
}

func add(objects ...backend.Object) (ops []backend.Op) {
	for _, o := range objects {
		ops = append(ops, backend.Op{Do: backend.Add, What: o})
	}
	return ops
}

func TestRepairsThatAreAFight(t *testing.T) {
	route := add(routeTo("10.244.2.0/24"))
	both := add(routeTo("10.244.2.0/24"), routeTo("10.244.3.0/24"))
	for _, c := range []struct {
		name  string
		ops   []backend.Op
		first bool // what the pass wants has changed
		each  time.Duration
		times int
		want  int // Problems
		over  bool
	}{
		{"a person tries what happens", route, false, time.Second, oftenEnough - 1, 0, false},
		{"a script that does not end", route, false, 200 * time.Millisecond, 100, 1, true},
		{"a job that runs every minute", route, false, time.Minute, oftenEnough, 1, true},
		{"the slow timer alone finds it", route, false, slow, oftenEnough, 1, true},
		{"now and then", route, false, calm + time.Second, 100, 0, false},
		{"two routes", both, false, time.Second, oftenEnough, 2, true},
		{"peers that come and go", route, true, time.Second, 100, 0, false},
		{"nothing to do", nil, false, slow, 100, 0, false},
		{"a link with what hangs on it", append(add(tunnelLink()), both...), false, time.Second, oftenEnough, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f fights
			var problems []subnet.Problem
			var over bool
			now := born
			for range c.times {
				res := result{of: make([]string, len(c.ops))}
				for i := range res.of {
					res.of[i] = done
				}
				now = now.Add(c.each)
				problems, over = f.note(Plan{Ops: c.ops, Again: !c.first}, res, now)
			}
			if len(problems) != c.want || over != c.over {
				t.Errorf("after %d passes: %v, all of it a fight: %v; want %d, %v", c.times, problems, over, c.want, c.over)
			}
			if problems, _ = f.note(Plan{Again: true}, result{}, now.Add(calm)); len(problems) != c.want {
				t.Errorf("%v later: %v", calm, problems)
			}
			if problems, _ = f.note(Plan{Again: true}, result{}, now.Add(calm+1)); len(problems) != 0 {
				t.Errorf("after more than %v without a repair: %v", calm, problems)
			}
		})
	}
}

// A fault of another object in the midst of a fight is told.
func TestFightHidesAnotherFault(t *testing.T) {
	var f fights
	now := born
	for range oftenEnough {
		now = now.Add(time.Second)
		f.note(Plan{Ops: add(routeTo("10.244.2.0/24")), Again: true}, result{of: []string{done}}, now)
	}
	ops := add(routeTo("10.244.2.0/24"), routeTo("10.244.3.0/24"))
	problems, over := f.note(Plan{Ops: ops, Again: true}, result{of: []string{done, done}}, now)
	if over || len(problems) != 1 {
		t.Errorf("all of it is a fight: %v; %v", over, problems)
	}
}

// Somebody who fights over very many objects does not fill the report, nor the memory.
func TestFightOverManyObjects(t *testing.T) {
	var ops []backend.Op
	for n := range 2 * mostRemembered {
		ops = append(ops, add(routeTo(fmt.Sprintf("10.%d.%d.0/24", n/256, n%256)))...)
	}
	res := result{of: make([]string, len(ops))}
	for i := range res.of {
		res.of[i] = done
	}
	var f fights
	var problems []subnet.Problem
	for n := range 2 * oftenEnough {
		problems, _ = f.note(Plan{Ops: ops, Again: true}, res, born.Add(time.Duration(n)*time.Second))
	}
	if len(problems) != mostFights || len(f.repairs.runs) != mostRemembered {
		t.Errorf("%d problems, %d objects remembered", len(problems), len(f.repairs.runs))
	}
}

func TestFightIsNamedWithAWayOut(t *testing.T) {
	for _, kind := range backend.Kinds() {
		text := fightText("COMMAND", kind)
		if !strings.Contains(text, "`COMMAND`") || !strings.Contains(text, " 5 times") || !strings.Contains(text, "; ") {
			t.Errorf("%s: %s", kind, text)
		}
	}
	// What a text names is there, and the documents say what it is.
	install, err := os.ReadFile("../docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	for kind, file := range map[string]string{
		"route":   "/etc/systemd/networkd.conf.d/10-tweed.conf",
		"rule":    "/etc/systemd/networkd.conf.d/10-tweed.conf",
		"link":    "/etc/systemd/network/10-tweed.network",
		"address": "/etc/NetworkManager/conf.d/10-tweed.conf",
	} {
		text, err := os.ReadFile("../manifests/host" + file)
		if err != nil || !strings.Contains(fightText("COMMAND", kind), file) || !strings.Contains(string(install), file) {
			t.Errorf("%s: nothing leads to %s (%v)", kind, file, err)
		}
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "ManageForeign") && !strings.Contains(string(install), line) {
				t.Errorf("docs/install.md does not say %s", line)
			}
		}
	}
}

// harassed runs a node's passes, and its watch of the kernel if it hears, in time that passes as fast as f waits. It
// returns what the log has by then.
func harassed(t *testing.T, hears bool, f func(n *node)) (log string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		n := newNode(t)
		n.planner.SysctlRoot = sysctlsWithNetfilter(t)
		n.log = slog.New(slog.NewTextHandler(&text, nil))
		n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
		ctx, cancel := context.WithCancel(t.Context())
		var daemon sync.WaitGroup
		watch := func(ctx context.Context) error {
			if !hears {
				return nil
			}
			return n.kern.Watch(ctx, n.isUplink, n.Ring)
		}
		for _, part := range []func(context.Context) error{n.Passes, n.Publish, watch} {
			daemon.Go(func() {
				if err := part(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		after(time.Second)
		f(n)
		cancel()
		daemon.Wait()
		log = text.String()
	})
	return log
}

func (n *node) loses(t *testing.T, dst string) {
	t.Helper()
	if n.routes(t)[dst] == "" {
		return
	}
	if err := n.kern.ByHand(backend.Op{Do: backend.Delete, What: n.state(t).Routes[routeTo(dst).RouteKey]}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) fought() (texts []string) {
	for _, p := range n.Report().Problems {
		if p.Kind == subnet.KindFight {
			texts = append(texts, p.Text)
		}
	}
	return texts
}

// A script deletes the same route for ever. It is put back at most five times a second, that is said once, and another
// route that is lost meanwhile comes back as soon as ever.
func TestScriptDeletesTheSameRouteForEver(t *testing.T) {
	log := harassed(t, true, func(n *node) {
		const minutes = 4
		before := len(n.kern.Ops())
		for i := range minutes * 60 * 100 {
			n.loses(t, "10.244.2.0/24")
			if i == 12_000 {
				n.loses(t, "10.244.3.0/24")
			}
			if i == 12_100 && n.routes(t)["10.244.3.0/24"] == "" {
				t.Error("another route is not back within a second")
			}
			after(10 * time.Millisecond)
		}
		if repairs := len(n.kern.Ops()) - before; repairs < minutes*60*4 || repairs > minutes*60*5+10 {
			t.Errorf("%d repairs in %d minutes, which is not about five a second", repairs, minutes)
		}
		if texts := n.fought(); len(texts) != 1 || !strings.Contains(texts[0], "`ip route add 10.244.2.0/24 ") {
			t.Errorf("the fight is named %q", texts)
		}
		after(calm + slow + time.Second)
		if n.routes(t)["10.244.2.0/24"] == "" || len(n.fought()) != 0 {
			t.Errorf("after the fight: routes %v, fights %v", n.routes(t), n.fought())
		}
	})
	// Of the start, of the first repairs, of the fight's beginning and end, and of the other route.
	if lines := strings.Count(log, "\n"); lines > 20 || strings.Count(log, "kind=fight") != 2 {
		t.Errorf("the log has %d lines:\n%s", lines, log[:min(len(log), 4000)])
	}
}

// A stranger's route takes our route's place for a moment, all the time: the problem comes and goes with it.
func TestProblemComesAndGoesAllTheTime(t *testing.T) {
	log := harassed(t, true, func(n *node) {
		for range 1000 {
			n.loses(t, "10.244.2.0/24")
			n.kern.AddStranger(routeTo("10.244.2.0/24"))
			after(300 * time.Millisecond)
			n.kern.RemoveStranger(routeTo("10.244.2.0/24"))
			n.kern.Ring()
			after(300 * time.Millisecond)
		}
	})
	if lines := strings.Count(log, "\n"); lines > 40 || !strings.Contains(log, "comes and goes") {
		t.Errorf("the log has %d lines:\n%s", lines, log[:min(len(log), 8000)])
	}
}

// The kernel does not tell of everything; without a word from it, what is wrong is found after half a minute.
func TestNothingRings(t *testing.T) {
	harassed(t, false, func(n *node) {
		after(slow)
		if err := n.kern.ByHand(backend.Op{Do: backend.Delete, What: n.state(t).Links["tweed.1"]}); err != nil {
			t.Fatal(err)
		}
		after(slow)
		if _, there := n.state(t).Links["tweed.1"]; !there || len(n.routes(t)) != 2 {
			t.Errorf("after half a minute: %v", n.routes(t))
		}
	})
}

func TestPassesOverALargeNodeArePacedByWhatTheyCost(t *testing.T) {
	for _, c := range []struct {
		rep  Report
		want time.Duration
	}{
		{Report{TookMs: 5}, pace},
		{Report{TookMs: 5, Drift: 1}, pace},
		{Report{TookMs: 100, Drift: 1}, 300 * time.Millisecond},
		{Report{TookMs: 100, Failed: 1}, 300 * time.Millisecond},
		{Report{TookMs: 100}, pace}, // a peer that has come does not wait
		{Report{TookMs: 5000, Drift: 1}, longestPause},
	} {
		if got := c.rep.pause(); got != c.want {
			t.Errorf("after a pass of %v ms with %d repairs: %v, want %v", c.rep.TookMs, c.rep.Drift, got, c.want)
		}
	}
}

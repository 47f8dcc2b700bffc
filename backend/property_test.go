package backend_test

import (
	"context"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/subnet"
)

func observe(t rapid.TB, f *kernel.Fake, want backend.State) backend.Observed {
	t.Helper()
	have, err := f.Observe(context.Background(), want)
	if err != nil {
		t.Fatalf("observing: %v", err)
	}
	return have
}

// apply makes changes of which the kernel must refuse none.
func apply(t rapid.TB, f *kernel.Fake, ops []backend.Op) {
	t.Helper()
	for i, op := range ops {
		if err := f.Apply(context.Background(), op); err != nil {
			t.Fatalf("%s: %v\nafter\n%s", op, err, strings.Join(commands(ops[:i]), "\n"))
		}
	}
}

// reach makes one pass, after which there must be nothing left to do.
func reach(t rapid.TB, f *kernel.Fake, want backend.State) []backend.Op {
	t.Helper()
	ops, problems := backend.Diff(want, observe(t, f, want))
	if len(problems) > 0 {
		t.Fatalf("problems: %v", problems)
	}
	apply(t, f, ops)
	if rest, _ := backend.Diff(want, observe(t, f, want)); len(rest) > 0 {
		t.Fatalf("after\n%s\nthere is still to do\n%s",
			strings.Join(commands(ops), "\n"), strings.Join(commands(rest), "\n"))
	}
	return ops
}

func commands(ops []backend.Op) (lines []string) {
	for _, op := range ops {
		lines = append(lines, op.String())
	}
	return lines
}

// drawDamage does to a host what others may do, and returns functions that do the same to another host.
func drawDamage(t *rapid.T, f *kernel.Fake) []func(*kernel.Fake) {
	var done []func(*kernel.Fake)
	for range rapid.IntRange(0, 4).Draw(t, "damages") {
		own := observe(t, f, backend.State{})
		var choices []func(*kernel.Fake)
		byHand := func(op backend.Op) {
			choices = append(choices, func(f *kernel.Fake) { _ = f.ByHand(op) })
		}
		for _, l := range sorted(own.Links) {
			byHand(backend.Op{Do: backend.Delete, What: l})
			down, other := l, l
			down.Up, other.MAC = !l.Up, mac(9)
			byHand(backend.Op{Do: backend.Change, What: down, Was: l})
			byHand(backend.Op{Do: backend.Change, What: other, Was: l})
		}
		for _, a := range sorted(own.Addrs) {
			byHand(backend.Op{Do: backend.Delete, What: a})
		}
		for _, r := range sorted(own.Routes) {
			byHand(backend.Op{Do: backend.Delete, What: r})
		}
		for _, n := range sorted(own.Neighs) {
			byHand(backend.Op{Do: backend.Delete, What: n})
		}
		for _, dev := range []string{"eth0", "eth1"} {
			choices = append(choices, func(f *kernel.Fake) {
				all, _ := f.Interfaces(context.Background())
				f.RemoveInterface(dev)
				for _, i := range all {
					if i.Name == dev {
						f.SetInterface(i)
					}
				}
			})
		}
		do := choices[rapid.IntRange(0, len(choices)-1).Draw(t, "damage")]
		do(f)
		done = append(done, do)
	}
	return done
}

// sorted lists the objects of one kind in the same order each time.
func sorted[K comparable, V backend.Object](m map[K]V) []V {
	return slices.SortedFunc(maps.Values(m), func(a, b V) int {
		return strings.Compare(a.Command(backend.Add, nil), b.Command(backend.Add, nil))
	})
}

func TestOnePassReachesWantFromAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := host()
		reach(t, f, drawState(t, "before"))
		drawDamage(t, f)
		reach(t, f, drawState(t, "want"))
		reach(t, f, backend.State{})
		if own := observe(t, f, backend.State{}); own.Len() > 0 {
			t.Fatalf("left behind: %+v", own.State)
		}
	})
}

func TestDaemonDiesInTheMiddleOfAPass(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		before, want := drawState(t, "before"), drawState(t, "want")
		f := host()
		reach(t, f, before)
		damage := drawDamage(t, f)
		ops, _ := backend.Diff(want, observe(t, f, want))
		for died := range ops {
			f := host()
			reach(t, f, before)
			for _, do := range damage {
				do(f)
			}
			apply(t, f, ops[:died])
			reach(t, f, want)
		}
	})
}

func TestNothingIsDoneTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawState(t, "state")
		if ops, problems := backend.Diff(s, backend.Observed{State: s}); len(ops)+len(problems) > 0 {
			t.Fatalf("ops %v, problems %v", ops, problems)
		}
	})
}

func TestPeerIsNotInTheKernel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawState(t, "state")
		f := host()
		for _, op := range reach(t, f, s) {
			if named := peerOf(op.What); op.Do != backend.Delete && op.Peer != named {
				t.Fatalf("%s is for %q, and says %q", op, named, op.Peer)
			}
		}
		for k, r := range s.Routes {
			r.Peer += "x"
			s.Routes[k] = r
		}
		for k, n := range s.Neighs {
			n.Peer += "x"
			s.Neighs[k] = n
		}
		for k, e := range s.FDB {
			e.Peer += "x"
			s.FDB[k] = e
		}
		if ops, _ := backend.Diff(s, observe(t, f, s)); len(ops) > 0 {
			t.Fatalf("another peer's name makes work: %v", commands(ops))
		}
	})
}

func peerOf(o backend.Object) string {
	p := reflect.ValueOf(o).FieldByName("Peer")
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

func TestOperationsReadAsCommands(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := host()
		reach(t, f, drawState(t, "before"))
		drawDamage(t, f)
		want := drawState(t, "want")
		have := observe(t, f, want)
		ops, _ := backend.Diff(want, have)
		seen := map[string]bool{}
		for _, line := range commands(ops) {
			program, _, _ := strings.Cut(line, " ")
			if !slices.Contains([]string{"ip", "bridge", "sysctl", "ethtool"}, program) ||
				strings.Contains(line, "  ") || strings.Contains(line, "invalid") || strings.Contains(line, "%!") {
				t.Fatalf("%q is no command", line)
			}
			if seen[line] {
				t.Fatalf("%q is planned twice", line)
			}
			seen[line] = true
		}
		again, _ := backend.Diff(want, have)
		if !slices.Equal(commands(ops), commands(again)) {
			t.Fatalf("two orders:\n%s\nand\n%s", strings.Join(commands(ops), "\n"), strings.Join(commands(again), "\n"))
		}
	})
}

func TestStrangersStandInTheWay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := host()
		reach(t, f, drawState(t, "before"))
		want := drawState(t, "want")
		blocked, taken := drawStrangers(t, f, want)
		before := f.Strangers()

		have := observe(t, f, want)
		ops, problems := backend.Diff(want, have)
		for _, p := range problems {
			if p.Kind != subnet.KindStranger || p.Text == "" {
				t.Fatalf("odd problem %+v", p)
			}
		}
		if len(problems) != len(blocked)+len(taken) {
			t.Fatalf("strangers hold links %v and keys %v, and make the problems %v", blocked, taken, problems)
		}
		for _, op := range ops {
			if touches(op.What, blocked, taken) {
				t.Fatalf("%s touches a stranger, or what cannot be without it", op)
			}
		}
		apply(t, f, ops)
		if after := f.Strangers(); !reflect.DeepEqual(before, after) {
			t.Fatalf("strangers were %+v and are %+v", before, after)
		}
		if rest, _ := backend.Diff(want, observe(t, f, want)); len(rest) > 0 {
			t.Fatalf("still to do: %v", commands(rest))
		}
		for k := range want.Routes {
			r, there := observe(t, f, want).Routes[k]
			r.Peer = want.Routes[k].Peer
			if !touches(want.Routes[k], blocked, taken) && (!there || r != want.Routes[k]) {
				t.Fatalf("route %v is not there", want.Routes[k])
			}
		}
	})
}

// drawStrangers puts strangers in the way of want, and returns the links and keys that they hold.
func drawStrangers(t *rapid.T, f *kernel.Fake, want backend.State) (blocked map[string]bool, taken map[any]bool) {
	blocked, taken = map[string]bool{}, map[any]bool{}
	own := observe(t, f, want)
	for _, l := range sorted(want.Links) {
		if rapid.IntRange(0, 2).Draw(t, "stranger link") > 0 {
			continue
		}
		if have, there := own.Links[l.Name]; there {
			_ = f.ByHand(backend.Op{Do: backend.Delete, What: have})
		}
		l.Up = true
		if l.Type == backend.KindVXLAN && rapid.Bool().Draw(t, "same VNI") {
			l.VXLAN.Dev = ""
			blocked[l.Name] = true
			l.Name = "flannel." + l.Name
		}
		blocked[strings.TrimPrefix(l.Name, "flannel.")] = true
		f.AddStranger(l)
	}
	for _, r := range sorted(want.Routes) {
		if _, ours := observe(t, f, want).Routes[r.RouteKey]; !ours && !blocked[r.Dev] &&
			r.Dst != netip.MustParsePrefix("10.9.0.0/24") && rapid.IntRange(0, 2).Draw(t, "stranger route") == 0 {
			taken[r.RouteKey] = true
			f.AddStranger(backend.Route{RouteKey: r.RouteKey, Dev: "eth0"})
		}
	}
	for _, r := range sorted(want.Rules) {
		if _, ours := own.Rules[r.RuleKey]; !ours && rapid.Bool().Draw(t, "stranger rule") {
			f.AddStranger(r)
		}
	}
	// Whoever else uses a table, all of our rules that lead there are kept back.
	others := f.Strangers()
	for key := range want.Rules {
		for other := range others.Rules {
			taken[key] = taken[key] || other.Table == key.Table
		}
		for other := range others.Routes {
			taken[key] = taken[key] || other.Table == key.Table && other.Dst.Addr().Is4() == key.From.Addr().Is4()
		}
		if !taken[key] {
			delete(taken, key)
		}
	}
	return blocked, taken
}

func touches(o backend.Object, blocked map[string]bool, taken map[any]bool) bool {
	switch o := o.(type) {
	case backend.Link:
		return blocked[o.Name]
	case backend.Addr:
		return blocked[o.Dev]
	case backend.Neigh:
		return blocked[o.Dev]
	case backend.FDBEntry:
		return blocked[o.Dev]
	case backend.Route:
		return blocked[o.Dev] || taken[o.RouteKey]
	case backend.Rule:
		return taken[o.RuleKey]
	case backend.Sysctl:
		return slices.ContainsFunc(slices.Collect(maps.Keys(blocked)), func(dev string) bool {
			return strings.Contains(o.Name, "/"+dev+"/")
		})
	}
	return false
}

package overlay

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// watched counts how often the kernel is looked at.
type watched struct {
	Kernel
	looks int
}

func (w *watched) Observe(ctx context.Context, want backend.State) (backend.Observed, error) {
	w.looks++
	return w.Kernel.Observe(ctx, want)
}

func (w *watched) ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error) {
	w.looks++
	return w.Kernel.ObserveFilter(ctx, want)
}

// knowing is a node with some peers that has looked at its kernel and found nothing to do.
func knowing(t testing.TB, peers ...subnet.Lease) (*node, *watched) {
	t.Helper()
	n := newNode(t)
	kern := &watched{Kernel: n.planner.Kernel}
	n.planner.Kernel = kern
	n.cluster.set(peers...)
	for range 3 {
		n.step(t)
	}
	if n.planner.known == nil {
		t.Fatalf("the kernel is not known after a look that found nothing to do: %+v", n.Report())
	}
	return n, kern
}

func TestPeerComesWithoutALookAndIsLookedAtThen(t *testing.T) {
	n, kern := knowing(t, peer("n2", "10.244.2.0/24", "192.0.2.12"))
	looks := kern.looks
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	rep := n.turn(t)
	if kern.looks != looks || rep.Done == 0 || rep.Failed > 0 || rep.Drift > 0 || rep.Peers != 2 || !rep.Converged {
		t.Errorf("%d looks; %+v", kern.looks-looks, rep)
	}
	if got := n.routes(t)["10.244.3.0/24"]; got == "" {
		t.Error("no route to the peer that came")
	}
	looks = kern.looks
	if rep := n.turn(t); kern.looks == looks || rep.Done+rep.Drift > 0 {
		t.Errorf("%d looks after a change that nobody has seen; %+v", kern.looks-looks, rep)
	}
}

func TestStrangersRouteThatNobodyToldOfIsNotReplaced(t *testing.T) {
	n, _ := knowing(t)
	dst := netip.MustParsePrefix("10.244.3.0/24")
	n.kern.AddStranger(backend.Route{RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: dst}, Dev: "eth0"})
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	if rep := n.turn(t); rep.Failed != 1 {
		t.Errorf("a stranger's route is in the way, and %d operations failed", rep.Failed)
	}
	if rep := n.turn(t); rep.Failed > 0 || !hasProblem(rep, "n3", "not ours") {
		t.Errorf("problems after a look: %v", rep.Problems)
	}
}

func TestDriftIsSeenAlthoughListsKeepComing(t *testing.T) {
	n, _ := knowing(t, peer("n3", "10.244.3.0/24", "192.0.2.13"))
	for _, r := range n.state(t).Routes {
		if err := n.kern.ByHand(backend.Op{Do: backend.Delete, What: r}); err != nil {
			t.Fatal(err)
		}
	}
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	n.Ring()
	if n.turn(t); n.routes(t)["10.244.3.0/24"] == "" {
		t.Error("the kernel has told of a change, and nothing was repaired")
	}
}

// What is amended is what would have been worked out from the whole list, whatever the lists are.
func TestAmendedIsWhatTheWholeListGives(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n, _ := knowing(t)
		for range 12 {
			n.cluster.set(drawLeases(rt)...)
			if rapid.IntRange(0, 5).Draw(rt, "own lease is gone") == 0 {
				n.cluster.published = nil
			}
			p := n.planner
			list, _ := n.cluster.List()
			n.turn(t)
			if got, want := p.desired, p.desire(p.last, list); !reflect.DeepEqual(counted(got), counted(want)) {
				ops, _ := backend.Diff(want.state, backend.Observed{State: got.state})
				rt.Fatalf("amended, and needs %v %v; peers %d, not %d; nodes %v, not %v; refused %d, not %d; unsaid %v, not %v",
					ops, masq.Diff(want.filter, got.filter), got.peers, want.peers, got.nodes, want.nodes,
					got.refused, want.refused, got.unsaid, want.unsaid)
			}
			if rep := n.step(t); rep.Drift+rep.Failed > 0 {
				rt.Fatalf("the look after found something to repair: %+v", rep)
			}
			n.step(t)
		}
	})
}

// counted is d without what does not count.
func counted(d desired) desired {
	d.state.Version = 0
	if d.nodes == nil {
		d.nodes = []string{}
	}
	if d.problems == nil {
		d.problems = []subnet.Problem{}
	}
	return d
}

// drawLeases draws the leases of some of a few nodes, in the order of their names. Now and then two have something in
// common.
func drawLeases(t *rapid.T) (leases []subnet.Lease) {
	nodes := map[string][]subnet.Lease{}
	for i := range 5 {
		if rapid.IntRange(0, 2).Draw(t, "away") == 0 {
			continue
		}
		name := fmt.Sprintf("peer-%d", i)
		third, host := 10+i, 20+i
		if rapid.IntRange(0, 9).Draw(t, "twin") == 0 {
			third = 10 + rapid.IntRange(0, 4).Draw(t, "subnet")
		}
		if rapid.IntRange(0, 9).Draw(t, "shared") == 0 {
			host = 20 + rapid.IntRange(0, 4).Draw(t, "host")
		}
		four := peer(name, fmt.Sprintf("10.244.%d.0/24", third), fmt.Sprintf("192.0.2.%d", host))
		nodes[name] = append(nodes[name], four)
		if rapid.Bool().Draw(t, "dual-stack") {
			six := four
			six.Subnet = netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", third))
			nodes[name] = append(nodes[name], six)
		}
		if rapid.IntRange(0, 9).Draw(t, "other MAC") == 0 {
			nodes[name][0].Data = peer("peer-0", "10.244.2.0/24", "192.0.2.12").Data
		}
		if rapid.IntRange(0, 9).Draw(t, "older version") == 0 {
			for i := range nodes[name] {
				data, _, _ := strings.Cut(string(nodes[name][i].Data), `,"inside"`)
				nodes[name][i].Data = json.RawMessage(data + "}")
			}
		}
		if rapid.IntRange(0, 9).Draw(t, "bad") == 0 {
			nodes[name][0].Backend = "pigeons"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		leases = append(leases, nodes[name]...)
	}
	return leases
}

func TestLoserOfAConflictIsAPeerOnceTheWinnerIsGone(t *testing.T) {
	winner, loser := peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13")
	loser.Data, loser.Since = winner.Data, winner.Since.Add(1)
	n, kern := knowing(t, winner, loser)
	looks := kern.looks
	n.cluster.set(loser)
	if rep := n.turn(t); rep.Peers != 1 || kern.looks != looks || n.routes(t)["10.244.3.0/24"] == "" {
		t.Errorf("%d looks; %+v", kern.looks-looks, rep)
	}
}

// Pods are no part of what a list of leases asks for, on either way to work that out.
func TestPodsStayJudgedWhenAListIsCompared(t *testing.T) {
	near, far := peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13")
	twin := peer("n4", "10.244.3.0/24", "192.0.2.14") // a conflict: the whole list is worked out
	for _, list := range [][]subnet.Lease{{near, far}, {near, far, twin}} {
		n, kern := knowing(t, near)
		n.attach(t, "tweed1", "10.244.1.2/24", "lab")
		n.step(t)
		n.step(t)
		looks := kern.looks
		n.cluster.set(list...)
		if n.turn(t); kern.looks != looks {
			t.Errorf("%d leases: %d looks", len(list), kern.looks-looks)
		}
		n.wantJudged(t, "after the list", true, "tweed1")
	}
}

package overlay

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// peersOf lists what the kernel lets in.
func (n *node) peersOf(t *testing.T) string {
	t.Helper()
	have, err := n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for s, addrs := range have.Sets {
		for _, a := range slices.SortedFunc(maps.Keys(addrs), netip.Addr.Compare) {
			all = append(all, s.Name+" "+a.String())
		}
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// Whoever has a route has to be let in, from all addresses that it sends from, and nobody else.
func TestPeerThatIsReachedIsNotLetIn(t *testing.T) {
	n := newNode(t)
	behind := peer("n2", "10.244.2.0/24", "192.0.2.12")
	behind.Sources = []netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7")}
	refused := peer("n4", "172.16.4.0/24", "192.0.2.14")
	for _, c := range []struct {
		leases []subnet.Lease
		want   string
	}{
		{nil, ""},
		{[]subnet.Lease{behind, refused}, "tweed-peers4 192.0.2.12, tweed-peers4 198.51.100.7"},
		{[]subnet.Lease{peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n2", "fd00:10:244:2::/64", "192.0.2.12"),
			peer("n3", "10.244.3.0/24", "192.0.2.13")}, "tweed-peers4 192.0.2.12, tweed-peers4 192.0.2.13"},
		{[]subnet.Lease{peer("n3", "10.244.3.0/24", "192.0.2.33")}, "tweed-peers4 192.0.2.33"},
	} {
		n.cluster.set(c.leases...)
		n.step(t)
		if got := n.peersOf(t); got != c.want {
			t.Errorf("let in are %q, want %q", got, c.want)
		}
		if rep := n.step(t); rep.Done > 0 {
			t.Errorf("a pass later there is something to do: %+v", rep)
		}
	}
}

func TestGuardCannotBeSwitchedOff(t *testing.T) {
	n := newNode(t)
	n.planner.Config.Backend.Guard = false
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	if got := n.peersOf(t); got != "" {
		t.Errorf("let in are %q", got)
	}
	if _, there := n.scrape(t)["tweed_guard_drops_total pod"]; there {
		t.Error("what is not guarded is counted")
	}
}

func TestDropsAreMiscounted(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	input := masq.Chain{Family: masq.IPv4, Table: masq.MangleTable, Name: masq.GuardInput}
	forward := masq.Chain{Family: masq.IPv4, Table: masq.MangleTable, Name: masq.GuardForward}
	n.kern.SetRuleCounts(input, 1, 10, 100, 1000)
	n.kern.SetRuleCounts(forward, 10000, 100000)
	n.wantSeries(t, map[string]float64{
		"tweed_guard_drops_total pod": 10011, "tweed_guard_drops_total translated": 100100,
		"tweed_guard_drops_total stranger": 1000,
	})
	n.byHand(t, backend.Add, masq.Entry{Chain: input, At: 1, Rule: masq.Rule{Unknown: "-j ACCEPT"}})
	n.wantSeries(t, map[string]float64{
		"tweed_guard_drops_total pod": 10000, "tweed_guard_drops_total stranger": 0,
	})
}

// A cluster's size is no reason to wait: what all peers need together is a few operations.
func TestThousandsOfPeersAreAddedOneByOne(t *testing.T) {
	n := newNode(t)
	var leases []subnet.Lease
	for i := range 5000 {
		leases = append(leases, peer(fmt.Sprintf("p%d", i), fmt.Sprintf("10.%d.%d.0/24", 1+i/250, i%250),
			fmt.Sprintf("192.1.%d.%d", i/250, 1+i%250)))
	}
	n.cluster.set(leases...)
	plan, err := n.planner.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ops, members := 0, 0
	for _, op := range plan.Ops {
		if m, is := op.What.(masq.Members); is {
			ops, members = ops+1, members+len(m.Addrs)
		}
	}
	if members != 5000 || ops > 100 {
		t.Errorf("%d addresses by %d operations", members, ops)
	}
}

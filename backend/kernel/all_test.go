package kernel

import (
	"context"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

func (h *realHost) ObserveAll(ctx context.Context) (have backend.State, err error) {
	h.ns.Do(h.t, func() { have, err = h.Kernel.ObserveAll(ctx) })
	return have, err
}

func (h *realHost) ObserveAllFilters(ctx context.Context) (have masq.Ruleset, err error) {
	h.ns.Do(h.t, func() { have, err = h.Kernel.ObserveAllFilters(ctx) })
	return have, err
}

// askAll has all that is ours found by who does not know what to look for, and taken away in the order of Diff.
func askAll(t *testing.T, h host) {
	pass(t, h, sample())
	filterPass(t, h, dualStackFilter(t))
	have, err := h.ObserveAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := sample()
	want.Sysctls = nil
	if have.Len() != want.Len() || !reflect.DeepEqual(have.Links, want.Links) {
		t.Errorf("found\n%+v\nof\n%+v", have, want)
	}
	takeAllAway(t, h)
}

func takeAllAway(t *testing.T, h host) {
	t.Helper()
	for _, op := range removals(t, h) {
		if err := h.Apply(t.Context(), op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	for _, op := range removals(t, h) {
		t.Errorf("still to do: %s", op)
	}
}

func removals(t *testing.T, h host) []backend.Op {
	t.Helper()
	have, err := h.ObserveAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rules, err := h.ObserveAllFilters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ops, _ := backend.Diff(backend.State{}, backend.Observed{State: have})
	return append(ops, masq.Diff(masq.Ruleset{}, rules)...)
}

func TestLeftoversOfAnotherConfigurationAreOverlooked(t *testing.T) {
	h := newRealHost(t)
	for _, c := range []string{
		"ip link add tweed.7 group 116 type vxlan id 7 dstport 4789 local 192.0.2.11",
		"ip link add tweedab group 116 type veth peer name pod",
		"ip link add theirs type veth peer name other", "ip link set theirs up",
		"ip route add 10.9.0.0/24 via 192.0.2.1 proto 116", "ip route add 10.9.1.0/24 via 192.0.2.1 table 77 proto 116",
		"ip route add 10.9.0.0/24 via 192.0.2.1 metric 5",
		"ip route add unreachable 10.9.2.0/24 proto 116", "ip route add fd00:9::/64 via 2001:db8::1 proto 116",
		"ip -6 route add fd00:9:1::/64 proto 116 nexthop via 2001:db8::1 nexthop via 2001:db8::2",
	} {
		h.ns.Run(t, c)
	}
	takeAllAway(t, h)
	h.ns.Run(t, "ip link show theirs")
	if left := h.ns.Run(t, "ip link show group 116") + h.ns.Run(t, "ip route show table all proto 116") +
		h.ns.Run(t, "ip -6 route show table all proto 116"); left != "" {
		t.Errorf("left:\n%s", left)
	}
	if routes := h.ns.Run(t, "ip route"); !strings.Contains(routes, "10.9.0.0/24 via 192.0.2.1 dev eth0 metric 5") {
		t.Errorf("a stranger's route is gone:\n%s", routes)
	}
}

// A kubelet that changed from one iptables to the other has left our chains in both.
func TestChainsInTheOtherIptablesAreOverlooked(t *testing.T) {
	h := newRealHost(t)
	for _, form := range []string{"nft", "legacy"} {
		t.Run(form, func(t *testing.T) {
			callIptables(t, form)
			h.open()
			filterPass(t, h, dualStackFilter(t))
		})
	}
	rules, err := h.ObserveAllFilters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(rules.Chains) != 8 || len(rules.Jumps) != 8 {
		t.Errorf("chains %v, jumps %v", slices.Collect(maps.Keys(rules.Chains)), rules.Jumps)
	}
	takeAllAway(t, h)
	for _, program := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		if saved := h.ns.Run(t, program+"-save"); strings.Contains(saved, "TWEED") {
			t.Errorf("%s-save:\n%s", program, saved)
		}
	}
}

func TestLookingForLeftoversMakesTables(t *testing.T) {
	h := newRealHost(t)
	takeAllAway(t, h)
	for _, c := range []string{
		"cat /proc/thread-self/net/ip_tables_names", "cat /proc/thread-self/net/ip6_tables_names", "nft list ruleset",
	} {
		if out := h.ns.Run(t, c); out != "" {
			t.Errorf("%s:\n%s", c, out)
		}
	}
}

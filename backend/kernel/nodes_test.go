package kernel

import (
	"net/netip"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// known is a filter of a node whose pods other nodes know by their addresses.
func known(t testing.TB, form masq.Form) masq.Config {
	t.Helper()
	c := dualStack(t, form)
	c.Device = "tweed.1"
	for _, a := range []string{"192.0.2.11", "2001:db8::11"} {
		c.Own = append(c.Own, netip.MustParseAddr(a))
	}
	for _, a := range []string{"192.0.2.12", "192.0.2.13", "2001:db8::12"} {
		c.Near = append(c.Near, netip.MustParseAddr(a))
	}
	return c
}

func askNodes(t *testing.T, h host) {
	h.dropForwarded()
	for _, form := range []masq.Form{masq.NFTables, masq.IPTables, masq.NFTables} {
		c := known(t, form)
		filterPass(t, h, c.Desired())
		c.Near = c.Near[1:]
		filterPass(t, h, c.Desired())
		c.Own, c.Near = nil, nil
		filterPass(t, h, c.Desired())
		c.Device = ""
		filterPass(t, h, c.Desired())
	}
	takeAllAway(t, h)
}

func TestCommandsAboutNodesDoWhatTheySay(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		h.dropForwarded()
		for _, want := range []masq.Ruleset{known(t, form).Desired(), {}} {
			for _, op := range filterOps(t, h, want) {
				shell(t, h.ns, op.String())
			}
			for _, op := range filterOps(t, h, want) {
				t.Errorf("still to do: %s", op)
			}
		}
	})
}

// A rule of ours would send packets where somebody else's routes are, and theirs where ours are.
func keptBack(t *testing.T, h host, stranger backend.Object) {
	rule := backend.Rule{RuleKey: backend.RuleKey{
		Priority: 116, From: netip.MustParsePrefix("10.244.3.0/24"), Mark: 0x1000, Table: 1161}}
	want := backend.State{Rules: map[backend.RuleKey]backend.Rule{rule.RuleKey: rule}}
	plan := func(ops, problems int) {
		t.Helper()
		have, err := h.Observe(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		if o, p := backend.Diff(want, have); len(o) != ops || len(p) != problems {
			t.Errorf("operations %v, want %d; problems %v, want %d", o, ops, p, problems)
		}
	}
	plan(1, 0)
	h.addStranger(stranger)
	plan(0, 1)
}

func askRouteOfOthers(t *testing.T, h host) {
	keptBack(t, h, backend.Route{
		RouteKey: backend.RouteKey{Table: 1161, Dst: netip.MustParsePrefix("198.51.100.0/24")}, Dev: "eth0"})
}

func askRuleOfOthers(t *testing.T, h host) {
	keptBack(t, h, backend.Rule{
		RuleKey: backend.RuleKey{Priority: 500, From: netip.MustParsePrefix("10.9.0.0/24"), Table: 1161}})
}

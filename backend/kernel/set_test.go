package kernel

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// setOf is a set in one form as package masq names it.
func setOf(form masq.Form, family masq.Family, name string) masq.Set {
	if form == masq.NFTables {
		return masq.Set{Family: family, Table: masq.OwnTable, Name: name}
	}
	return masq.Set{Family: family, Name: fmt.Sprintf("%s%s%d", masq.SetPrefix, name, family)}
}

// addrs are so many addresses of a family.
func addrs(family masq.Family, n int) map[netip.Addr]bool {
	a, all := netip.MustParseAddr("198.51.100.0"), map[netip.Addr]bool{}
	if family == masq.IPv6 {
		a = netip.MustParseAddr("2001:db8:5::")
	}
	for range n {
		all[a], a = true, a.Next()
	}
	return all
}

// withSets is a filter in which each family's first rule names a set of n addresses.
func withSets(t testing.TB, form masq.Form, n int) masq.Ruleset {
	t.Helper()
	want := dualStack(t, form).Desired()
	want.Sets = map[masq.Set]map[netip.Addr]bool{}
	for c, rules := range want.Chains {
		if c.Name == masq.Forward {
			continue
		}
		s := setOf(form, c.Family, "some")
		want.Sets[s] = addrs(c.Family, n)
		want.Chains[c] = append([]masq.Rule{
			{SrcIn: s, Verdict: masq.Return}, {UDP: true, DstIn: s, NotDstIn: true, Verdict: masq.Return},
		}, rules...)
	}
	return want
}

func askSets(t *testing.T, h host) {
	for _, form := range []masq.Form{masq.NFTables, masq.IPTables, masq.NFTables} {
		for _, n := range []int{0, 250, 249, 1} {
			filterPass(t, h, withSets(t, form, n))
		}
		filterPass(t, h, dualStack(t, form).Desired())
		filterPass(t, h, withSets(t, form, 3))
		have, err := h.ObserveAllFilters(t.Context())
		if err != nil || len(have.Sets) != 2 {
			t.Errorf("with %s: %v, %v", form, have.Sets, err)
		}
	}
	takeAllAway(t, h)
}

func TestCommandsOfSetsDoWhatTheySay(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		for _, want := range []masq.Ruleset{
			withSets(t, form, 3), withSets(t, form, 150), withSets(t, form, 1), dualStack(t, form).Desired(),
		} {
			for _, op := range filterOps(t, h, want) {
				shell(t, h.ns, op.String())
			}
			h.filter.changes.Add(1)
			for _, op := range filterOps(t, h, want) {
				t.Errorf("still to do: %s", op)
			}
		}
	})
}

func TestSetsChangedByHandAreRepaired(t *testing.T) {
	for form, commands := range map[masq.Form][]string{
		masq.NFTables: {
			"nft flush set ip tweed some", "nft add element ip6 tweed some { 2001:db8:9::9 }",
			"nft delete element ip tweed some { 198.51.100.1 }", "nft delete table ip tweed",
		},
		masq.IPTables: {
			"ipset flush tweed-some4", "ipset add tweed-some6 2001:db8:9::9", "ipset del tweed-some4 198.51.100.1",
			"ipset create tweed-old hash:ip",
		},
	} {
		t.Run(string(form), func(t *testing.T) {
			h := newRealHost(t)
			filterPass(t, h, withSets(t, form, 3))
			for _, c := range commands {
				shell(t, h.ns, c)
				if len(filterOps(t, h, withSets(t, form, 3))) == 0 {
					t.Errorf("%s: not seen", c)
				}
				filterPass(t, h, withSets(t, form, 3))
			}
		})
	}
}

// A set of a stranger's is named and stays, and what does not need it is written all the same.
func TestStrangersSetHasOurName(t *testing.T) {
	for form, c := range map[masq.Form]struct{ theirs, out string }{
		masq.NFTables: {"nft add table ip tweed; nft 'add set ip tweed some { type ipv4_addr ; flags interval ; }'",
			"nft delete table ip tweed"},
		masq.IPTables: {"ipset create tweed-some4 hash:net", "ipset destroy tweed-some4"},
	} {
		t.Run(string(form), func(t *testing.T) {
			h := newRealHost(t)
			shell(t, h.ns, c.theirs)
			want := withSets(t, form, 3)
			filterPass(t, h, want)
			have, err := h.ObserveFilter(t.Context(), want)
			if err != nil {
				t.Fatal(err)
			}
			s := setOf(form, masq.IPv4, "some")
			if why := have.Taken[s]; len(have.Taken) != 1 || !strings.Contains(why, c.out) {
				t.Errorf("said %v", have.Taken)
			}
			if _, ours := have.Sets[s]; ours || len(have.Sets) != 1 {
				t.Errorf("found %v", slices.Collect(maps.Keys(have.Sets)))
			}
			if form == masq.IPTables {
				if out := h.ns.Run(t, "ipset list tweed-some4"); !strings.Contains(out, "hash:net") {
					t.Errorf("not as it was:\n%s", out)
				}
			}
			shell(t, h.ns, c.out)
			filterPass(t, h, want)
			if have, err = h.ObserveFilter(t.Context(), want); err != nil || len(have.Taken) > 0 || len(have.Sets) != 2 {
				t.Errorf("once it is gone: %+v, %v", have, err)
			}
		})
	}
}

// Rules in the iptables of yesterday would go by what the set held yesterday, and keep it from being destroyed.
func TestSetIsHeldByTheOtherIptables(t *testing.T) {
	for _, then := range []masq.Form{masq.IPTables, masq.NFTables} {
		for before, after := range map[string]string{"legacy": "nft", "nft": "legacy"} {
			t.Run(before+" to "+after+", "+string(then), func(t *testing.T) {
				h := newRealHost(t)
				callIptables(t, before)
				filterPass(t, h, withSets(t, masq.IPTables, 3))
				callIptables(t, after)
				h.open()
				filterPass(t, h, withSets(t, then, 2))
				for _, program := range []string{"iptables-", "ip6tables-"} {
					if saved := h.ns.Run(t, program+before+"-save"); strings.Contains(saved, "TWEED") {
						t.Errorf("%s:\n%s", program+before, saved)
					}
				}
				filterPass(t, h, masq.Ruleset{})
				if left := h.ns.Run(t, "ipset list -n"); left != "" {
					t.Errorf("left: %s", left)
				}
			})
		}
	}
}

// A cluster's nodes at a cold start are few messages and no process.
func TestManyMembersAreFewMessages(t *testing.T) {
	ops := masq.Diff(withSets(t, masq.NFTables, 5000), masq.Ruleset{})
	n := 0
	for _, op := range ops {
		if _, ok := op.What.(masq.Members); ok {
			n++
		}
	}
	if n != 100 {
		t.Errorf("%d operations for 2 x 5000 addresses", n)
	}
}

func BenchmarkSetOf5000(b *testing.B) {
	for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
		h := newRealHost(b)
		want := withSets(b, form, 5000)
		for _, op := range masq.Diff(withSets(b, form, 0), masq.Ruleset{}) {
			if err := h.Apply(b.Context(), op); err != nil {
				b.Fatal(err)
			}
		}
		full := masq.Ruleset{Sets: want.Sets}
		b.Run(string(form)+"/fill", func(b *testing.B) {
			for b.Loop() {
				for s, addrs := range full.Sets {
					apply(b, h, masq.Diff(masq.Ruleset{Sets: map[masq.Set]map[netip.Addr]bool{s: addrs}},
						masq.Ruleset{Sets: map[masq.Set]map[netip.Addr]bool{s: nil}}))
					b.StopTimer()
					apply(b, h, masq.Diff(masq.Ruleset{Sets: map[masq.Set]map[netip.Addr]bool{s: nil}},
						masq.Ruleset{Sets: map[masq.Set]map[netip.Addr]bool{s: addrs}}))
					b.StartTimer()
				}
			}
		})
	}
}

func apply(b *testing.B, h host, ops []backend.Op) {
	b.Helper()
	for _, op := range ops {
		if err := h.Apply(b.Context(), op); err != nil {
			b.Fatal(err)
		}
	}
}

package masq

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/spoof"
)

// Diff returns the operations that turn have into want. In between, no packet is treated otherwise than by the one or
// by the other: a chain is filled before packets get to it and left before it is emptied, and where rules change, the
// new ones stand before the old ones go; a set is filled before a rule names it. So it is too where the form changes:
// all of the new form stands before any of the old one goes, and in between both would do the same.
func Diff(want, have Ruleset) []backend.Op {
	want = want.withoutTaken(have.Taken)
	ops := append(additions(want, have), removals(want, have)...)
	if have.Unjudged == "" {
		ops = append(ops, spoof.Diff(want.Spoof, have.Spoof)...)
	}
	return ops
}

// Retires reports whether op takes away what others of a Diff may have been added instead of. It must not be done where one
// of these could not be: what is retired may be all that there is.
func Retires(op backend.Op) bool {
	switch op.What.(type) {
	case Table, Chain, Jump, Guest:
		return op.Do == backend.Delete
	}
	return false
}

func additions(want, have Ruleset) (ops []backend.Op) {
	add := func(o backend.Object) { ops = append(ops, backend.Op{Do: backend.Add, What: o}) }
	for _, t := range sorted(want.Tables, compareTables) {
		if !have.Tables[t] {
			add(t)
		}
	}
	for _, s := range sorted(want.Sets, compareSets) {
		if _, there := have.Sets[s]; !there {
			add(s)
		}
		ops = append(ops, members(backend.Add, s, want.Sets[s], have.Sets[s])...)
	}
	for _, c := range sorted(want.Chains, compareChains) {
		if _, there := have.Chains[c]; !there {
			add(c)
		}
		ops = append(ops, diffRules(c, want.Chains[c], have)...)
	}
	for _, j := range sorted(want.Jumps, compareJumps) {
		if !have.Jumps[j] && have.dueJump(j) {
			if j.At = have.Hosts[j.Base()].End; j.first() {
				j.At = 1
			}
			add(j)
		}
	}
	for _, g := range sorted(want.Guests, compareGuests) {
		if _, there := have.Guests[g]; !there && have.dueGuest(g) {
			g.At = have.Hosts[g.Host].End
			add(g)
		}
	}
	return ops
}

func removals(want, have Ruleset) (ops []backend.Op) {
	remove := func(o backend.Object) { ops = append(ops, backend.Op{Do: backend.Delete, What: o, Was: o}) }
	for _, g := range sorted(have.Guests, compareGuests) {
		if _, wanted := want.Guests[g]; !wanted || !have.dueGuest(g) {
			g.Handle = have.Guests[g]
			remove(g)
		}
	}
	for _, j := range sorted(have.Jumps, compareJumps) {
		if !want.Jumps[j] || !have.dueJump(j) {
			remove(j)
		}
	}
	for _, c := range sorted(have.Chains, compareChains) {
		if _, wanted := want.Chains[c]; !wanted {
			remove(c)
		}
	}
	for _, s := range sorted(have.Sets, compareSets) {
		if addrs, wanted := want.Sets[s]; wanted {
			ops = append(ops, members(backend.Delete, s, have.Sets[s], addrs)...)
		} else {
			remove(s)
		}
	}
	for _, t := range sorted(have.Tables, compareTables) {
		if !want.Tables[t] {
			remove(t)
		}
	}
	return ops
}

// first reports whether j stands in front of what others decide.
func (j Jump) first() bool { return j.Chain.Table == MangleTable || j.Chain.Table == RawTable }

// dueJump reports whether this host needs j. From DOCKER-USER it would overtake all that follows in FORWARD, network
// policies too; there it is only for where packets would not get further.
func (r Ruleset) dueJump(j Jump) bool { return j.From != DockerUser || r.Hosts[j.Base()].Harms }

// dueGuest reports whether this host needs g, and has the chain for it. In FORWARD and INPUT it stands before a policy
// can become to drop.
func (r Ruleset) dueGuest(g Guest) bool {
	h, there := r.Hosts[g.Host]
	return there && (g.Host.Name == BaseForward || g.Host.Name == BaseInput || h.Harms)
}

// diffRules first inserts from the top what is missing, then takes away from the bottom what is too many: exceptions
// stand above what they except from, so they come first and go last.
func diffRules(c Chain, want []Rule, found Ruleset) (ops []backend.Op) {
	have := found.Chains[c]
	keep := common(want, have)
	type line struct {
		rule   Rule
		keep   bool
		handle uint64
	}
	var now []line
	for i, rule := range have {
		l := line{rule: rule, keep: keep[i]}
		if handles := found.Handles[c]; i < len(handles) {
			l.handle = handles[i]
		}
		now = append(now, l)
	}
	at := 0
	for _, rule := range want {
		next := at
		for next < len(now) && !now[next].keep {
			next++
		}
		if next < len(now) && now[next].rule == rule {
			at = next + 1
			continue
		}
		now = slices.Insert(now, at, line{rule: rule, keep: true})
		at++
		ops = append(ops, backend.Op{Do: backend.Add, What: Entry{Chain: c, At: at, Rule: rule}})
	}
	for i := len(now) - 1; i >= 0; i-- {
		if !now[i].keep {
			e := Entry{Chain: c, At: i + 1, Rule: now[i].rule, Handle: now[i].handle}
			ops = append(ops, backend.Op{Do: backend.Delete, What: e, Was: e})
		}
	}
	return ops
}

// common marks those of have that are part of a longest common subsequence of want and have.
func common(want, have []Rule) []bool {
	length := make([][]int, len(want)+1) // length[i][j] is that of the tails want[i:] and have[j:]
	for i := range length {
		length[i] = make([]int, len(have)+1)
	}
	for i := len(want) - 1; i >= 0; i-- {
		for j := len(have) - 1; j >= 0; j-- {
			if want[i] == have[j] {
				length[i][j] = length[i+1][j+1] + 1
			} else {
				length[i][j] = max(length[i+1][j], length[i][j+1])
			}
		}
	}
	keep := make([]bool, len(have))
	for i, j := 0, 0; i < len(want) && j < len(have); {
		switch {
		case want[i] == have[j]:
			keep[j] = true
			i, j = i+1, j+1
		case length[i+1][j] >= length[i][j+1]:
			i++
		default:
			j++
		}
	}
	return keep
}

func sorted[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	return slices.SortedFunc(maps.Keys(m), compare)
}

func compareTables(a, b Table) int {
	return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Name, b.Name))
}

func compareChains(a, b Chain) int {
	return cmp.Or(cmp.Compare(a.Variant, b.Variant), compareTables(a.table(), b.table()), cmp.Compare(a.Name, b.Name))
}

func compareJumps(a, b Jump) int {
	return cmp.Or(compareChains(a.Chain, b.Chain), cmp.Compare(a.From, b.From))
}

// compareGuests puts those of one chain into an order that is always the same; any would do, for all accept.
func compareGuests(a, b Guest) int {
	text := func(g Guest) string { return strings.Join(g.Rule.Words(g.Host.Family), " ") + g.Rule.Unknown }
	return cmp.Or(compareChains(a.Host, b.Host), cmp.Compare(text(a), text(b)))
}

package masq

import (
	"cmp"
	"maps"
	"slices"

	"tweed.dev/tweed/backend"
)

// Diff returns the operations that turn have into want. In between, no packet is treated otherwise than by the one or
// by the other: a chain is filled before packets get to it and left before it is emptied, and where rules change, the
// new ones stand before the old ones go.
func Diff(want, have Ruleset) []backend.Op {
	var ops []backend.Op
	for _, c := range sorted(want.Chains) {
		if _, there := have.Chains[c]; !there {
			ops = append(ops, backend.Op{Do: backend.Add, What: c})
		}
		ops = append(ops, diffRules(c, want.Chains[c], have.Chains[c])...)
	}
	for _, j := range sortedJumps(want.Jumps) {
		if !have.Jumps[j] {
			j.At = have.Ends[j.Base()]
			ops = append(ops, backend.Op{Do: backend.Add, What: j})
		}
	}
	for _, j := range sortedJumps(have.Jumps) {
		if !want.Jumps[j] {
			ops = append(ops, backend.Op{Do: backend.Delete, What: j, Was: j})
		}
	}
	for _, c := range sorted(have.Chains) {
		if _, wanted := want.Chains[c]; !wanted {
			ops = append(ops, backend.Op{Do: backend.Delete, What: c, Was: c})
		}
	}
	return ops
}

// diffRules first inserts from the top what is missing, then takes away from the bottom what is too many: exceptions
// stand above what they except from, so they come first and go last.
func diffRules(c Chain, want, have []Rule) (ops []backend.Op) {
	keep := common(want, have)
	type line struct {
		rule Rule
		keep bool
	}
	var now []line
	for i, rule := range have {
		now = append(now, line{rule, keep[i]})
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
		now = slices.Insert(now, at, line{rule, true})
		at++
		ops = append(ops, backend.Op{Do: backend.Add, What: Entry{c, at, rule}})
	}
	for i := len(now) - 1; i >= 0; i-- {
		if !now[i].keep {
			e := Entry{c, i + 1, now[i].rule}
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

func sorted(chains map[Chain][]Rule) []Chain {
	return slices.SortedFunc(maps.Keys(chains), compareChains)
}

func sortedJumps(jumps map[Jump]bool) []Jump {
	return slices.SortedFunc(maps.Keys(jumps), func(a, b Jump) int {
		return cmp.Or(compareChains(a.Chain, b.Chain), cmp.Compare(a.From, b.From))
	})
}

func compareChains(a, b Chain) int {
	return cmp.Or(cmp.Compare(a.Form, b.Form), cmp.Compare(a.Family, b.Family), cmp.Compare(a.Table, b.Table),
		cmp.Compare(a.Name, b.Name))
}

package kernel

import (
	"maps"
	"testing"
)

// A MAC can have a second destination, which reads as a second entry with the same key.
func TestSecondEntryOfOneKeyHidden(t *testing.T) {
	want := map[string]int{"a": 1, "b": 2}
	for name, read := range map[string][]int{"right one first": {1, 9}, "right one last": {9, 1}} {
		s := newSeen(want)
		s.add("b", 2, true)
		for _, v := range read {
			s.add("a", v, v == want["a"])
		}
		if have := s.all(); s.asWanted() || !maps.Equal(have, map[string]int{"a": 9, "b": 2}) {
			t.Errorf("%s: %v, as wanted %v", name, have, s.asWanted())
		}
	}
}

func TestMissingEntryTakenForWanted(t *testing.T) {
	want := map[string]int{"a": 1, "b": 2}
	s := newSeen(want)
	s.add("a", 1, true)
	if have := s.all(); s.asWanted() || !maps.Equal(have, map[string]int{"a": 1}) {
		t.Errorf("%v, as wanted %v", have, s.asWanted())
	}
}

// At rest a pass must not pay for maps that nobody needs.
func TestMapsMadeAtRest(t *testing.T) {
	h := newRealHost(t)
	want := sample()
	pass(t, h, want)
	have, err := h.Observe(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	delete(have.Neighs, neighTo("10.244.7.0").NeighKey)
	delete(have.FDB, fdb("192.0.2.17").FDBKey)
	delete(have.Routes, tunnelRoute("10.244.7.0/24", "10.244.7.0", 0).RouteKey)
	for kind, l := range map[string][2]int{
		"neighbours": {len(want.Neighs), len(sample().Neighs)}, "FDB entries": {len(want.FDB), len(sample().FDB)},
		"routes": {len(want.Routes), len(sample().Routes)},
	} {
		if l[0] != l[1]-1 {
			t.Errorf("what was read of %s is not the map of what is wanted", kind)
		}
	}
}

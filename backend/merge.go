package backend

import "maps"

// Merge is the union of states. Of two objects with one key the later state's stands. The states are used up: their maps
// become those of the result, or change.
func Merge(states ...State) State {
	var all State
	for _, s := range states {
		all = State{
			Links:   union(all.Links, s.Links),
			Addrs:   union(all.Addrs, s.Addrs),
			Neighs:  union(all.Neighs, s.Neighs),
			FDB:     union(all.FDB, s.FDB),
			Routes:  union(all.Routes, s.Routes),
			Rules:   union(all.Rules, s.Rules),
			Sysctls: union(all.Sysctls, s.Sysctls),
			Ports:   union(all.Ports, s.Ports),
		}
	}
	return all
}

func union[K comparable, V any](a, b map[K]V) map[K]V {
	if a != nil && len(a) >= len(b) {
		maps.Copy(a, b)
		return a
	}
	for k, v := range a {
		if _, later := b[k]; !later {
			b[k] = v
		}
	}
	return b
}

// Swap puts what leads to some peers, now, in the place of what led to them, was, and reports whether it did. It does
// nothing where s does not hold all of was, or holds something else where now has to go; or where the two differ in more
// than neighbours, FDB entries and routes.
func (s *State) Swap(was, now State) bool {
	if !swappable(s.Neighs, was.Neighs, now.Neighs) || !swappable(s.FDB, was.FDB, now.FDB) ||
		!swappable(s.Routes, was.Routes, now.Routes) {
		return false
	}
	rest := State{Links: was.Links, Addrs: was.Addrs, Rules: was.Rules, Sysctls: was.Sysctls, Ports: was.Ports}
	if !within(s.Links, was.Links) || !within(s.Addrs, was.Addrs) || !within(s.Rules, was.Rules) ||
		!within(s.Sysctls, was.Sysctls) || !within(s.Ports, was.Ports) ||
		!rest.Equal(State{Links: now.Links, Addrs: now.Addrs, Rules: now.Rules, Sysctls: now.Sysctls, Ports: now.Ports}) {
		return false
	}
	s.Neighs = swapped(s.Neighs, was.Neighs, now.Neighs)
	s.FDB = swapped(s.FDB, was.FDB, now.FDB)
	s.Routes = swapped(s.Routes, was.Routes, now.Routes)
	return true
}

func swappable[K, V comparable](all, was, now map[K]V) bool {
	for k := range now {
		_, there := all[k]
		if _, goes := was[k]; there && !goes {
			return false
		}
	}
	return within(all, was)
}

// within reports whether all holds each of some.
func within[K, V comparable](all, some map[K]V) bool {
	for k, v := range some {
		if have, there := all[k]; !there || have != v {
			return false
		}
	}
	return true
}

func swapped[K comparable, V any](all, was, now map[K]V) map[K]V {
	for k := range was {
		delete(all, k)
	}
	return union(all, now)
}

// Len is the number of objects in s.
func (s State) Len() int {
	return len(s.Links) + len(s.Addrs) + len(s.Neighs) + len(s.FDB) + len(s.Routes) + len(s.Rules) + len(s.Sysctls) +
		len(s.Ports)
}

// Equal reports whether s and t hold the same objects, for the same peers.
func (s State) Equal(t State) bool {
	return maps.Equal(s.Links, t.Links) && maps.Equal(s.Addrs, t.Addrs) && maps.Equal(s.Neighs, t.Neighs) &&
		maps.Equal(s.FDB, t.FDB) && maps.Equal(s.Routes, t.Routes) && maps.Equal(s.Rules, t.Rules) &&
		maps.Equal(s.Sysctls, t.Sysctls) && maps.Equal(s.Ports, t.Ports)
}

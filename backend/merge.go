package backend

import "maps"

// Merge is the union of states. Of two objects with one key the later state's stands. The result may share maps with
// its arguments.
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
	if len(a) == 0 {
		return b
	}
	if len(b) == 0 {
		return a
	}
	all := make(map[K]V, len(a)+len(b))
	maps.Copy(all, a)
	maps.Copy(all, b)
	return all
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

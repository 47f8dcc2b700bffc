package kernel

import "maps"

// A seen is what was read of one kind of object. Where all of it is as wanted, which with ten thousand routes costs
// most of a pass to find out, the wanted map itself is the answer: no second one is made, and nobody needs to compare
// the two.
type seen[K comparable, V any] struct {
	want  map[K]V
	right []K // of objects that are as wanted
	other map[K]V
}

func newSeen[K comparable, V any](want map[K]V) seen[K, V] {
	return seen[K, V]{want: want, right: make([]K, 0, len(want)), other: map[K]V{}}
}

func (s *seen[K, V]) add(key K, v V, right bool) {
	if right {
		s.right = append(s.right, key)
	} else {
		s.other[key] = v
	}
}

// asWanted reports whether the kernel holds all that is wanted, and nothing else.
func (s *seen[K, V]) asWanted() bool { return len(s.other) == 0 && len(s.right) == len(s.want) }

// all returns what the kernel holds. It is not to be changed.
func (s *seen[K, V]) all() map[K]V {
	if s.asWanted() {
		return s.want
	}
	have := make(map[K]V, len(s.right)+len(s.other))
	for _, key := range s.right {
		have[key] = s.want[key]
	}
	maps.Copy(have, s.other)
	return have
}

package kube

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"tweed.dev/tweed/subnet"
)

// A published is what one Node's annotations say.
type published struct {
	leases   []subnet.Lease
	problems []subnet.Problem
	// standing is what others that lease need to know; without a version, since a heartbeat is not news to them.
	standing subnet.Standing
}

func parsePublished(obj any) (name string, p published, err error) {
	o, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return "", published{}, fmt.Errorf("the API server sent a %T in place of a Node's metadata", obj)
	}
	p.leases, p.problems = Parse(&o.ObjectMeta)
	p.standing = standingOf(&o.ObjectMeta)
	p.standing.Version = subnet.Version{}
	return o.Name, p, nil
}

func (p published) isEmpty() bool {
	return p.standing.Subnets == "" && p.standing.Claim == "" && p.same(published{})
}

func (p published) equal(q published) bool { return p.standing == q.standing && p.same(q) }

// same reports whether p and q are the same to who routes, and does not lease.
func (p published) same(q published) bool {
	return slices.EqualFunc(p.leases, q.leases, subnet.Lease.Equal) && slices.Equal(p.problems, q.problems)
}

// A table holds what all Nodes publish, and nothing else of them.
type table struct {
	mu     sync.Mutex
	synced bool
	byNode map[string]published // without those that publish nothing
	gen    uint64
	at     time.Time
	list   subnet.List // built from byNode when asked for; that of another gen is out of date
	wake   func()      // called when what any Node has leased or claims may have changed; it must not block
}

// standings returns what the Nodes have leased and claim, as far as it is known.
func (t *table) standings() (subnet.Listing, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := subnet.Listing{}
	for _, p := range t.byNode {
		all = append(all, p.standing)
	}
	return all, t.synced
}

// snapshot returns the last complete list. Its slices are shared with later ones.
func (t *table) snapshot() (subnet.List, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.synced {
		return subnet.List{}, false
	}
	if t.list.Generation != t.gen {
		leases := 0
		for _, p := range t.byNode {
			leases += len(p.leases)
		}
		t.list = subnet.List{Generation: t.gen, Leases: slices.Grow([]subnet.Lease(nil), leases)}
		for _, name := range slices.Sorted(maps.Keys(t.byNode)) {
			t.list.Leases = append(t.list.Leases, t.byNode[name].leases...)
			t.list.Problems = append(t.list.Problems, t.byNode[name].problems...)
		}
	}
	t.list.At = t.at
	return t.list, true
}

// put records what one Node publishes now and reports whether that is something else than before.
func (t *table) put(name string, p published) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at = time.Now()
	before := t.byNode[name]
	if before.equal(p) {
		return false
	}
	if p.isEmpty() {
		delete(t.byNode, name)
	} else {
		t.byNode[name] = p
	}
	t.wake()
	if before.same(p) {
		return false
	}
	t.gen++
	return true
}

// replace records what all Nodes publish and reports whether that is something else than before, as the first time is.
func (t *table) replace(all map[string]published) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at = time.Now()
	if t.synced && maps.EqualFunc(t.byNode, all, published.equal) {
		return false
	}
	same := t.synced && maps.EqualFunc(t.byNode, all, published.same)
	t.synced = true
	t.byNode = all
	t.wake()
	if same {
		return false
	}
	t.gen++
	return true
}

// touch records that the list is current.
func (t *table) touch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at = time.Now()
}

// A nodeStore is where the reflector of all Nodes puts what it learns.
type nodeStore struct {
	*table
	ring func()
	// complete is called after each complete list.
	complete func()
}

var _ cache.ReflectorBookmarkStore = nodeStore{}

func (s nodeStore) Add(obj any) error { return s.Update(obj) }

func (s nodeStore) Update(obj any) error {
	name, p, err := parsePublished(obj)
	if err != nil {
		return err
	}
	if s.put(name, p) {
		s.ring()
	}
	return nil
}

func (s nodeStore) Delete(obj any) error {
	name, _, err := parsePublished(obj)
	if err != nil {
		return err
	}
	if s.put(name, published{}) {
		s.ring()
	}
	return nil
}

func (s nodeStore) Replace(objs []any, _ string) error {
	all := map[string]published{}
	for _, obj := range objs {
		name, p, err := parsePublished(obj)
		if err != nil {
			return err
		}
		if !p.isEmpty() {
			all[name] = p
		}
	}
	s.complete()
	if s.replace(all) {
		s.ring()
	}
	return nil
}

// Bookmark is the server's word that there was nothing else until now.
func (s nodeStore) Bookmark(string) error {
	s.touch()
	return nil
}

func (s nodeStore) Resync() error { return nil }

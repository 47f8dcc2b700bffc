package subnet

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A key stands for all worlds that differ only in what no move can tell: in which node is which, in versions that are
// gone (a write that names one is refused, whatever it is), and in nonces of processes that are gone. With some mutants
// versions that are gone can come back; then they are told apart. order says how daemons of two worlds of one key
// correspond: those with the same number do.
func (m *model) key(w *world) (key [16]byte, order [maxDaemons]int8) {
	var parts [maxNodes]string
	nodes := make([]int, 0, maxNodes)
	for n := range maxNodes {
		if w.births[n] > 0 {
			parts[n] = m.describe(w, n)
			nodes = append(nodes, n)
		}
	}
	if !m.exact() {
		slices.SortStableFunc(nodes, func(a, b int) int { return strings.Compare(parts[a], parts[b]) })
	}
	text := make([]byte, 0, 1024)
	text = append(text, byte(w.crashes), byte(w.timeouts), byte(w.deletions), byte(w.touches))
	at := int8(0)
	for _, n := range nodes {
		text = append(append(text, parts[n]...), '\n')
		for i, host := range m.hosts {
			if host == n {
				order[i] = at
				at++
			}
		}
	}
	sum := sha256.Sum256(text)
	copy(key[:], sum[:])
	return key, order
}

func (m *model) exact() bool {
	return m.ignoreVersion || m.ignoreUID || m.resend || m.remembers
}

// describe is node n with all that belongs to it.
func (m *model) describe(w *world, n int) string {
	v := viewer{m, w, n}
	b := make([]byte, 0, 256)
	b = v.standing(b, w.nodes[n])
	if m.caches {
		b = v.standing(append(b, '/'), w.cache[n])
	}
	for i, host := range m.hosts {
		if host != n {
			continue
		}
		d := &w.daemons[i]
		b = append(b, '|')
		b = v.step(b, d.step)
		if _, lists := d.step.(ListNodes); lists {
			b = append(v.standing(b, d.own), '.')
		}
		b = v.memory(b, &d.claimant.memory)
		b = appendSubnets(b, d.kept)
		b = strconv.AppendBool(b, d.again)
		for _, s := range d.first {
			b = v.standing(b, s)
		}
	}
	var late []string
	for _, l := range w.late {
		if l.node == n && (m.exact() || precondition(l.step) == w.nodes[n].Version) {
			late = append(late, string(v.step(nil, l.step)))
		}
	}
	slices.Sort(late)
	return string(append(b, strings.Join(late, "+")...))
}

func appendSubnets(b []byte, subnets []netip.Prefix) []byte {
	for _, s := range subnets {
		b = append(s.AppendTo(b), ',')
	}
	return append(b, ' ')
}

// A viewer writes what is known at node n, as seen from there.
type viewer struct {
	*model
	w *world
	n int
}

func (v viewer) version(b []byte, x Version) []byte {
	switch {
	case v.exact():
		return append(append(append(b, x.UID...), '@'), x.Resource...)
	case x == Version{}:
		return append(b, '0')
	case x == v.w.nodes[v.n].Version:
		return append(b, '=')
	}
	return append(b, '-')
}

func (v viewer) claim(b []byte, text string) []byte {
	if text == "" {
		return b
	}
	subnets, nonce, _ := strings.Cut(text, " ")
	who := byte('x')
	at := byte('a')
	for i, host := range v.hosts {
		if host != v.n {
			continue
		}
		if v.w.daemons[i].claimant.nonce == nonce {
			who = at
		}
		at++
	}
	return append(append(b, subnets...), who)
}

func (v viewer) standing(b []byte, s Standing) []byte {
	b = append(v.version(b, s.Version), ' ')
	b = append(append(b, s.Subnets...), ' ')
	return v.claim(b, s.Claim)
}

func (v viewer) step(b []byte, s Step) []byte {
	switch x := s.(type) {
	case nil:
		return append(b, "read"...)
	case PatchClaim:
		b = v.version(append(b, 'C'), x.If)
		return v.claim(b, x.Claim.String())
	case PatchSubnets:
		b = v.version(append(b, 'S'), x.If)
		return append(b, join(x.Subnets)...)
	case RemoveClaim:
		return v.version(append(b, 'R'), x.If)
	case Wait:
		return append(b, 'W')
	case Stuck:
		return append(b, 'X')
	}
	return append(b, s.String()...)
}

func (v viewer) memory(b []byte, x *memory) []byte {
	b = appendSubnets(b, x.remembered)
	b = strconv.AppendBool(strconv.AppendBool(b, x.tries > 0), x.lost)
	b = strconv.AppendInt(append(strconv.AppendInt(b, int64(x.crowded), 10), ' '), int64(x.unaccepted), 10)
	for _, a := range []attempt{x.asked, x.clear} {
		switch {
		case v.exact():
			b = fmt.Append(b, ' ', a)
		case a.uid == v.w.nodes[v.n].Version.UID:
			b = v.claim(append(b, ' '), a.claim)
		default:
			b = append(b, " -"...)
		}
	}
	return b
}

// A graph is what was explored: one state for each key.
type graph struct {
	states    []state
	collision string   // what went wrong, if something did
	collided  int32    // and in which state
	trace     []string // the shortest way there
}

type state struct {
	parent, nth   int32 // the nth move of parent led here first
	done, settled [maxDaemons]bool
	step          [maxDaemons]edge // where each daemon gets by its next move
	created       int32            // where the return of the absent Node leads, 0 for none
	back          [maxDaemons]int8 // who is who there
}

// An edge leads to a state, in which the daemon has another number.
type edge struct {
	to int32
	as int8
}

// explore looks at every state that can be reached, the nearest first, until one is a collision.
func (m *model) explore(t *testing.T) *graph {
	t.Helper()
	e := explorer{model: m, ids: map[[16]byte]int32{}}
	start := m.start(t)
	e.meet(-1, 0, start)
	for id := int32(0); len(e.worlds) > 0; id++ {
		w := e.worlds[0]
		e.worlds = e.worlds[1:]
		e.expand(id, *w)
		if e.g.collision != "" {
			e.g.trace = m.replay(start, e.g.pathTo(e.g.collided))
			return &e.g
		}
	}
	t.Logf("%d states", len(e.g.states))
	return &e.g
}

type explorer struct {
	*model
	g      graph
	ids    map[[16]byte]int32
	worlds []*world // of the states that were met and not yet expanded
}

// meet returns which state w is, and the numbers that its daemons have there.
func (e *explorer) meet(parent, nth int32, w world) (id int32, order [maxDaemons]int8) {
	key, order := e.key(&w)
	id, ok := e.ids[key]
	if ok {
		return id, order
	}
	id = int32(len(e.g.states))
	e.ids[key] = id
	e.worlds = append(e.worlds, &w)
	s := state{parent: parent, nth: nth}
	for i := range e.hosts {
		s.done[order[i]], s.settled[order[i]] = w.done(i), w.settled(i)
	}
	e.g.states = append(e.g.states, s)
	if c := w.collision(); c != "" && e.g.collision == "" {
		e.g.collision, e.g.collided = c, id
	}
	return id, order
}

func (e *explorer) expand(id int32, w world) {
	_, order := e.key(&w)
	var acted [maxDaemons]bool
	nth := int32(0)
	e.moves(w, func(mv move, next world) {
		to, there := e.meet(id, nth, next)
		nth++
		s := &e.g.states[id]
		if mv.daemon >= 0 && !acted[mv.daemon] {
			acted[mv.daemon] = true
			s.step[order[mv.daemon]] = edge{to, there[mv.daemon]}
		}
		if mv.what == created {
			s.created = to
			for i := range e.hosts {
				s.back[order[i]] = there[i]
			}
		}
	})
}

func (g *graph) pathTo(id int32) (path []int32) {
	for ; g.states[id].parent >= 0; id = g.states[id].parent {
		path = append(path, g.states[id].nth)
	}
	slices.Reverse(path)
	return path
}

// replay tells what happens on a path.
func (m *model) replay(w world, path []int32) (lines []string) {
	for _, want := range path {
		n, from := int32(0), w
		m.moves(from, func(mv move, next world) {
			if n == want {
				w = next
				lines = append(lines, m.tell(mv, &next))
			}
			n++
		})
	}
	return lines
}

func (m *model) tell(mv move, w *world) string {
	step := ""
	if mv.step != nil {
		step = mv.step.String()
	}
	if mv.daemon < 0 {
		return strings.TrimSpace(mv.what + " " + step)
	}
	line := strings.Join(strings.Fields(mv.what+" "+step), " ")
	if s := w.daemons[mv.daemon].step; s != nil && mv.what == "" {
		line += "  =>  " + s.String()
	}
	return fmt.Sprintf("%s/%d %s", names[m.hosts[mv.daemon]], mv.daemon, line)
}

// longest is more moves than a daemon that runs alone can need.
const longest = 100

// finishesAlone returns a state from which the daemon of that number does not finish though no other one runs and
// nothing more goes wrong, or -1.
func (m *model) finishesAlone(g *graph, finished func(*state) *[maxDaemons]bool) int32 {
	known := make([][maxDaemons]bool, len(g.states))
	for id := range g.states {
		for i := range m.hosts {
			at, as := int32(id), int8(i)
			var path []edge
			for !known[at][as] && !finished(&g.states[at])[as] {
				path = append(path, edge{at, as})
				if len(path) > longest {
					return int32(id)
				}
				if s := &g.states[at]; s.created > 0 {
					at, as = s.created, s.back[as]
				} else {
					at, as = s.step[as].to, s.step[as].as
				}
			}
			for _, e := range path {
				known[e.to][e.as] = true
			}
		}
	}
	return -1
}

// allFinish returns a state from which no order of the daemons' own moves makes all of them finish, or -1.
func (m *model) allFinish(g *graph, finished func(*state) *[maxDaemons]bool) int32 {
	before := make([][]int32, len(g.states))
	var todo []int32
	can := make([]bool, len(g.states))
	for id := range g.states {
		s := &g.states[id]
		if all := finished(s); !slices.Contains(all[:len(m.hosts)], false) {
			can[id] = true
			todo = append(todo, int32(id))
		}
		for i := range m.hosts {
			before[s.step[i].to] = append(before[s.step[i].to], int32(id))
		}
		if s.created > 0 {
			before[s.created] = append(before[s.created], int32(id))
		}
	}
	for len(todo) > 0 {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, b := range before[id] {
			if !can[b] {
				can[b] = true
				todo = append(todo, b)
			}
		}
	}
	return int32(slices.Index(can, false))
}

func doneIn(s *state) *[maxDaemons]bool    { return &s.done }
func settledIn(s *state) *[maxDaemons]bool { return &s.settled }

// Every order of what nodes and their misfortunes can do: no two nodes get one subnet; whoever runs alone from anywhere
// on gets one, or learns that there is none; and from anywhere on all can.
func TestNodesLeaseAtTheSameMoment(t *testing.T) {
	two, three := []int{0, 1}, []int{0, 1, 2}
	for _, c := range []struct {
		name     string
		model    model
		finished func(*state) *[maxDaemons]bool
	}{
		{"a crash and a timeout", model{subnets: 3, hosts: three, crashes: 1, timeouts: 1}, doneIn},
		{"a Node deleted", model{subnets: 3, hosts: three, deletions: 1}, doneIn},
		{"two daemons of one node", model{subnets: 3, hosts: []int{0, 0, 1, 2}}, doneIn},
		{"two daemons of one node and a timeout", model{subnets: 2, hosts: []int{0, 0, 1}, timeouts: 1}, doneIn},
		{"too few subnets and a timeout", model{subnets: 2, hosts: three, timeouts: 1}, settledIn},
		{"two families", model{subnets: 2, dual: true, hosts: two, crashes: 1, timeouts: 1}, doneIn},
		{"a subnet that not all nodes accept", model{subnets: 2, hosts: two, timeouts: 1, accepts: "10.0.0.0/24"}, doneIn},
		{"everything", model{subnets: 2, hosts: two, crashes: 1, timeouts: 1, deletions: 1, touches: 1}, doneIn},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := c.model.explore(t)
			if g.collision != "" {
				t.Fatalf("%s:\n%s", g.collision, strings.Join(g.trace, "\n"))
			}
			start := c.model.start(t)
			if id := c.model.finishesAlone(g, c.finished); id >= 0 {
				t.Errorf("a node that runs alone does not finish after:\n%s",
					strings.Join(c.model.replay(start, g.pathTo(id)), "\n"))
			}
			if id := c.model.allFinish(g, c.finished); id >= 0 {
				t.Errorf("not all nodes can finish after:\n%s", strings.Join(c.model.replay(start, g.pathTo(id)), "\n"))
			}
		})
	}
}

// An old list, of whatever age, is told from a fresh one by the version of this node's Node in it.
func TestFreshListIsOldWithoutSayingSo(t *testing.T) {
	old := func(w *world, _ *daemon) []Listing { return []Listing{listOf(w.cache)} }
	m := model{subnets: 2, hosts: []int{0, 1}, timeouts: 1, deletions: 1, caches: true, answer: old}
	if g := m.explore(t); g.collision != "" {
		t.Errorf("%s:\n%s", g.collision, strings.Join(g.trace, "\n"))
	}
}

// Each mutant leaves out one part of the protocol, in the server or in what drives the Claimants. A model that finds
// nothing wrong with one of them would prove nothing.
func TestModelFindsWhatEachPartOfTheProtocolIsFor(t *testing.T) {
	two := []int{0, 1}
	for _, c := range []struct {
		name  string
		model model
	}{
		{"no second list", model{subnets: 2, hosts: two, remembers: true,
			answer: func(_ *world, d *daemon) []Listing { return []Listing{d.first.with(d.own)} }}},
		{"a stale second list", model{subnets: 2, hosts: two, remembers: true, caches: true,
			answer: func(w *world, d *daemon) []Listing { return []Listing{listOf(w.cache).with(d.own)} }}},
		{"a second list of pages, each as old as the cache of the server that gives it", model{subnets: 2, hosts: two,
			remembers: true, caches: true, answer: pages}},
		{"a PATCH without resourceVersion", model{subnets: 2, hosts: two, timeouts: 1, ignoreVersion: true}},
		{"a PATCH without uid", model{subnets: 2, hosts: two, timeouts: 1, deletions: 1, ignoreUID: true}},
		{"a write without an answer that counts as lost", model{subnets: 2, hosts: two, timeouts: 1, deletions: 1,
			resend: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := c.model.explore(t)
			if g.collision == "" {
				t.Fatalf("nothing found in %d states", len(g.states))
			}
			t.Logf("%s after %d moves:\n%s", g.collision, len(g.trace), strings.Join(g.trace, "\n"))
		})
	}
}

// pages are those of two nodes, one on each.
func pages(w *world, _ *daemon) []Listing {
	mixed, other := w.nodes, w.nodes
	mixed[0], other[1] = w.cache[0], w.cache[1]
	return []Listing{listOf(w.nodes), listOf(mixed), listOf(other)}
}

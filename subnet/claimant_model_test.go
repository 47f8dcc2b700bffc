package subnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"testing"
)

// The model explores what Claimants can do to one another, in every order. Each move is one request to the server, as
// one daemon or one misfortune makes it; between two moves of a daemon anything else may happen. The Claimants are the
// real ones, what drives them and the server are of the model.
//
// Misfortunes are counted, or there would be no end: crashes with a restart, writes whose answer does not come (they
// land at any later time, or never), deletions of a Node (it comes back), and writes of others to a Node.
type model struct {
	subnets int    // how many there are to be leased of each family
	dual    bool   // there are two families
	accepts string // what every node publishes as its network
	hosts   []int  // which node each daemon is on

	crashes, timeouts, deletions, touches int8

	// What a mutant's server or driver does wrong. With resend a write without an answer counts as lost, and is made again
	// for the version that is there now.
	ignoreVersion bool // a PATCH does not name the resourceVersion
	ignoreUID     bool // a PATCH does not name the uid
	resend        bool
	remembers     bool                                // answers need what a daemon or a cache knew before
	caches        bool                                // there is a cache of Nodes, which lags behind
	answer        func(w *world, d *daemon) []Listing // to a fresh list; nil is what it should be

	network Network
	draws   uint64 // what dice can show
	dice    *dice
}

const maxNodes, maxDaemons = 3, 4

// A world is one state of everything. It is copied by assignment: nothing in it is changed in place.
type world struct {
	nodes   [maxNodes]Standing // without a UID: there is no such Node
	births  [maxNodes]int
	cache   [maxNodes]Standing
	daemons [maxDaemons]daemon
	late    []lateWrite

	crashes, timeouts, deletions, touches int8
}

type daemon struct {
	claimant Claimant
	own      Standing // as last read
	step     Step     // to be done next; nil to read the Node
	again    bool     // step has to be made for the version that is there now
	boots    int
	first    Listing        // the list that step 1 was decided by
	kept     []netip.Prefix // what is remembered across restarts
}

type lateWrite struct {
	node int
	step Step
}

// created is the one move that a daemon may have to wait for.
const created = "the Node is created again"

// A move says who does what, for traces.
type move struct {
	daemon int // -1 for nobody's
	what   string
	step   Step
}

// dice stand in for randomness: they show what they are told to, and tell whether they were thrown.
type dice struct {
	sides, value uint64 // value has a digit for each throw
	used         bool
}

func (d *dice) roll() uint64 {
	d.used = true
	shown := d.value % d.sides
	d.value /= d.sides
	return shown
}

// names are those of nodes whose first choice is the same subnet, of 2 and of 3.
var names = func() (out [maxNodes]string) {
	n := 0
	for i := 0; n < maxNodes; i++ {
		if name := "n" + strconv.Itoa(i); hash(name)%6 == 0 {
			out[n] = name
			n++
		}
	}
	return out
}()

func (m *model) start(t *testing.T) world {
	t.Helper()
	last := fmt.Sprintf("10.0.%d.0/24", m.subnets-1)
	m.network = Network{mustRange(t, Range{Prefix: prefix("10.0.0.0/22"), Len: 24, Max: prefix(last)})}
	m.draws = uint64(m.subnets)
	if m.dual {
		last = fmt.Sprintf("fd00:0:0:%d::/64", m.subnets-1)
		m.network = append(m.network, mustRange(t, Range{Prefix: prefix("fd00::/62"), Len: 64, Max: prefix(last)}))
		m.draws *= m.draws
	}
	m.dice = &dice{}
	w := world{crashes: m.crashes, timeouts: m.timeouts, deletions: m.deletions, touches: m.touches}
	for _, n := range m.hosts {
		if w.births[n] == 0 {
			m.create(&w, n)
		}
	}
	w.cache = w.nodes
	for i := range m.hosts {
		m.boot(&w, i)
	}
	return w
}

func (m *model) create(w *world, n int) {
	w.births[n]++
	w.nodes[n] = Standing{Node: names[n], Version: Version{fmt.Sprintf("%s-%d", names[n], w.births[n]), "1"},
		Network: m.accepts}
}

func (m *model) boot(w *world, i int) {
	d := &w.daemons[i]
	c, err := NewClaimant(names[m.hosts[i]], m.network, fmt.Sprintf("d%db%d", i, d.boots), d.kept, m.dice.roll)
	if err != nil {
		panic(err)
	}
	*d = daemon{claimant: *c, boots: d.boots + 1, kept: d.kept}
}

// apply makes a write, if the server takes it.
func (m *model) apply(w *world, n int, s Step) bool {
	o, v := w.nodes[n], precondition(s)
	if o.Version.UID == "" || !m.ignoreUID && v.UID != o.Version.UID ||
		!m.ignoreVersion && v.Resource != o.Version.Resource {
		return false
	}
	switch s := s.(type) {
	case PatchClaim:
		o.Claim = s.Claim.String()
	case PatchSubnets:
		o.Subnets, o.Claim = join(s.Subnets), ""
	case RemoveClaim:
		o.Claim = ""
	}
	w.nodes[n] = touched(o)
	return true
}

func touched(o Standing) Standing {
	v, err := strconv.Atoi(o.Version.Resource)
	if err != nil {
		panic(err)
	}
	o.Version.Resource = strconv.Itoa(v + 1)
	return o
}

// precondition is zero for what is not a write.
func precondition(s Step) Version {
	switch s := s.(type) {
	case PatchClaim:
		return s.If
	case PatchSubnets:
		return s.If
	case RemoveClaim:
		return s.If
	}
	return Version{}
}

func withPrecondition(s Step, v Version) Step {
	switch s := s.(type) {
	case PatchClaim:
		s.If = v
		return s
	case PatchSubnets:
		s.If = v
		return s
	case RemoveClaim:
		s.If = v
		return s
	}
	return s
}

func isWrite(s Step) bool { return precondition(s) != Version{} }

func listOf(nodes [maxNodes]Standing) Listing {
	l := make(Listing, 0, maxNodes)
	for _, n := range nodes {
		if n.Version.UID != "" {
			l = append(l, n)
		}
	}
	return l
}

// with is the list with own in it, as a driver would make it that remembers the answer to its own write.
func (l Listing) with(own Standing) Listing {
	out := slices.Clone(l)
	for i := range out {
		if out[i].Node == own.Node {
			out[i] = own
		}
	}
	return out
}

// next asks daemon i what to do, and yields a world for each thing that chance can make of it.
func (m *model) next(w world, i int, own Standing, all Listing, mv move, yield func(move, world)) {
	before := w.daemons[i].claimant
	for v := range m.draws {
		w := w
		d := &w.daemons[i]
		d.claimant = before
		*m.dice = dice{sides: uint64(m.subnets), value: v}
		d.own, d.step, d.again = own, d.claimant.Next(own, all), false
		switch s := d.step.(type) {
		case ListNodes:
			if !s.Fresh {
				m.first(w, i, mv, yield)
				return
			}
		case Done:
			d.kept = s.Subnets
		case Wait: // how long does not matter, since anything can happen meanwhile
			d.step = Wait{Why: s.Why}
			m.dice.used = false
		}
		yield(mv, w)
		if !m.dice.used {
			return
		}
	}
}

// first answers the request for all Nodes from which a daemon chooses what to claim. A cache will do for that: one that
// knows nothing stands for the others. What it is told can be old when the claim is written, so it costs no move.
func (m *model) first(w world, i int, mv move, yield func(move, world)) {
	for _, l := range []Listing{listOf(w.nodes), {}} {
		if m.remembers {
			w.daemons[i].first = l
		}
		m.next(w, i, w.daemons[i].own, l, mv, yield)
	}
}

// moves yields what can happen next. What the daemons do by themselves comes first, each one's most likely move before
// its others.
func (m *model) moves(w world, yield func(move, world)) {
	for i := range m.hosts {
		m.act(w, i, yield)
	}
	for n := range maxNodes {
		m.meddle(w, n, yield)
	}
	for i := range m.hosts {
		m.hurt(w, i, yield)
	}
	for k, late := range w.late {
		w := w
		w.late = slices.Delete(slices.Clone(w.late), k, k+1)
		m.apply(&w, late.node, late.step)
		yield(move{-1, "lands late on " + names[late.node], late.step}, w)
	}
	if m.caches && w.cache != w.nodes {
		w := w
		w.cache = w.nodes
		yield(move{-1, "the cache catches up", nil}, w)
	}
}

// act lets daemon i do its step.
func (m *model) act(w world, i int, yield func(move, world)) {
	d, n := w.daemons[i], m.hosts[i]
	mv := move{i, "", d.step}
	switch s := d.step.(type) {
	case ListNodes:
		for _, l := range m.lists(&w, i) {
			m.next(w, i, d.own, l, mv, yield)
		}
	case PatchClaim, PatchSubnets, RemoveClaim:
		if d.again {
			s = withPrecondition(s, w.nodes[n].Version)
		}
		if m.apply(&w, n, s) {
			m.next(w, i, w.nodes[n], nil, mv, yield)
			return
		}
		w.daemons[i].step, w.daemons[i].again = nil, false
		yield(move{i, "refused:", s}, w)
	default:
		m.next(w, i, w.nodes[n], nil, move{i, "reads its Node", nil}, yield)
	}
}

// lists says what may be answered to a request for a fresh list.
func (m *model) lists(w *world, i int) []Listing {
	if m.answer != nil {
		return m.answer(w, &w.daemons[i])
	}
	return []Listing{listOf(w.nodes)}
}

// meddle does to node n what others do.
func (m *model) meddle(w world, n int, yield func(move, world)) {
	switch {
	case w.births[n] == 0:
		return
	case w.nodes[n].Version.UID == "":
		w := w
		m.create(&w, n)
		yield(move{-1, created, nil}, w)
		return
	case w.deletions > 0:
		w := w
		w.deletions--
		w.nodes[n] = Standing{}
		yield(move{-1, names[n] + " is deleted", nil}, w)
	}
	if w.touches > 0 {
		w.touches--
		w.nodes[n] = touched(w.nodes[n])
		yield(move{-1, names[n] + " is written by somebody else", nil}, w)
	}
}

// hurt lets daemon i crash, or its write stay without an answer.
func (m *model) hurt(w world, i int, yield func(move, world)) {
	d := w.daemons[i]
	if w.timeouts > 0 && isWrite(d.step) && !d.again {
		w := w
		w.timeouts--
		w.late = append(slices.Clone(w.late), lateWrite{m.hosts[i], d.step})
		w.daemons[i].again = m.resend
		if !m.resend {
			w.daemons[i].step = nil
		}
		yield(move{i, "gets no answer:", d.step}, w)
	}
	if w.crashes > 0 {
		w.crashes--
		m.boot(&w, i)
		yield(move{i, "crashes and starts again", nil}, w)
	}
}

// collision says which two nodes hold one subnet.
func (w *world) collision() string {
	for i, a := range w.nodes {
		for _, b := range w.nodes[:i] {
			for _, p := range mentioned(a.Subnets) {
				if slices.ContainsFunc(mentioned(b.Subnets), p.Overlaps) {
					return fmt.Sprintf("%s and %s both hold %s", b.Node, a.Node, p)
				}
			}
		}
	}
	return ""
}

func (w *world) done(i int) bool {
	_, ok := w.daemons[i].step.(Done)
	return ok
}

// settled reports whether daemon i has said all that it has to say: its node has a subnet, or there is none.
func (w *world) settled(i int) bool {
	_, stuck := w.daemons[i].step.(Stuck)
	return stuck || w.done(i)
}

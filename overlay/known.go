package overlay

import (
	"net/netip"
	"reflect"
	"slices"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// A known is what the kernel was found to hold by a plan that found nothing to do: all that was desired. The next need not
// look again while nobody has told of a change.
type known struct {
	filter masq.Ruleset
	told   []subnet.Problem // what is wrong there all the same
	pods   int              // how many objects there are for those of this node
}

// PlanChange is Plan for where nothing but the list of leases has changed since the last plan: it compares what the kernel
// should hold now with what it was found to hold, and does not look. It is to be used only while the kernel has told of no
// change. It reports false where only a look can tell what to do; a plan that asks for operations is followed by a look,
// since nobody has seen what became of them.
//
// What a stranger has put in the way meanwhile is not harmed: no operation that adds a route replaces one.
func (p *Planner) PlanChange() (Plan, bool) {
	list, ok := p.Leases.List()
	if !ok || p.known == nil {
		return Plan{}, false
	}
	node, err := p.Publisher.Self()
	if err != nil || !reflect.DeepEqual(node, p.last.node) {
		return Plan{}, false
	}
	have, found := *p.known, p.desired.len()
	ops, ok := p.amend(list)
	if !ok {
		ops = p.renew(list)
	}
	plan := p.plan(list)
	plan.Ops, plan.Wanted, plan.Found = ops, p.desired.len()+have.pods, found+have.pods
	plan.Problems = append(plan.Problems, have.told...)
	return plan, true
}

// renew works out what is desired from the whole list, and how it differs from what was. The kernel is not known any more
// when there is something to do.
func (p *Planner) renew(list subnet.List) []backend.Op {
	in, was := p.last, p.desired.state
	in.generation = list.Generation
	p.want(in, list)
	ops, _ := backend.Diff(p.desired.state, backend.Observed{State: was})
	ops = append(masq.Diff(p.desired.filter, p.known.filter), ops...)
	if len(ops) > 0 {
		p.known = nil
	}
	return ops
}

// mostAmended is how many nodes may have changed for it to be worth while to look at them alone.
const mostAmended = 8

// amend is renew for where the leases of a few nodes have changed: it looks at theirs alone. Thousands of others are only
// asked whether they have anything in common with these. It reports false, and has done nothing, where that is so, where
// anything is wrong with these few, or where nodes are in conflict.
func (p *Planner) amend(list subnet.List) (ops []backend.Op, ok bool) {
	self, d := p.last.node.Name, &p.desired
	if !d.plain {
		return nil, false
	}
	gone, come, ok := changed(p.listed, list.Leases, self)
	if ok && len(gone)+len(come) > 0 { // it may be this node's own that are listed otherwise
		ops, ok = p.exchange(list.Leases, gone, come)
	}
	if !ok {
		return nil, false
	}
	d.compareOwn(self, list.Leases)
	p.last.generation, p.listed = list.Generation, list.Leases
	if len(ops) > 0 {
		p.known = nil
	}
	return ops, true
}

// exchange puts what leads to the leases come in the place of what leads to gone, and returns how. It reports false, and
// has done nothing, where more is to be done than that.
func (p *Planner) exchange(listed, gone, come []subnet.Lease) (ops []backend.Op, ok bool) {
	self, d := p.last.node.Name, &p.desired
	w := p.Config.way(self, p.last.uplink)
	peers, problems := subnet.Settle(self, p.rules(p.last, w), slices.Concat(d.self, come))
	if len(peers) != len(come) || len(problems) > 0 || entangled(listed, gone, come) {
		return nil, false
	}
	was, _ := w.desired(d.self, gone)
	now, _ := w.desired(d.self, come)
	ops, _ = backend.Diff(now, backend.Observed{State: was})
	if !d.state.Swap(was, now) {
		return nil, false
	}
	d.state.Version++
	ops = append(p.amendFilter(d.filteredFor(gone), d.filteredFor(come)), ops...)
	d.amendNodes(gone, come)
	return ops, true
}

// amendFilter puts the addresses of now in the place of those of was, and returns how.
func (p *Planner) amendFilter(was, now masq.Ruleset) []backend.Op {
	want, have := p.desired.filter, p.known.filter
	want.Sets, have.Sets = now.Sets, was.Sets
	ops := masq.Diff(want, have)
	for s, addrs := range p.desired.filter.Sets {
		for a := range was.Sets[s] {
			delete(addrs, a)
		}
		for a := range now.Sets[s] {
			addrs[a] = true
		}
	}
	return ops
}

// amendNodes keeps the count of peers and their nodes.
func (d *desired) amendNodes(gone, come []subnet.Lease) {
	d.peers += len(come) - len(gone)
	for _, l := range gone {
		if i, there := slices.BinarySearch(d.nodes, l.Node); there {
			d.nodes = slices.Delete(d.nodes, i, i+1)
		}
	}
	for _, l := range come {
		if i, there := slices.BinarySearch(d.nodes, l.Node); !there {
			d.nodes = slices.Insert(d.nodes, i, l.Node)
		}
	}
}

// len is the number of objects in d.
func (d *desired) len() int { return d.state.Len() + d.filter.Len() }

// changed returns the leases of nodes other than self whose leases are not the same in two lists: those that they had, and
// those that they have. It reports false where that are many nodes, or where a list is not in the order of its nodes.
func changed(before, after []subnet.Lease, self string) (gone, come []subnet.Lease, ok bool) {
	nodes := 0
	for len(before)+len(after) > 0 {
		var name string
		switch {
		case len(before) == 0:
			name = after[0].Node
		case len(after) == 0:
			name = before[0].Node
		default:
			name = min(before[0].Node, after[0].Node)
		}
		was, rest, sorted := cutNode(before, name)
		is, left, sortedToo := cutNode(after, name)
		if !sorted || !sortedToo {
			return nil, nil, false
		}
		before, after = rest, left
		if name == self || slices.EqualFunc(was, is, subnet.Lease.Equal) {
			continue
		}
		gone, come = append(gone, was...), append(come, is...)
		if nodes++; nodes > mostAmended {
			return nil, nil, false
		}
	}
	return gone, come, true
}

// cutNode cuts the leases of the node called name off the front. It reports false where a node before it comes next.
func cutNode(leases []subnet.Lease, name string) (its, rest []subnet.Lease, sorted bool) {
	n := 0
	for n < len(leases) && leases[n].Node == name {
		n++
	}
	return leases[:n], leases[n:], n == len(leases) || leases[n].Node > name
}

// entangled reports whether the leases of a few nodes, that go and that come, have a subnet or an address in common with
// those of another node.
func entangled(listed, gone, come []subnet.Lease) bool {
	few := slices.Concat(gone, come)
	for i := range few {
		a := &few[i]
		for _, others := range [...][]subnet.Lease{listed, few} {
			for j := range others {
				if b := &others[j]; a.Node != b.Node && meet(a, b) {
					return true
				}
			}
		}
	}
	return false
}

// meet reports whether two leases have a subnet or an address in common.
func meet(a, b *subnet.Lease) bool {
	return a.Subnet.Overlaps(b.Subnet) || a.Host == b.Host ||
		slices.ContainsFunc(a.NodeAddrs, func(addr netip.Addr) bool { return uses(b, addr) }) ||
		slices.ContainsFunc(a.Sources, func(addr netip.Addr) bool { return uses(b, addr) })
}

// uses reports whether packets of the lease's node go to an address, or come from it.
func uses(l *subnet.Lease, a netip.Addr) bool {
	return l.Host == a || slices.Contains(l.NodeAddrs, a) || slices.Contains(l.Sources, a)
}

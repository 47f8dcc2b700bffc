package overlay

import (
	"reflect"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// A known is what the kernel was found to hold by a plan that found nothing to do, so that the next need not look again
// while nobody has told of a change.
type known struct {
	state  backend.State
	filter masq.Ruleset
	told   []subnet.Problem // what is wrong there all the same
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
	in := p.last
	in.generation = list.Generation
	p.want(in, list)
	plan := p.plan(list)
	have := p.known
	plan.Ops = masq.Diff(p.desired.filter, have.filter)
	ops, _ := backend.Diff(p.desired.state, backend.Observed{State: have.state})
	plan.Ops = append(plan.Ops, ops...)
	plan.Wanted = p.desired.state.Len() + p.desired.filter.Len()
	plan.Found = have.state.Len() + have.filter.Len()
	plan.Problems = append(plan.Problems, have.told...)
	if len(plan.Ops) > 0 {
		p.known = nil
	}
	return plan, true
}

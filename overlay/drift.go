package overlay

import (
	"reflect"
	"slices"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// sameKernel reports whether d and e want the same of the kernel.
func (d desired) sameKernel(e desired) bool {
	return d.state.Equal(e.state) && reflect.DeepEqual(d.filter, e.filter) &&
		reflect.DeepEqual(d.info.Spoofing, e.info.Spoofing)
}

// barred names the nodes that strangers keep from being reached; all of them where one has the device's place.
func (d desired) barred(problems []subnet.Problem, strangers []backend.Stranger) []string {
	if slices.ContainsFunc(strangers, func(s backend.Stranger) bool { return s.Key == d.info.Device }) {
		return d.nodes
	}
	var barred []string
	for _, p := range problems {
		if p.Node != "" {
			barred = append(barred, p.Node)
		}
	}
	return barred
}

// An outcome is what became of an operation on one kind of object.
type outcome struct{ kind, result string }

// The results of an operation.
const (
	done    = "done"
	failed  = "failed"
	skipped = "skipped"
)

// A tally counts what became of the operations of a pass.
type tally struct {
	ops   map[outcome]int
	drift map[string]int // operations that repaired drift, by kind
}

// tally counts what became of a plan's operations. Where the kernel should hold what it should have held before, what
// had to be done is drift, but for what is owed: commands that were needed for another reason and have not been done
// since. What is owed from now on is owes.
func (res result) tally(plan Plan, owed map[string]bool) (t tally, owes map[string]bool) {
	t = tally{ops: map[outcome]int{}, drift: map[string]int{}}
	owes = map[string]bool{}
	for i, op := range plan.Ops[:len(res.of)] {
		kind, how := op.What.Kind(), res.of[i]
		t.ops[outcome{kind, how}]++
		first := !plan.Again || len(owed) > 0 && owed[op.String()]
		switch {
		case how != done && first:
			owes[op.String()] = true
		case how == done && !first:
			t.drift[kind]++
		}
	}
	return t, owes
}

// programmed counts the peers that the kernel leads to now.
func (res result) programmed(plan Plan) int {
	missing := map[string]bool{}
	for _, node := range plan.Barred {
		missing[node] = true
	}
	for i, op := range plan.Ops[:len(res.of)] {
		if res.of[i] != done && op.Peer != "" && op.Do != backend.Delete {
			missing[op.Peer] = true
		}
	}
	return plan.Nodes - len(missing)
}

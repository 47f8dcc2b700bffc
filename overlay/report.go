package overlay

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// A Report is what came of one pass. It is served as JSON at /report.
type Report struct {
	Version string `json:"version"`
	// Converged is set when everything local is done and each peer was tried.
	Converged bool `json:"converged"`
	// Waiting says what has to come before a pass can be made (then the counts are those of the last that was), or before
	// pods can be attached.
	Waiting string `json:"waiting,omitempty"`
	// ListAge is how long ago the list of leases was last known to be current, in seconds; -1 before the first.
	ListAge float64 `json:"listAge"`
	// Peers counts the leases of other nodes that are in force.
	Peers int `json:"peers"`
	// Wanted and Found count objects in the kernel, before the operations of the pass.
	Wanted int `json:"wanted"`
	Found  int `json:"found"`
	// Done, Failed and Skipped count operations; one is skipped when what it needs, a link mostly, could not be had.
	Done    int `json:"done"`
	Failed  int `json:"failed"`
	Skipped int `json:"skipped"`
	// Drift counts those of Done that repaired what somebody else had changed.
	Drift int `json:"drift"`
	// Problems holds what is wrong, on this node and with others.
	Problems []subnet.Problem `json:"problems"`
	// TookMs is the duration of the pass in milliseconds.
	TookMs float64 `json:"tookMs"`

	node string // this node's name, as far as known
	// looked is set where the pass looked at the kernel, or tried to.
	looked bool
	fight  bool // all that was done was to go on with fights
	lack   lack

	census census
	tally  *tally          // nil where no pass could be made
	owed   map[string]bool // commands that were needed for the first time, and have not been done since
}

// A census is what a pass counted beside, for the metrics.
type census struct {
	own, refused      int // leases: of this node, and of others that are not in force
	nodes, programmed int // other nodes that are to be reached, and that the kernel leads to
	subnets           []netip.Prefix
	counted           map[masq.Chain][]string // as in Plan
}

// A lack is what keeps this node from being planned for, or from having a lease.
type lack struct {
	event
	noLease bool // no lease of this node stands
}

// count takes in what came of a plan's operations after the report before. A half that could not be read is worth another
// try soon.
func (r *Report) count(plan Plan, res result, before Report) {
	t, owes := res.tally(plan, before.owed)
	r.Failed = plan.Unread
	for o, n := range t.ops {
		switch o.result {
		case done:
			r.Done += n
		case failed:
			r.Failed += n
		case skipped:
			r.Skipped += n
		}
	}
	for _, n := range t.drift {
		r.Drift += n
	}
	r.tally, r.owed = &t, owes
	r.census = census{
		own: len(plan.Self), refused: plan.Refused, nodes: plan.Nodes, programmed: res.programmed(plan),
		subnets: plan.Info.Subnets, counted: plan.Counted,
	}
	if plan.Blind { // as far as is known
		r.census.programmed = min(before.census.programmed, plan.Nodes)
	}
}

// without is the report of a pass that could not be made because of err: what is known besides stays as it was.
func (r Report) without(err error) Report {
	r.Done, r.Failed, r.Skipped, r.Drift, r.Converged, r.Waiting = 0, 0, 0, 0, false, err.Error()
	r.tally, r.looked = nil, true
	var w Waiting
	if errors.As(err, &w) {
		r.lack = lack{}
		if w.Reason != "" {
			r.lack = lack{event{w.Reason, w.For}, w.NoLease}
		}
		return r
	}
	r.Failed = 1 // the reading; it is worth another try soon
	r.lack = lack{event: event{reasonUnreadable, err.Error()}}
	return r
}

// missing records what is not known of this node any more. One that the cluster does not know is not reached by others.
func (r *Report) missing(w *Waiting) {
	if w == nil {
		return
	}
	r.lack = lack{event{w.Reason, w.For}, w.NoLease}
	if w.NoNode {
		r.Waiting = w.For
	}
}

// Ready reports whether pods can be attached and reach others.
func (r Report) Ready() bool { return r.Converged && r.Waiting == "" }

// logChange logs what is different since the report before: operations, problems that came and went, and what is waited
// for. A pass like the one before it logs nothing, nor does one that goes on with a fight, and a problem that comes and
// goes all the time is not told each time: said has the rest.
func logChange(log *slog.Logger, said *streak, before, now Report) {
	at := time.Now()
	said.forget(at)
	if now.Waiting != "" && now.Waiting != before.Waiting && said.again(now.Waiting, at) <= oftenEnough {
		log.Warn("waiting", "for", now.Waiting)
	}
	was := map[subnet.Problem]bool{}
	for _, p := range before.Problems {
		was[p] = true
	}
	for _, p := range now.Problems {
		if !was[p] {
			switch n := said.again(p.String(), at); {
			case n < oftenEnough:
				log.Warn("problem", "node", p.Node, "kind", p.Kind, "why", p.Text)
			case n == oftenEnough:
				log.Warn("problem comes and goes, and is not told each time", "node", p.Node, "kind", p.Kind, "why", p.Text)
			}
		}
		delete(was, p)
	}
	for p := range was {
		if said.times(p.String()) < oftenEnough {
			log.Info("problem gone", "node", p.Node, "kind", p.Kind, "what", p.Text)
		}
	}
	msg := "converged"
	if !now.Converged {
		msg = "not converged"
	}
	worked := now.Done+now.Failed+now.Skipped > 0 && !now.fight
	if worked || now.Converged != before.Converged && said.again(msg, at) <= oftenEnough {
		log.Info(msg, "ops", now.Done, "failed", now.Failed, "skipped", now.Skipped, "peers", now.Peers,
			"took", time.Duration(now.TookMs*float64(time.Millisecond)).Round(100*time.Microsecond))
	}
}

package overlay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// The kinds of what the packet filter consists of.
const kindFilter, kindSet = "filter", "set"

const (
	// pace is the shortest time from the end of one pass to the next. It keeps a storm of events from making us spin.
	pace = 200 * time.Millisecond
	// share and longestPause make that time longer behind a pass that repaired drift, or failed: who fights with us over
	// a large node gets a quarter of a processor out of us, and what is taken away still comes back within a second.
	share        = 3
	longestPause = 500 * time.Millisecond
	// slow is the time after which a pass is made although no bell rang, unless Interval says otherwise.
	slow = 30 * time.Second
	// retry is the time to the next pass after one that failed; it doubles up to slow.
	retry = time.Second
	// soonest and latest bound the pause after a write to the cluster that failed; it doubles.
	soonest, latest = 500 * time.Millisecond, 5 * time.Second
)

// A Reconciler makes passes: one at a time, and one more whenever its bell has rung.
type Reconciler struct {
	// Announcer may be set before the first pass; nil where no operator would look.
	Announcer Announcer
	// MetricsAddress may be set before Run, to a HOST:PORT that CheckMetricsAddress takes; empty for none.
	MetricsAddress string
	// Interval is the time after which a pass is made although no bell rang: some changes ring none. It may be set before
	// Run; 30 s if zero.
	Interval time.Duration

	planner *Planner
	cni     CNIConf
	log     *slog.Logger
	version string
	meter   *meter

	bell    chan struct{}
	look    atomic.Bool         // the bell rang for something else than the list of leases
	publish chan []subnet.Lease // holds at most the latest
	// published is set once this node's lease stands for others to see, unpublished to why it does not.
	published   atomic.Bool
	unpublished atomic.Pointer[string]
	standings   chan standing // holds at most the latest, as events does
	events      chan []event
	undeclared  atomic.Pointer[string] // why the Node does not say how this node fares
	vigil       vigil
	fights      fights
	said        streak // what the log has
	uplinks     atomic.Pointer[[]string]
	report      atomic.Pointer[Report]
	passed      atomic.Int64 // when the last pass ended, Unix nanoseconds
}

// NewReconciler makes a Reconciler that has not run yet.
func NewReconciler(p *Planner, cni CNIConf, version string, log *slog.Logger) *Reconciler {
	r := &Reconciler{
		planner: p, cni: cni, log: log, version: version,
		bell: make(chan struct{}, 1), publish: make(chan []subnet.Lease, 1),
		standings: make(chan standing, 1), events: make(chan []event, 1),
	}
	r.report.Store(&Report{Version: version, Waiting: "starting"})
	r.passed.Store(time.Now().UnixNano())
	r.meter = newMeter(r)
	return r
}

// Ring asks for a pass. However often it is called before the next pass, one pass follows.
func (r *Reconciler) Ring() {
	r.look.Store(true)
	r.ringForLeases()
}

// ringForLeases asks for a pass because of nothing but the list of leases: it need not look at the kernel.
func (r *Reconciler) ringForLeases() {
	select {
	case r.bell <- struct{}{}:
	default:
	}
}

// Report returns what came of the last pass.
func (r *Reconciler) Report() Report {
	rep := *r.report.Load()
	rep.ListAge = -1
	if list, ok := r.planner.Leases.List(); ok {
		rep.ListAge = time.Since(list.At).Seconds()
	}
	return rep
}

// Passes makes passes until ctx ends. It leaves the data path as it is.
func (r *Reconciler) Passes(ctx context.Context) error {
	again := retry
	timer := time.NewTimer(0)
	defer timer.Stop()
	var looked time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.bell:
		case <-timer.C:
			r.look.Store(true)
		}
		start := time.Now()
		rep := r.pass(ctx)
		if rep.looked {
			looked = start
		}
		if ctx.Err() != nil {
			return nil
		}
		r.meter.note(rep)
		logChange(r.log, &r.said, *r.report.Load(), rep)
		r.report.Store(&rep)
		r.passed.Store(time.Now().UnixNano())

		wait := cmp.Or(r.Interval, slow)
		if rep.Failed > 0 {
			wait, again = again, min(2*again, wait)
		} else {
			again = retry
		}
		timer.Reset(shorter(max(wait-start.Sub(looked), pace), r.announce(rep)))
		if !sleep(ctx, rep.pause()) {
			return nil
		}
	}
}

// pause is the shortest time to the next pass.
func (r Report) pause() time.Duration {
	if r.Drift+r.Failed == 0 {
		return pace
	}
	return min(max(pace, share*time.Duration(r.TookMs*float64(time.Millisecond))), longestPause)
}

// pass plans, applies, and tells the plugin and the other nodes once all is right.
func (r *Reconciler) pass(ctx context.Context) Report {
	start := time.Now()
	rep := Report{Version: r.version}
	plan, looked, err := r.plan(ctx)
	if err != nil {
		return r.report.Load().without(err)
	}
	rep.looked = looked
	r.uplinks.Store(plan.bells())
	if plan.Grown != nil {
		r.log.Info("pod network changed", "network", listing(plan.Grown.Prefixes(), ","))
	}
	for _, c := range plan.Changes {
		r.log.Info("configuration changed", "key", c.key, "was", c.before, "now", c.now)
	}
	for _, op := range plan.Ops {
		// They are the host's more than ours, so each is told.
		if op.What.Kind() == "sysctl" && r.said.again(op.String(), start) <= oftenEnough {
			r.log.Info("host setting", "command", op)
		}
	}
	res := apply(ctx, r.planner.Kernel, plan.Ops)
	rep.count(plan, res, *r.report.Load())
	rep.Peers, rep.Wanted, rep.Found = plan.Peers, plan.Wanted, plan.Found
	rep.Problems = append(append([]subnet.Problem{}, plan.Problems...), res.problems...)
	rep.Converged = !plan.Blocked && !res.blocked && ctx.Err() == nil
	r.tellPeers(plan)
	if !r.published.Load() {
		rep.Waiting = "waiting for this node's lease to be published"
	}
	rep.missing(plan.Stale)
	fought, over := r.fights.note(plan, res, start)
	rep.Problems, rep.fight = append(rep.Problems, fought...), over
	problem := func(kind, text string) {
		rep.Problems = append(rep.Problems, subnet.Problem{Kind: kind, Text: text})
	}
	if rep.Converged {
		if err := r.tellPlugin(plan); err != nil {
			problem(subnet.KindPods, err.Error())
			rep.Failed, rep.Converged = rep.Failed+1, false
		}
	}
	if why := r.unpublished.Load(); why != nil {
		problem(subnet.KindPublish, *why)
	}
	if why := r.undeclared.Load(); why != nil {
		problem(subnet.KindPublish, *why)
	}
	for _, text := range r.cni.rivals() {
		problem(subnet.KindPods, text)
	}
	rep.node = plan.Info.Node
	for i := range rep.Problems {
		if rep.Problems[i].Node == "" {
			rep.Problems[i].Node = plan.Info.Node
		}
	}
	rep.TookMs = float64(time.Since(start).Microseconds()) / 1000
	return rep
}

// plan plans by a look at the kernel, unless nothing but the list of leases rang.
func (r *Reconciler) plan(ctx context.Context) (plan Plan, looked bool, err error) {
	if !r.look.Swap(false) {
		if plan, ok := r.planner.PlanChange(); ok {
			if len(plan.Ops) > 0 {
				r.Ring()
			}
			return plan, false, nil
		}
	}
	plan, err = r.planner.Plan(ctx)
	return plan, true, err
}

// tellPeers has this node's leases published where they do not stand yet.
func (r *Reconciler) tellPeers(plan Plan) {
	switch {
	case plan.Stale != nil: // what would be published is no longer known to be so
		select {
		case <-r.publish:
		default:
		}
		if plan.Stale.NoLease {
			r.published.Store(false)
		}
	case plan.Unpublished:
		replace(r.publish, plan.Self)
	default:
		r.published.Store(true)
		r.unpublished.Store(nil) // the answer to a write that was made can get lost
	}
}

// tellPlugin lets pods be attached: first what the network looks like, then, once others know this node, the
// configuration that makes the node ready.
func (r *Reconciler) tellPlugin(plan Plan) error {
	plan.Info.Converged = true
	if err := plan.Info.Write(r.planner.RunDir); err != nil {
		return err
	}
	if !r.published.Load() {
		return nil
	}
	return r.cni.Write()
}

// Publish publishes what passes ask for, until ctx ends. It is apart from the passes because it can take long.
func (r *Reconciler) Publish(ctx context.Context) error {
	wait := soonest
	for {
		var leases []subnet.Lease
		select {
		case <-ctx.Done():
			return nil
		case leases = <-r.publish:
		}
		err := r.planner.Publisher.Publish(ctx, leases)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			wait = soonest
			r.unpublished.Store(nil)
			if !r.published.Swap(true) {
				r.Ring() // for the CNI configuration
			}
			continue
		}
		why := fmt.Sprintf("this node's lease could not be published: %v", err)
		if was := r.unpublished.Swap(&why); was == nil || *was != why {
			r.Ring()
		}
		if !sleep(ctx, wait) {
			return nil
		}
		wait = min(2*wait, latest)
		r.Ring() // whose pass asks again, if it is still wanted
	}
}

// isUplink reports whether a device's changes may matter for the uplink; where there is none, any device's do.
func (r *Reconciler) isUplink(dev string) bool {
	devs := r.uplinks.Load()
	return devs == nil || slices.Contains(*devs, dev)
}

// result is what came of a plan's operations.
type result struct {
	of       []string // done, failed or skipped: of each operation that there was time for
	problems []subnet.Problem
	blocked  bool // an operation for this node itself failed
}

// An obstacle is what failed operations keep others from.
type obstacle struct {
	missing map[string]bool // links that could not be had
	// incomplete is set where something could not be put into the packet filter.
	incomplete bool
	unfilled   map[masq.Set]bool // sets without all of their addresses
}

// bars reports whether an operation must not be tried: it hangs on a link that is missing, it takes away of the packet
// filter what may have to stand in for what is missing there, or it adds a rule that would take a peer for a stranger.
func (o *obstacle) bars(op backend.Op) bool {
	if e, ok := op.What.(masq.Entry); ok && op.Do != backend.Delete && (o.unfilled[e.Rule.SrcIn] || o.unfilled[e.Rule.DstIn]) {
		return true
	}
	return o.missing[backend.Device(op.What)] || o.incomplete && masq.Retires(op)
}

// grow takes in an operation that failed.
func (o *obstacle) grow(op backend.Op) {
	if op.Do == backend.Delete {
		return
	}
	if link, ok := op.What.(backend.Link); ok && !carries(op.Was) {
		o.missing[link.Name] = true
	}
	switch what := op.What.(type) {
	case masq.Set:
		o.unfilled[what], o.incomplete = true, true
	case masq.Members:
		o.unfilled[what.Set], o.incomplete = true, true
	}
	o.incomplete = o.incomplete || op.What.Kind() == kindFilter
}

// apply makes the changes in order. A failed one keeps back no more than it has to.
func apply(ctx context.Context, k Kernel, ops []backend.Op) result {
	var res result
	in := obstacle{missing: map[string]bool{}, unfilled: map[masq.Set]bool{}}
	for len(ops) > 0 {
		if ctx.Err() != nil {
			res.blocked = true
			return res
		}
		if in.bars(ops[0]) {
			res.of, ops = append(res.of, skipped), ops[1:]
			continue
		}
		now := in.together(ops)
		for i, err := range k.ApplyAll(ctx, ops[:now]) {
			res.note(ops[i], err)
			if err != nil {
				in.grow(ops[i])
			}
		}
		ops = ops[now:]
	}
	return res
}

// atOnce is how many operations are begun before the daemon looks whether it is to end.
const atOnce = 500

// together is how many operations can be made without a look at what has become of the first. What hangs on a link
// waits for the link, what may go of the packet filter for what comes in its place, and all of it for its sets: some
// rules do, and what is given away at once may be one process.
func (o *obstacle) together(ops []backend.Op) int {
	var adds, fills bool // the packet filter; a set of it
	for n, op := range ops[:min(len(ops), atOnce)] {
		_, isLink := op.What.(backend.Link)
		set, filter := op.What.Kind() == kindSet, op.What.Kind() == kindFilter
		if n > 0 && (isLink || adds && masq.Retires(op) || fills && filter || o.bars(op)) {
			return n
		}
		if isLink {
			return 1
		}
		if op.Do != backend.Delete {
			fills, adds = fills || set, adds || set || filter
		}
	}
	return min(len(ops), atOnce)
}

// note records what came of the next operation.
func (res *result) note(op backend.Op, err error) {
	if err == nil {
		res.of = append(res.of, done)
		return
	}
	res.of = append(res.of, failed)
	// Without what no kernel of this kind has, pods work all the same.
	res.blocked = res.blocked || op.Peer == "" && !errors.Is(err, spoof.ErrUnsupported)
	res.problems = append(res.problems, subnet.Problem{
		Node: op.Peer, Kind: subnet.KindKernel, Text: fmt.Sprintf("%s: %v", op, err)})
}

// carries reports whether a link that could not be changed from what it was can have something hang on it. One that was
// to be added was nothing.
func carries(was backend.Object) bool {
	link, ok := was.(backend.Link)
	return ok && link.Up
}

// sleep waits, and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// forget removes what a daemon of an earlier boot left for the container runtime: until this one has converged, the node
// must not look ready. What was written in this boot stays, because DEL needs it.
func (r *Reconciler) forget() error {
	if _, err := podnet.ReadNodeInfo(r.planner.RunDir); err == nil {
		return nil
	}
	return r.cni.Remove()
}

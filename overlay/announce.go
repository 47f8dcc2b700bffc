package overlay

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"tweed.dev/tweed/subnet"
)

// An Announcer speaks where a cluster's operators look first: on this node's own Node object. It answers without a word
// where the cluster does not know this node.
type Announcer interface {
	// SetNetwork has the Node say whether its pods have a network, and why. It writes nothing where that stands already.
	SetNetwork(ctx context.Context, up bool, reason, message string) error
	// Admit takes the startup taint off the Node, where it is there.
	Admit(ctx context.Context) error
	// Tell writes an event about the Node. One that is told again is the same event, of a later time.
	Tell(ctx context.Context, reason, message string) error
}

const (
	// grace is how long something must have been wrong to be told: a subnet that comes after seconds, an uplink that
	// is just being set up, are no matter for an operator.
	grace = 10 * time.Second
	// mostEvents bounds what is told at a time. Where more is wrong, the report has it.
	mostEvents = 8
	// mostTries bounds how often an event is tried to be written, with pauses that grow from tellAgain by a factor.
	mostTries  = 5
	tellAgain  = time.Second
	tellFactor = 4
)

// The reasons of the condition NetworkUnavailable and of events.
const (
	ReasonUp            = "TweedIsUp"
	ReasonConfigInvalid = "ConfigInvalid" // the daemon ends
	ReasonCannotStart   = "CannotStart"   // the daemon ends
	reasonNoSubnet      = "NoPodSubnet"
	reasonNoUplink      = "NoUplink"
	reasonOverlap       = "NetworkHoldsNode"
	reasonRefused       = "NetworkRefused"
	reasonUnreadable    = "HostNotReadable"
)

// reasonOf names the event for a kind of Problem on this node.
func reasonOf(kind string) string {
	reasons := map[string]string{
		subnet.KindAnnotation: "BadAnnotation",
		subnet.KindLease:      "LeaseProblem",
		subnet.KindConflict:   "LeaseConflict",
		subnet.KindStranger:   "StrangerInTheWay",
		subnet.KindKernel:     "KernelRefused",
		subnet.KindPublish:    "NotPublished",
		subnet.KindPods:       "PodsAffected",
		subnet.KindConfig:     "ConfigNotInForce",
		subnet.KindFight:      "FoughtOver",
	}
	return cmp.Or(reasons[kind], "Problem")
}

// An event is what is wrong on this node. Two of the same text are one.
type event struct{ reason, text string }

// A standing is what the Node is to say. With up and down unset it stays as it is.
type standing struct {
	up, down bool
	event
}

// An announcement is what passes have found, as far as it is to be told.
type announcement struct {
	standing standing
	events   []event
}

// A vigil knows since when things have been wrong.
type vigil struct{ since map[event]time.Time }

// watch takes in what a pass has found, and returns what is to be told, and after what time more is: 0 for none.
func (v *vigil) watch(rep Report, now time.Time) (a announcement, next time.Duration) {
	wrong := rep.wrong()
	before := v.since
	v.since = map[event]time.Time{}
	for _, e := range wrong {
		since, known := before[e]
		if !known {
			since = now
		}
		v.since[e] = since
		if left := grace - now.Sub(since); left > 0 {
			next = shorter(next, left)
		} else if len(a.events) < mostEvents {
			a.events = append(a.events, e)
		}
	}
	switch {
	case rep.Ready():
		a.standing = standing{up: true, event: event{ReasonUp, "tweed has connected this node to the pod network"}}
	case rep.lack.noLease && now.Sub(v.since[rep.lack.event]) >= grace:
		a.standing = standing{down: true, event: rep.lack.event}
	}
	return a, next
}

// wrong lists what is wrong on this node, each once.
func (r Report) wrong() []event {
	var all []event
	add := func(e event) {
		if e.text != "" && !slices.Contains(all, e) {
			all = append(all, e)
		}
	}
	add(r.lack.event)
	for _, p := range r.Problems {
		// What keeps this node from its lease is a lack already.
		if p.Node == r.node && strings.TrimSuffix(p.Text, staleSuffix) != r.lack.text {
			add(event{reasonOf(p.Kind), p.Text})
		}
	}
	return all
}

// shorter returns the smaller of two times, where 0 means none.
func shorter(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// announce hands over what is to be told, in place of what nobody took yet, and returns after what time more will be: 0
// for none.
func (r *Reconciler) announce(rep Report) time.Duration {
	if r.Announcer == nil {
		return 0
	}
	a, next := r.vigil.watch(rep, time.Now())
	replace(r.standings, a.standing)
	replace(r.events, a.events)
	return next
}

// replace puts v into a channel of one place, which only the caller writes to.
func replace[T any](c chan T, v T) {
	select {
	case <-c:
	default:
	}
	c <- v
}

// Declare keeps what this node's Node says of its network as passes find it, until ctx ends.
func (r *Reconciler) Declare(ctx context.Context) error {
	wait := soonest
	for {
		var s standing
		select {
		case <-ctx.Done():
			return nil
		case s = <-r.standings:
		}
		err := r.declare(ctx, s)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			wait = soonest
			if r.undeclared.Swap(nil) != nil {
				r.Ring()
			}
			continue
		}
		why := err.Error()
		if was := r.undeclared.Swap(&why); was == nil || *was != why {
			r.Ring()
		}
		if !sleep(ctx, wait) {
			return nil
		}
		wait = min(2*wait, latest)
		r.Ring() // whose pass asks again, if it is still wanted
	}
}

func (r *Reconciler) declare(ctx context.Context, s standing) error {
	switch {
	case s.up:
		if err := r.Announcer.Admit(ctx); err != nil {
			return err
		}
	case !s.down:
		return nil
	}
	return r.Announcer.SetNetwork(ctx, s.up, s.reason, s.text)
}

// TellEvents writes an event for each thing that is wrong, once for as long as it is, until ctx ends.
func (r *Reconciler) TellEvents(ctx context.Context) error {
	t := teller{told: map[event]*telling{}}
	again := time.NewTimer(slow)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case events := <-r.events:
			t.want(events)
		case <-again.C:
		}
		for _, e := range t.due(time.Now()) {
			err := r.Announcer.Tell(ctx, e.reason, e.text)
			if ctx.Err() != nil {
				return nil
			}
			if t.tried(e, err, time.Now()) {
				r.log.Warn("event not written", "reason", e.reason, "event", e.text, "err", err)
			}
		}
		again.Reset(t.next(time.Now()))
	}
}

// A teller knows which of the standing events have been written.
type teller struct{ told map[event]*telling }

type telling struct {
	over  bool // written, or given up
	tries int
	at    time.Time // of the next try
}

// want forgets the events that are over, so that each is told again when it comes again.
func (t *teller) want(events []event) {
	maps.DeleteFunc(t.told, func(e event, _ *telling) bool { return !slices.Contains(events, e) })
	for _, e := range events {
		if t.told[e] == nil {
			t.told[e] = &telling{}
		}
	}
}

func (t *teller) due(now time.Time) []event {
	var due []event
	for e, s := range t.told {
		if !s.over && !s.at.After(now) {
			due = append(due, e)
		}
	}
	slices.SortFunc(due, func(a, b event) int {
		return cmp.Or(cmp.Compare(a.reason, b.reason), cmp.Compare(a.text, b.text))
	})
	return due
}

// tried records what came of a try, and reports whether it was the last of too many.
func (t *teller) tried(e event, err error, now time.Time) (givenUp bool) {
	s := t.told[e]
	s.tries++
	if s.over = err == nil || s.tries == mostTries; s.over {
		return err != nil
	}
	pause := tellAgain
	for range s.tries - 1 {
		pause *= tellFactor
	}
	s.at = now.Add(pause)
	return false
}

// next is the time to the next try that is due.
func (t *teller) next(now time.Time) time.Duration {
	wait := slow
	for _, s := range t.told {
		if !s.over {
			wait = min(wait, max(s.at.Sub(now), 0))
		}
	}
	return wait
}

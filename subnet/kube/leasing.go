package kube

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tweed.dev/tweed/subnet"
)

const (
	// pauseFirst and pauseLast bound the pause after a request of a node that leases has failed. It doubles.
	pauseFirst = 500 * time.Millisecond
	pauseLast  = 3 * time.Second
	// noticed is how long a wait has to be for people to be told why.
	noticed = 3 * time.Second
)

// A lessor finds out where this node's subnets come from, and leases them where nodes do that for themselves.
type lessor struct {
	*Source
	origin   subnet.Origin // as configured
	nonce    string
	readOnly bool
	evidence evidence
	claims   int            // written since the last lease was had
	leased   types.UID      // of the Node object on which a lease was had
	dropped  subnet.Version // of that from which a foreign claim was taken off
	pause    time.Duration  // after the next request that fails
	wake     chan struct{}  // something has changed that a decision may depend on

	mu         sync.Mutex
	network    subnet.Network
	remembered []netip.Prefix
	claimant   *subnet.Claimant // nil before the first is needed, and when network has changed
}

func newLessor(s *Source, o Options) *lessor {
	return &lessor{
		Source: s, origin: o.Origin, readOnly: o.ReadOnly, network: o.Network, remembered: o.Remembered,
		nonce: strings.ToLower(rand.Text()), wake: make(chan struct{}, 1), pause: pauseFirst,
	}
}

// grow has subnets leased from n from now on.
func (l *lessor) grow(n subnet.Network) {
	l.mu.Lock()
	l.network, l.claimant = n, nil
	l.mu.Unlock()
	l.rouse()
}

// rouse has the lessor look again.
func (l *lessor) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run leases, or waits for what the cluster hands out, until ctx ends.
func (l *lessor) run(ctx context.Context) {
	for ctx.Err() == nil {
		again := l.turn(ctx)
		var timer <-chan time.Time
		if again > 0 {
			timer = time.After(again)
		}
		select {
		case <-ctx.Done():
		case <-l.wake:
		case <-timer:
		}
	}
}

// turn does what can be done now, and returns after what time more can: 0 if only a change brings that about.
func (l *lessor) turn(ctx context.Context) time.Duration {
	obj, err := l.self.known()
	if err != nil {
		return 0
	}
	origin, again, why := l.decide(ctx, obj)
	if origin != subnet.OriginLease || l.self.decided() != origin { // why a lease is not had, the taking tells
		l.conclude(origin, why)
	}
	switch {
	case l.readOnly:
		return again
	case origin == subnet.OriginNodeSpec:
		return l.dropClaim(ctx, obj)
	case origin == subnet.OriginLease:
		return l.take(ctx, obj)
	}
	return again
}

func (l *lessor) conclude(origin subnet.Origin, why error) {
	if l.self.decide(origin, why) {
		l.ring()
	}
}

// take goes on with the protocol until there is a lease, or nothing can be done for now; it then returns after what time
// it may be tried again.
func (l *lessor) take(ctx context.Context, obj object) time.Duration {
	if l.leased == obj.uid && obj.annotations[Subnets] == "" { // the watch may be behind
		var err error
		if obj, err = l.fresh(ctx); err != nil {
			return pauseLast
		}
	}
	own := standingOfOwn(l.node, obj)
	var all subnet.Listing
	for ctx.Err() == nil {
		claimant, err := l.protocol()
		if err != nil {
			l.conclude(subnet.OriginLease, err)
			return 0
		}
		step := claimant.Next(own, all)
		switch step := step.(type) {
		case subnet.Done:
			l.leased = types.UID(own.Version.UID)
			l.done(step)
			return 0
		case subnet.Stuck:
			l.conclude(subnet.OriginLease, step.Err)
			return step.For
		}
		l.log.Debug("leasing", "step", step)
		if own, all, err = l.do(ctx, own, step); err == nil {
			l.pause = pauseFirst
			continue
		}
		if ctx.Err() != nil || errors.Is(err, errNotNow) {
			return 0
		}
		l.conclude(subnet.OriginLease, fmt.Errorf("node %s is leasing a subnet: %w", l.node, err))
		// What was not answered may have been done, and what was refused has met another version: the Node says
		// which. Where its subnets come from may be another question by then, too.
		pause := l.pause
		l.pause = min(2*pause, pauseLast)
		if !sleep(ctx, pause) {
			return 0
		}
		if obj, err = l.fresh(ctx); err != nil {
			return l.pause
		}
		if origin, _, _ := l.decide(ctx, obj); origin != subnet.OriginLease {
			l.rouse()
			return 0
		}
		own = standingOfOwn(l.node, obj)
	}
	return 0
}

// errNotNow is for what a change brings about that the lessor is told of.
var errNotNow = errors.New("not now")

// do does one step, and returns this node's Node and the list that Next is to have.
func (l *lessor) do(ctx context.Context, own subnet.Standing, step subnet.Step) (subnet.Standing, subnet.Listing, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	var err error
	var all subnet.Listing
	switch step := step.(type) {
	case subnet.ListNodes:
		all, err = l.listing(ctx, step.Fresh)
	case subnet.PatchClaim:
		l.claims++
		own, err = l.patch(ctx, own, step.If, map[string]any{Claim: step.Claim.String()})
	case subnet.PatchSubnets:
		own, err = l.patch(ctx, own, step.If, map[string]any{
			Subnets: subnet.FormatSubnets(step.Subnets), Claim: nil})
	case subnet.RemoveClaim:
		own, err = l.patch(ctx, own, step.If, map[string]any{Claim: nil})
	case subnet.Wait:
		if step.For >= noticed {
			l.conclude(subnet.OriginLease, fmt.Errorf("node %s is leasing a subnet: %s", l.node, step.Why))
		}
		if !sleep(ctx, step.For) {
			return own, nil, ctx.Err()
		}
		var obj object
		if obj, err = l.fresh(ctx); err == nil {
			own = standingOfOwn(l.node, obj)
		}
	}
	return own, all, err
}

// protocol returns the claimant.
func (l *lessor) protocol() (*subnet.Claimant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.claimant == nil {
		c, err := subnet.NewClaimant(l.node, l.network, l.nonce, l.remembered, mathrand.Uint64)
		if err != nil {
			return nil, err
		}
		l.claimant = c
	}
	return l.claimant, nil
}

// done records the lease that the node has.
func (l *lessor) done(d subnet.Done) {
	l.mu.Lock()
	before := l.remembered
	l.remembered = d.Subnets
	l.mu.Unlock()
	if l.claims > 0 { // it is not the lease of an earlier start
		l.log.Info("subnet leased", "node", l.node, "subnets", subnet.FormatSubnets(d.Subnets), "claims", l.claims)
		l.claims = 0
	}
	if len(before) > 0 && !sameSet(before, d.Subnets) {
		l.log.Warn("this node has another subnet than before: pods with addresses of the old one have to be restarted",
			"node", l.node, "before", subnet.FormatSubnets(before), "now", subnet.FormatSubnets(d.Subnets))
	}
	l.conclude(subnet.OriginLease, nil)
}

// dropClaim takes a claim off the Node of a node that leases nothing.
func (l *lessor) dropClaim(ctx context.Context, obj object) time.Duration {
	own := standingOfOwn(l.node, obj)
	if own.Claim == "" || own.Version == l.dropped {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if _, err := l.patch(ctx, own, own.Version, map[string]any{Claim: nil}); err != nil {
		return pauseLast // the watch may be behind
	}
	l.dropped = own.Version
	return 0
}

// patch writes annotations to this node's Node, if it is of that version. Nobody may try that again with another version.
func (l *lessor) patch(
	ctx context.Context, own subnet.Standing, at subnet.Version, annotations map[string]any,
) (subnet.Standing, error) {
	m, err := l.patchAnnotations(ctx, version{uid: types.UID(at.UID), resource: at.Resource}, annotations)
	if err != nil {
		return own, l.explainWrite("lease a subnet for", "nodes", err)
	}
	return standingOf(&m.ObjectMeta), nil
}

// fresh is this node's Node as the server has it now.
func (l *lessor) fresh(ctx context.Context) (object, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	n, err := l.read(ctx)
	switch {
	case apierrors.IsNotFound(err):
		return object{}, errNotNow
	case err != nil:
		return object{}, explain("get", "nodes", l.server, err)
	}
	return *objectOf(n), nil
}

// listing is what all Nodes say: as far as the watch knows, or, fresh, in one list of one moment as the store has it.
func (l *lessor) listing(ctx context.Context, fresh bool) (subnet.Listing, error) {
	if !fresh {
		all, known := l.all.standings()
		if !known {
			return nil, errNotNow
		}
		return all, nil
	}
	list, err := listMetadata(ctx, l.core)
	if err != nil {
		return nil, explain("list", "nodes", l.server, err)
	}
	all := make(subnet.Listing, 0, len(list.Items))
	for i := range list.Items {
		all = append(all, standingOf(&list.Items[i].ObjectMeta))
	}
	return all, nil
}

// standingOf says how a Node stands to those that lease.
func standingOf(m *metav1.ObjectMeta) subnet.Standing {
	return subnet.Standing{
		Node: m.Name, Version: subnet.Version{UID: string(m.UID), Resource: m.ResourceVersion},
		Since:   m.CreationTimestamp.UTC(),
		Subnets: legible(m.Annotations[Subnets]), Network: legible(m.Annotations[Network]),
		Claim: legible(m.Annotations[Claim]),
	}
}

// legible is what can matter of a value in which single words are read although it is none as a whole. One without fault
// is far shorter, and is not cut.
func legible(s string) string {
	const most = 4 << 10 // bytes
	if len(s) <= most {
		return s
	}
	s = s[:most]
	return strings.Clone(s[:strings.LastIndexAny(s, ", ")+1]) // the last word is not whole
}

func standingOfOwn(node string, o object) subnet.Standing {
	return subnet.Standing{
		Node: node, Version: subnet.Version{UID: string(o.uid), Resource: o.resource},
		Since:   o.since,
		Subnets: o.annotations[Subnets], Network: o.annotations[Network], Claim: o.annotations[Claim],
	}
}

// sleep waits, and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

package subnet

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"time"
)

// A Claimant takes a lease for one node, without a lock and without anybody who hands them out: by writing first and
// looking then. It says what is to be done next, and is told what was read; it does nothing itself.
//
//  1. List, and choose free subnets.
//  2. Write them to this node's Node as a claim.
//  3. List again, freshly.
//  4. If another Node has a lease or a claim that overlaps: remove the claim, wait a random while and start over.
//  5. Else write the lease and remove the claim, in one write.
//
// So no two nodes get one subnet: of two that want it, the one that writes its claim second lists after both writes and
// sees the first. That holds because the claim stands from before the list until the lease replaces it, since every
// write names the version that it was made for. Claims do not expire.
//
// What it chooses is, if possible, what all nodes with a lease accept. That only guides the choice, and not for ever: a
// node that never accepts more delays the others, and does not stop them.
type Claimant struct {
	node    string
	network Network
	nonce   string
	random  func() uint64
	memory
}

// memory is what a Claimant keeps from one step to the next.
type memory struct {
	remembered []netip.Prefix
	tries      int     // claims asked for
	crowded    int     // lists in a row in which only claims were in the way
	unaccepted int     // lists in which all that was free is what some node does not accept yet
	lost       bool    // the claim goes because of a rival
	asked      attempt // whose fresh list was asked for
	clear      attempt // whose fresh list showed no rival
}

// An attempt is a claim of this process on one Node object.
type attempt struct{ uid, claim string }

// patience is how many lists in a row may show that claims take all that is free before that is said: most claims are
// gone soon.
const patience = 5

// A subnet that not all accept is taken after so many lists in which no other was free, with such pauses between them.
const (
	acceptPause = 5 * time.Second
	acceptLists = int(AcceptPatience / acceptPause)
)

// Pauses are drawn from zero to the first, which doubles with each try up to the last.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 2 * time.Second
)

// NewClaimant returns one that leases subnets of network for node. No two processes may have the same nonce, of
// lower-case letters and digits. What is remembered, at most one subnet a family, is taken again if it is free. random
// returns what rand.Uint64 of math/rand/v2 does.
func NewClaimant(node string, network Network, nonce string, remembered []netip.Prefix,
	random func() uint64) (*Claimant, error) {
	if len(network) == 0 {
		return nil, errors.New("there is no pod network to lease subnets of; set Network or IPv6Network in net-conf.json")
	}
	if err := checkNonce(nonce); err != nil {
		return nil, err
	}
	return &Claimant{node, network, nonce, random, memory{remembered: slices.Clone(remembered)}}, nil
}

// Next says what to do. own is this node's Node as it was last read from the server or answered by it to a write; the
// zero Standing stands for a Node that there is not. all is nil, unless it answers the ListNodes that was returned
// last; then it is not nil, even if it is empty.
//
// A write that was refused, or whose answer did not come, is followed by a read of the Node and another Next. It is
// never done again by itself: with a version that was read later it could be wrong.
func (c *Claimant) Next(own Standing, all Listing) Step {
	if own.Version.UID == "" {
		c.asked, c.clear = attempt{}, attempt{}
		return c.wait("node " + c.node + " is not registered")
	}
	held, err := c.held(own)
	switch {
	case err != nil && own.Claim != "":
		return RemoveClaim{own.Version, "the node leases nothing for now"}
	case err != nil:
		return Stuck{err, lastPause}
	}
	missing := c.missing(held)
	if own.Claim == "" && len(missing) == 0 {
		c.memory = memory{remembered: held}
		return Done{held}
	}
	if own.Claim == "" {
		return c.choose(own, missing, all)
	}
	claim, err := ParseClaim(own.Claim)
	if err != nil || claim.Nonce != c.nonce || !matches(claim.Subnets, missing) {
		return RemoveClaim{own.Version, "it is not of this process"}
	}
	return c.look(own, held, claim, all)
}

// held reads which subnets the node has leased.
func (c *Claimant) held(own Standing) ([]netip.Prefix, error) {
	if own.Subnets == "" {
		return nil, nil
	}
	subnets, err := parseSubnets(own.Subnets)
	if err != nil {
		return nil, fmt.Errorf("the lease of node %s cannot be read: %w; correct or remove it", c.node, err)
	}
	for _, s := range subnets {
		if !c.network.Contains(s) {
			return nil, fmt.Errorf("node %s has leased %s, which is outside the network %v: correct the network, "+
				"or drain the node and remove the lease", c.node, s, c.network.Prefixes())
		}
	}
	return subnets, nil
}

// missing lists the ranges in which held has no subnet.
func (c *Claimant) missing(held []netip.Prefix) (out []Range) {
	for _, r := range c.network {
		if _, ok := within(r, held); !ok {
			out = append(out, r)
		}
	}
	return out
}

// within returns the one of subnets that has the address family of r.
func within(r Range, subnets []netip.Prefix) (netip.Prefix, bool) {
	i := slices.IndexFunc(subnets, func(s netip.Prefix) bool { return sameFamily(s.Addr(), r.Prefix.Addr()) })
	if i < 0 {
		return netip.Prefix{}, false
	}
	return subnets[i], true
}

// matches reports whether subnets has one of each range that may be leased, and no other.
func matches(subnets []netip.Prefix, ranges []Range) bool {
	return len(subnets) == len(ranges) && !slices.ContainsFunc(ranges, func(r Range) bool {
		s, ok := within(r, subnets)
		return !ok || r.Check(s) != nil
	})
}

// choose picks a subnet of each range and claims them.
func (c *Claimant) choose(own Standing, ranges []Range, all Listing) Step {
	c.asked, c.clear = attempt{}, attempt{}
	if c.lost {
		c.lost = false
		return c.wait("another node wanted the same subnet")
	}
	if all == nil {
		return ListNodes{}
	}
	taken := slices.Concat(c.others(all, leased), c.others(all, claimed))
	claim := Claim{Nonce: c.nonce}
	for _, r := range ranges {
		avoid, why := c.avoid(r, taken, all)
		if why != "" {
			return Wait{acceptPause, why}
		}
		s, ok := c.pick(r, slices.Concat(taken, avoid))
		if !ok {
			return c.exhausted(r, all)
		}
		claim.Subnets = append(claim.Subnets, s)
	}
	c.tries++
	c.crowded = 0
	return PatchClaim{claim, own.Version}
}

// avoid says what of r is not to be chosen as long as some node does not accept it. Where only that is free, why says
// what is better waited for; "" if it has been for long enough.
func (c *Claimant) avoid(r Range, taken []netip.Prefix, all Listing) (parts []netip.Prefix, why string) {
	parts, by := all.Unaccepted(r, c.node)
	if _, ok := c.remembers(r, taken); ok || len(parts) == 0 {
		return nil, ""
	}
	if len(r.gaps(slices.Concat(taken, parts))) > 0 {
		return parts, ""
	}
	if len(r.gaps(taken)) == 0 || c.unaccepted == acceptLists {
		return nil, ""
	}
	c.unaccepted++
	return nil, NotAccepted(r, by)
}

// remembers returns the remembered subnet of r, if it is free.
func (c *Claimant) remembers(r Range, taken []netip.Prefix) (netip.Prefix, bool) {
	s, ok := within(r, c.remembered)
	return s, ok && r.Check(s) == nil && !slices.ContainsFunc(taken, s.Overlaps)
}

// pick chooses a subnet of r that overlaps none of taken: the remembered one, else the first time one that follows from
// the node's name, so that a node mostly gets back what it had, and then a random one.
func (c *Claimant) pick(r Range, taken []netip.Prefix) (netip.Prefix, bool) {
	if s, ok := c.remembers(r, taken); ok {
		return s, true
	}
	if c.tries == 0 {
		for s := range r.Free(hash(c.node), taken) {
			return s, true
		}
		return netip.Prefix{}, false
	}
	return r.nth(c.random(), taken)
}

func hash(s string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s))
	return h.Sum64()
}

// nth is the free subnet of number n, counted from Min and modulo how many there are.
func (r Range) nth(n uint64, taken []netip.Prefix) (netip.Prefix, bool) {
	gaps := r.gaps(taken)
	if len(gaps) == 0 {
		return netip.Prefix{}, false
	}
	n %= count(gaps)
	for _, g := range gaps {
		if size := g.last - g.first; n > size {
			n -= size + 1
			continue
		}
		return r.subnet(g.first + n), true
	}
	return netip.Prefix{}, false
}

// look decides about this process's claim, which stands in own.
func (c *Claimant) look(own Standing, held []netip.Prefix, claim Claim, all Listing) Step {
	this := attempt{own.Version.UID, own.Claim}
	if c.clear == this {
		return PatchSubnets{c.sorted(held, claim.Subnets), own.Version}
	}
	if c.asked != this || all == nil {
		c.asked = this
		return ListNodes{Fresh: true}
	}
	if !all.shows(own) {
		c.asked = attempt{}
		return c.wait("the list of Nodes does not show the Node as it was read")
	}
	if rival, ok := c.rival(all, claim.Subnets); ok {
		c.lost = true
		return RemoveClaim{own.Version, rival}
	}
	c.clear, c.lost = this, false
	return PatchSubnets{c.sorted(held, claim.Subnets), own.Version}
}

// sorted joins two parts of a lease, IPv4 first.
func (c *Claimant) sorted(held, claimed []netip.Prefix) []netip.Prefix {
	subnets := slices.Concat(held, claimed)
	slices.SortFunc(subnets, func(a, b netip.Prefix) int { return cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen()) })
	return subnets
}

func (c *Claimant) wait(why string) Step {
	limit := min(firstPause<<min(c.tries, 8), lastPause)
	return Wait{time.Duration(c.random() % uint64(limit)), why}
}

// exhausted says that nothing of r is free, or waits where that is only so because of claims.
func (c *Claimant) exhausted(r Range, all Listing) Step {
	if c.crowded < patience && len(r.gaps(c.others(all, leased))) > 0 {
		c.crowded++
		return c.wait("other nodes' claims take all that is free of " + r.Prefix.String())
	}
	return Stuck{&ExhaustedError{
		Node: c.node, Network: r.Prefix, Len: r.Len, Total: r.Count(),
		Leased:  c.holders(all, r, leased),
		Claimed: c.holders(all, r, claimed),
	}, lastPause}
}

func leased(s Standing) string  { return s.Subnets }
func claimed(s Standing) string { return s.Claim }

// others lists what is in one field of all other Nodes.
func (c *Claimant) others(all Listing, field func(Standing) string) (out []netip.Prefix) {
	for _, s := range all {
		out = append(out, c.theirs(s, field)...)
	}
	return out
}

// theirs lists what is in one field of s, if that is another Node. What does not lie in the network is in nobody's way:
// else one Node's bad data would stop all others.
func (c *Claimant) theirs(s Standing, field func(Standing) string) []netip.Prefix {
	if s.Node == c.node {
		return nil
	}
	return slices.DeleteFunc(mentioned(field(s)), func(p netip.Prefix) bool { return !c.network.Contains(p) })
}

// shows reports whether the list is of a moment at which own, with the claim in it, was the Node's latest version. One
// that does not may be from before the claim.
func (l Listing) shows(own Standing) bool {
	return slices.ContainsFunc(l, func(s Standing) bool { return s.Node == own.Node && s.Version == own.Version })
}

// rival names another node that has leased or claimed what overlaps one of subnets.
func (c *Claimant) rival(all Listing, subnets []netip.Prefix) (string, bool) {
	for _, s := range all {
		for _, p := range slices.Concat(c.theirs(s, leased), c.theirs(s, claimed)) {
			if slices.ContainsFunc(subnets, p.Overlaps) {
				return fmt.Sprintf("node %s has or wants %s", s.Node, p), true
			}
		}
	}
	return "", false
}

// holders says which other nodes have something of r in one field, the oldest Nodes first.
func (c *Claimant) holders(all Listing, r Range, field func(Standing) string) (out []string) {
	byAge := slices.Clone(all)
	slices.SortFunc(byAge, func(a, b Standing) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Node, b.Node))
	})
	for _, s := range byAge {
		for _, p := range c.theirs(s, field) {
			if r.contains(p) {
				out = append(out, fmt.Sprintf("%s by %s since %s", p, s.Node, s.Since.UTC().Format(time.RFC3339)))
			}
		}
	}
	return out
}

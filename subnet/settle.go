package subnet

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Rules say which leases are good.
type Rules struct {
	Network Network
	// ExactLength refuses subnets of a length other than that of their Range: set where nodes lease from Network, and
	// not where the cluster hands out subnets by rules of its own.
	ExactLength bool
	// Judge is the backend's part. It refuses a lease that it cannot reach, or returns what no two nodes may share
	// (for VXLAN the VTEP's MAC), "" for nothing. nil refuses nothing.
	Judge func(Lease) (identity string, err error)
}

// Settle says which of leases are to be reached from node self, and what is wrong with the others. leases is a complete
// list, with self's own leases as they stand now.
//
// First each lease is judged alone. Those that are good compete for subnets and identities, the oldest first: one that
// overlaps a winner's subnet or has the identity of another winner's node is refused, and takes no part any more. So a
// refused lease never knocks out another, and a younger one never an older one. A node that leases two subnets may win
// one and lose the other. Peers never hold self's own leases, nor any that overlaps one or has self's identity, whoever
// is older: a node that loses its subnet to another has pods there all the same.
//
// Both results are sorted and do not depend on the order of leases. Problems holds the refused, self included.
func Settle(self string, rules Rules, leases []Lease) (peers []Lease, problems []Problem) {
	s := settling{
		rules: rules, self: self, owners: make(map[string]*contender, len(leases)),
		good: make([]*contender, 0, len(leases)), winners: make([]int, 0, len(leases)),
	}
	contenders := make([]contender, len(leases)) // all at once, as there are thousands
	for i := range leases {
		c := &contenders[i]
		c.Lease = &leases[i]
		if s.judge(c) {
			s.good = append(s.good, c)
		}
	}
	slices.SortFunc(s.good, oldestFirst)
	for i := range s.good {
		s.compete(i)
	}
	winners := make([]*contender, 0, len(s.winners))
	for _, i := range s.winners {
		winners = append(winners, s.good[i])
	}
	slices.SortFunc(winners, byNode)
	peers = make([]Lease, 0, len(winners))
	for _, w := range winners {
		if w.Node != self && !s.excluded(w) {
			peers = append(peers, *w.Lease)
		}
	}
	slices.SortFunc(s.problems, byProblem)
	return peers, slices.Compact(s.problems)
}

// A contender is a lease that is good by itself.
type contender struct {
	*Lease
	identity string
}

// settling is the state of one Settle.
type settling struct {
	rules Rules
	self  string
	// good holds the contenders, oldest first.
	good []*contender
	// winners do not overlap, and are sorted by their subnets' addresses. So a subnet that overlaps any of them
	// overlaps one of the two that it would stand between. They are indices of good: pointers are slow to move about.
	winners []int
	// owners tells who has won an identity. All leases of one node may have it.
	owners map[string]*contender
	// own holds self's leases, also the refused ones.
	own      []*contender
	problems []Problem
}

// judge looks at c alone, and names all that is wrong with it.
func (s *settling) judge(c *contender) (good bool) {
	var unusable error
	if s.rules.Judge != nil {
		c.identity, unusable = s.rules.Judge(*c.Lease)
	}
	if c.Node == s.self {
		s.own = append(s.own, c)
	}
	good = true
	for _, err := range [...]error{s.rules.checkSubnet(c.Subnet), s.rules.checkHost(c.Host), unusable} {
		if err != nil {
			s.refuse(c.Node, KindLease, fmt.Sprintf("%v; pods on %s cannot be reached", err, c.Node))
			good = false
		}
	}
	return good
}

func (s *settling) refuse(node, kind, text string) {
	s.problems = append(s.problems, Problem{Node: node, Kind: kind, Text: text})
}

func (r Rules) checkSubnet(p netip.Prefix) error {
	if !p.IsValid() {
		return errors.New("the lease has no subnet")
	}
	if p != p.Masked() {
		return fmt.Errorf("subnet %s has host bits set (did you mean %s?)", p, p.Masked())
	}
	in, ok := r.Network.Range(p.Addr())
	if !ok {
		return fmt.Errorf("subnet %s is not of a family of the network %v: "+
			"give the network a range of that family, or the node no such subnet", p, r.Network.Prefixes())
	}
	if !in.contains(p) {
		return fmt.Errorf("subnet %s is outside the network %s: "+
			"give the node another, or correct the network", p, in.Prefix)
	}
	if r.ExactLength && p.Bits() != in.Len {
		return fmt.Errorf("subnet %s has length /%d where the network %s has /%d: "+
			"give the node another, or correct the configured length", p, p.Bits(), in.Prefix, in.Len)
	}
	return nil
}

// checkHost refuses what is nobody's address, or everybody's, and what would send the tunnel's packets into the tunnel.
func (r Rules) checkHost(a netip.Addr) error {
	var what string
	switch {
	case !a.IsValid():
		return errors.New("the lease has no host to send packets to")
	case a.Is4In6() || a.Zone() != "":
		what = "not a plain IPv4 or IPv6 address"
	case a.IsUnspecified():
		what = "the unspecified address"
	case a.IsLoopback():
		what = "a loopback address"
	case a.IsMulticast():
		what = "a multicast address"
	case a.IsLinkLocalUnicast():
		what = "a link-local address"
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		what = "the broadcast address"
	default:
		in, ok := r.Network.Range(a)
		if !ok || !in.Prefix.Contains(a) {
			return nil
		}
		what = "inside the pod network " + in.Prefix.String()
	}
	return fmt.Errorf("host %s is %s: choose the node's uplink with --iface", a, what)
}

// compete lets contender i win what no older one has.
func (s *settling) compete(i int) {
	c := s.good[i]
	at, _ := slices.BinarySearchFunc(s.winners, c.Subnet.Addr(), func(w int, a netip.Addr) int {
		return s.good[w].Subnet.Addr().Compare(a)
	})
	for _, w := range s.winners[max(at-1, 0):min(at+1, len(s.winners))] {
		if w := s.good[w]; w.Subnet.Overlaps(c.Subnet) {
			s.refuse(c.Node, KindConflict, lostSubnet(c, w))
			return
		}
	}
	owner, taken := s.owners[c.identity]
	if taken && owner.Node != c.Node {
		s.refuse(c.Node, KindConflict, lostIdentity(c, owner))
		return
	}
	if c.identity != "" && !taken {
		s.owners[c.identity] = c
	}
	s.winners = slices.Insert(s.winners, at, i)
}

// excluded reports whether the winner w cannot be a peer because self has its subnet or identity too. Self has lost them
// then, or w would not have won: the fault is self's.
func (s *settling) excluded(w *contender) bool {
	excluded := false
	for _, own := range s.own {
		if own.Subnet.Overlaps(w.Subnet) {
			s.refuse(own.Node, KindConflict, lostSubnet(own, w))
			excluded = true
		}
		if own.identity != "" && own.identity == w.identity {
			s.refuse(own.Node, KindConflict, lostIdentity(own, w))
			excluded = true
		}
	}
	return excluded
}

func lostSubnet(loser, winner *contender) string {
	if loser.Node == winner.Node {
		return fmt.Sprintf("subnet %s overlaps %s of the same node; remove one of the two", loser.Subnet, winner.Subnet)
	}
	claim := fmt.Sprintf("subnet %s is also claimed by %s", loser.Subnet, winner.Node)
	if loser.Subnet != winner.Subnet {
		claim = fmt.Sprintf("subnet %s overlaps %s of %s", loser.Subnet, winner.Subnet, winner.Node)
	}
	return fmt.Sprintf("%s, %s; pods on %s cannot be reached until one of the two gives it up",
		claim, standing(winner, loser), loser.Node)
}

func lostIdentity(loser, winner *contender) string {
	return fmt.Sprintf("VTEP address %s is also that of %s, %s; pods on %s cannot be reached until one of the two "+
		"changes it", loser.identity, winner.Node, standing(winner, loser), loser.Node)
}

// standing says how winner compares with loser by age. It is younger only where loser is refused for another reason.
func standing(winner, loser *contender) string {
	switch winner.Since.Compare(loser.Since) {
	case -1:
		return "which is older"
	case 1:
		return "which is younger"
	}
	return "which is of the same age"
}

// oldestFirst orders leases by who stands against whom. What comes after the subnet only makes the order complete.
func oldestFirst(a, b *contender) int {
	if c := a.Since.Compare(b.Since); c != 0 {
		return c
	}
	if c := byNode(a, b); c != 0 {
		return c
	}
	return cmp.Or(
		a.Host.Compare(b.Host),
		cmp.Compare(a.Backend, b.Backend),
		bytes.Compare(a.Data, b.Data),
		slices.CompareFunc(a.NodeAddrs, b.NodeAddrs, netip.Addr.Compare),
		slices.CompareFunc(a.Sources, b.Sources, netip.Addr.Compare),
		slices.CompareFunc(a.Accepts, b.Accepts, netip.Prefix.Compare),
	)
}

func byNode(a, b *contender) int {
	if c := cmp.Compare(a.Node, b.Node); c != 0 {
		return c
	}
	return a.Subnet.Compare(b.Subnet)
}

func byProblem(a, b Problem) int {
	return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Text, b.Text))
}

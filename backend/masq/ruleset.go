package masq

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
)

// A Ruleset is what a host's packet filter holds of ours, or should hold.
type Ruleset struct {
	// Chains are those of ours, each with its rules in order.
	Chains map[Chain][]Rule
	// Jumps are the ways into them that packets can get to.
	Jumps map[Jump]bool
	// Ends tells, for a base chain of the kernel that has one, the place of the first rule that takes every packet,
	// counted from 1. It is only ever read from a host.
	Ends map[Chain]int
}

// Len is the number of chains, rules and jumps in r.
func (r Ruleset) Len() int {
	n := len(r.Chains) + len(r.Jumps)
	for _, rules := range r.Chains {
		n += len(rules)
	}
	return n
}

// Family is an address family, which has a packet filter of its own: 4 or 6.
type Family int

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf returns the family that a belongs to.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Command names the program that changes the family's packet filter.
func (f Family) Command() string {
	if f == IPv4 {
		return "iptables"
	}
	return "ip6tables"
}

// A Chain is one chain of one table.
type Chain struct {
	Family Family
	Table  string
	Name   string
	// Form is that of iptables that holds the chain, where one of them is meant (nft, legacy: xtables-nft(8)); empty for
	// the one in use.
	Form string
}

// Program names the program that changes the chain.
func (c Chain) Program() string {
	if c.Form == "" {
		return c.Family.Command()
	}
	return c.Family.Command() + "-" + c.Form
}

// A Jump leads from one of the kernel's own chains into a chain of ours, in the same table.
type Jump struct {
	Chain Chain
	From  string
	// At is the place to insert it at, counted from 1; 0 is the end. It is part of an operation and not of a Ruleset.
	At int
}

// Base returns the chain that j leads from.
func (j Jump) Base() Chain { return Chain{j.Chain.Family, j.Chain.Table, j.From, j.Chain.Form} }

// Args returns what makes up the rule in iptables' words.
func (j Jump) Args() []string {
	return []string{"-m", "comment", "--comment", Comment, "-j", j.Chain.Name}
}

// Verdict is what happens to a packet that a Rule matches.
type Verdict string

// The verdicts.
const (
	Accept     Verdict = "ACCEPT"
	Return     Verdict = "RETURN"
	Masquerade Verdict = "MASQUERADE" // with a source port that cannot be foretold
)

// A PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// A Rule is one rule of a chain of ours. Matches that are not set match everything.
type Rule struct {
	Src, Dst       netip.Prefix
	NotSrc, NotDst bool   // match what is not in Src, in Dst
	Mark           uint32 // bits of the packet's mark, all of them set
	UDP            bool
	Verdict        Verdict
	// Ports, of Masquerade, are those that the new source port is taken from.
	Ports PortRange
	// Unknown is the text of a rule that somebody else put into a chain of ours, in the packet filter's own words. The
	// other fields are not set then.
	Unknown string
}

// Args returns r in iptables' words, in the order in which iptables -S prints them.
func (r Rule) Args() []string {
	var args []string
	prefix := func(flag string, p netip.Prefix, not bool) {
		if !p.IsValid() {
			return
		}
		if not {
			args = append(args, "!")
		}
		args = append(args, flag, p.String())
	}
	prefix("-s", r.Src, r.NotSrc)
	prefix("-d", r.Dst, r.NotDst)
	if r.UDP {
		args = append(args, "-p", "udp")
	}
	if r.Mark != 0 {
		args = append(args, "-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", r.Mark, r.Mark))
	}
	args = append(args, "-m", "comment", "--comment", Comment, "-j", string(r.Verdict))
	if r.Ports != (PortRange{}) {
		args = append(args, "--to-ports", fmt.Sprintf("%d-%d", r.Ports.First, r.Ports.Last))
	}
	if r.Verdict == Masquerade {
		args = append(args, "--random-fully")
	}
	return args
}

// An Entry is a Rule in its place.
type Entry struct {
	Chain Chain
	At    int // counted from 1, at the moment of the operation
	Rule  Rule
}

// Kind implements backend.Object.
func (Chain) Kind() string { return "filter" }

// Kind implements backend.Object.
func (Jump) Kind() string { return "filter" }

// Kind implements backend.Object.
func (Entry) Kind() string { return "filter" }

// Command implements backend.Object.
func (c Chain) Command(do backend.Verb, _ backend.Object) string {
	if do == backend.Delete {
		return c.command("-F", c.Name) + " && " + c.command("-X", c.Name)
	}
	return c.command("-N", c.Name)
}

// Command implements backend.Object.
func (j Jump) Command(do backend.Verb, _ backend.Object) string {
	switch {
	case do == backend.Delete:
		return j.Chain.command("-D", j.From, j.Args()...)
	case j.At == 0:
		return j.Chain.command("-A", j.From, j.Args()...)
	}
	return j.Chain.command("-I", fmt.Sprintf("%s %d", j.From, j.At), j.Args()...)
}

// Command implements backend.Object.
func (e Entry) Command(do backend.Verb, _ backend.Object) string {
	place := fmt.Sprintf("%s %d", e.Chain.Name, e.At)
	if do == backend.Delete {
		return e.Chain.command("-D", place)
	}
	return e.Chain.command("-I", place, e.Rule.Args()...)
}

func (c Chain) command(do, what string, args ...string) string {
	words := append([]string{c.Program(), "-t", c.Table, do, what}, args...)
	return strings.Join(words, " ")
}

// Apply changes r as op would change a packet filter that holds r, and refuses what a packet filter would refuse.
func (r *Ruleset) Apply(op backend.Op) error {
	switch o := op.What.(type) {
	case Chain:
		return r.applyChain(op.Do, o)
	case Jump:
		return r.applyJump(op.Do, o)
	case Entry:
		return r.applyEntry(op.Do, o)
	}
	return fmt.Errorf("a packet filter holds no %s", op.What.Kind())
}

func (r *Ruleset) applyChain(do backend.Verb, c Chain) error {
	_, there := r.Chains[c]
	if do == backend.Delete {
		for j := range r.Jumps {
			if j.Chain == c {
				return fmt.Errorf("chain %s is still jumped to from %s", c.Name, j.From)
			}
		}
		if !there {
			return fmt.Errorf("no chain %s", c.Name)
		}
		delete(r.Chains, c)
		return nil
	}
	if there {
		return fmt.Errorf("chain %s already exists", c.Name)
	}
	if r.Chains == nil {
		r.Chains = map[Chain][]Rule{}
	}
	r.Chains[c] = nil
	return nil
}

func (r *Ruleset) applyJump(do backend.Verb, j Jump) error {
	j.At = 0
	if do == backend.Delete {
		if !r.Jumps[j] {
			return fmt.Errorf("no jump from %s to %s", j.From, j.Chain.Name)
		}
		delete(r.Jumps, j)
		return nil
	}
	if _, there := r.Chains[j.Chain]; !there {
		return fmt.Errorf("no chain %s", j.Chain.Name)
	}
	if r.Jumps == nil {
		r.Jumps = map[Jump]bool{}
	}
	r.Jumps[j] = true
	return nil
}

func (r *Ruleset) applyEntry(do backend.Verb, e Entry) error {
	rules, there := r.Chains[e.Chain]
	i := e.At - 1
	switch {
	case !there:
		return fmt.Errorf("no chain %s", e.Chain.Name)
	case do == backend.Delete && (i < 0 || i >= len(rules) || rules[i] != e.Rule),
		do != backend.Delete && (i < 0 || i > len(rules)):
		return fmt.Errorf("chain %s holds another rule, or none, at %d", e.Chain.Name, e.At)
	case do == backend.Delete:
		r.Chains[e.Chain] = slices.Delete(slices.Clone(rules), i, i+1)
	default:
		r.Chains[e.Chain] = slices.Insert(slices.Clone(rules), i, e.Rule)
	}
	return nil
}

package masq

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/spoof"
)

// A Ruleset is what a host's packet filter holds of ours, or should hold.
type Ruleset struct {
	// Tables are those of ours, which only nftables has.
	Tables map[Table]bool
	// Sets are those of ours, each with its addresses.
	Sets map[Set]map[netip.Addr]bool
	// Chains are those of ours, each with its rules in order.
	Chains map[Chain][]Rule
	// Jumps are the ways into them that packets can get to.
	Jumps map[Jump]bool
	// Guests are the rules of ours in chains of others that packets can get to, each with the handle by which nftables
	// knows it, or 0.
	Guests map[Guest]uint64
	// Spoof is the table that judges what pods send, whatever form the rest is in.
	Spoof spoof.Table

	// What follows is only ever read from a host.

	// Hosts are the chains of others that jumps or guests of ours stand in, or could.
	Hosts map[Chain]Host
	// Handles are the numbers by which nftables knows the rules of Chains, in the same order.
	Handles map[Chain][]uint64
	// Drops names what drops packets of pods although everything is as desired, one sentence each.
	Drops []string
	// Taken are the sets whose names strangers have, each with one sentence on that.
	Taken map[Set]string
	// Unjudged says why Spoof cannot be told, nor changed.
	Unjudged string
}

// A Host is a chain of others.
type Host struct {
	// End is the place of the first rule that takes every packet, counted from 1; 0 if there is none.
	End int
	// Harms is set where that rule drops or translates.
	Harms bool
}

// Len is the number of tables, sets and their addresses, chains, rules and jumps in r, but for what only some hosts
// need.
func (r Ruleset) Len() int {
	n := len(r.Tables) + len(r.Sets) + len(r.Chains) + r.Spoof.Len()
	for _, addrs := range r.Sets {
		n += len(addrs)
	}
	for j := range r.Jumps {
		if j.From != DockerUser {
			n++
		}
	}
	for _, rules := range r.Chains {
		n += len(rules)
	}
	return n
}

// Has reports whether r holds a chain of ours in one form.
func (r Ruleset) Has(form Form) bool {
	for c := range r.Chains {
		if c.Form() == form {
			return true
		}
	}
	return false
}

// Family is an address family, which has a packet filter of its own: 4 or 6.
type Family int

// The families. Bridge is nftables' own one, of frames.
const (
	IPv4   Family = 4
	IPv6   Family = 6
	Bridge Family = 7
)

// FamilyOf returns the family that a belongs to.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Command names the program that changes the family's packet filter, in the variant in use.
func (f Family) Command() string {
	if f == IPv4 {
		return "iptables"
	}
	return "ip6tables"
}

// NFT is the family in nftables' words.
func (f Family) NFT() string {
	switch f {
	case IPv4:
		return "ip"
	case Bridge:
		return "bridge"
	}
	return "ip6"
}

// A Table is a table of ours in nftables.
type Table struct {
	Family Family
	Name   string
}

// A Variant is one of the two programs that are called iptables. Neither sees the other's chains.
type Variant string

// The variants (xtables-nft(8), xtables-legacy(8)).
const (
	NFT    Variant = "nft"    // keeps its chains in nftables
	Legacy Variant = "legacy" // the older one
)

// Command names the program that changes a family's packet filter; Family.Command for the variant in use.
func (v Variant) Command(f Family) string {
	if v == "" {
		return f.Command()
	}
	return f.Command() + "-" + string(v)
}

// A Chain is one chain of one table.
type Chain struct {
	Family Family
	Table  string
	Name   string
	// Variant is that of iptables which holds the chain, where one is meant; empty for the one in use, and in nftables.
	Variant Variant
}

// Form returns the form that a chain of ours belongs to.
func (c Chain) Form() Form {
	if c.Table == OwnTable {
		return NFTables
	}
	return IPTables
}

func (f Family) chain(table, name string) Chain { return Chain{Family: f, Table: table, Name: name} }

func (c Chain) table() Table { return Table{c.Family, c.Table} }

// A Jump leads from one of the kernel's own chains into a chain of ours, in the same table. In a table of ours the
// chain that it leads from is part of it.
type Jump struct {
	Chain Chain
	From  string
	// At is the place to insert it at, counted from 1; 0 is the end. It is part of an operation and not of a Ruleset.
	At int
}

// Base returns the chain that j leads from.
func (j Jump) Base() Chain { return Chain{j.Chain.Family, j.Chain.Table, j.From, j.Chain.Variant} }

// Match is what all packets are that j takes, as a rule without a verdict. Those that its chain has nothing to say of go
// past it, for each rule that they are asked by takes its time.
func (j Jump) Match() Rule {
	switch j.Chain.Name {
	case GuardInput, GuardForward, UntrackedIn, UntrackedOut, Input,
		GuardInputNFT, GuardForwardNFT, UntrackedInNFT, UntrackedOutNFT:
		return Rule{UDP: true}
	case Marks, MarksNFT:
		return Rule{In: OurDevices}
	}
	return Rule{}
}

// Args returns what makes up the rule in iptables' words.
func (j Jump) Args() []string {
	return append(j.Match().matchArgs(), "-m", "comment", "--comment", Comment, "-j", j.Chain.Name)
}

// A Guest is a rule of ours in a chain of others, in nftables.
type Guest struct {
	Host Chain
	Rule Rule
	// At is the place to insert it at, counted from 1; 0 is the end. Handle is nftables' number for the one to delete.
	// Both are part of an operation and not of a Ruleset.
	At     int
	Handle uint64
}

// Verdict is what happens to a packet that a Rule matches.
type Verdict string

// The verdicts.
const (
	Accept     Verdict = "ACCEPT"
	Return     Verdict = "RETURN"
	Masquerade Verdict = "MASQUERADE" // with a source port that cannot be foretold
	Drop       Verdict = "DROP"
	NoTrack    Verdict = "NOTRACK" // no connection is kept for it
	SetMark    Verdict = "MARK"    // Bits are set in its mark, and the next rule is asked
)

// A PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// A Rule is one rule of a chain of ours. Matches that are not set match everything.
type Rule struct {
	Src, Dst       netip.Prefix
	NotSrc, NotDst bool // match what is not in Src, in Dst
	// SrcIn and DstIn are sets that the packet's source, its destination, is in; NotSrcIn and NotDstIn as above.
	SrcIn, DstIn       Set
	NotSrcIn, NotDstIn bool
	Mark               uint32 // bits of the packet's mark, all of them set
	// In begins the name of the device that the packet arrived from, and Out is that of the one that it leaves by.
	In, Out string
	UDP     bool
	DstPort uint16 // of UDP; 0 for any
	// Local matches packets to an address of this node, and Translated those whose destination was changed on the way.
	Local, Translated bool
	// Answers matches the packets of a connection that its caller does not send.
	Answers bool
	Verdict Verdict
	Bits    uint32 // of SetMark
	// Counts says what the packets that a rule drops are counted as. It is not in the packet filter.
	Counts string
	// Ports, of Masquerade, are those that the new source port is taken from.
	Ports PortRange
	// Unknown is the text of a rule that somebody else put into a chain of ours, in the packet filter's own words. The
	// other fields are not set then.
	Unknown string
}

// Args returns r in iptables' words, in the order in which iptables -S prints them.
func (r Rule) Args() []string {
	w := r.matchArgs()
	w.when(true, "-m", "comment", "--comment", Comment)
	if r.Verdict == NoTrack {
		return append(w, "-j", "CT", "--notrack")
	}
	w.when(true, "-j", string(r.Verdict))
	w.when(r.Verdict == SetMark, "--set-xmark", fmt.Sprintf("%#x/%#x", r.Bits, r.Bits))
	w.when(r.Ports != PortRange{}, "--to-ports", fmt.Sprintf("%d-%d", r.Ports.First, r.Ports.Last))
	w.when(r.Verdict == Masquerade, "--random-fully")
	return w
}

func (r Rule) matchArgs() words {
	w := words{}
	w.prefix("-s", r.Src, r.NotSrc)
	w.prefix("-d", r.Dst, r.NotDst)
	w.when(r.In != "", "-i", r.In+"+")
	w.when(r.Out != "", "-o", r.Out)
	w.when(r.UDP, "-p", "udp")
	w.when(r.DstPort != 0, "-m", "udp", "--dport", strconv.Itoa(int(r.DstPort)))
	w.when(r.Mark != 0, "-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", r.Mark, r.Mark))
	w.when(r.Local, "-m", "addrtype", "--dst-type", "LOCAL")
	w.when(r.Translated || r.Answers, "-m", "conntrack")
	w.when(r.Translated, "--ctstate", "DNAT")
	w.when(r.Answers, "--ctdir", "REPLY")
	w.matchSet(r.SrcIn, "src", r.NotSrcIn)
	w.matchSet(r.DstIn, "dst", r.NotDstIn)
	return w
}

// Words returns r in the words of nft, as it is known in one family.
func (r Rule) Words(family Family) []string {
	w := r.matchWords(family)
	w.when(r.Verdict == Drop, "counter")
	if r.Verdict == SetMark {
		return append(w, "meta", "mark", "set", "meta", "mark", "or", fmt.Sprintf("%#x", r.Bits), "comment", Comment)
	}
	w.when(true, strings.ToLower(string(r.Verdict)))
	w.when(r.Ports != PortRange{}, "to", fmt.Sprintf(":%d-%d", r.Ports.First, r.Ports.Last))
	w.when(r.Verdict == Masquerade, "fully-random")
	return append(w, "comment", Comment)
}

func (r Rule) matchWords(family Family) words {
	w := words{}
	w.when(r.Mark != 0, "meta", "mark", "and", fmt.Sprintf("%#x", r.Mark), "==", fmt.Sprintf("%#x", r.Mark))
	w.when(r.In != "", "iifname", `"`+r.In+`*"`)
	w.when(r.Out != "", "oifname", r.Out)
	w.compare(family, "saddr", text(r.Src), r.NotSrc)
	w.compare(family, "daddr", text(r.Dst), r.NotDst)
	w.when(r.UDP && r.DstPort == 0, "meta", "l4proto", "udp")
	w.when(r.DstPort != 0, "udp", "dport", strconv.Itoa(int(r.DstPort)))
	w.when(r.Local, "fib", "daddr", "type", "local")
	w.when(r.Translated, "ct", "status", "dnat")
	w.when(r.Answers, "ct", "direction", "reply")
	w.compare(family, "saddr", r.SrcIn.mention(), r.NotSrcIn)
	w.compare(family, "daddr", r.DstIn.mention(), r.NotDstIn)
	return w
}

// words are those of a rule while it is put into words.
type words []string

func (w *words) when(so bool, more ...string) {
	if so {
		*w = append(*w, more...)
	}
}

func (w *words) prefix(flag string, p netip.Prefix, not bool) {
	if p.IsValid() {
		w.when(not, "!")
		w.when(true, flag, p.String())
	}
}

func (w *words) matchSet(s Set, side string, not bool) {
	if s != (Set{}) {
		w.when(true, "-m", "set")
		w.when(not, "!")
		w.when(true, "--match-set", s.Name, side)
	}
}

// compare compares a field of the IP header, if there is something to compare it with.
func (w *words) compare(family Family, field, with string, not bool) {
	if with != "" {
		w.when(true, family.NFT(), field)
		w.when(not, "!=")
		w.when(true, with)
	}
}

func text(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

// mention is how a rule of nft names s.
func (s Set) mention() string {
	if s == (Set{}) {
		return ""
	}
	return "@" + s.Name
}

// An Entry is a Rule in its place.
type Entry struct {
	Chain Chain
	At    int // counted from 1, at the moment of the operation
	Rule  Rule
	// Handle is nftables' number for a rule to delete.
	Handle uint64
}

// Kind implements backend.Object.
func (Table) Kind() string { return "filter" }

// Kind implements backend.Object.
func (Guest) Kind() string { return "filter" }

// Kind implements backend.Object.
func (Chain) Kind() string { return "filter" }

// Kind implements backend.Object.
func (Jump) Kind() string { return "filter" }

// Kind implements backend.Object.
func (Entry) Kind() string { return "filter" }

// Command implements backend.Object.
func (t Table) Command(do backend.Verb, _ backend.Object) string {
	verb := "add"
	if do == backend.Delete {
		verb = "delete"
	}
	return fmt.Sprintf("nft %s table %s %s", verb, t.Family.NFT(), t.Name)
}

// Command implements backend.Object.
func (c Chain) Command(do backend.Verb, _ backend.Object) string {
	switch {
	case c.Form() == NFTables && do == backend.Delete:
		return c.nft("flush chain", c.Name) + " && " + c.nft("delete chain", c.Name)
	case c.Form() == NFTables:
		return c.nft("add chain", c.Name)
	case do == backend.Delete:
		return c.command("-F", c.Name) + " && " + c.command("-X", c.Name)
	}
	return c.command("-N", c.Name)
}

// Command implements backend.Object.
func (j Jump) Command(do backend.Verb, _ backend.Object) string {
	switch {
	case j.Chain.Form() == NFTables:
		return j.nft(do)
	case do == backend.Delete:
		return j.Chain.command("-D", j.From, j.Args()...)
	case j.At == 0:
		return j.Chain.command("-A", j.From, j.Args()...)
	}
	return j.Chain.command("-I", fmt.Sprintf("%s %d", j.From, j.At), j.Args()...)
}

// nft is one command, because packets take their way as soon as the chain is there.
func (j Jump) nft(do backend.Verb) string {
	from := fmt.Sprintf("%s %s %s", j.Chain.Family.NFT(), j.Chain.Table, j.From)
	if do == backend.Delete {
		return fmt.Sprintf("nft 'flush chain %s ; delete chain %s'", from, from)
	}
	hook := HookOf(j.From)
	return fmt.Sprintf("nft 'add chain %s { type %s hook %s priority %d ; } ; flush chain %s ; add rule %s %s'",
		from, hook.Type, hook.Name, hook.Priority, from, from,
		strings.Join(append(j.Match().matchWords(j.Chain.Family), "jump", j.Chain.Name, "comment", Comment), " "))
}

// Command implements backend.Object.
func (e Entry) Command(do backend.Verb, _ backend.Object) string {
	place := fmt.Sprintf("%s %d", e.Chain.Name, e.At)
	switch {
	case e.Chain.Form() == NFTables:
		return e.nft(do)
	case do == backend.Delete:
		return e.Chain.command("-D", place)
	}
	return e.Chain.command("-I", place, e.Rule.Args()...)
}

func (e Entry) nft(do backend.Verb) string {
	words := e.Rule.Words(e.Chain.Family)
	switch {
	case do == backend.Delete:
		return e.Chain.nft("delete rule", e.Chain.Name, "handle", strconv.FormatUint(e.Handle, 10))
	case e.At == 1:
		return e.Chain.nft("insert rule", e.Chain.Name, words...)
	}
	// nft counts from 0, and adds behind the rule that it is given.
	return e.Chain.nft("add rule", fmt.Sprintf("%s index %d", e.Chain.Name, e.At-2), words...)
}

// Command implements backend.Object.
func (g Guest) Command(do backend.Verb, _ backend.Object) string {
	words := g.Rule.Words(g.Host.Family)
	switch {
	case do == backend.Delete:
		return g.Host.nft("delete rule", g.Host.Name, "handle", strconv.FormatUint(g.Handle, 10))
	case g.At == 0:
		return g.Host.nft("add rule", g.Host.Name, words...)
	}
	return g.Host.nft("insert rule", fmt.Sprintf("%s index %d", g.Host.Name, g.At-1), words...)
}

func (c Chain) command(do, what string, args ...string) string {
	words := append([]string{c.Variant.Command(c.Family), "-t", c.Table, do, what}, args...)
	return strings.Join(words, " ")
}

func (c Chain) nft(do, what string, args ...string) string {
	words := append([]string{"nft", do, c.Family.NFT(), c.Table, what}, args...)
	return strings.Join(words, " ")
}

// Apply changes r as op would change a packet filter that holds r, and refuses what a packet filter would refuse.
func (r *Ruleset) Apply(op backend.Op) error {
	switch o := op.What.(type) {
	case Table:
		return r.applyTable(op.Do, o)
	case Guest:
		return r.applyGuest(op.Do, o)
	case Set:
		return r.applySet(op.Do, o)
	case Members:
		return r.applyMembers(op.Do, o)
	case Chain:
		return r.applyChain(op.Do, o)
	case Jump:
		return r.applyJump(op.Do, o)
	case Entry:
		return r.applyEntry(op.Do, o)
	case spoof.Rules, spoof.Pod:
		return r.Spoof.Apply(op)
	}
	return fmt.Errorf("a packet filter holds no %s", op.What.Kind())
}

func (r *Ruleset) applyTable(do backend.Verb, t Table) error {
	if do != backend.Delete {
		if r.Tables[t] {
			return fmt.Errorf("table %s %s already exists", t.Family.NFT(), t.Name)
		}
		if r.Tables == nil {
			r.Tables = map[Table]bool{}
		}
		r.Tables[t] = true
		return nil
	}
	if !r.Tables[t] {
		return fmt.Errorf("no table %s %s", t.Family.NFT(), t.Name)
	}
	delete(r.Tables, t) // and all that is in it
	maps.DeleteFunc(r.Sets, func(s Set, _ map[netip.Addr]bool) bool { return s.table() == t })
	maps.DeleteFunc(r.Chains, func(c Chain, _ []Rule) bool { return c.table() == t })
	maps.DeleteFunc(r.Jumps, func(j Jump, _ bool) bool { return j.Chain.table() == t })
	return nil
}

func (r *Ruleset) applyGuest(do backend.Verb, g Guest) error {
	g.At, g.Handle = 0, 0
	_, known := r.Hosts[g.Host]
	_, there := r.Guests[g]
	switch {
	case do == backend.Delete && !there:
		return fmt.Errorf("no such rule in %s", g.Host.Name)
	case do == backend.Delete:
		delete(r.Guests, g)
	case !known:
		return fmt.Errorf("no chain %s", g.Host.Name)
	case r.Guests == nil:
		r.Guests = map[Guest]uint64{g: 0}
	default:
		r.Guests[g] = 0
	}
	return nil
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
	if c.Form() == NFTables && !r.Tables[c.table()] {
		return fmt.Errorf("no table %s %s", c.Family.NFT(), c.Table)
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
	case do != backend.Delete && r.lacks(e.Rule):
		return fmt.Errorf("no set that a rule of chain %s names", e.Chain.Name)
	case do == backend.Delete:
		r.Chains[e.Chain] = slices.Delete(slices.Clone(rules), i, i+1)
	default:
		r.Chains[e.Chain] = slices.Insert(slices.Clone(rules), i, e.Rule)
	}
	return nil
}

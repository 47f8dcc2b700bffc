package masq

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tweed.dev/tweed/backend"
)

// SetPrefix begins the names of all sets of ours that are not in a table of ours.
const SetPrefix = "tweed-"

// MaxMembers is how many addresses a set can hold.
const MaxMembers = 1 << 20

// mostAtOnce is how many addresses one operation adds or takes away: many, because a cluster has thousands of nodes,
// and as few as a person can still read.
const mostAtOnce = 100

// A Set is a set of addresses that rules name: in nftables part of a table of ours, and else an ipset(8) of the type
// hash:ip.
type Set struct {
	Family Family
	Table  string // OwnTable, or empty
	Name   string
}

// A Members is some addresses of a set, which one operation adds or takes away.
type Members struct {
	Set   Set
	Addrs []netip.Addr
}

// set returns the set of a name in one form. The names of ipsets stand for both families.
func (f Family) set(form Form, name string) Set {
	if form == NFTables {
		return Set{f, OwnTable, name}
	}
	return Set{f, "", SetPrefix + name + strconv.Itoa(int(f))}
}

// Form returns the form that s belongs to.
func (s Set) Form() Form {
	if s.Table == OwnTable {
		return NFTables
	}
	return IPTables
}

func (s Set) table() Table { return Table{s.Family, s.Table} }

// Kind implements backend.Object.
func (Set) Kind() string { return "set" }

// Kind implements backend.Object.
func (Members) Kind() string { return "set" }

// Command implements backend.Object.
func (s Set) Command(do backend.Verb, _ backend.Object) string {
	family, typ := "inet", "ipv4_addr"
	if s.Family == IPv6 {
		family, typ = "inet6", "ipv6_addr"
	}
	switch {
	case s.Form() == NFTables && do == backend.Delete:
		return fmt.Sprintf("nft delete set %s %s %s", s.Family.NFT(), s.Table, s.Name)
	case s.Form() == NFTables:
		return fmt.Sprintf("nft 'add set %s %s %s { type %s ; }'", s.Family.NFT(), s.Table, s.Name, typ)
	case do == backend.Delete:
		return "ipset destroy " + s.Name
	}
	return fmt.Sprintf("ipset create %s hash:ip family %s maxelem %d", s.Name, family, MaxMembers)
}

// Command implements backend.Object.
func (m Members) Command(do backend.Verb, _ backend.Object) string {
	verb, short := "add", "add"
	if do == backend.Delete {
		verb, short = "delete", "del"
	}
	var words []string
	for _, a := range m.Addrs {
		if m.Set.Form() == IPTables {
			words = append(words, fmt.Sprintf("ipset -! %s %s %s", short, m.Set.Name, a))
		} else {
			words = append(words, a.String())
		}
	}
	if m.Set.Form() == IPTables {
		return strings.Join(words, " && ")
	}
	return fmt.Sprintf("nft '%s element %s %s %s { %s }'", verb, m.Set.Family.NFT(), m.Set.Table, m.Set.Name,
		strings.Join(words, ", "))
}

// Names reports whether a rule of r names s.
func (r Ruleset) Names(s Set) bool {
	for _, rules := range r.Chains {
		if slices.ContainsFunc(rules, func(rule Rule) bool { return rule.SrcIn == s || rule.DstIn == s }) {
			return true
		}
	}
	for g := range r.Guests {
		if g.Rule.SrcIn == s || g.Rule.DstIn == s {
			return true
		}
	}
	return false
}

// lacks reports whether rule names a set that is not in r.
func (r Ruleset) lacks(rule Rule) bool {
	for _, s := range []Set{rule.SrcIn, rule.DstIn} {
		if _, there := r.Sets[s]; !there && s != (Set{}) {
			return true
		}
	}
	return false
}

// members returns what to do for one set to hold the addresses of want.
func members(do backend.Verb, s Set, want, have map[netip.Addr]bool) (ops []backend.Op) {
	var lacking []netip.Addr
	for a := range want {
		if !have[a] {
			lacking = append(lacking, a)
		}
	}
	slices.SortFunc(lacking, netip.Addr.Compare)
	for some := range slices.Chunk(lacking, mostAtOnce) {
		op := backend.Op{Do: do, What: Members{s, some}}
		if do == backend.Delete {
			op.Was = op.What
		}
		ops = append(ops, op)
	}
	return ops
}

// withoutTaken returns r without the sets that strangers have the names of, and without what hangs on them.
func (r Ruleset) withoutTaken(taken map[Set]string) Ruleset {
	if len(taken) == 0 {
		return r
	}
	hangs := func(rule Rule) bool {
		_, src := taken[rule.SrcIn]
		_, dst := taken[rule.DstIn]
		return src || dst
	}
	r.Sets, r.Chains, r.Guests = maps.Clone(r.Sets), maps.Clone(r.Chains), maps.Clone(r.Guests)
	maps.DeleteFunc(r.Sets, func(s Set, _ map[netip.Addr]bool) bool { _, is := taken[s]; return is })
	maps.DeleteFunc(r.Guests, func(g Guest, _ uint64) bool { return hangs(g.Rule) })
	for c, rules := range r.Chains {
		r.Chains[c] = slices.DeleteFunc(slices.Clone(rules), hangs)
	}
	return r
}

func compareSets(a, b Set) int {
	return compareChains(Chain{a.Family, a.Table, a.Name, ""}, Chain{b.Family, b.Table, b.Name, ""})
}

func (r *Ruleset) applySet(do backend.Verb, s Set) error {
	_, there := r.Sets[s]
	_, taken := r.Taken[s]
	switch {
	case do == backend.Delete && !there:
		return fmt.Errorf("no set %s", s.Name)
	case do == backend.Delete && r.Names(s):
		return fmt.Errorf("a rule still names the set %s", s.Name)
	case do == backend.Delete:
		delete(r.Sets, s)
	case there || taken:
		return fmt.Errorf("set %s already exists", s.Name)
	case s.Form() == NFTables && !r.Tables[s.table()]:
		return fmt.Errorf("no table %s %s", s.Family.NFT(), s.Table)
	case r.Sets == nil:
		r.Sets = map[Set]map[netip.Addr]bool{s: nil}
	default:
		r.Sets[s] = nil
	}
	return nil
}

func (r *Ruleset) applyMembers(do backend.Verb, m Members) error {
	have, there := r.Sets[m.Set]
	if !there {
		return fmt.Errorf("no set %s", m.Set.Name)
	}
	have = maps.Clone(have)
	if have == nil {
		have = map[netip.Addr]bool{}
	}
	for _, a := range m.Addrs {
		if FamilyOf(a) != m.Set.Family {
			return fmt.Errorf("the set %s holds no addresses like %s", m.Set.Name, a)
		}
		if do == backend.Delete {
			delete(have, a)
		} else {
			have[a] = true
		}
	}
	r.Sets[m.Set] = have
	return nil
}

// Package spoof says what the kernel must hold for a pod to send as nobody but itself: the table bridge tweed of
// nftables, which judges each frame that a bridge takes in from a pod.
//
// It is pure, and made for two: the plugin adds a pod when it attaches it, the daemon keeps all of it as it should be.
// What the table does not know is not judged. So a pod that is exempt is left out, and one of a plugin that knew
// nothing of the table goes on to work.
package spoof

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
)

// Name is that of the table. Its family is bridge.
const Name = "tweed"

// ErrUnsupported says that a kernel does not have what the table needs.
var ErrUnsupported = errors.New("this kernel's nftables does not judge the frames of bridges")

// A Set is one of the table's sets.
type Set string

// The sets. The latter three are what a port's pod may send as.
const (
	Ports Set = "ports" // whose frames are judged
	MACs  Set = "macs"
	IPv4  Set = "ipv4" // ARP too
	IPv6  Set = "ipv6" // ND too
)

// Sets lists them.
func Sets() []Set { return []Set{Ports, MACs, IPv4, IPv6} }

// An Entry is an element of a set. MAC is not set in Ports, and Addr only in IPv4 and IPv6.
type Entry struct {
	Set  Set
	Port string // the host's end of the pod's interface
	MAC  backend.MAC
	Addr netip.Addr
}

// Entries are what one pod has in the table. Its MAC's link-local address is its own too.
func Entries(port string, mac backend.MAC, addrs []netip.Addr) []Entry {
	all := []Entry{{Set: Ports, Port: port}, {Set: MACs, Port: port, MAC: mac}}
	for _, a := range append(slices.Clip(addrs), mac.LinkLocal()) {
		set := IPv6
		if a.Is4() {
			set = IPv4
		}
		if e := (Entry{set, port, mac, a}); !slices.Contains(all, e) {
			all = append(all, e)
		}
	}
	return all
}

// A Table is what a kernel holds of it, or should hold.
type Table struct {
	// Made is set where the table is there, with sets, chains and rules as this package has them.
	Made bool
	// Odd is set where it is there otherwise.
	Odd     bool
	Entries map[Entry]bool
}

// Rules is the table with all but its entries, as an object: to add it replaces whatever has its name.
type Rules struct{}

// A Pod is entries of one port, which one operation adds or takes away.
type Pod struct {
	Port    string
	Entries []Entry
}

// Kind implements backend.Object.
func (Rules) Kind() string { return "spoof" }

// Kind implements backend.Object.
func (Pod) Kind() string { return "spoof" }

// Command implements backend.Object. It takes nft 1.0.8 or later, which knows icmpv6 taddr.
func (Rules) Command(do backend.Verb, _ backend.Object) string {
	const gone = "delete table bridge " + Name
	if do == backend.Delete {
		return "nft " + gone
	}
	lines := []string{"table bridge " + Name, gone, "add table bridge " + Name}
	for _, s := range Sets() {
		lines = append(lines, fmt.Sprintf("add set bridge %s %s { type %s ; }", Name, s, s.words()))
	}
	for _, c := range Chains() {
		lines = append(lines, fmt.Sprintf("add chain bridge %s %s%s", Name, c.Name, c.words()))
	}
	for _, c := range Chains() {
		for _, r := range c.Rules {
			lines = append(lines, fmt.Sprintf("add rule bridge %s %s %s comment %s", Name, c.Name, r.Words, Comment))
		}
	}
	return "nft '" + strings.Join(lines, " ; ") + "'"
}

// Command implements backend.Object.
func (p Pod) Command(do backend.Verb, _ backend.Object) string {
	verb := "add"
	if do == backend.Delete {
		verb = "delete"
	}
	var lines []string
	for _, e := range p.Entries {
		lines = append(lines, fmt.Sprintf("%s element bridge %s %s { %s }", verb, Name, e.Set, e.words()))
	}
	return "nft '" + strings.Join(lines, " ; ") + "'"
}

func (e Entry) words() string {
	words := []string{e.Port}
	if e.Set != Ports {
		words = append(words, e.MAC.String())
	}
	if e.Addr.IsValid() {
		words = append(words, e.Addr.String())
	}
	return strings.Join(words, " . ")
}

// Diff returns the operations that turn have into want. A table that is not wanted goes as a whole.
func Diff(want, have Table) (ops []backend.Op) {
	there := have.Made || have.Odd
	switch {
	case !want.Made && there:
		return []backend.Op{{Do: backend.Delete, What: Rules{}, Was: Rules{}}}
	case !want.Made:
		return nil
	case !have.Made:
		ops, have.Entries = append(ops, backend.Op{Do: backend.Add, What: Rules{}}), nil
	}
	for _, p := range lacking(want.Entries, have.Entries) {
		ops = append(ops, backend.Op{Do: backend.Add, What: p})
	}
	for _, p := range lacking(have.Entries, want.Entries) {
		ops = append(ops, backend.Op{Do: backend.Delete, What: p, Was: p})
	}
	return ops
}

// lacking returns, pod by pod, what of all is not in some.
func lacking(all, some map[Entry]bool) (pods []Pod) {
	if maps.Equal(all, some) {
		return nil
	}
	byPort := map[string][]Entry{}
	for e := range all {
		if !some[e] {
			byPort[e.Port] = append(byPort[e.Port], e)
		}
	}
	for _, port := range slices.Sorted(maps.Keys(byPort)) {
		entries := byPort[port]
		slices.SortFunc(entries, compareEntries)
		pods = append(pods, Pod{port, entries})
	}
	return pods
}

func compareEntries(a, b Entry) int {
	place := func(e Entry) int { return slices.Index(Sets(), e.Set) }
	return cmp.Or(cmp.Compare(place(a), place(b)), bytes.Compare(a.MAC[:], b.MAC[:]), a.Addr.Compare(b.Addr))
}

// Len is the number of things in t: the table counts as one.
func (t Table) Len() int {
	if !t.Made {
		return 0
	}
	return 1 + len(t.Entries)
}

// Apply changes t as op would change a kernel that holds t, and refuses what a kernel would refuse.
func (t *Table) Apply(op backend.Op) error {
	there := t.Made || t.Odd
	switch o := op.What.(type) {
	case Rules:
		if op.Do == backend.Delete && !there {
			return fmt.Errorf("no table bridge %s", Name)
		}
		*t = Table{Made: op.Do != backend.Delete}
		return nil
	case Pod:
		if !t.Made {
			return fmt.Errorf("no table bridge %s", Name)
		}
		entries := maps.Clone(t.Entries)
		if entries == nil {
			entries = map[Entry]bool{}
		}
		for _, e := range o.Entries {
			if op.Do == backend.Delete && !entries[e] {
				return fmt.Errorf("no element %s in the set %s", e.words(), e.Set)
			}
			if entries[e] = true; op.Do == backend.Delete {
				delete(entries, e)
			}
		}
		t.Entries = entries
		return nil
	}
	return fmt.Errorf("the table bridge %s holds no %s", Name, op.What.Kind())
}

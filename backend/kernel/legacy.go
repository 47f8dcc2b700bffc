package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// Of linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h and linux/netfilter/x_tables.h.
const (
	iptGetInfo     = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	iptGetEntries  = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	iptName        = 32 // XT_TABLE_MAXNAMELEN
	sizeofIptInfo  = 84 // struct ipt_getinfo
	iptValidHooks  = 32 // offset in it of a bit for each hook that the table has
	iptHookEntries = 36 // of where the chain of each hook begins
	iptUnderflows  = 56 // of where each hook's policy is, which ends its chain
	iptSize        = 80 // of the size of all entries
	iptEntries     = 40 // offset of the entries in struct ipt_get_entries
	sizeofXtTarget = 32 // struct xt_entry_target
	xtTargetName   = 2  // offset in it of the name
	xtErrorName    = 30 // length of what follows it in struct xt_error_target
	xtStandard     = "" // the target whose verdict follows
	xtError        = "ERROR"
	iptVerdictDrop = -nfDrop - 1
)

// An xtLayout says where things are in one family's entry: struct ipt_entry, struct ip6t_entry.
type xtLayout struct {
	domain, level int
	target        int // offset of target_offset; next_offset follows
	cache         int // of nfcache
	comefrom      int // of the hooks that lead here
	counters      int
	size          int
}

func layoutOf(family masq.Family) xtLayout {
	if family == masq.IPv4 {
		return xtLayout{unix.AF_INET, unix.SOL_IP, 88, 84, 92, 96, 112}
	}
	return xtLayout{unix.AF_INET6, unix.SOL_IPV6, 140, 136, 144, 152, 168}
}

// xtHooks are the kernel's own chains (linux/netfilter.h).
func xtHooks() map[string]int {
	return map[string]int{
		"PREROUTING": unix.NF_INET_PRE_ROUTING, "INPUT": unix.NF_INET_LOCAL_IN, "FORWARD": unix.NF_INET_FORWARD,
		"OUTPUT": unix.NF_INET_LOCAL_OUT, "POSTROUTING": unix.NF_INET_POST_ROUTING,
	}
}

// A legacyTable is a table of the older form of iptables.
type legacyTable struct {
	chains map[string][]string // each rule in bytes that are the same for the same rule
	counts map[string][]uint64 // of packets that each rule has matched
	drops  map[string]bool     // policies of the kernel's own chains
}

var errCutOff = errors.New("the kernel's answer cannot be read")

// legacyGlimpse looks at what the older form of iptables holds.
func legacyGlimpse(family masq.Family) (g glimpse, err error) {
	var text strings.Builder
	tables := map[string]legacyTable{}
	for _, c := range places(family) {
		table, read := tables[c.Table]
		if !read {
			if table, err = readLegacy(family, c.Table); err != nil {
				return glimpse{}, err
			}
			tables[c.Table] = table
		}
		if rules, there := table.chains[c.Name]; there {
			g.note(&text, c, rules)
		}
	}
	g.text = text.String()
	return g, nil
}

// legacyDrops reports whether the policy of FORWARD in the older form of iptables is to drop.
func legacyDrops(family masq.Family) bool {
	table, err := readLegacy(family, masq.FilterTable)
	return err == nil && table.drops[masq.BaseForward]
}

// readLegacy reads a table of the older form of iptables, which is empty where there is none: to ask the kernel would make
// it.
func readLegacy(family masq.Family, name string) (legacyTable, error) {
	if !hasLegacy(family, name) {
		return legacyTable{}, nil
	}
	l := layoutOf(family)
	fd, err := unix.Socket(l.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return legacyTable{}, fmt.Errorf("opening a socket for table %s: %w", name, err)
	}
	defer unix.Close(fd)
	for try := range steadyTries {
		info := make([]byte, sizeofIptInfo)
		copy(info, name)
		err := getsockopt(fd, l.level, iptGetInfo, info)
		size := binary.NativeEndian.Uint32(info[iptSize:])
		entries := make([]byte, iptEntries+size)
		if err == nil {
			copy(entries, name)
			binary.NativeEndian.PutUint32(entries[iptName:], size)
			err = getsockopt(fd, l.level, iptGetEntries, entries)
		}
		if errors.Is(err, unix.EAGAIN) && try < steadyTries-1 {
			continue // it is of another size by now
		}
		if err != nil {
			return legacyTable{}, fmt.Errorf("reading table %s: %w", name, err)
		}
		return parseLegacy(l, info, entries[iptEntries:])
	}
	return legacyTable{}, errUnsteady
}

func getsockopt(fd, level, option int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// An xtEntry is one rule, or the head or the end of a chain.
type xtEntry struct {
	at, next int
	bytes    []byte // without what changes by itself
	packets  uint64 // that it has matched
	target   string
	value    []byte // what follows the target's head
}

// entryAt takes one entry out of all.
func (l xtLayout) entryAt(all []byte, at int) (e xtEntry, ok bool) {
	if at < 0 || at+l.size > len(all) {
		return e, false
	}
	target := int(binary.NativeEndian.Uint16(all[at+l.target:]))
	next := int(binary.NativeEndian.Uint16(all[at+l.target+2:]))
	if target < l.size || next < target+sizeofXtTarget || at+next > len(all) {
		return e, false
	}
	b := bytes.Clone(all[at : at+next])
	clear(b[l.cache : l.cache+4])
	clear(b[l.comefrom : l.comefrom+4])
	clear(b[l.counters : l.counters+16])
	head := b[target:]
	const nameLength = sizeofXtTarget - xtTargetName - 1 // the revision follows
	return xtEntry{at: at, next: at + next, bytes: b, packets: binary.NativeEndian.Uint64(all[at+l.counters:]),
		target: getString(head[xtTargetName : xtTargetName+nameLength]), value: head[sizeofXtTarget:]}, true
}

// verdict is that of a standard target: below 0 what happens to the packet, else where it goes on.
func (e xtEntry) verdict() int { return int(int32(getU32(e.value))) }

// parseLegacy finds the chains among the entries of a table.
func parseLegacy(l xtLayout, info, all []byte) (legacyTable, error) {
	t := legacyTable{chains: map[string][]string{}, counts: map[string][]uint64{}, drops: map[string]bool{}}
	var entries []xtEntry
	for at := 0; at < len(all); {
		e, ok := l.entryAt(all, at)
		if !ok {
			return t, errCutOff
		}
		entries, at = append(entries, e), e.next
	}
	if len(info) < sizeofIptInfo {
		return t, errCutOff
	}
	begins, ends := xtChains(info, entries)
	chain := ""
	for _, e := range entries {
		if e.target == xtError {
			continue
		}
		if name, begun := begins[e.at]; begun {
			chain = name
			t.chains[chain] = []string{}
		}
		switch {
		case chain == "":
		case ends[e.at]:
			t.drops[chain] = e.target == xtStandard && e.verdict() == iptVerdictDrop
			chain = ""
		default:
			t.chains[chain] = append(t.chains[chain], e.text(begins))
			t.counts[chain] = append(t.counts[chain], e.packets)
		}
	}
	return t, nil
}

// xtChains tells chains by the places of their first entries, and which entries are their last. A chain of somebody's own
// begins behind an entry with its name, and ends with one that returns, as a chain of the kernel's ends with its policy.
func xtChains(info []byte, entries []xtEntry) (begins map[int]string, ends map[int]bool) {
	begins, ends = map[int]string{}, map[int]bool{}
	for i, e := range entries {
		if e.target == xtError {
			begins[e.next] = getString(e.value[:min(len(e.value), xtErrorName)])
			ends[entries[max(i-1, 0)].at] = true
		}
	}
	for name, hook := range xtHooks() {
		if getU32(info[iptValidHooks:])&(1<<hook) != 0 {
			begins[int(getU32(info[iptHookEntries+4*hook:]))] = name
			ends[int(getU32(info[iptUnderflows+4*hook:]))] = true
		}
	}
	return begins, ends
}

// text is the same for the same rule wherever it stands: where a jump leads to is told by name.
func (e xtEntry) text(chains map[int]string) string {
	to := ""
	if e.target == xtStandard && e.verdict() >= 0 {
		to = chains[e.verdict()]
		if e.verdict() == e.next { // on to the next rule
			to = "next"
		}
		clear(e.value[:min(len(e.value), 4)])
	}
	return string(e.bytes) + to
}

package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// RuleCounts returns how many packets each rule of a chain of ours has matched, in their order, since the rule is
// there. It starts no process. A chain that is not there has no rules.
func (k *Kernel) RuleCounts(_ context.Context, c masq.Chain) ([]uint64, error) {
	if c.Form() == masq.IPTables && k.filter.isLegacy() {
		return legacyCounts(c)
	}
	counts, err := k.nft.counts(c)
	if err != nil {
		return nil, fmt.Errorf("reading the counters of %s: %w", c.Name, err)
	}
	return counts, nil
}

// isLegacy reports whether the iptables in use is of the older form, as far as it is known.
func (f *filter) isLegacy() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.legacy
}

func (n *nftables) counts(c masq.Chain) ([]uint64, error) {
	if n.noConn != nil {
		return nil, n.noConn
	}
	rules, err := n.rules(c)
	if isNoNFT(err) {
		return nil, nil
	}
	counts := make([]uint64, len(rules))
	for i, r := range rules {
		counts[i] = r.packets()
	}
	return counts, err
}

// packets is what the counter of r says; 0 without one.
func (r nftRule) packets() uint64 {
	for _, e := range r.exprs {
		if e.name == "counter" {
			return getBE64(attr(e.data, unix.NFTA_COUNTER_PACKETS))
		}
	}
	return 0
}

// Of linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h and linux/netfilter/x_tables.h.
const (
	xtErrorTarget = "ERROR" // begins a chain, and ends the table
	xtTargetName  = 2       // offset of the name in struct xt_entry_target
	xtNameLen     = 29      // XT_EXTENSION_MAXNAMELEN
)

var errCutOff = errors.New("the table is cut off")

// legacyCounts reads a chain of the older form of iptables.
func legacyCounts(c masq.Chain) ([]uint64, error) {
	if !hasLegacy(c.Family, c.Table) { // to ask would make it
		return nil, nil
	}
	table, err := legacyTable(c.Family, c.Table)
	if err != nil {
		return nil, fmt.Errorf("reading the counters of %s: %w", c.Name, err)
	}
	return parseLegacyCounts(c.Family, table.entries, c.Name)
}

// parseLegacyCounts walks the entries of a table. A chain is an entry with its name, its rules, and one that returns.
func parseLegacyCounts(family masq.Family, entries []byte, chain string) (counts []uint64, err error) {
	target := targetOffsetV4
	counter := target + 8 // struct xt_counters comes behind target_offset, next_offset and comefrom
	if family == masq.IPv6 {
		target = targetOffsetV6
		counter = target + 12 // and is aligned to 8
	}
	inside := false
	for len(entries) > 0 {
		if len(entries) < counter+16 {
			return nil, errCutOff
		}
		at, next := int(binary.NativeEndian.Uint16(entries[target:])), int(binary.NativeEndian.Uint16(entries[target+2:]))
		if next < counter+16 || next > len(entries) || at+sizeofXtTarget > next {
			return nil, errCutOff
		}
		isError := getString(entries[at+xtTargetName:at+xtTargetName+xtNameLen]) == xtErrorTarget
		switch {
		case isError && inside:
			return counts[:max(0, len(counts)-1)], nil // without the one that returns
		case isError:
			inside = getString(entries[at+sizeofXtTarget:next]) == chain
		case inside:
			counts = append(counts, binary.NativeEndian.Uint64(entries[counter:]))
		}
		entries = entries[next:]
	}
	return nil, nil
}

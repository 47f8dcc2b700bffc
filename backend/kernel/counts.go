package kernel

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// RuleCounts returns how many packets each rule of a chain of ours has matched, in their order, since the rule is
// there. It starts no process. A chain that is not there has no rules.
func (k *Kernel) RuleCounts(_ context.Context, c masq.Chain) (counts []uint64, err error) {
	if c.Form() == masq.IPTables && k.variantOf(c) == masq.Legacy {
		var table legacyTable
		table, err = readLegacy(c.Family, c.Table)
		counts = table.counts[c.Name]
	} else {
		counts, err = k.nft.counts(c)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the counters of %s: %w", c.Name, err)
	}
	return counts, nil
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

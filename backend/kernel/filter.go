package kernel

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
)

// A filter is the packet filter by way of one variant of iptables, and what was last read of it. To read starts a
// process, so it is read only where the kernel says that there is something else than there was.
type filter struct {
	kernel  *Kernel
	variant masq.Variant

	mu      sync.Mutex
	sides   map[masq.Family]*side
	limit   time.Duration // how long a program that writes may take
	locked  error         // why nothing more is written in this pass
	unclear time.Time     // when nobody could say last how far a batch had come
}

// A form is one way in which this host's packet filter is written.
type form interface {
	apply(op backend.Op) error
}

// families are those that have a packet filter.
func families() []masq.Family { return []masq.Family{masq.IPv4, masq.IPv6} }

func newFilters(k *Kernel) map[masq.Variant]*filter {
	all := map[masq.Variant]*filter{}
	for _, v := range variants() {
		all[v] = &filter{kernel: k, variant: v, sides: map[masq.Family]*side{}, limit: stuck}
		for _, family := range families() {
			all[v].sides[family] = &side{}
		}
	}
	return all
}

// ObserveFilter reads what the packet filter holds of ours, in whichever form: the chains of package masq, and the ways
// into them that packets get to. A rule reads as the one in want that it is, or as an unknown one. Chains of ours in an
// iptables that is not in use, because the host or its kubelet has changed from one to the other, have their Variant.
func (k *Kernel) ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error) {
	have := emptyRuleset()
	// A kernel without nftables holds nothing in that form.
	if err := k.nft.observe(ctx, want, &have); err != nil {
		if want.Has(masq.NFTables) {
			return masq.Ruleset{}, err
		}
		have.Unjudged = err.Error()
	}
	ctx, hurry := context.WithTimeout(ctx, patience)
	defer hurry()
	for _, family := range families() {
		if err := k.observeIptables(ctx, family, want, &have); err != nil {
			return masq.Ruleset{}, err
		}
	}
	return have, k.sets.observe(want, &have)
}

func (k *Kernel) observeIptables(ctx context.Context, family masq.Family, want masq.Ruleset, have *masq.Ruleset) error {
	var inUse masq.Variant // none, where nobody asks
	var err error
	if want.Has(masq.IPTables) {
		inUse, err = k.chooseVariant(family)
	}
	for _, v := range variants() {
		as := v
		if v == inUse {
			as = ""
		}
		if err == nil {
			err = k.filters[v].observe(ctx, family, as, want, have)
		}
	}
	return err
}

// formOf returns what an object of the packet filter is written by.
func (k *Kernel) formOf(what backend.Object) form {
	switch o := what.(type) {
	case masq.Set:
		return k.formOfSet(o)
	case masq.Members:
		return k.formOfSet(o.Set)
	}
	if f, _ := k.filterOf(what); f != nil {
		return f
	}
	return k.nft
}

// filterOf returns the iptables that an object is written by, and the family; nil if it is none of iptables'.
func (k *Kernel) filterOf(what backend.Object) (*filter, masq.Family) {
	c, ok := chainOf(what)
	if !ok || c.Form() != masq.IPTables {
		return nil, c.Family
	}
	return k.filters[k.variantOf(c)], c.Family
}

// chainOf returns the chain of ours that an object is, or is of.
func chainOf(what backend.Object) (c masq.Chain, ok bool) {
	switch o := what.(type) {
	case masq.Chain:
		return o, true
	case masq.Jump:
		return o.Chain, true
	case masq.Entry:
		return o.Chain, true
	}
	return c, false
}

func (k *Kernel) formOfSet(s masq.Set) form {
	if s.Form() == masq.NFTables {
		return k.nft
	}
	return k.sets
}

func emptyRuleset() masq.Ruleset {
	return masq.Ruleset{
		Tables: map[masq.Table]bool{}, Chains: map[masq.Chain][]masq.Rule{}, Jumps: map[masq.Jump]bool{},
		Sets: map[masq.Set]map[netip.Addr]bool{}, Taken: map[masq.Set]string{},
		Guests: map[masq.Guest]uint64{}, Hosts: map[masq.Chain]masq.Host{}, Handles: map[masq.Chain][]uint64{},
	}
}

// A filterEar tells which changes of nftables matter, which iptables makes too in its newer form: where rules of ours
// stand or may have to. What kube-proxy does with its own chains is none of our business.
type filterEar struct {
	// judging is set while the table that judges pods is changed. By whom comes last.
	judging bool
}

// pluginName is that of the process that attaches pods, and changes the table for them.
const pluginName = "tweed-cni"

func (e *filterEar) heard(m syscall.NetlinkMessage) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
		return false
	}
	b := nfBody(m.Data)
	switch msg := m.Header.Type & 0xff; {
	case msg == unix.NFT_MSG_NEWGEN: // it ends what the others began
		judging := e.judging
		e.judging = false
		return judging && getString(attr(b, unix.NFTA_GEN_PROC_NAME)) != pluginName
	case len(m.Data) > 0 && m.Data[0] == unix.NFPROTO_BRIDGE: // all that these messages tell of has its table first
		e.judging = e.judging || getString(attr(b, unix.NFTA_TABLE_NAME)) == spoof.Name
		return false
	case msg == unix.NFT_MSG_NEWCHAIN, msg == unix.NFT_MSG_DELCHAIN:
		c := parseNFTChain(m.Data)
		return concerns(c.table, c.name) || c.base && c.hook == unix.NF_INET_FORWARD && c.policy == nfDrop
	case msg == unix.NFT_MSG_NEWRULE, msg == unix.NFT_MSG_DELRULE:
		return concerns(getString(attr(b, unix.NFTA_RULE_TABLE)), getString(attr(b, unix.NFTA_RULE_CHAIN)))
	}
	return getString(attr(b, unix.NFTA_TABLE_NAME)) == masq.OwnTable
}

// concerns reports whether rules of ours stand in a chain, or may have to, or whether it says which iptables is in use.
func concerns(table, chain string) bool {
	if table == masq.OwnTable || table == hintTable && chain == hint {
		return true
	}
	return slices.ContainsFunc(places(masq.IPv4), func(p place) bool { return p.Table == table && p.Name == chain })
}

// ways lists our chains of one family with the chains that each is reached from.
func ways(family masq.Family, v masq.Variant) []masq.Jump {
	all := masq.Ways(masq.IPTables, family)
	for i := range all {
		all[i].Chain.Variant = v
	}
	return all
}

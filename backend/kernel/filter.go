package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
)

// lockWait is how long, in seconds, iptables waits for another program's change to end. What else a pass has to do waits
// as long.
const (
	lockWait = 2
	lockHeld = "xtables lock" // what iptables says, among other words, when that was not enough
)

// A filter is the packet filter by way of one variant of iptables, and what was last read of it. To read starts a
// process, so it is read only where the kernel says that there is something else than there was.
type filter struct {
	kernel  *Kernel
	variant masq.Variant

	mu     sync.Mutex
	sides  map[masq.Family]*side
	tables map[masq.Family]*iptables.IPTables // for those families that were written
	locked error                              // why nothing more is written in this pass
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
		all[v] = &filter{kernel: k, variant: v, sides: map[masq.Family]*side{}, tables: map[masq.Family]*iptables.IPTables{}}
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
	var c masq.Chain
	switch o := what.(type) {
	case masq.Chain:
		c = o
	case masq.Jump:
		c = o.Chain
	case masq.Entry:
		c = o.Chain
	case masq.Set:
		return k.formOfSet(o)
	case masq.Members:
		return k.formOfSet(o.Set)
	default: // tables and guests, and what judges pods
		return k.nft
	}
	if c.Form() == masq.NFTables {
		return k.nft
	}
	return k.filters[k.variantOf(c)]
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

// program returns what writes a family's packet filter.
func (f *filter) program(family masq.Family) (*iptables.IPTables, error) {
	if ipt := f.tables[family]; ipt != nil {
		return ipt, nil
	}
	proto := iptables.ProtocolIPv4
	if family == masq.IPv6 {
		proto = iptables.ProtocolIPv6
	}
	name, err := f.kernel.command(f.variant, family)
	if err != nil {
		return nil, err
	}
	ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Timeout(lockWait), iptables.Path(name))
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", name, err)
	}
	f.tables[family] = ipt
	return ipt, nil
}

// ways lists our chains of one family with the chains that each is reached from.
func ways(family masq.Family, v masq.Variant) []masq.Jump {
	all := masq.Ways(masq.IPTables, family)
	for i := range all {
		all[i].Chain.Variant = v
	}
	return all
}

func explainFilter(err error) error {
	var e *iptables.Error
	if errors.As(err, &e) && e.ExitStatus() == 4 {
		return fmt.Errorf("%w (another program holds the packet filter, or it %w)", err, errPermission)
	}
	return err
}

// apply makes one change. What was seen before counts no more, however the change ends. Where another program has the
// lock, it is waited for once in a pass, and not once for each change.
func (f *filter) apply(op backend.Op) (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.locked != nil {
		return f.locked
	}
	defer func() {
		for _, s := range f.sides {
			s.looked = false
		}
		if err != nil && strings.Contains(err.Error(), lockHeld) {
			f.locked = err
		}
	}()
	switch o := op.What.(type) {
	case masq.Chain:
		return f.applyChain(op.Do, o)
	case masq.Jump:
		return f.applyJump(op.Do, o)
	case masq.Entry:
		return f.applyEntry(op.Do, o)
	}
	return fmt.Errorf("the packet filter has no %s", op.What.Kind())
}

func (f *filter) applyChain(do backend.Verb, c masq.Chain) error {
	ipt, err := f.program(c.Family)
	if err != nil {
		return err
	}
	if do != backend.Delete {
		return explainFilter(ipt.NewChain(c.Table, c.Name))
	}
	for _, way := range ways(c.Family, c.Variant) {
		if way.Chain == c { // a jump that packets do not get to is not ours to see, but holds the chain
			if err := deleteJumps(ipt, way); err != nil {
				return err
			}
		}
	}
	return explainFilter(ipt.ClearAndDeleteChain(c.Table, c.Name))
}

func (f *filter) applyJump(do backend.Verb, j masq.Jump) error {
	ipt, err := f.program(j.Chain.Family)
	switch {
	case err != nil:
		return err
	case do == backend.Delete:
		return deleteJumps(ipt, j)
	case j.At == 0:
		return explainFilter(ipt.Append(j.Chain.Table, j.From, j.Args()...))
	}
	return explainFilter(ipt.Insert(j.Chain.Table, j.From, j.At, j.Args()...))
}

// deleteJumps takes away all copies of a jump.
func deleteJumps(ipt *iptables.IPTables, j masq.Jump) error {
	for {
		there, err := ipt.Exists(j.Chain.Table, j.From, j.Args()...)
		if err == nil && there {
			err = ipt.Delete(j.Chain.Table, j.From, j.Args()...)
		}
		if err != nil || !there {
			return explainFilter(err)
		}
	}
}

func (f *filter) applyEntry(do backend.Verb, e masq.Entry) error {
	ipt, err := f.program(e.Chain.Family)
	if err != nil {
		return err
	}
	if do != backend.Delete {
		return explainFilter(ipt.Insert(e.Chain.Table, e.Chain.Name, e.At, e.Rule.Args()...))
	}
	// A number is only as good as the moment it was counted in.
	lines, err := ipt.List(e.Chain.Table, e.Chain.Name)
	if err != nil {
		return explainFilter(err)
	}
	var now []string
	for _, line := range lines {
		if chain, rule, ok := ruleOf(line); ok && chain == e.Chain.Name {
			now = append(now, rule)
		}
	}
	if e.At > len(now) || e.Rule.Unknown != "" && now[e.At-1] != e.Rule.Unknown {
		return fmt.Errorf("chain %s changed since the last look", e.Chain.Name)
	}
	return explainFilter(ipt.DeleteById(e.Chain.Table, e.Chain.Name, e.At))
}

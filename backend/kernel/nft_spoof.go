package kernel

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/spoof"
)

// readSpoof reads the table that judges what pods send.
func (n *nftables) readSpoof() (spoof.Table, error) {
	m := nfMessage(unix.NFPROTO_BRIDGE)
	m.string(unix.NFTA_TABLE_NAME, spoof.Name)
	if _, err := n.conn.get(nftType(unix.NFT_MSG_GETTABLE), m); err != nil {
		if isNoNFT(err) {
			err = nil
		}
		return spoof.Table{}, err
	}
	chains, err := n.spoofChains()
	var right bool
	if err == nil && chains {
		right, err = n.spoofSets()
	}
	if err != nil || !right {
		return spoof.Table{Odd: err == nil}, err
	}
	t := spoof.Table{Made: true, Entries: map[spoof.Entry]bool{}}
	for _, s := range spoof.Sets() {
		if err := n.spoofEntries(s, t.Entries); err != nil {
			return spoof.Table{}, err
		}
	}
	return t, nil
}

// spoofChains reports whether the chains of the table are those that it should have.
func (n *nftables) spoofChains() (right bool, err error) {
	there := map[string]nftChain{}
	err = n.conn.dump(nftType(unix.NFT_MSG_GETCHAIN), nfMessage(unix.NFPROTO_BRIDGE), func() { clear(there) },
		func(b []byte) {
			if c := parseNFTChain(b); c.table == spoof.Name {
				there[c.name] = c
			}
		})
	want := spoof.Chains()
	if err != nil || len(there) != len(want) {
		return false, err
	}
	steps := map[string][]string{}
	m := nfMessage(unix.NFPROTO_BRIDGE)
	m.string(unix.NFTA_RULE_TABLE, spoof.Name)
	err = n.conn.dump(nftType(unix.NFT_MSG_GETRULE), m, func() { clear(steps) }, func(b []byte) {
		r := parseNFTRule(b)
		steps[r.chain] = append(steps[r.chain], textOf(r.exprs))
	})
	for _, c := range want {
		have, ok := there[c.Name]
		if !ok || have.base != c.Hook || c.Hook && !have.judges() || !slices.EqualFunc(steps[c.Name], c.Rules, does) {
			return false, err
		}
	}
	return err == nil, err
}

// does reports whether the steps of a rule are those of r.
func does(steps string, r spoof.Rule) bool {
	all := make([]nftExpr, len(r.Steps))
	for i, s := range r.Steps {
		all[i] = nftExpr{s.Name, s.Data}
	}
	return steps == textOf(all)
}

// judges reports whether c is where all frames pass that a bridge takes in.
func (c nftChain) judges() bool {
	return c.typ == "filter" && c.hook == 0 && c.priority == spoof.Priority && c.policy == nfAccept // NF_BR_PRE_ROUTING
}

// spoofSets reports whether the sets of the table are those that it should have.
func (n *nftables) spoofSets() (right bool, err error) {
	types := map[spoof.Set]uint32{}
	m := nfMessage(unix.NFPROTO_BRIDGE)
	m.string(unix.NFTA_SET_TABLE, spoof.Name)
	err = n.conn.dump(nftType(unix.NFT_MSG_GETSET), m, func() { clear(types) }, func(b []byte) {
		if s, table := parseNFTSet(b); table == spoof.Name && s.flags == 0 {
			types[spoof.Set(s.name)] = s.typ
		}
	})
	for _, s := range spoof.Sets() {
		if types[s] != s.KeyType() {
			return false, err
		}
	}
	return err == nil, err
}

func (n *nftables) spoofEntries(s spoof.Set, into map[spoof.Entry]bool) error {
	m := nfMessage(unix.NFPROTO_BRIDGE)
	m.string(unix.NFTA_SET_ELEM_LIST_TABLE, spoof.Name)
	m.string(unix.NFTA_SET_ELEM_LIST_SET, string(s))
	return n.conn.dump(nftType(unix.NFT_MSG_GETSETELEM), m, func() {}, func(b []byte) {
		for _, element := range attrs(attr(nfBody(b), unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			key := attr(attr(element, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
			if e, ok := spoof.ParseEntry(s, key); ok {
				into[e] = true
			}
		}
	})
}

// spoofChanges are what an operation on the table consists of.
func spoofChanges(do backend.Verb, what backend.Object) []nftChange {
	var msgs []spoof.Message
	pod, isPod := what.(spoof.Pod)
	switch {
	case isPod && do == backend.Delete:
		msgs = spoof.Delete(pod.Entries)
	case isPod:
		msgs = spoof.Add(pod.Entries)
	case do == backend.Delete:
		msgs = spoof.Remove()
	default:
		msgs = spoof.Replace()
	}
	changes := make([]nftChange, len(msgs))
	for i, m := range msgs {
		changes[i] = nftChange{m.Type, m.Flags, message(m.Body)}
	}
	return changes
}

// explainSpoof says what it means that the table cannot be made.
func explainSpoof(op backend.Op, err error) error {
	if _, ok := op.What.(spoof.Rules); ok && op.Do == backend.Add && isNoNFT(err) {
		return fmt.Errorf("%w: %w: pods that have CAP_NET_RAW can send in each other's names; boot one with "+
			"CONFIG_NF_TABLES_BRIDGE, or have PodSpoofing in net-conf.json allow it", err, spoof.ErrUnsupported)
	}
	return err
}

package kernel

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// Types of nftables' keys (nft's own numbers, which the kernel keeps for it) and what each address takes.
const (
	nftTypeIPv4 = 7
	nftTypeIPv6 = 8
)

// An nftSet is what the kernel says of a set of nftables.
type nftSet struct {
	name  string
	typ   uint32
	flags uint32
	holds map[netip.Addr]bool
}

func nftKey(f masq.Family) (typ, length uint32) {
	if f == masq.IPv4 {
		return nftTypeIPv4, 4
	}
	return nftTypeIPv6, 16
}

// readSets reads the sets of our table of one family. A table that is not there has none.
func (n *nftables) readSets(family masq.Family, into *nftReading) error {
	var sets []nftSet
	m := nfMessage(nfproto(family))
	m.string(unix.NFTA_SET_TABLE, masq.OwnTable)
	err := n.conn.dump(nftType(unix.NFT_MSG_GETSET), m, func() { sets = nil }, func(b []byte) {
		if s, table := parseNFTSet(b); table == masq.OwnTable && s.flags&unix.NFT_SET_ANONYMOUS == 0 {
			sets = append(sets, s)
		}
	})
	if isNoNFT(err) {
		return nil
	}
	for i := range sets {
		if err == nil {
			err = n.readElements(family, &sets[i])
		}
		into.sets[masq.Set{Family: family, Table: masq.OwnTable, Name: sets[i].name}] = sets[i]
	}
	return err
}

func parseNFTSet(b []byte) (s nftSet, table string) {
	for typ, v := range attrs(nfBody(b)) {
		switch typ {
		case unix.NFTA_SET_TABLE:
			table = getString(v)
		case unix.NFTA_SET_NAME:
			s.name = getString(v)
		case unix.NFTA_SET_KEY_TYPE:
			s.typ = getBE32(v)
		case unix.NFTA_SET_FLAGS:
			s.flags = getBE32(v)
		}
	}
	return s, table
}

func (n *nftables) readElements(family masq.Family, s *nftSet) error {
	m := nfMessage(nfproto(family))
	m.string(unix.NFTA_SET_ELEM_LIST_TABLE, masq.OwnTable)
	m.string(unix.NFTA_SET_ELEM_LIST_SET, s.name)
	reset := func() { s.holds = map[netip.Addr]bool{} }
	return n.conn.dump(nftType(unix.NFT_MSG_GETSETELEM), m, reset, func(b []byte) {
		for _, element := range attrs(attr(nfBody(b), unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			key := attr(attr(element, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
			s.holds[getAddr(key)] = true
		}
	})
}

// tell adds s to have. One that is not made as we make it is in the way of ours, in a table of ours.
func (s nftSet) tell(name masq.Set, want masq.Ruleset, have *masq.Ruleset) {
	typ, _ := nftKey(name.Family)
	if _, wanted := want.Sets[name]; wanted && (s.typ != typ || s.flags != 0) {
		have.Taken[name] = fmt.Sprintf("the set %s in table %s %s is not ours; what it is needed for is left out; delete "+
			"the table (nft delete table %s %s), and it is made anew",
			name.Name, name.Family.NFT(), name.Table, name.Family.NFT(), name.Table)
		return
	}
	have.Sets[name] = s.holds
}

func setMessage(s masq.Set) message {
	m := nfMessage(nfproto(s.Family))
	m.string(unix.NFTA_SET_TABLE, s.Table)
	m.string(unix.NFTA_SET_NAME, s.Name)
	return m
}

func changeSet(do backend.Verb, s masq.Set) []nftChange {
	m := setMessage(s)
	if do == backend.Delete {
		return []nftChange{{typ: unix.NFT_MSG_DELSET, body: m}}
	}
	typ, length := nftKey(s.Family)
	m.be32(unix.NFTA_SET_FLAGS, 0)
	m.be32(unix.NFTA_SET_KEY_TYPE, typ)
	m.be32(unix.NFTA_SET_KEY_LEN, length)
	m.be32(unix.NFTA_SET_ID, 1) // by which the rest of this transaction could name it
	return []nftChange{{unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE | unix.NLM_F_EXCL, m}}
}

func changeMembers(do backend.Verb, o masq.Members) []nftChange {
	m := nfMessage(nfproto(o.Set.Family))
	m.string(unix.NFTA_SET_ELEM_LIST_TABLE, o.Set.Table)
	m.string(unix.NFTA_SET_ELEM_LIST_SET, o.Set.Name)
	m.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(m *message) {
		for _, a := range o.Addrs {
			m.nest(unix.NFTA_LIST_ELEM, func(m *message) {
				m.nest(unix.NFTA_SET_ELEM_KEY, value(a.AsSlice()))
			})
		}
	})
	if do == backend.Delete {
		return []nftChange{{typ: unix.NFT_MSG_DELSETELEM, body: m}}
	}
	return []nftChange{{unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, m}}
}

// lookup compares an address in the packet with those of a set.
func lookup(offset uint32, s masq.Set, not bool) []nftExpr {
	if s == (masq.Set{}) {
		return nil
	}
	_, length := nftKey(s.Family)
	flags := uint32(0)
	if not {
		flags = unix.NFT_LOOKUP_F_INV
	}
	var m message
	m.string(unix.NFTA_LOOKUP_SET, s.Name)
	m.be32(unix.NFTA_LOOKUP_SREG, unix.NFT_REG_1)
	m.be32(unix.NFTA_LOOKUP_FLAGS, flags)
	return []nftExpr{loadNetwork(offset, length), {"lookup", m}}
}

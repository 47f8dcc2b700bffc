package spoof

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// A Message is one of a transaction of nftables.
type Message struct {
	Type  int // NFT_MSG_*
	Flags int // NLM_F_*
	Body  []byte
}

// A Step is one of those that nftables makes a rule of.
type Step struct {
	Name string
	Data []byte // attributes
}

// Make returns what makes the table, without entries. The transaction fails with EEXIST where there is one.
func Make() []Message {
	const anew = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	all := []Message{{unix.NFT_MSG_NEWTABLE, anew, table()}}
	for i, s := range Sets() {
		m := message(unix.NFTA_SET_TABLE)
		m.text(unix.NFTA_SET_NAME, string(s))
		m.u32(unix.NFTA_SET_FLAGS, 0)
		m.u32(unix.NFTA_SET_KEY_TYPE, s.KeyType())
		m.u32(unix.NFTA_SET_KEY_LEN, s.keyLen())
		m.u32(unix.NFTA_SET_ID, uint32(i+1)) // by which the rest of this transaction could name it
		if s == Ports {
			// The keys' byte order is the host's, or nft prints no names (libnftnl: NFTNL_UDATA_SET_KEYBYTEORDER).
			m.bytes(unix.NFTA_SET_USERDATA, binary.NativeEndian.AppendUint32([]byte{0, 4}, 1))
		}
		all = append(all, Message{unix.NFT_MSG_NEWSET, anew, m})
	}
	for _, c := range Chains() {
		all = append(all, Message{unix.NFT_MSG_NEWCHAIN, anew, c.body()})
	}
	for _, c := range Chains() {
		for _, r := range c.Rules {
			all = append(all, Message{unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE | unix.NLM_F_APPEND, r.body(c.Name)})
		}
	}
	return all
}

// Remove returns what removes the table, and fails with ENOENT where there is none.
func Remove() []Message { return []Message{{Type: unix.NFT_MSG_DELTABLE, Body: table()}} }

// Replace returns what makes the table whether there is one or not.
func Replace() []Message {
	return slices.Concat([]Message{{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table()}}, Remove(), Make())
}

// Add returns what adds entries, those that are there already too. It fails with ENOENT where the table is not there.
func Add(entries []Entry) []Message {
	return changes(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, entries)
}

// Delete returns what takes entries away, and fails with ENOENT where one is not there.
func Delete(entries []Entry) []Message { return changes(unix.NFT_MSG_DELSETELEM, 0, entries) }

// changes has one message for each set.
func changes(typ, flags int, entries []Entry) (all []Message) {
	for _, s := range Sets() {
		m := message(unix.NFTA_SET_ELEM_LIST_TABLE)
		m.text(unix.NFTA_SET_ELEM_LIST_SET, string(s))
		some := false
		m.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(m *body) {
			for _, e := range entries {
				if e.Set == s {
					some = true
					m.nest(unix.NFTA_LIST_ELEM, func(m *body) { m.nest(unix.NFTA_SET_ELEM_KEY, value(e.key())) })
				}
			}
		})
		if some {
			all = append(all, Message{typ, flags, m})
		}
	}
	return all
}

// ChainOf returns the body of a message that asks for a chain.
func ChainOf(name string) []byte {
	m := message(unix.NFTA_CHAIN_TABLE)
	m.text(unix.NFTA_CHAIN_NAME, name)
	return m
}

// The numbers of nft's for types of keys, which the kernel keeps for it, and how many bits each has in that of several
// together (libnftables, datatype.h).
const (
	typeIPv4Addr  = 7
	typeIPv6Addr  = 8
	typeEtherAddr = 9
	typeIfname    = 41
	typeBits      = 6
)

// Sizes of what keys consist of, in bytes. Each part takes whole registers of 4.
const (
	sizeIfname = unix.IFNAMSIZ
	sizeMAC    = 8
)

// KeyType is what nft calls the type of the set's keys.
func (s Set) KeyType() uint32 {
	switch s {
	case Ports:
		return typeIfname
	case MACs:
		return typeIfname<<typeBits | typeEtherAddr
	case IPv4:
		return (typeIfname<<typeBits|typeEtherAddr)<<typeBits | typeIPv4Addr
	}
	return (typeIfname<<typeBits|typeEtherAddr)<<typeBits | typeIPv6Addr
}

func (s Set) keyLen() uint32 {
	return map[Set]uint32{
		Ports: sizeIfname, MACs: sizeIfname + sizeMAC, IPv4: sizeIfname + sizeMAC + 4, IPv6: sizeIfname + sizeMAC + 16,
	}[s]
}

func (s Set) words() string {
	return map[Set]string{
		Ports: "ifname", MACs: "ifname . ether_addr", IPv4: "ifname . ether_addr . ipv4_addr",
		IPv6: "ifname . ether_addr . ipv6_addr",
	}[s]
}

func (e Entry) key() []byte {
	k := make([]byte, e.Set.keyLen())
	copy(k[:sizeIfname-1], e.Port)
	if e.Set != Ports {
		copy(k[sizeIfname:], e.MAC[:])
	}
	if e.Addr.IsValid() {
		copy(k[sizeIfname+sizeMAC:], e.Addr.AsSlice())
	}
	return k
}

// ParseEntry reads the key of an element, and reports false if it is none that a frame can have: a name that is too long
// for a device, or something where nothing is.
func ParseEntry(s Set, key []byte) (Entry, bool) {
	e := Entry{Set: s}
	if len(key) != int(s.keyLen()) {
		return e, false
	}
	e.Port = unix.ByteSliceToString(key[:sizeIfname])
	if s != Ports {
		e.MAC = backend.MAC(key[sizeIfname : sizeIfname+len(e.MAC)])
	}
	if s == IPv4 || s == IPv6 {
		e.Addr, _ = netip.AddrFromSlice(key[sizeIfname+sizeMAC:])
	}
	return e, bytes.Equal(e.key(), key)
}

// A body is that of a message, or of an attribute that has others in it: attributes.
type body []byte

// message begins one about the bridge family (struct nfgenmsg, linux/netfilter/nfnetlink.h) with the table's name, as
// an attribute of the given type.
func message(typ uint16) body {
	m := body{unix.NFPROTO_BRIDGE, unix.NFNETLINK_V0, 0, 0}
	m.text(typ, Name)
	return m
}

func table() body { return message(unix.NFTA_TABLE_NAME) }

func (c Chain) body() body {
	m := body(ChainOf(c.Name))
	if c.Hook {
		m.nest(unix.NFTA_CHAIN_HOOK, func(m *body) {
			priority := int32(Priority)
			m.u32(unix.NFTA_HOOK_HOOKNUM, nfBrPreRouting)
			m.u32(unix.NFTA_HOOK_PRIORITY, uint32(priority))
		})
		m.u32(unix.NFTA_CHAIN_POLICY, nfAccept)
		m.text(unix.NFTA_CHAIN_TYPE, "filter")
	}
	return m
}

func (r Rule) body(chain string) body {
	m := message(unix.NFTA_RULE_TABLE)
	m.text(unix.NFTA_RULE_CHAIN, chain)
	m.nest(unix.NFTA_RULE_EXPRESSIONS, func(m *body) {
		for _, s := range r.Steps {
			m.nest(unix.NFTA_LIST_ELEM, func(m *body) {
				m.text(unix.NFTA_EXPR_NAME, s.Name)
				m.bytes(unix.NFTA_EXPR_DATA, s.Data)
			})
		}
	})
	// As iptables and nft keep a comment (libnftnl, udata.h): a type, a length and the text.
	m.bytes(unix.NFTA_RULE_USERDATA, append([]byte{0, byte(len(Comment) + 1)}, Comment+"\x00"...))
	return m
}

// Of linux/netfilter.h and linux/netfilter_bridge.h; x/sys/unix does not have them.
const (
	nfDrop         = 0
	nfAccept       = 1
	nfBrPreRouting = 0
)

// The registers behind the one of 16 bytes that a port's name takes.
const (
	regMAC  = unix.NFT_REG_2
	regAddr = unix.NFT_REG32_00 + (sizeIfname+sizeMAC)/4
)

func (m *body) bytes(typ uint16, v []byte) {
	*m = binary.NativeEndian.AppendUint16(*m, uint16(unix.SizeofRtAttr+len(v)))
	*m = binary.NativeEndian.AppendUint16(*m, typ)
	*m = append(*m, v...)
	for len(*m)%unix.RTA_ALIGNTO != 0 {
		*m = append(*m, 0)
	}
}

func (m *body) u32(typ uint16, v uint32)  { m.bytes(typ, binary.BigEndian.AppendUint32(nil, v)) }
func (m *body) text(typ uint16, v string) { m.bytes(typ, append([]byte(v), 0)) }

func (m *body) nest(typ uint16, fill func(*body)) {
	var inner body
	fill(&inner)
	m.bytes(typ, inner)
}

func value(v []byte) func(*body) { return func(m *body) { m.bytes(unix.NFTA_DATA_VALUE, v) } }

func meta(key uint32) Step {
	var m body
	m.u32(unix.NFTA_META_KEY, key)
	m.u32(unix.NFTA_META_DREG, unix.NFT_REG_1)
	return Step{"meta", m}
}

func payload(header, offset, length, register uint32) Step {
	var m body
	m.u32(unix.NFTA_PAYLOAD_DREG, register)
	m.u32(unix.NFTA_PAYLOAD_BASE, header)
	m.u32(unix.NFTA_PAYLOAD_OFFSET, offset)
	m.u32(unix.NFTA_PAYLOAD_LEN, length)
	return Step{"payload", m}
}

func equal(with []byte) Step  { return compare(unix.NFT_CMP_EQ, with) }
func differ(with []byte) Step { return compare(unix.NFT_CMP_NEQ, with) }

func compare(op uint32, with []byte) Step {
	var m body
	m.u32(unix.NFTA_CMP_SREG, unix.NFT_REG_1)
	m.u32(unix.NFTA_CMP_OP, op)
	m.nest(unix.NFTA_CMP_DATA, value(with))
	return Step{"cmp", m}
}

func lookup(s Set, not bool) Step {
	flags := uint32(0)
	if not {
		flags = unix.NFT_LOOKUP_F_INV
	}
	var m body
	m.text(unix.NFTA_LOOKUP_SET, string(s))
	m.u32(unix.NFTA_LOOKUP_SREG, unix.NFT_REG_1)
	m.u32(unix.NFTA_LOOKUP_FLAGS, flags)
	return Step{"lookup", m}
}

func gotoChain(name string) Step { return verdict(unix.NFT_GOTO, name) }

func verdict(code int32, chain string) Step {
	var m body
	m.u32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
	m.nest(unix.NFTA_IMMEDIATE_DATA, func(m *body) {
		m.nest(unix.NFTA_DATA_VERDICT, func(m *body) {
			m.u32(unix.NFTA_VERDICT_CODE, uint32(code))
			if chain != "" {
				m.text(unix.NFTA_VERDICT_CHAIN, chain)
			}
		})
	})
	return Step{"immediate", m}
}

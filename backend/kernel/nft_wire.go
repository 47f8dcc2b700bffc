package kernel

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// Of linux/netfilter.h and linux/netfilter/nf_tables.h; x/sys/unix does not have them.
const (
	nfDrop            = 0
	nfAccept          = 1
	nfQueue           = 3
	nftaBitwiseOp     = 6 // NFTA_BITWISE_OP
	nftaMatchName     = 1 // NFTA_MATCH_NAME and NFTA_TARGET_NAME
	nftaMatchInfo     = 3 // NFTA_MATCH_INFO
	nftGoto           = -4
	nftReturn         = -5
	nftaQuotaConsumed = 4 // NFTA_QUOTA_CONSUMED
	sizeofNfgenmsg    = 4
	ipsDstNAT         = 1 << 5 // IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h
	ipCTDirReply      = 1      // IP_CT_DIR_REPLY of linux/netfilter/nf_conntrack_tuple_common.h
	commentUdata      = 0      // NFTNL_UDATA_RULE_COMMENT of libnftnl/udata.h, which iptables and nft read
)

// nfMessage returns the head of a message about one family.
func nfMessage(family uint8) message { return message{family, unix.NFNETLINK_V0, 0, 0} }

// nfBody returns what follows the head of an answer.
func nfBody(b []byte) []byte { return b[min(len(b), sizeofNfgenmsg):] }

func nftType(msg int) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(msg) }

func nfproto(f masq.Family) uint8 {
	switch f {
	case masq.IPv4:
		return unix.NFPROTO_IPV4
	case masq.Bridge:
		return unix.NFPROTO_BRIDGE
	}
	return unix.NFPROTO_IPV6
}

// An nftChange is one message of a transaction.
type nftChange struct {
	typ   int // NFT_MSG_*
	flags int
	body  message
}

// commit makes all changes or none, and none if the ruleset is not of generation gen any more: then the error is
// ERESTART. The kernel works while the message is sent, and answers only what it refuses.
func (c *conn) commit(gen uint32, changes []nftChange) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	if err := c.wire.send(batch(gen, c.seq, changes)); err != nil {
		return fmt.Errorf("sending a change of nftables: %w", err)
	}
	var refused error
	for {
		err := c.receive(unix.MSG_DONTWAIT, func(h syscall.NlMsghdr, body []byte) {
			if h.Type == unix.NLMSG_ERROR && h.Seq == c.seq && refused == nil {
				refused = refusal(h.Type, h.Flags, body)
			}
		})
		switch {
		case errors.Is(err, unix.EAGAIN):
			return refused
		case err != nil:
			c.drain()
			return fmt.Errorf("receiving what became of a change of nftables: %w", err)
		}
	}
}

// batch puts changes between what begins and what ends a transaction (linux/netfilter/nfnetlink.h).
func batch(gen, seq uint32, changes []nftChange) []byte {
	bound := message{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	begin := slices.Clone(bound)
	begin.be32(unix.NFNL_BATCH_GENID, gen)
	out := appendRequest(nil, unix.NFNL_MSG_BATCH_BEGIN, 0, seq, begin)
	for _, c := range changes {
		out = appendRequest(out, nftType(c.typ), c.flags, seq, c.body)
	}
	return appendRequest(out, unix.NFNL_MSG_BATCH_END, 0, seq, bound)
}

// An nftExpr is one step of a rule of nftables.
type nftExpr struct {
	name string
	data message
}

// exprs returns the steps of r that nft would make of the same rule, so that either's is known for the other's.
func exprs(family masq.Family, r masq.Rule) []nftExpr {
	var all []nftExpr
	if r.Mark != 0 {
		mark := binary.NativeEndian.AppendUint32(nil, r.Mark)
		all = append(all, loadMeta(unix.NFT_META_MARK), mask(mark), compare(mark, false))
	}
	if r.In != "" {
		all = append(all, loadMeta(unix.NFT_META_IIFNAME), compare([]byte(r.In), false))
	}
	if r.Out != "" {
		name := make([]byte, unix.IFNAMSIZ) // with what follows a shorter name, or it would be any that begins so
		copy(name, r.Out)
		all = append(all, loadMeta(unix.NFT_META_OIFNAME), compare(name, false))
	}
	src, dst := uint32(12), uint32(16) // offsets in struct iphdr
	if family == masq.IPv6 {
		src, dst = 8, 24 // in struct ipv6hdr
	}
	all = append(all, matchPrefix(src, r.Src, r.NotSrc)...)
	all = append(all, matchPrefix(dst, r.Dst, r.NotDst)...)
	all = append(all, matchUDP(r)...)
	all = append(all, matchWay(r)...)
	all = append(all, lookup(src, r.SrcIn, r.NotSrcIn)...)
	all = append(all, lookup(dst, r.DstIn, r.NotDstIn)...)
	return append(all, verdictOf(r)...)
}

func jumpExprs(j masq.Jump) []nftExpr {
	return append(exprs(j.Chain.Family, j.Match()), verdict(unix.NFT_JUMP, j.Chain.Name))
}

// verdictOf returns the steps of what happens to a packet that r matches. What is dropped is counted.
func verdictOf(r masq.Rule) []nftExpr {
	switch r.Verdict {
	case masq.Accept:
		return []nftExpr{verdict(nfAccept, "")}
	case masq.Return:
		return []nftExpr{verdict(nftReturn, "")}
	case masq.Masquerade:
		return masquerade(r.Ports)
	case masq.Drop:
		return []nftExpr{{name: "counter"}, verdict(nfDrop, "")}
	case masq.NoTrack:
		return []nftExpr{{name: "notrack"}}
	case masq.SetMark:
		return setMark(r.Bits)
	}
	return nil
}

func matchUDP(r masq.Rule) (all []nftExpr) {
	if r.UDP {
		all = append(all, loadMeta(unix.NFT_META_L4PROTO), compare([]byte{unix.IPPROTO_UDP}, false))
	}
	if r.DstPort != 0 {
		const dport = 2 // offset in struct udphdr
		all = append(all, load(unix.NFT_PAYLOAD_TRANSPORT_HEADER, dport, 2),
			compare(binary.BigEndian.AppendUint16(nil, r.DstPort), false))
	}
	return all
}

// matchWay asks where a packet goes, and whether it was meant to go there.
func matchWay(r masq.Rule) (all []nftExpr) {
	if r.Local {
		var m message
		m.be32(unix.NFTA_FIB_DREG, unix.NFT_REG_1)
		m.be32(unix.NFTA_FIB_RESULT, unix.NFT_FIB_RESULT_ADDRTYPE)
		m.be32(unix.NFTA_FIB_FLAGS, unix.NFTA_FIB_F_DADDR)
		all = append(all, nftExpr{"fib", m}, compare(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL), false))
	}
	if r.Translated {
		all = append(all, loadCT(unix.NFT_CT_STATUS), mask(binary.NativeEndian.AppendUint32(nil, ipsDstNAT)),
			compare(make([]byte, 4), true))
	}
	if r.Answers {
		all = append(all, loadCT(unix.NFT_CT_DIRECTION), compare([]byte{ipCTDirReply}, false))
	}
	return all
}

// loadCT reads what is known of the packet's connection.
func loadCT(key uint32) nftExpr {
	var m message
	m.be32(unix.NFTA_CT_DREG, unix.NFT_REG_1)
	m.be32(unix.NFTA_CT_KEY, key)
	return nftExpr{"ct", m}
}

// setMark leaves all other bits of the mark as they are.
func setMark(bits uint32) []nftExpr {
	var m message
	m.be32(unix.NFTA_META_KEY, unix.NFT_META_MARK)
	m.be32(unix.NFTA_META_SREG, unix.NFT_REG_1)
	native := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	return []nftExpr{loadMeta(unix.NFT_META_MARK), bitwise(native(^bits), native(bits)), {"meta", m}}
}

func loadMeta(key uint32) nftExpr {
	var m message
	m.be32(unix.NFTA_META_KEY, key)
	m.be32(unix.NFTA_META_DREG, unix.NFT_REG_1)
	return nftExpr{"meta", m}
}

func mask(bits []byte) nftExpr { return bitwise(bits, make([]byte, len(bits))) }

// bitwise keeps the bits of a mask, and turns those of xor over.
func bitwise(bits, xor []byte) nftExpr {
	var m message
	m.be32(unix.NFTA_BITWISE_SREG, unix.NFT_REG_1)
	m.be32(unix.NFTA_BITWISE_DREG, unix.NFT_REG_1)
	m.be32(unix.NFTA_BITWISE_LEN, uint32(len(bits)))
	m.nest(unix.NFTA_BITWISE_MASK, value(bits))
	m.nest(unix.NFTA_BITWISE_XOR, value(xor))
	return nftExpr{"bitwise", m}
}

func compare(with []byte, not bool) nftExpr {
	op := uint32(unix.NFT_CMP_EQ)
	if not {
		op = unix.NFT_CMP_NEQ
	}
	var m message
	m.be32(unix.NFTA_CMP_SREG, unix.NFT_REG_1)
	m.be32(unix.NFTA_CMP_OP, op)
	m.nest(unix.NFTA_CMP_DATA, value(with))
	return nftExpr{"cmp", m}
}

func value(v []byte) func(*message) {
	return func(m *message) { m.bytes(unix.NFTA_DATA_VALUE, v) }
}

// matchPrefix compares an address in the packet with p. Of a prefix that ends between two bytes' bits the whole address
// is masked; of another no more is read than it has, as nft does it.
func matchPrefix(offset uint32, p netip.Prefix, not bool) []nftExpr {
	if !p.IsValid() {
		return nil
	}
	addr := p.Masked().Addr().AsSlice()
	whole := p.Bits()%8 == 0
	if whole {
		addr = addr[:p.Bits()/8]
	}
	all := []nftExpr{loadNetwork(offset, uint32(len(addr)))}
	if !whole {
		bits := make([]byte, len(addr))
		for i := range p.Bits() {
			bits[i/8] |= 0x80 >> (i % 8)
		}
		all = append(all, mask(bits))
	}
	return append(all, compare(addr, not))
}

// loadNetwork reads from the packet's IP header.
func loadNetwork(offset, length uint32) nftExpr {
	return load(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, length)
}

func load(header, offset, length uint32) nftExpr {
	var m message
	m.be32(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1)
	m.be32(unix.NFTA_PAYLOAD_BASE, header)
	m.be32(unix.NFTA_PAYLOAD_OFFSET, offset)
	m.be32(unix.NFTA_PAYLOAD_LEN, length)
	return nftExpr{"payload", m}
}

func verdict(code int32, chain string) nftExpr {
	var m message
	m.be32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
	m.nest(unix.NFTA_IMMEDIATE_DATA, func(m *message) {
		m.nest(unix.NFTA_DATA_VERDICT, func(m *message) {
			m.be32(unix.NFTA_VERDICT_CODE, uint32(code))
			if chain != "" {
				m.string(unix.NFTA_VERDICT_CHAIN, chain)
			}
		})
	})
	return nftExpr{"immediate", m}
}

// masquerade gives connections ports that cannot be foretold, from a range if there is one.
func masquerade(ports masq.PortRange) (all []nftExpr) {
	flags := uint32(unix.NF_NAT_RANGE_PROTO_RANDOM_FULLY)
	var m message
	if ports != (masq.PortRange{}) {
		flags |= unix.NF_NAT_RANGE_PROTO_SPECIFIED
		all = append(all, loadPort(unix.NFT_REG_1, ports.First), loadPort(unix.NFT_REG_2, ports.Last))
		m.be32(unix.NFTA_MASQ_REG_PROTO_MIN, unix.NFT_REG_1)
		m.be32(unix.NFTA_MASQ_REG_PROTO_MAX, unix.NFT_REG_2)
	}
	m.be32(unix.NFTA_MASQ_FLAGS, flags)
	return append(all, nftExpr{"masq", m})
}

func loadPort(register uint32, port uint16) nftExpr {
	var m message
	m.be32(unix.NFTA_IMMEDIATE_DREG, register)
	m.nest(unix.NFTA_IMMEDIATE_DATA, value(binary.BigEndian.AppendUint16(nil, port)))
	return nftExpr{"immediate", m}
}

// textOf tells what steps do, the same for the same steps whoever wrote them: in which order attributes come is each
// writer's own, and neither counters nor comments change anything.
func textOf(all []nftExpr) string {
	var steps []string
	for _, e := range all {
		if e.name == "counter" || e.isComment() {
			continue
		}
		var words []string
		for typ, v := range attrs(e.data) {
			if e.name == "bitwise" && typ == nftaBitwiseOp && getBE32(v) == 0 {
				continue // only newer kernels tell
			}
			words = append(words, fmt.Sprintf("%d=%s", typ, hex.EncodeToString(v)))
		}
		slices.Sort(words)
		steps = append(steps, "["+strings.Join(append([]string{e.name}, words...), " ")+"]")
	}
	return strings.Join(steps, " ")
}

// An nftRule is what the kernel says of a rule of nftables.
type nftRule struct {
	chain  string
	handle uint64
	exprs  []nftExpr
	ours   bool // it has our comment
	udata  []byte
}

func parseNFTRule(b []byte) nftRule {
	var r nftRule
	for typ, v := range attrs(nfBody(b)) {
		switch typ {
		case unix.NFTA_RULE_CHAIN:
			r.chain = getString(v)
		case unix.NFTA_RULE_HANDLE:
			r.handle = getBE64(v)
		case unix.NFTA_RULE_EXPRESSIONS:
			for _, elem := range attrs(v) {
				e := parseExpr(elem)
				r.exprs = append(r.exprs, e)
				r.ours = r.ours || e.isComment() && getString(attr(e.data, nftaMatchInfo)) == masq.Comment
			}
		case unix.NFTA_RULE_USERDATA:
			r.udata = v
			r.ours = r.ours || commentOf(v) == masq.Comment
		}
	}
	return r
}

// still is all that r says but for what it counts, and the same for the same rule.
func (r nftRule) still() string {
	var b strings.Builder
	for _, e := range r.exprs {
		fmt.Fprintf(&b, "%s %d", e.name, len(e.data))
		switch e.name {
		case "counter", "last":
		case "quota":
			for typ, v := range attrs(e.data) {
				if typ != nftaQuotaConsumed {
					fmt.Fprintf(&b, " %d=%x", typ, v)
				}
			}
		default:
			b.Write(e.data)
		}
	}
	b.Write(r.udata)
	return b.String()
}

func parseExpr(b []byte) (e nftExpr) {
	for typ, v := range attrs(b) {
		switch typ {
		case unix.NFTA_EXPR_NAME:
			e.name = getString(v)
		case unix.NFTA_EXPR_DATA:
			e.data = v
		}
	}
	return e
}

// commentOf returns the comment among what programs keep beside a rule: a type, a length and a value, over and over.
func commentOf(udata []byte) string {
	for len(udata) >= 2 && len(udata) >= 2+int(udata[1]) {
		if udata[0] == commentUdata {
			return getString(udata[2 : 2+int(udata[1])])
		}
		udata = udata[2+int(udata[1]):]
	}
	return ""
}

// attr returns the value of the first attribute of a type in b.
func attr(b []byte, typ uint16) []byte {
	for t, v := range attrs(b) {
		if t == typ {
			return v
		}
	}
	return nil
}

// verdictOf returns the code of the verdict that e gives, if it gives one.
func (e nftExpr) verdictOf() (code int32, gives bool) {
	if e.name != "immediate" || getBE32(attr(e.data, unix.NFTA_IMMEDIATE_DREG)) != unix.NFT_REG_VERDICT {
		return 0, false
	}
	v := attr(attr(e.data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
	return int32(getBE32(attr(v, unix.NFTA_VERDICT_CODE))), true
}

// jumps reports whether r leads to another chain.
func (r nftRule) jumps() bool {
	return slices.ContainsFunc(r.exprs, func(e nftExpr) bool {
		code, gives := e.verdictOf()
		return gives && code < 0 && code != nftReturn
	})
}

// end reports whether no packet gets past r, and whether it harms those that are stopped there: it drops or translates
// them.
func (r nftRule) end() (ends, harms bool) {
	for _, e := range r.exprs {
		stops, bad, passes := e.effect()
		if !passes {
			return false, false
		}
		ends, harms = ends || stops, harms || bad
	}
	return ends, harms
}

// effect says of a step whether it stops all packets, whether it drops or translates them, and whether all packets get
// to the next step or are stopped here: what compares does not count, whatever with.
func (e nftExpr) effect() (stops, harms, passes bool) {
	switch e.name {
	case "counter", "log":
		return false, false, true
	case "reject", "masq", "nat", "queue":
		return true, true, true
	case "immediate":
		code, gives := e.verdictOf()
		drops := code == nfDrop || code&0xff == nfQueue
		return gives && (code >= 0 || code == nftGoto || code == nftReturn), gives && drops, true
	case "match": // of iptables
		return false, false, e.isComment()
	case "target":
		return effectOf(getString(attr(e.data, nftaMatchName)))
	}
	return false, false, false
}

// isComment reports whether e is how iptables keeps a comment (linux/netfilter/xt_comment.h).
func (e nftExpr) isComment() bool {
	return e.name == "match" && getString(attr(e.data, nftaMatchName)) == "comment"
}

// effectOf is effect for a target of iptables.
func effectOf(target string) (stops, harms, passes bool) {
	switch target {
	case "ACCEPT", "RETURN":
		return true, false, true
	case "DROP", "REJECT", "MASQUERADE", "SNAT", "NFQUEUE":
		return true, true, true
	}
	return false, false, true
}

// An nftChain is what the kernel says of a chain of nftables.
type nftChain struct {
	family      uint8
	table, name string
	base        bool
	hook        uint32
	priority    int32
	policy      uint32
	typ         string
	rules       []nftRule
}

func parseNFTChain(b []byte) nftChain {
	c := nftChain{policy: nfAccept}
	if len(b) > 0 {
		c.family = b[0]
	}
	for typ, v := range attrs(nfBody(b)) {
		switch typ {
		case unix.NFTA_CHAIN_TABLE:
			c.table = getString(v)
		case unix.NFTA_CHAIN_NAME:
			c.name = getString(v)
		case unix.NFTA_CHAIN_HOOK:
			c.base = true
			c.hook = getBE32(attr(v, unix.NFTA_HOOK_HOOKNUM))
			c.priority = int32(getBE32(attr(v, unix.NFTA_HOOK_PRIORITY)))
		case unix.NFTA_CHAIN_POLICY:
			c.policy = getBE32(v)
		case unix.NFTA_CHAIN_TYPE:
			c.typ = getString(v)
		}
	}
	return c
}

// host says where rules of ours would stand in c.
func (c nftChain) host() masq.Host {
	for i, r := range c.rules {
		if ends, harms := r.end(); ends {
			return masq.Host{End: i + 1, Harms: harms}
		}
	}
	return masq.Host{}
}

package kernel

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// Of linux/rtnetlink.h and linux/neighbour.h; x/sys/unix does not have them.
const (
	skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	ndaNHID   = 13     // NDA_NH_ID
)

// A link is what the kernel says of a network device. Two are equal if nothing changed that matters to anybody here.
type link struct {
	index, mtu int
	group      uint32
	name, kind string
	mac        backend.MAC
	up, noARP  bool

	// Of a VXLAN device:
	vni      uint32
	port     uint16
	local    netip.Addr
	remote6  bool // it has an IPv6 group or remote address
	dev      int  // the underlay device's index, 0 for none
	learning bool
	// features is set in a message that tells of nothing but that offloads were switched. It does not say which.
	features bool

	// Of a port of another device: that device's index, and whether frames go back to where they came from.
	master  int
	hairpin bool
	// As in backend.Port, and whether the kernel knows of locks.
	locked, noLearning, noFlood bool
	hasLock                     bool

	bridge backend.Bridge
	// Whether the kernel knows the bridge's attributes of the same names.
	hasCall4, hasCall6, hasSnooping bool
}

// ours reports whether l is a link of State. The veths of pods carry our group too, but State does not hold them.
func (l link) ours() bool {
	return l.group == backend.Owner && (l.kind == string(backend.KindVXLAN) || l.kind == string(backend.KindBridge))
}

func (l link) is(kind backend.LinkKind) bool { return l.kind == string(kind) }

// underlay6 reports whether the VXLAN device l sends over IPv6.
func (l link) underlay6() bool { return l.local.Is6() || l.remote6 }

// closed reports whether l is a port that takes nothing from other MACs than are known to be there, as far as the
// kernel can keep it from that.
func (l link) closed() bool { return l.noLearning && l.noFlood && (l.locked || !l.hasLock) }

// parseLink reads the body of an RTM_NEWLINK or RTM_DELLINK message.
func parseLink(b []byte) (link, bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return link{}, false
	}
	l := link{
		index: int(int32(binary.NativeEndian.Uint32(b[4:]))),
		up:    binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0,
		noARP: binary.NativeEndian.Uint32(b[8:])&unix.IFF_NOARP != 0,
	}
	for typ, v := range attrs(b[unix.SizeofIfInfomsg:]) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.name = getString(v)
		case unix.IFLA_ADDRESS:
			l.mac = getMAC(v)
		case unix.IFLA_MTU:
			l.mtu = int(getU32(v))
		case unix.IFLA_GROUP:
			l.group = getU32(v)
		case unix.IFLA_MASTER:
			l.master = int(getU32(v))
		case unix.IFLA_EVENT:
			l.features = getU32(v) == unix.IFLA_EVENT_FEATURES
		case unix.IFLA_LINKINFO:
			l.parseInfo(v)
		case unix.IFLA_PROTINFO: // where a bridge tells of a port
			l.parsePort(v)
		}
	}
	return l, true
}

func (l *link) parseInfo(b []byte) {
	var data []byte
	for typ, v := range attrs(b) {
		switch typ {
		case unix.IFLA_INFO_SLAVE_DATA:
			l.parsePort(v)
		case unix.IFLA_INFO_KIND:
			l.kind = getString(v)
		case unix.IFLA_INFO_DATA:
			data = v
		}
	}
	switch {
	case l.is(backend.KindVXLAN):
		l.parseVXLAN(data)
	case l.is(backend.KindBridge):
		l.parseBridge(data)
	}
}

func (l *link) parsePort(data []byte) {
	for typ, v := range attrs(data) {
		switch typ {
		case unix.IFLA_BRPORT_MODE:
			l.hairpin = getU8(v) != 0
		case unix.IFLA_BRPORT_LEARNING:
			l.noLearning = getU8(v) == 0
		case unix.IFLA_BRPORT_UNICAST_FLOOD:
			l.noFlood = getU8(v) == 0
		case unix.IFLA_BRPORT_LOCKED:
			l.locked, l.hasLock = getU8(v) != 0, true
		}
	}
}

func (l *link) parseVXLAN(data []byte) {
	for typ, v := range attrs(data) {
		switch typ {
		case unix.IFLA_VXLAN_ID:
			l.vni = getU32(v)
		case unix.IFLA_VXLAN_PORT:
			l.port = getBE16(v)
		case unix.IFLA_VXLAN_LOCAL, unix.IFLA_VXLAN_LOCAL6:
			l.local = getAddr(v)
		case unix.IFLA_VXLAN_GROUP6:
			l.remote6 = true
		case unix.IFLA_VXLAN_LINK:
			l.dev = int(getU32(v))
		case unix.IFLA_VXLAN_LEARNING:
			l.learning = getU8(v) != 0
		}
	}
}

func (l *link) parseBridge(data []byte) {
	for typ, v := range attrs(data) {
		switch typ {
		case unix.IFLA_BR_MCAST_SNOOPING:
			l.bridge.McastSnooping, l.hasSnooping = getU8(v) != 0, true
		case unix.IFLA_BR_NF_CALL_IPTABLES:
			l.bridge.CallIptables, l.hasCall4 = getU8(v) != 0, true
		case unix.IFLA_BR_NF_CALL_IP6TABLES:
			l.bridge.CallIp6tables, l.hasCall6 = getU8(v) != 0, true
		}
	}
}

// An address is what the kernel says of an address on a device.
type address struct {
	index  int
	prefix netip.Prefix
	toward netip.Addr // the other end, where there is one
	flags  uint32     // IFA_F_*
	scope  uint8      // RT_SCOPE_*
}

func parseAddr(b []byte) (address, bool) {
	if len(b) < unix.SizeofIfAddrmsg || b[0] != unix.AF_INET && b[0] != unix.AF_INET6 {
		return address{}, false
	}
	a := address{flags: uint32(b[2]), scope: b[3], index: int(binary.NativeEndian.Uint32(b[4:]))}
	var local, other netip.Addr
	for typ, v := range attrs(b[unix.SizeofIfAddrmsg:]) {
		switch typ {
		case unix.IFA_LOCAL: // where it is missing, or differs because the link has two ends only, it is our end's
			local = getAddr(v)
		case unix.IFA_ADDRESS:
			other = getAddr(v)
		case unix.IFA_FLAGS:
			a.flags = getU32(v)
		}
	}
	if !local.IsValid() {
		local = other
	}
	if other.IsValid() && other != local {
		a.toward = other
	}
	a.prefix = netip.PrefixFrom(local, int(b[1]))
	return a, a.prefix.IsValid()
}

// A neighbour is what the kernel says of a neighbour or an FDB entry.
type neighbour struct {
	family uint8
	index  int
	state  uint16 // NUD_*
	flags  uint8  // NTF_*
	dst    netip.Addr
	mac    backend.MAC
	odd    bool // an FDB entry with a port, a VNI, an interface or a nexthop of its own
}

// isPermanent reports whether a message is of a permanent neighbour or FDB entry of the device with an index.
func isPermanent(b []byte, index int) bool {
	return len(b) >= unix.SizeofNdMsg && int(int32(binary.NativeEndian.Uint32(b[4:]))) == index &&
		binary.NativeEndian.Uint16(b[8:])&unix.NUD_PERMANENT != 0
}

func parseNeigh(b []byte) (neighbour, bool) {
	if len(b) < unix.SizeofNdMsg {
		return neighbour{}, false
	}
	n := neighbour{
		family: b[0],
		index:  int(int32(binary.NativeEndian.Uint32(b[4:]))),
		state:  binary.NativeEndian.Uint16(b[8:]),
		flags:  b[10],
	}
	for typ, v := range attrs(b[unix.SizeofNdMsg:]) {
		switch typ {
		case unix.NDA_DST:
			n.dst = getAddr(v)
		case unix.NDA_LLADDR:
			n.mac = getMAC(v)
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, ndaNHID:
			n.odd = true
		}
	}
	return n, true
}

// A route is what the kernel says of a route.
type route struct {
	family, tos, protocol, typ uint8
	flags                      uint32 // RTNH_F_* and RTM_F_*
	key                        backend.RouteKey
	dev                        int // the output interface's index
	via, src                   netip.Addr
	hops                       []int // the output interfaces of a route with several
}

func parseRoute(b []byte) (route, bool) {
	if len(b) < unix.SizeofRtMsg || b[0] != unix.AF_INET && b[0] != unix.AF_INET6 {
		return route{}, false
	}
	r := route{
		family: b[0], tos: b[3], protocol: b[5], typ: b[7],
		flags: binary.NativeEndian.Uint32(b[8:]),
		key:   backend.RouteKey{Table: int(b[4])},
	}
	dst := netip.IPv4Unspecified()
	if r.family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	for typ, v := range attrs(b[unix.SizeofRtMsg:]) {
		switch typ {
		case unix.RTA_DST:
			dst = getAddr(v)
		case unix.RTA_TABLE:
			r.key.Table = int(getU32(v))
		case unix.RTA_PRIORITY:
			r.key.Metric = int(getU32(v))
		case unix.RTA_OIF:
			r.dev = int(getU32(v))
		case unix.RTA_GATEWAY:
			r.via = getAddr(v)
		case unix.RTA_VIA: // a family, then an address of it
			if len(v) > 2 {
				r.via = getAddr(v[2:])
			}
		case unix.RTA_PREFSRC:
			r.src = getAddr(v)
		case unix.RTA_MULTIPATH:
			r.hops = parseHops(v)
		}
	}
	r.key.Dst = netip.PrefixFrom(dst, int(b[1]))
	return r, r.key.Dst.IsValid()
}

func parseHops(b []byte) (devs []int) {
	for len(b) >= unix.SizeofRtNexthop {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtNexthop || size > len(b) {
			break
		}
		devs = append(devs, int(int32(binary.NativeEndian.Uint32(b[4:]))))
		b = b[min(len(b), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
	}
	return devs
}

// A rule is what the kernel says of a policy routing rule.
type rule struct {
	protocol uint8
	key      backend.RuleKey
}

// ruleFamily is that of a rule's packets.
func ruleFamily(k backend.RuleKey) uint8 {
	switch {
	case k.From.IsValid():
		return family(k.From.Addr())
	case k.To.IsValid():
		return family(k.To.Addr())
	}
	return unix.AF_INET
}

// sizeofRuleMsg is the size of struct fib_rule_hdr in linux/fib_rules.h.
const sizeofRuleMsg = 12

func parseRule(b []byte) (rule, bool) {
	if len(b) < sizeofRuleMsg || b[0] != unix.AF_INET && b[0] != unix.AF_INET6 {
		return rule{}, false
	}
	r := rule{key: backend.RuleKey{Table: int(b[4])}}
	var from, to netip.Addr
	for typ, v := range attrs(b[sizeofRuleMsg:]) {
		switch typ {
		case unix.FRA_DST:
			to = getAddr(v)
		case unix.FRA_SRC:
			from = getAddr(v)
		case unix.FRA_PRIORITY:
			r.key.Priority = int(getU32(v))
		case unix.FRA_TABLE:
			r.key.Table = int(getU32(v))
		case unix.FRA_FWMARK:
			r.key.Mark = getU32(v)
		case unix.FRA_PROTOCOL:
			r.protocol = getU8(v)
		}
	}
	if to.IsValid() {
		r.key.To = netip.PrefixFrom(to, int(b[1]))
	}
	if from.IsValid() {
		r.key.From = netip.PrefixFrom(from, int(b[2]))
	}
	if b[0] == unix.AF_INET6 && !from.IsValid() && !to.IsValid() {
		r.key.From = netip.PrefixFrom(netip.IPv6Unspecified(), 0) // or it would look like an IPv4 rule
	}
	return r, true
}

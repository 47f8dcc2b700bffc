package spoof

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Comment marks every rule.
const Comment = "tweed"

// Devices begins the names of all ports that a pod can be behind.
const Devices = "tweed"

// Priority is that of the table's one chain at a hook, prerouting: before br_netfilter (NF_BR_PRI_BRNF, which is 0)
// hands a frame on to conntrack and to the packet filter of IP.
const Priority = -300

// What a frame can be dropped for.
const (
	DroppedIPv4  = "ipv4"  // an IPv4 source, or a MAC beside it, that is another's
	DroppedIPv6  = "ipv6"  // the same of IPv6
	DroppedARP   = "arp"   // said who has another's address
	DroppedND    = "nd"    // the same of IPv6
	DroppedRA    = "ra"    // a router advertisement
	DroppedDHCP  = "dhcp"  // an answer of a DHCP server, of either family
	DroppedOther = "other" // neither IP nor ARP
)

// Reasons lists what frames can be dropped for.
func Reasons() []string {
	return []string{DroppedIPv4, DroppedIPv6, DroppedARP, DroppedND, DroppedRA, DroppedDHCP, DroppedOther}
}

// A Chain is one of the table's.
type Chain struct {
	Name  string
	Hook  bool // at prerouting, with Priority
	Rules []Rule
}

// A Rule is one rule of a Chain.
type Rule struct {
	Words string // of nft
	Steps []Step
	// Drops says what the frames that it drops are dropped for; empty if it drops none.
	Drops string
}

func (c Chain) words() string {
	if c.Hook {
		return fmt.Sprintf(" { type filter hook prerouting priority %d ; }", Priority)
	}
	return ""
}

// Of linux/icmpv6.h, linux/mld6.h and net/ndisc.h.
const (
	mldReport    = 131
	routerAdvert = 134
	neighSolicit = 135
	neighAdvert  = 136
	mld2Report   = 143
)

// Chains lists the table's chains with their rules. A frame that is as it should be costs one look into a set, of
// whatever its sender's port, MAC and address are together; only who drops asks whether the port is to be judged at
// all. Each that drops counts.
func Chains() []Chain {
	return []Chain{
		{Name: "prerouting", Hook: true, Rules: []Rule{
			ownTCP(), // most of what there is, and never judged otherwise
			sort("ip", unix.ETH_P_IP, "pod-ipv4"),
			sort("ip6", unix.ETH_P_IPV6, "pod-ipv6"),
			sort("arp", unix.ETH_P_ARP, "pod-arp"),
			drop("", DroppedOther),
		}},
		{Name: "pod-ipv4", Rules: []Rule{
			drop("udp sport 67 udp dport 68", DroppedDHCP, udp(67, 68)...),
			own("ip", unix.ETH_P_IP, ipv4Source),
			drop("", DroppedIPv4),
		}},
		{Name: "pod-ipv6", Rules: []Rule{
			{Words: "meta l4proto ipv6-icmp goto pod-icmpv6",
				Steps: []Step{meta(unix.NFT_META_L4PROTO), equal([]byte{unix.IPPROTO_ICMPV6}), gotoChain("pod-icmpv6")}},
			drop("udp sport 547 udp dport 546", DroppedDHCP, udp(547, 546)...),
			own("ip6", unix.ETH_P_IPV6, ipv6Source),
			drop("", DroppedIPv6),
		}},
		{Name: "pod-icmpv6", Rules: []Rule{
			drop("meta l4proto ipv6-icmp @th,0,8 134", DroppedRA, icmpv6(routerAdvert)...),
			drop("meta l4proto ipv6-icmp @th,0,8 136 iifname . ether saddr . icmpv6 taddr != @ipv6", DroppedND,
				slices.Concat(icmpv6(neighAdvert), find(true, ether, ndTarget))...),
			own("ip6", unix.ETH_P_IPV6, ipv6Source),
			// Who does not know yet whether an address is its own, asks from none, and says from none what it listens to.
			accept("meta protocol ip6 ip6 saddr :: meta l4proto ipv6-icmp @th,0,8 135 "+
				"iifname . ether saddr . icmpv6 taddr @ipv6",
				fromNone(), icmpv6(neighSolicit), find(false, ether, ndTarget)),
			accept("meta protocol ip6 ip6 saddr :: meta l4proto ipv6-icmp @th,0,8 143 iifname . ether saddr @macs",
				fromNone(), icmpv6(mld2Report), findMAC()),
			accept("meta protocol ip6 ip6 saddr :: meta l4proto ipv6-icmp @th,0,8 131 iifname . ether saddr @macs",
				fromNone(), icmpv6(mldReport), findMAC()),
			drop("", DroppedIPv6),
		}},
		{Name: "pod-arp", Rules: []Rule{
			// All that others take for ARP of IPv4 on Ethernet is where the next rules look for it.
			drop("@nh,0,48 != 0x000108000604", DroppedARP,
				payload(unix.NFT_PAYLOAD_NETWORK_HEADER, 0, 6, unix.NFT_REG_1), differ([]byte{0, 1, 8, 0, 6, 4})),
			accept("meta protocol arp iifname . ether saddr . arp saddr ip @ipv4 iifname . arp saddr ether . arp saddr ip @ipv4",
				carries(unix.ETH_P_ARP), find(false, ether, arpSource), find(false, arpMAC, arpSource)),
			// A probe asks for an address before it is taken (RFC 5227, section 2.1.1).
			accept("meta protocol arp arp saddr ip 0.0.0.0 iifname . ether saddr . arp daddr ip @ipv4 "+
				"iifname . arp saddr ether . arp daddr ip @ipv4",
				carries(unix.ETH_P_ARP), []Step{arpSource.load(unix.NFT_REG_1), equal(make([]byte, 4))},
				find(false, ether, arpTarget), find(false, arpMAC, arpTarget)),
			drop("", DroppedARP),
		}},
	}
}

// sort hands frames of pods on by what they carry.
func sort(protocol string, number uint16, to string) Rule {
	return Rule{
		Words: fmt.Sprintf(`iifname "%s*" meta protocol %s goto %s`, Devices, protocol, to),
		Steps: slices.Concat([]Step{meta(unix.NFT_META_IIFNAME), equal([]byte(Devices))}, carries(number),
			[]Step{gotoChain(to)}),
	}
}

// carries asks what a frame carries. Who comes here by sort knows, but nft asks before it looks at a header, and by the
// frame's own word unless it is told to ask as here: that word is another behind a VLAN tag.
func carries(protocol uint16) []Step {
	return []Step{meta(unix.NFT_META_PROTOCOL), equal(binary.BigEndian.AppendUint16(nil, protocol))}
}

// drop drops what comes from a port that is judged, and matches.
func drop(words, reason string, match ...Step) Rule {
	if words != "" {
		words += " "
	}
	return Rule{
		Words: words + "iifname @ports counter drop", Drops: reason,
		Steps: slices.Concat(match, []Step{
			meta(unix.NFT_META_IIFNAME), lookup(Ports, false), {Name: "counter"}, verdict(nfDrop, ""),
		}),
	}
}

func accept(words string, match ...[]Step) Rule {
	return Rule{Words: words + " accept", Steps: append(slices.Concat(match...), verdict(nfAccept, ""))}
}

// own accepts what comes from its port's own MAC and address.
func own(protocol string, number uint16, addr field) Rule {
	return accept(fmt.Sprintf("meta protocol %s iifname . ether saddr . %s @%s", protocol, addr.words, addr.set()),
		carries(number), find(false, ether, addr))
}

// ownTCP is own for TCP over IPv4.
func ownTCP() Rule {
	return accept("meta protocol ip meta l4proto tcp iifname . ether saddr . ip saddr @ipv4", carries(unix.ETH_P_IP),
		[]Step{meta(unix.NFT_META_L4PROTO), equal([]byte{unix.IPPROTO_TCP})}, find(false, ether, ipv4Source))
}

// A field is where a MAC or an address stands in a frame.
type field struct {
	words                  string
	header, offset, length uint32
}

var (
	ether      = field{"ether saddr", unix.NFT_PAYLOAD_LL_HEADER, 6, 6}
	ipv4Source = field{"ip saddr", unix.NFT_PAYLOAD_NETWORK_HEADER, 12, 4}
	ipv6Source = field{"ip6 saddr", unix.NFT_PAYLOAD_NETWORK_HEADER, 8, 16}
	ndTarget   = field{"icmpv6 taddr", unix.NFT_PAYLOAD_TRANSPORT_HEADER, 8, 16}
	arpMAC     = field{"arp saddr ether", unix.NFT_PAYLOAD_NETWORK_HEADER, 8, 6}
	arpSource  = field{"arp saddr ip", unix.NFT_PAYLOAD_NETWORK_HEADER, 14, 4}
	arpTarget  = field{"arp daddr ip", unix.NFT_PAYLOAD_NETWORK_HEADER, 24, 4}
)

// fromNone matches what has no sender.
func fromNone() []Step {
	return slices.Concat(carries(unix.ETH_P_IPV6), []Step{ipv6Source.load(unix.NFT_REG_1), equal(make([]byte, 16))})
}

func (f field) set() Set {
	if f.length == 4 {
		return IPv4
	}
	return IPv6
}

func (f field) load(register uint32) Step { return payload(f.header, f.offset, f.length, register) }

// find looks whether a port has a MAC together with an address.
func find(not bool, mac, addr field) []Step {
	return []Step{meta(unix.NFT_META_IIFNAME), mac.load(regMAC), addr.load(regAddr), lookup(addr.set(), not)}
}

func findMAC() []Step {
	return []Step{meta(unix.NFT_META_IIFNAME), ether.load(regMAC), lookup(MACs, false)}
}

func udp(from, to uint16) []Step {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	return transport(unix.IPPROTO_UDP, ports)
}

func icmpv6(typ byte) []Step { return transport(unix.IPPROTO_ICMPV6, []byte{typ}) }

// transport matches what begins so behind the IP header.
func transport(protocol byte, begins []byte) []Step {
	return []Step{
		meta(unix.NFT_META_L4PROTO), equal([]byte{protocol}),
		payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, uint32(len(begins)), unix.NFT_REG_1), equal(begins),
	}
}

// Package backend describes kernel state as plain values, and the way from one state to another as operations.
//
// It is pure. Packages vxlan and bridge say what the kernel should hold, package kernel reads and changes what it does
// hold, and Diff, in between, compares two values of one type.
package backend

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
)

// Owner marks what is ours in the kernel: the group of our links (IFLA_GROUP) and the protocol of our routes and rules
// (RTA_PROTOCOL, FRA_PROTOCOL). What does not carry it belongs to somebody else, even when it points at our device.
const Owner = 116

// State is what one host's kernel holds of ours, or should hold. Each map is keyed by what the kernel tells two such
// objects apart by.
type State struct {
	Links   map[string]Link
	Addrs   map[AddrKey]Addr
	Neighs  map[NeighKey]Neigh
	FDB     map[FDBKey]FDBEntry
	Routes  map[RouteKey]Route
	Rules   map[RuleKey]Rule
	Sysctls map[string]Sysctl
	Ports   map[string]Port
	// Version tells states of one maker apart: two of them with one Version, other than 0, hold the same neighbours, FDB
	// entries and routes. It does not count in comparisons.
	Version uint64
}

// Observed is what a host's kernel holds: what is ours, and what is not ours but stands where something of ours should.
type Observed struct {
	State
	Strangers []Stranger
}

// A Stranger occupies a key that we want. We leave it alone and say so.
type Stranger struct {
	// Key is that of the object it stands in the way of: a link's name, an AddrKey, a RouteKey, a RuleKey.
	Key any
	// What describes the stranger as a person would, with the way out: what to remove, or what to choose instead.
	What string
}

// LinkKind is the kernel's name for the kind of a link (IFLA_INFO_KIND).
type LinkKind string

// The kinds of link that we create.
const (
	KindVXLAN  LinkKind = "vxlan"
	KindBridge LinkKind = "bridge"
	// KindVeth is the host's end of a pod's interface. It is the plugin's: no State that is wanted holds one.
	KindVeth LinkKind = "veth"
)

// A Link is a network device of ours. Of VXLAN and Bridge only the one that Type names is set.
type Link struct {
	Name   string
	Type   LinkKind
	MAC    MAC
	MTU    int // bytes
	Up     bool
	VXLAN  VXLAN
	Bridge Bridge
}

// VXLAN holds what is particular to a VXLAN device.
type VXLAN struct {
	VNI      uint32
	Port     uint16     // UDP destination port
	Local    netip.Addr // source of encapsulated packets; its family is the underlay's
	Dev      string     // underlay device; empty where packets may leave by several
	Learning bool       // learn FDB entries from received packets
	// NoTxChecksum turns the device's transmit checksum offload off, for kernels and NICs that break it.
	NoTxChecksum bool
}

// Bridge holds what is particular to a bridge.
type Bridge struct {
	McastSnooping bool
	// CallIptables and CallIp6tables pass bridged packets through the packet filter (IFLA_BR_NF_CALL_IPTABLES).
	CallIptables, CallIp6tables bool
}

// AddrKey tells addresses apart.
type AddrKey struct {
	Dev    string
	Prefix netip.Prefix // the address with its prefix length, not masked
	// Toward is a gateway (IFA_ADDRESS; what ip calls the peer of an address). Packets that leave through it, and have no
	// address yet, get this one. Invalid where it is for all that leave by the device.
	Toward netip.Addr
}

// An Addr is an address on a device of ours. Link-local addresses that the kernel makes are not ours.
type Addr struct {
	AddrKey
	// NoDAD spares an IPv6 address the duplicate address detection (IFA_F_NODAD).
	NoDAD bool
	// NoPrefixRoute keeps the kernel from adding a route for the prefix (IFA_F_NOPREFIXROUTE).
	NoPrefixRoute bool
	// Late is set of an address with Toward that stands behind one without: of those that are for no gateway in
	// particular the kernel takes the first there is (inet_select_addr), and this must not be it. An address has its place
	// by when it was added.
	Late bool
	Peer string // node that the address is for; not part of what the kernel holds
}

// plain4 reports whether a is an IPv4 address for all that leaves by its device.
func (a AddrKey) plain4() bool { return a.Prefix.Addr().Is4() && !a.Toward.IsValid() }

// NeighKey tells neighbour entries apart.
type NeighKey struct {
	Dev  string
	Addr netip.Addr
}

// A Neigh is a permanent neighbour (ARP or ND) entry on a VXLAN device of ours.
type Neigh struct {
	NeighKey
	MAC MAC
	// Peer is the node that the entry is for. The kernel does not hold it, and it does not count in comparisons.
	Peer string
}

// FDBKey tells forwarding database entries apart.
type FDBKey struct {
	Dev string
	MAC MAC
}

// An FDBEntry says which host a VTEP's MAC is reached at, on a VXLAN device of ours.
type FDBEntry struct {
	FDBKey
	Dst netip.Addr
	// Peer is as in Neigh.
	Peer string
}

// MainTable is the routing table that every packet is looked up in (RT_TABLE_MAIN).
const MainTable = 254

// NodesTable is the routing table in which the packets of this node's pods to other nodes' own addresses are looked up
// first.
const NodesTable = Owner

// PodMark is the bit by which packets are marked that come from pods here, or are for them, unless they answer what came
// to a node's own port.
const PodMark = 0x1000

// RouteKey tells routes apart. The address family is the destination's.
type RouteKey struct {
	Table  int // mostly MainTable
	Dst    netip.Prefix
	Metric int // 0 is written as the kernel's default: 0 for IPv4, 1024 for IPv6
}

// A Route is a route with protocol Owner.
type Route struct {
	RouteKey
	Dev    string
	Via    netip.Addr // invalid for a destination on the link
	Src    netip.Addr // preferred source, or invalid
	Onlink bool       // take Via to be on the link although no route says so
	// Peer is as in Neigh.
	Peer string
}

// RuleKey tells policy routing rules apart.
type RuleKey struct {
	Priority int
	From, To netip.Prefix
	Mark     uint32 // bits of the packet's mark, all of them set; 0 for any mark
	Table    int
}

// A Rule is a policy routing rule with protocol Owner.
type Rule struct{ RuleKey }

// SetSysctl wants a setting to have a value. s has a map for them.
func (s State) SetSysctl(name, value string) { s.Sysctls[name] = Sysctl{Name: name, Value: value} }

// A Sysctl is one kernel setting. Name is its path below /proc/sys, such as net/ipv4/ip_forward.
type Sysctl struct {
	Name, Value string
}

// A Port is the host's end of a pod's interface, as a port of a bridge of ours. The plugin makes and removes the device;
// State wants one that is there to be open.
type Port struct {
	Name    string // of the device
	Bridge  string // which it is a port of; empty for none
	Up      bool
	Hairpin bool // send frames back to where they came from, so that a pod reaches itself by a service's address
	// Locked takes frames from no MAC but those that the bridge knows to be there. Kernels before 5.18 cannot.
	Locked bool
	// NoLearning keeps the bridge from taking a MAC to be there because a frame comes from it, and NoFlood from sending
	// there what is for a MAC that it does not know.
	NoLearning, NoFlood bool
	// MAC is the pod's, which the bridge knows to be there and nowhere else. The zero one stands for none.
	MAC MAC
	// Others is set where the bridge knows further MACs to be behind a port that is Locked.
	Others bool
}

// MAC is a 48-bit hardware address. Unlike net.HardwareAddr it can be compared.
type MAC [6]byte

// ParseMAC reads the form aa:bb:cc:dd:ee:ff.
func ParseMAC(s string) (MAC, error) {
	if m, ok := parseUsualMAC(s); ok {
		return m, nil
	}
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("%q is not a MAC address of the form 0a:58:0a:f4:03:02", s)
	}
	return MAC(hw), nil
}

// parseUsualMAC is ParseMAC for the form that String has. Peers' MACs have it, and there are thousands.
func parseUsualMAC(s string) (m MAC, ok bool) {
	if len(s) != 3*len(m)-1 {
		return MAC{}, false
	}
	var digits [2 * len(m)]byte
	for i := range m {
		if i > 0 && s[3*i-1] != ':' {
			return MAC{}, false
		}
		copy(digits[2*i:], s[3*i:3*i+2])
	}
	_, err := hex.Decode(m[:], digits[:])
	return m, err == nil
}

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// IsUnicast reports whether one interface can have the address: not the zero address, and the group bit clear.
func (m MAC) IsUnicast() bool { return m != MAC{} && m[0]&1 == 0 }

// LinkLocal is the IPv6 link-local address made from m as a modified EUI-64 identifier (RFC 4291, appendix A).
func (m MAC) LinkLocal() netip.Addr {
	return netip.AddrFrom16([16]byte{
		0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5],
	})
}

// MarshalJSON writes m in the form that ParseMAC reads.
func (m MAC) MarshalJSON() ([]byte, error) { return json.Marshal(m.String()) }

// UnmarshalJSON reads what MarshalJSON writes.
func (m *MAC) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	var err error
	*m, err = ParseMAC(s)
	return err
}

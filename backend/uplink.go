package backend

import (
	"net/netip"
	"slices"
)

// An Uplink is where packets for other nodes leave this host.
type Uplink struct {
	// Devs are the interfaces, mostly one; several where the underlay is routed over more than one.
	Devs []string
	// Local is the address that encapsulated packets leave from and arrive at.
	Local netip.Addr
	// Addrs are the addresses that this node publishes: Local, or what stands for it where there is a NAT in front;
	// then, if any, one of the other family.
	Addrs []netip.Addr
	// Held are those of Addrs that are this host's, by an interface that is not of ours.
	Held []netip.Addr
	// MTU is the smallest of the interfaces', in bytes.
	MTU int
	// Routed is set where Local is on a Stub, Holder, so that routing has to choose among Devs for each packet.
	Routed bool
	Holder string
	// Segment is what Devs reach without a router; the zero one where all is to go through the tunnel.
	Segment Segment
}

// MTUWithin is the MTU, or most where that is smaller. 0 stands for unknown, or no limit.
func (u Uplink) MTUWithin(most int) int {
	if most != 0 && (most < u.MTU || u.MTU == 0) {
		return most
	}
	return u.MTU
}

// An Interface is a network device of this host as far as the choice of an uplink needs to know it.
type Interface struct {
	Name  string
	MTU   int // bytes
	Up    bool
	Ours  bool           // carries Owner, or is a pod's
	Addrs []netip.Prefix // global addresses with their prefix lengths, in the kernel's order
	// Default4 and Default6 report whether the default route of the family leaves here.
	Default4, Default6 bool
	// Stub is set for lo and dummy devices: their addresses are the host's, and packets from these leave elsewhere.
	Stub bool
	// NoARP is set for links on which nobody is asked who has an address: tunnels, mostly. What is behind one need not
	// take packets for others.
	NoARP bool
	// Ways are the routes that leave here without a router, and those with one that lead into the network of an address
	// of this host.
	Ways []Way
}

// Holder names the first interface that holds an address and is not of ours; "" where there is none.
func Holder(ifaces []Interface, a netip.Addr) string {
	for _, i := range ifaces {
		if !i.Ours && slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return i.Name
		}
	}
	return ""
}

// A Path is how a packet leaves this host. The zero Path is none.
type Path struct {
	Dev string     // lo for a packet to the host itself
	Src netip.Addr // source that the kernel would give it
}

package backend

import "net/netip"

// An Uplink is where packets for other nodes leave this host.
type Uplink struct {
	// Devs are the interfaces, mostly one; several where the underlay is routed over more than one.
	Devs []string
	// Local is the address that encapsulated packets leave from and arrive at.
	Local netip.Addr
	// Addrs are the addresses that this node publishes: Local, then, if any, one of the other family.
	Addrs []netip.Addr
	// MTU is the smallest of the interfaces', in bytes.
	MTU int
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
}

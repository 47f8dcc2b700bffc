// Package vxlan says what the kernel must hold for VXLAN to reach every lease.
//
// One device carries both families of pod addresses over one family of the underlay. It learns nothing: each peer has
// one FDB entry, and per lease a permanent neighbour and a route, so that no packet ever waits for an answer.
package vxlan

import (
	"crypto/sha256"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// Name is what leases call this backend.
const Name = "vxlan"

// Bytes that VXLAN adds to a packet: the inner Ethernet header (14), VXLAN (8), UDP (8) and the outer IPv4 (20) or IPv6
// (40) header (RFC 7348, section 5).
const (
	overhead4 = 50
	overhead6 = 70
)

// A Config is what all nodes have to agree on, and this node's own part.
type Config struct {
	Node string // this node's name
	VNI  uint32
	Port uint16 // UDP
	// MTU is the underlay's MTU to assume, in bytes; 0 for the uplink's.
	MTU int
	// NoTxChecksum is as in backend.VXLAN.
	NoTxChecksum bool
	// Held are the addresses that this node publishes and has itself, at most one a family.
	Held []netip.Addr
	// Underlay is the family of addresses that encapsulated packets travel between: 4 or 6.
	Underlay int
}

// DeviceName is the name of the device for a VNI.
func DeviceName(vni uint32) string { return "tweed." + strconv.FormatUint(uint64(vni), 10) }

// MAC is the VTEP's address on a node: locally administered, unicast, and always the same for one name, so that a
// device made anew needs nothing from anybody.
func MAC(node string) backend.MAC {
	sum := sha256.Sum256([]byte("tweed vtep " + node))
	m := backend.MAC(sum[:6])
	m[0] = m[0]&^1 | 2
	return m
}

// Judge refuses a lease that this backend cannot reach. What no two nodes may share is the VTEP's MAC: the FDB is keyed
// by it.
func (c Config) Judge(l subnet.Lease) (identity string, err error) {
	if err := backend.CheckType(l, Name); err != nil {
		return "", err
	}
	d, err := c.parse(l.Data)
	if err != nil {
		return "", fmt.Errorf("backend-data: %w", err)
	}
	switch {
	case d.VNI != c.VNI:
		return "", fmt.Errorf("backend-data: VNI %d where this node has %d: Backend.VNI must be the same on all nodes",
			d.VNI, c.VNI)
	case d.Port != c.Port:
		return "", fmt.Errorf("backend-data: UDP port %d where this node has %d: Backend.Port must be the same on all nodes",
			d.Port, c.Port)
	case l.Host.IsValid() && l.Host.Is4() != (c.Underlay == 4):
		return "", fmt.Errorf("host %s where this node sends over IPv%d: the underlay must have the same family on all nodes",
			l.Host, c.Underlay)
	}
	return d.MAC.String(), nil
}

// DeviceMTU is that of the device, and so of pods, in bytes. The kernel refuses one that the uplink has no room for.
func (c Config) DeviceMTU(up backend.Uplink) int {
	mtu := up.MTUWithin(c.MTU)
	if up.Local.Is4() {
		return mtu - overhead4
	}
	return mtu - overhead6
}

// Desired is what this node's kernel must hold to reach peers, given its own leases. The peers' leases have passed
// Judge. Those on up's Segment get a plain route, each family by itself. They keep their entries on the device, so that
// to change over, in either direction, is to replace one route.
//
// Pods and nodes reach each other through the tunnel with their own addresses, where these are inside. A peer of an older
// version is sent an address of this node's subnet, which it answers through the tunnel; that is between the two.
func (c Config) Desired(self, peers []subnet.Lease, up backend.Uplink) backend.State {
	dev := DeviceName(c.VNI)
	s := backend.State{
		Links:  map[string]backend.Link{dev: c.link(dev, up)},
		Addrs:  make(map[backend.AddrKey]backend.Addr, len(self)),
		Neighs: make(map[backend.NeighKey]backend.Neigh, len(peers)),
		FDB:    make(map[backend.FDBKey]backend.FDBEntry, len(peers)),
		Routes: make(map[backend.RouteKey]backend.Route, 2*len(peers)),
		Rules:  map[backend.RuleKey]backend.Rule{}, Sysctls: map[string]backend.Sysctl{},
	}
	// A host that does not forward IPv6 believes router advertisements, and one could come out of the tunnel.
	s.SetSysctl("net/ipv6/conf/"+dev+"/accept_ra", "0")
	c.own(s, self)
	joined := make(map[netip.Addr]time.Time, len(peers)) // of the nodes, by their addresses
	for p := range c.peers(peers, up) {
		route := p.reach(s, dev)
		switch {
		case p.direct:
			continue
		case !p.Inside.Known():
			c.meet(s, p, route, self)
			continue
		case !p.Inside.Has(p.NodeAddr()):
			continue
		}
		// Of two nodes that publish one address the older is believed, as with a subnet.
		if since, taken := joined[p.NodeAddr()]; taken && !p.Since.Before(since) {
			continue
		}
		joined[p.NodeAddr()] = p.Since
		route.RouteKey = nodeKey(p.NodeAddr())
		s.Routes[route.RouteKey] = route
	}
	// So that the check of where a packet comes from (rp_filter) goes by the mark too. It is for IPv4 alone.
	s.SetSysctl("net/ipv4/conf/"+dev+"/src_valid_mark", "1")
	// By IPv6 no router cuts a packet that is too large, so the device learns how much there is room for and says so of the
	// way to the peer's pods. Of what is forwarded, the kernel goes by that in IPv6 only, unless it is told to.
	if up.Local.Is6() && slices.ContainsFunc(self, func(l subnet.Lease) bool { return l.Subnet.Addr().Is4() }) {
		s.SetSysctl("net/ipv4/ip_forward_use_pmtu", "1")
	}
	return s
}

func (c Config) link(dev string, up backend.Uplink) backend.Link {
	v := backend.VXLAN{VNI: c.VNI, Port: c.Port, Local: up.Local, NoTxChecksum: c.NoTxChecksum}
	// With the address on lo, or several uplinks, routing has to choose where a packet leaves. It stays so when one of them
	// goes: a device that stands on the other would go with that.
	if len(up.Devs) == 1 && !up.Routed {
		v.Dev = up.Devs[0]
	}
	return backend.Link{Name: dev, Type: backend.KindVXLAN, MAC: MAC(c.Node), MTU: c.DeviceMTU(up), Up: true, VXLAN: v}
}

// ownAddr is the address that the node's packets into the tunnel have where its own is not inside. In IPv4 it is the
// subnet's first, which is the gateway that peers route to. In IPv6 the first is an anycast address of every router on
// the subnet (RFC 4291, section 2.6.1) and the second the bridge's, so it is the third.
func ownAddr(dev string, first netip.Addr) backend.Addr {
	if first.Is4() {
		return backend.Addr{AddrKey: backend.AddrKey{Dev: dev, Prefix: netip.PrefixFrom(first, 32)}}
	}
	third := first.Next().Next()
	return backend.Addr{AddrKey: backend.AddrKey{Dev: dev, Prefix: netip.PrefixFrom(third, 128)}, NoDAD: true}
}

// A peer is a lease of another node, and what leads to its pods.
type peer struct {
	subnet.Lease
	Data
	route  backend.Route
	direct bool // it has a plain route
}

// peers reads leases, and finds the ways to them.
func (c Config) peers(leases []subnet.Lease, up backend.Uplink) iter.Seq[peer] {
	return func(yield func(peer) bool) {
		for _, l := range leases {
			d, err := c.parse(l.Data)
			if err != nil {
				continue
			}
			p := peer{Lease: l, Data: d}
			p.route, p.direct = up.Segment.Route(l)
			if !yield(p) {
				return
			}
		}
	}
}

// reach adds to s what leads to the pods of a peer, and returns the route.
func (p peer) reach(s backend.State, dev string) backend.Route {
	fdb := backend.FDBKey{Dev: dev, MAC: p.MAC}
	s.FDB[fdb] = backend.FDBEntry{FDBKey: fdb, Dst: p.Host, Peer: p.Node}
	// IPv6 goes by the VTEP's link-local address, which is on the link without a word: replacing a route fails with
	// EINVAL where it has onlink and a route to the gateway exists on another device.
	gateway, onlink := p.MAC.LinkLocal(), false
	if p.Subnet.Addr().Is4() {
		gateway, onlink = p.Subnet.Addr(), true
	}
	neigh := backend.NeighKey{Dev: dev, Addr: gateway}
	s.Neighs[neigh] = backend.Neigh{NeighKey: neigh, MAC: p.MAC, Peer: p.Node}
	route := p.route
	if !p.direct {
		route.Dev, route.Via, route.Onlink = dev, gateway, onlink
	}
	s.Routes[route.RouteKey] = route
	return route
}

// Package bridge says what the kernel must hold for this node's own pods: the bridge they hang on, its gateway
// addresses, the route to them, and forwarding.
package bridge

import (
	"crypto/sha256"
	"net/netip"

	"tweed.dev/tweed/backend"
)

// A Config is the bridge of one node.
type Config struct {
	Name string // of the bridge
	Node string // this node's name
	MTU  int    // bytes
	// Own are the addresses that other nodes' pods know this node by, at most one a family. Its own pods do so too.
	Own []netip.Addr
}

// Gateway is the address that pods of a subnet send to: the one after its first.
func Gateway(subnet netip.Prefix) netip.Addr { return subnet.Addr().Next() }

// MAC is the bridge's address on a node, always the same for one name. A bridge without an address of its own takes the
// lowest of its ports', and pods would lose their gateway whenever that changes.
func MAC(node string) backend.MAC {
	sum := sha256.Sum256([]byte("tweed bridge " + node))
	m := backend.MAC(sum[:6])
	m[0] = m[0]&^1 | 2
	return m
}

// Desired is what this node's kernel must hold for pods with addresses of subnets.
func (c Config) Desired(subnets []netip.Prefix) backend.State {
	s := backend.State{
		Links: map[string]backend.Link{c.Name: {
			Name: c.Name, Type: backend.KindBridge, MAC: MAC(c.Node), MTU: c.MTU, Up: true,
			// Snooping without a querier forgets who listens, and then neighbour discovery fails. The packet filter has to
			// see bridged packets, or a service whose backend is on the same bridge is answered past it.
			Bridge: backend.Bridge{McastSnooping: false, CallIptables: true, CallIp6tables: true},
		}},
		Addrs:   map[backend.AddrKey]backend.Addr{},
		Routes:  map[backend.RouteKey]backend.Route{},
		Sysctls: map[string]backend.Sysctl{},
	}
	// A host that does not forward IPv6 believes router advertisements, and any pod can send one.
	s.SetSysctl("net/ipv6/conf/"+c.Name+"/accept_ra", "0")
	// The bridge asks its pods for their MAC from its link-local address, which it has from its first port on. Until
	// nobody has objected to that, for one second or two, nothing would reach the first pod by IPv6.
	s.SetSysctl("net/ipv6/conf/"+c.Name+"/accept_dad", "0")
	// A bridge whose MAC is changed, or changed back, says so. Else a pod that has learned the wrong one meanwhile would
	// send there for half a minute.
	s.SetSysctl("net/ipv4/conf/"+c.Name+"/arp_notify", "1")
	s.SetSysctl("net/ipv6/conf/"+c.Name+"/ndisc_notify", "1")
	// With the last copy of an address the kernel takes the routes from it. The uplink may lose its own at any time, and
	// that is no reason to cut off the pods here.
	for _, a := range c.Own {
		key := backend.AddrKey{Dev: c.Name, Prefix: netip.PrefixFrom(a, a.BitLen())}
		s.Addrs[key] = backend.Addr{AddrKey: key, NoDAD: a.Is6(), NoPrefixRoute: true}
	}
	for _, p := range subnets {
		c.serve(s, p)
	}
	return s
}

// serve adds to s what the pods of one subnet need.
func (c Config) serve(s backend.State, p netip.Prefix) {
	gateway := backend.AddrKey{Dev: c.Name, Prefix: netip.PrefixFrom(Gateway(p), p.Bits())}
	key := backend.RouteKey{Table: backend.MainTable, Dst: p}
	// The route is ours and not the kernel's, so that it is seen and repaired like all else.
	route := backend.Route{RouteKey: key, Dev: c.Name}
	for _, a := range c.Own {
		if a.Is4() == p.Addr().Is4() {
			route.Src = a
		}
	}
	if p.Addr().Is4() {
		s.Addrs[gateway] = backend.Addr{AddrKey: gateway, NoPrefixRoute: true}
		// Without it the kernel takes the bridge's first address, also for the pods of a second subnet. For IPv6 it takes
		// the one nearest to the destination (RFC 6724, section 5).
		if !route.Src.IsValid() {
			route.Src = Gateway(p)
		}
		s.SetSysctl("net/ipv4/ip_forward", "1")
	} else {
		s.Addrs[gateway] = backend.Addr{AddrKey: gateway, NoDAD: true, NoPrefixRoute: true}
		s.SetSysctl("net/ipv6/conf/all/forwarding", "1")
	}
	s.Routes[key] = route
}

package vxlan

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

// Inside says of which families a node's published address takes part in the overlay: pods and other nodes send to it
// through the tunnel, untranslated, and it sends from it. The zero Inside is that of a node which knows nothing of this:
// it has an address of its subnet in the tunnel instead, and its pods answer other nodes past the tunnel.
type Inside uint8

const (
	insideKnown Inside = 1 << iota
	inside4
	inside6
)

// Known reports whether the node sends its pods' packets for nodes that are inside through the tunnel.
func (i Inside) Known() bool { return i&insideKnown != 0 }

// Has reports whether the node's address of the family of a is inside.
func (i Inside) Has(a netip.Addr) bool { return a.IsValid() && i&insideFamily(a) != 0 }

func insideFamily(a netip.Addr) Inside {
	if a.Is4() {
		return inside4
	}
	return inside6
}

// text is a JSON list of families.
func (i Inside) text() string {
	var families []string
	if i&inside4 != 0 {
		families = append(families, "4")
	}
	if i&inside6 != 0 {
		families = append(families, "6")
	}
	return "[" + strings.Join(families, ",") + "]"
}

// MarshalJSON writes i as a list of families: [4,6].
func (i Inside) MarshalJSON() ([]byte, error) { return []byte(i.text()), nil }

// UnmarshalJSON reads what MarshalJSON writes. Families that it does not know are left for later versions.
func (i *Inside) UnmarshalJSON(b []byte) error {
	var families []int
	if err := json.Unmarshal(b, &families); err != nil {
		return err
	}
	if families == nil {
		return errors.New("not a list")
	}
	*i = insideKnown
	for _, f := range families {
		switch f {
		case 4:
			*i |= inside4
		case 6:
			*i |= inside6
		}
	}
	return nil
}

// insideOf reads what follows the MAC in a node's Data, where it is just as this node would write it, or one of an older
// version.
func insideOf(rest []byte) (i Inside, plain bool) {
	if string(rest) == `"}` {
		return 0, true
	}
	switch string(rest) {
	case `","inside":[]}`:
		return insideKnown, true
	case `","inside":[4]}`:
		return insideKnown | inside4, true
	case `","inside":[6]}`:
		return insideKnown | inside6, true
	case `","inside":[4,6]}`:
		return insideKnown | inside4 | inside6, true
	}
	return 0, false
}

// inside is this node's own: what it publishes and holds. What stands for a NAT in front of it is no address of its own.
func (c Config) inside() Inside {
	i := insideKnown
	for _, a := range c.Held {
		i |= insideFamily(a)
	}
	return i
}

// held is this node's own address of the family of a, if it is inside; else it is invalid.
func (c Config) held(a netip.Addr) netip.Addr {
	for _, h := range c.Held {
		if h.Is4() == a.Is4() {
			return h
		}
	}
	return netip.Addr{}
}

// own adds to s the addresses that this node has in the tunnel, and the rules by which its pods' packets find nodes
// there.
func (c Config) own(s backend.State, self []subnet.Lease) {
	dev := DeviceName(c.VNI)
	for _, l := range self {
		a := ownAddr(dev, l.Subnet.Addr())
		if held := c.held(l.Subnet.Addr()); held.IsValid() {
			a = heldAddr(dev, held)
		}
		s.Addrs[a.AddrKey] = a
		rule := nodesRule(l.Subnet)
		s.Rules[rule.RuleKey] = rule
	}
}

// meet has this node's packets to the pods of a peer of an older version leave with an address of this node's subnet, the
// one after the first, which its bridge has too: such a peer answers nothing else through the tunnel. In IPv4 that is an
// address toward the peer's gateway, which the kernel takes also for what another program masquerades. In IPv6 there is no
// such thing, and the route's preferred source serves the node's own packets alone.
func (c Config) meet(s backend.State, p peer, route backend.Route, self []subnet.Lease) {
	if !c.held(p.Subnet.Addr()).IsValid() {
		return // there is no other address in the tunnel
	}
	for _, l := range self {
		source := l.Subnet.Addr().Next()
		switch {
		case source.Is4() != p.Subnet.Addr().Is4():
		case source.Is4():
			key := backend.AddrKey{Dev: route.Dev, Prefix: single(source), Toward: route.Via}
			s.Addrs[key] = backend.Addr{AddrKey: key, NoPrefixRoute: true, Late: true, Peer: p.Node}
		default:
			route.Src = source
			s.Routes[route.RouteKey] = route
		}
	}
}

// heldAddr puts the node's own address on the device as well, so that its packets into the tunnel have it, those too that
// another program masquerades: the kernel then takes the address of the device that a packet leaves by.
func heldAddr(dev string, a netip.Addr) backend.Addr {
	key := backend.AddrKey{Dev: dev, Prefix: single(a)}
	return backend.Addr{AddrKey: key, NoDAD: a.Is6(), NoPrefixRoute: a.Is6()}
}

// nodeKey is that of the route to a node's own address. Before the kernel adds an IPv4 route it looks for another with the
// same way out, in a list of all that share their device, source and metric (fib_find_info in net/ipv4/fib_semantics.c),
// whatever their table. Where thousands of peers have two routes each, that is most of the time that they take to make. To
// a single address no other route leads, so the metric is free to part them.
func nodeKey(a netip.Addr) backend.RouteKey {
	key := backend.RouteKey{Table: backend.NodesTable, Dst: single(a)}
	if b := a.AsSlice(); a.Is4() {
		key.Metric = 1 + int(b[len(b)-1])
	}
	return key
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// rulePriority is the place of our rules among others: behind what is local to the host (0), in front of the main table
// (32766).
const rulePriority = backend.Owner

// nodesRule has packets of a subnet's pods looked up among the nodes that are inside, if they have the mark: the answers
// to what came to a node's own port and was sent on to a pod here do not, for they have to leave as that came.
func nodesRule(subnet netip.Prefix) backend.Rule {
	return backend.Rule{RuleKey: backend.RuleKey{
		Priority: rulePriority, From: subnet, Mark: backend.PodMark, Table: backend.NodesTable}}
}

package subnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// AcceptPatience is how long a subnet that not all nodes accept is left alone. A network that has grown reaches the nodes
// one after the other: a kubelet takes up to two minutes to bring a changed ConfigMap to its pods, and a daemon half a
// minute to look. A node that never accepts it delays others, and does not stop them.
const AcceptPatience = 3 * time.Minute

// Unaccepted says in which parts of r some node does not accept leases, as those nodes with a lease say that are not
// self, and which nodes these are. A network that has grown has such parts until all nodes have learned of it.
func (l Listing) Unaccepted(r Range, self string) (parts []netip.Prefix, by []string) {
	// Of two prefixes one holds the other, or they have nothing in common. So what all accept is one prefix, or none.
	common := r.Prefix
	known := map[string]netip.Prefix{} // by the field's text, since most nodes say the same
	for _, s := range l {
		if s.Node == self || s.Subnets == "" || s.Network == "" {
			continue
		}
		p, ok := known[s.Network]
		if !ok {
			p = accepted(s.Network, r)
			known[s.Network] = p
		}
		if p == r.Prefix {
			continue
		}
		by = append(by, s.Node)
		if !p.Overlaps(common) {
			common = netip.Prefix{}
		} else if p.Bits() > common.Bits() {
			common = p
		}
	}
	if !common.IsValid() {
		return []netip.Prefix{r.Prefix}, by
	}
	return around(common, r.Prefix), by
}

// accepted is the part of r that a node accepts which publishes text as its network; the invalid prefix for none. What
// cannot be read counts as missing: it is a Problem elsewhere.
func accepted(text string, r Range) netip.Prefix {
	networks, err := parseNetwork(text)
	if err != nil {
		return r.Prefix
	}
	p, ok := within(r, networks)
	switch {
	case !ok || !p.Overlaps(r.Prefix):
		return netip.Prefix{}
	case p.Bits() <= r.Prefix.Bits():
		return r.Prefix
	}
	return p
}

// around lists what p leaves of the prefix in, which holds it.
func around(p, in netip.Prefix) (out []netip.Prefix) {
	for bits := in.Bits() + 1; bits <= p.Bits(); bits++ {
		b := p.Addr().AsSlice()
		b[(bits-1)/8] ^= 0x80 >> ((bits - 1) % 8)
		a, _ := netip.AddrFromSlice(b)
		out = append(out, netip.PrefixFrom(a, bits).Masked())
	}
	return out
}

// NotAccepted says that only such subnets of r are free as the nodes by do not accept yet.
func NotAccepted(r Range, by []string) string {
	slices.Sort(by)
	names := strings.Join(by[:min(named, len(by))], ", ")
	if more := len(by) - named; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Sprintf("every free subnet of %s is one that not all nodes accept yet, because their pod network does not "+
		"hold it: %s", r.Prefix, names)
}

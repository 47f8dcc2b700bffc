package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
)

// UplinkChoice says how the uplink is to be found.
type UplinkChoice struct {
	// Iface is an interface's name; empty to find one.
	Iface string
	// Family is that of the underlay, 4 or 6; 0 for that of the first node address, or else for IPv4 where there is any.
	Family int
}

// chooseUplink finds the interfaces and the address that carry packets to other nodes: the interface asked for, or the
// one that holds an address of nodeAddrs, or the one that the default route leaves by.
func chooseUplink(choice UplinkChoice, ifaces []backend.Interface, nodeAddrs []netip.Addr) (backend.Uplink, error) {
	ifaces = slices.DeleteFunc(slices.Clone(ifaces), func(i backend.Interface) bool { return i.Ours })
	if choice.Family == 0 && len(nodeAddrs) > 0 {
		choice.Family = family(nodeAddrs[0])
	}
	iface, why, err := uplinkInterface(choice, ifaces, nodeAddrs)
	if err != nil {
		return backend.Uplink{}, err
	}
	addrs := publishable(iface, nodeAddrs)
	if choice.Family == 0 && len(addrs) > 0 {
		choice.Family = family(addrs[0])
	}
	local := slices.IndexFunc(addrs, func(a netip.Addr) bool { return family(a) == choice.Family })
	if local < 0 {
		return backend.Uplink{}, fmt.Errorf("uplink %s (%s) has no global %s address; give it one, "+
			"or choose another interface with --iface, or another family with Underlay in net-conf.json",
			iface.Name, why, familyName(choice.Family))
	}
	up := backend.Uplink{Devs: []string{iface.Name}, Local: addrs[local], Addrs: addrs, MTU: iface.MTU}
	if local != 0 {
		slices.Reverse(up.Addrs)
	}
	if iface.Name == "lo" { // an address that any uplink may carry
		up.Devs, up.MTU = nil, 0
		for _, i := range ifaces {
			if i.Up && (i.Default4 || i.Default6) {
				up.Devs = append(up.Devs, i.Name)
				up.MTU = smaller(up.MTU, i.MTU)
			}
		}
		if len(up.Devs) == 0 {
			return backend.Uplink{}, fmt.Errorf("the node's address %s is on lo and no default route tells which "+
				"interfaces carry it; choose one with --iface", up.Local)
		}
	}
	return up, nil
}

// uplinkInterface returns the interface, and why it is that one.
func uplinkInterface(choice UplinkChoice, ifaces []backend.Interface, nodeAddrs []netip.Addr) (backend.Interface, string, error) {
	find := func(ok func(backend.Interface) bool) (backend.Interface, bool) {
		i := slices.IndexFunc(ifaces, ok)
		if i < 0 {
			return backend.Interface{}, false
		}
		return ifaces[i], true
	}
	if choice.Iface != "" {
		iface, ok := find(func(i backend.Interface) bool { return i.Name == choice.Iface })
		if !ok {
			return iface, "", fmt.Errorf("--iface %q: no such interface here; there are %s", choice.Iface, names(ifaces))
		}
		return iface, "chosen by --iface", nil
	}
	for _, a := range nodeAddrs {
		if choice.Family != 0 && family(a) != choice.Family {
			continue
		}
		if iface, ok := find(func(i backend.Interface) bool { return holds(i, a) }); ok {
			return iface, "it holds the node's address " + a.String(), nil
		}
	}
	if iface, ok := find(func(i backend.Interface) bool {
		return i.Default4 && choice.Family != 6 || i.Default6 && choice.Family != 4
	}); ok {
		return iface, "the default route leaves by it", nil
	}
	// Without a default route the choice is still clear where only one interface could carry packets to anybody.
	var able []backend.Interface
	for _, i := range ifaces {
		if i.Up && i.Name != "lo" && len(publishable(i, nil)) > 0 {
			able = append(able, i)
		}
	}
	if len(able) == 1 {
		return able[0], "no other interface has an address", nil
	}
	return backend.Interface{}, "", fmt.Errorf("no uplink: no interface holds %s, there is no default route, and %d "+
		"interfaces have an address; choose one with --iface (there are %s)",
		cmp.Or(listing(nodeAddrs, " or "), "a node address"), len(able), names(ifaces))
}

// publishable returns the addresses of an interface that others can reach the node by, at most one a family. Those that
// the cluster knows the node by come first.
func publishable(iface backend.Interface, nodeAddrs []netip.Addr) []netip.Addr {
	var all []netip.Addr
	for _, a := range nodeAddrs {
		if holds(iface, a) {
			all = append(all, a)
		}
	}
	for _, p := range iface.Addrs {
		if a := p.Addr(); a.IsGlobalUnicast() {
			all = append(all, a)
		}
	}
	var addrs []netip.Addr
	for _, a := range all {
		if !slices.ContainsFunc(addrs, func(b netip.Addr) bool { return family(a) == family(b) }) {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

func holds(i backend.Interface, a netip.Addr) bool {
	return slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return p.Addr() == a })
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

func familyName(family int) string {
	switch family {
	case 4:
		return "IPv4"
	case 6:
		return "IPv6"
	}
	return "IPv4 or IPv6"
}

func names(ifaces []backend.Interface) string {
	var s []string
	for _, i := range ifaces {
		s = append(s, i.Name)
	}
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

// listing joins items for a sentence.
func listing[T fmt.Stringer](items []T, separator string) string {
	var s []string
	for _, i := range items {
		s = append(s, i.String())
	}
	return strings.Join(s, separator)
}

// smaller returns the smaller of two MTUs, where 0 means that none is known yet.
func smaller(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

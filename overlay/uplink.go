package overlay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
)

// A finder looks for the uplink in what there is.
type finder struct {
	UplinkChoice
	// family is that of the underlay, 4 or 6; 0 for that of the first node address, or else for IPv4 where there is any.
	family    int
	ifaces    []backend.Interface
	nodeAddrs []netip.Addr // by which the cluster knows this node
	path      backend.Path // to Reach
}

// found is an interface that is the uplink, or that holds the address of packets which leave by others.
type found struct {
	backend.Interface
	why string // it is that one
	// prefer are addresses that are to be published before others that it has.
	prefer []netip.Addr
}

// uplink finds the interfaces and the address that carry packets to other nodes.
func (f finder) uplink() (backend.Uplink, error) {
	f.ifaces = slices.DeleteFunc(slices.Clone(f.ifaces), func(i backend.Interface) bool { return i.Ours })
	if f.family == 0 && len(f.nodeAddrs) > 0 {
		f.family = family(f.nodeAddrs[0])
	}
	iface, err := f.find()
	if err != nil {
		return backend.Uplink{}, err
	}
	addrs := publishable(iface.Interface, slices.Concat(iface.prefer, f.nodeAddrs))
	if f.family == 0 && len(addrs) > 0 {
		f.family = family(addrs[0])
	}
	local := slices.IndexFunc(addrs, func(a netip.Addr) bool { return family(a) == f.family })
	if local < 0 {
		return backend.Uplink{}, fmt.Errorf("uplink %s (%s) has no global %s address; give it one, "+
			"or choose another interface with --iface, or another family with Underlay in net-conf.json",
			iface.Name, iface.why, familyName(f.family))
	}
	up := backend.Uplink{Devs: []string{iface.Name}, Local: addrs[local], Addrs: addrs, MTU: iface.MTU}
	if local != 0 {
		slices.Reverse(up.Addrs)
	}
	if !iface.Stub {
		return up, nil
	}
	return f.spread(up)
}

// spread makes the uplinks of one whose address is on lo or a dummy device: every interface that may carry its packets.
func (f finder) spread(up backend.Uplink) (backend.Uplink, error) {
	usable := func(i backend.Interface) bool { return i.Up && !i.Stub }
	carry := func(i backend.Interface) bool { return usable(i) && (i.Default4 || i.Default6) }
	if !slices.ContainsFunc(f.ifaces, carry) {
		carry = usable // routing may know more exact routes
	}
	up.Devs, up.MTU, up.Routed, up.Holder = nil, 0, true, up.Devs[0]
	for _, i := range f.ifaces {
		if carry(i) {
			up.Devs = append(up.Devs, i.Name)
			up.MTU = smaller(up.MTU, i.MTU)
		}
	}
	if len(up.Devs) == 0 {
		return backend.Uplink{}, fmt.Errorf("the node's address %s is on %s, and no interface is up that could carry "+
			"packets from it; set one up, or choose another address's with --iface", up.Local, up.Holder)
	}
	return up, nil
}

// bells are the devices whose changes may be the uplink's; nil stands for all, because where no uplink is found it may
// come to be anywhere.
func (p Plan) bells() *[]string {
	if p.Stale != nil && p.Stale.Reason == reasonNoUplink {
		return nil
	}
	devs := p.Uplink.Devs
	if p.Uplink.Routed {
		devs = append(slices.Clone(devs), p.Uplink.Holder)
	}
	return &devs
}

// find returns the interface that was asked for, or else the first that one could guess.
func (f finder) find() (found, error) {
	switch {
	case f.Iface != "":
		return f.named()
	case f.Match != nil:
		return f.matching()
	case f.Reach.IsValid():
		return f.reaching()
	}
	for _, a := range f.nodeAddrs {
		if f.family != 0 && family(a) != f.family {
			continue
		}
		if i, ok := f.first(func(i backend.Interface) bool { return holds(i, a) }); ok {
			return found{Interface: i, why: "it holds the node's address " + a.String()}, nil
		}
	}
	if i, ok := f.first(func(i backend.Interface) bool {
		return i.Default4 && f.family != 6 || i.Default6 && f.family != 4
	}); ok {
		return found{Interface: i, why: "the default route leaves by it"}, nil
	}
	return f.only()
}

func (f finder) first(ok func(backend.Interface) bool) (backend.Interface, bool) {
	i := slices.IndexFunc(f.ifaces, ok)
	if i < 0 {
		return backend.Interface{}, false
	}
	return f.ifaces[i], true
}

func (f finder) named() (found, error) {
	i, ok := f.first(func(i backend.Interface) bool { return i.Name == f.Iface })
	if !ok {
		return found{}, fmt.Errorf("--iface %q: no such interface here; there are %s", f.Iface, names(f.ifaces))
	}
	return found{Interface: i, why: "chosen by --iface"}, nil
}

// matching finds an interface by a pattern. One that is an address's is a wish for that address too.
func (f finder) matching() (found, error) {
	for _, i := range f.ifaces {
		if f.Match.MatchString(i.Name) {
			return found{Interface: i, why: "its name is matched by --iface-regex"}, nil
		}
		for _, p := range i.Addrs {
			if a := p.Addr(); f.Match.MatchString(a.String()) {
				why := fmt.Sprintf("its address %s is matched by --iface-regex", a)
				return found{Interface: i, why: why, prefer: []netip.Addr{a}}, nil
			}
		}
	}
	return found{}, fmt.Errorf("--iface-regex %q: matches no interface's name and no address here; there are %s",
		f.Match, withAddrs(f.ifaces))
}

// reaching finds the interface that packets to an address leave by, which on the host that has it is the one with it.
func (f finder) reaching() (found, error) {
	why := "packets to " + f.Reach.String() + " of --iface-can-reach leave by it"
	if i, ok := f.first(func(i backend.Interface) bool { return holds(i, f.Reach) }); ok {
		why = "it holds the address " + f.Reach.String() + " of --iface-can-reach"
		return found{Interface: i, why: why, prefer: []netip.Addr{f.Reach}}, nil
	}
	if f.path.Dev == "" {
		return found{}, fmt.Errorf("--iface-can-reach %q: no route leads there; give this node one, or name an address "+
			"that it can reach", f.Reach)
	}
	i, ok := f.first(func(i backend.Interface) bool { return i.Name == f.path.Dev })
	if !ok {
		return found{}, fmt.Errorf("--iface-can-reach %q: packets to it leave by %s, which is of the pod network itself; "+
			"name an address outside of it", f.Reach, f.path.Dev)
	}
	// Where routing gives the address of lo to packets, that is what they can be answered at.
	if stub, ok := f.first(func(i backend.Interface) bool { return i.Stub && holds(i, f.path.Src) }); ok {
		i = stub
		why = "packets to " + f.Reach.String() + " of --iface-can-reach have its address"
	}
	return found{Interface: i, why: why, prefer: []netip.Addr{f.path.Src}}, nil
}

// only finds the interface where no other could carry packets to anybody.
func (f finder) only() (found, error) {
	var able []backend.Interface
	for _, i := range f.ifaces {
		if i.Up && !i.Stub && len(publishable(i, nil)) > 0 {
			able = append(able, i)
		}
	}
	if len(able) == 1 {
		return found{Interface: able[0], why: "no other interface has an address"}, nil
	}
	return found{}, fmt.Errorf("no uplink: no interface holds %s, there is no default route, and %d "+
		"interfaces have an address; choose one with --iface (there are %s)",
		cmp.Or(listing(f.nodeAddrs, " or "), "a node address"), len(able), names(f.ifaces))
}

// publishable returns the addresses of an interface that others can reach the node by, at most one a family. Those of
// prefer come first.
func publishable(iface backend.Interface, prefer []netip.Addr) []netip.Addr {
	var all []netip.Addr
	for _, a := range prefer {
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
	return cmp.Or(strings.Join(s, ", "), "none")
}

func withAddrs(ifaces []backend.Interface) string {
	var s []string
	for _, i := range ifaces {
		s = append(s, i.Name)
		for _, p := range i.Addrs {
			s[len(s)-1] += " " + p.Addr().String()
		}
	}
	return cmp.Or(strings.Join(s, ", "), "none")
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

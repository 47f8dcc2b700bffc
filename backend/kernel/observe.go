package kernel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// Observe reads what this host holds of ours, and what is not ours but stands where something in want should. Of
// sysctls it reads those in want. What the kernel cannot tell or do it reports as wanted.
func (k *Kernel) Observe(ctx context.Context, want backend.State) (backend.Observed, error) {
	s := survey{
		Kernel: k, ctx: ctx, want: want, names: map[int]string{}, ours: map[int]link{}, inWay: map[any]bool{},
		alien: map[fib]*route{},
	}
	for _, look := range []func() error{
		s.lookAtLinks, s.lookAtAddrs, s.lookAtEntries, s.lookAtRules, s.lookAtSysctls, s.lookAtPorts,
	} {
		if err := ctx.Err(); err != nil {
			return backend.Observed{}, err
		}
		if err := look(); err != nil {
			return backend.Observed{}, err
		}
	}
	k.mu.Lock()
	k.inWay = s.inWay
	k.mu.Unlock()
	return s.have, nil
}

// A survey is one Observe on its way.
type survey struct {
	*Kernel
	ctx   context.Context
	want  backend.State
	have  backend.Observed
	names map[int]string // of all links that were met
	ours  map[int]link   // by index
	inWay map[any]bool   // as in Kernel

	digests    []uint64 // as in memory, of what has been read
	neighsSeen seen[backend.NeighKey, backend.Neigh]
	fdbSeen    seen[backend.FDBKey, backend.FDBEntry]
	routesSeen seen[backend.RouteKey, backend.Route]

	// alien has, for each table that was read as a whole, a route there that is not ours; nil where there is none.
	alien map[fib]*route
}

// A fib is one family of a routing table.
type fib struct {
	family uint8
	table  int
}

// stranger notes one: key is what it keeps us from, at what it is itself (see isInWay).
func (s *survey) stranger(key, at any, format string, args ...any) {
	s.inWay[at] = true
	s.have.Strangers = append(s.have.Strangers, backend.Stranger{Key: key, What: fmt.Sprintf(format, args...)})
}

func (s *survey) lookAtLinks() error {
	s.have.Links = map[string]backend.Link{}
	vxlans, err := s.links(string(backend.KindVXLAN))
	if err != nil {
		return err
	}
	bridges, err := s.links(string(backend.KindBridge))
	if err != nil {
		return err
	}
	s.mu.Lock()
	clear(s.index)
	s.mu.Unlock()
	for _, l := range append(vxlans, bridges...) {
		s.names[l.index] = l.name
		if !l.ours() {
			continue
		}
		s.ours[l.index] = l
		s.remember(l.name, l.index)
		value, err := s.value(l)
		if err != nil {
			return err
		}
		s.have.Links[l.name] = value
	}
	for name, want := range s.want.Links {
		if err := s.lookForStrangers(name, want, vxlans); err != nil {
			return err
		}
	}
	return nil
}

// value translates a link of ours.
func (s *survey) value(l link) (backend.Link, error) {
	want := s.want.Links[l.name]
	v := backend.Link{Name: l.name, Type: backend.LinkKind(l.kind), MAC: l.mac, MTU: l.mtu, Up: l.up}
	if l.is(backend.KindBridge) {
		v.Bridge = l.bridge
		if !l.hasSnooping {
			v.Bridge.McastSnooping = want.Bridge.McastSnooping
		}
		if !l.hasCall4 {
			v.Bridge.CallIptables = want.Bridge.CallIptables
		}
		if !l.hasCall6 {
			v.Bridge.CallIp6tables = want.Bridge.CallIp6tables
		}
		return v, nil
	}
	v.VXLAN = backend.VXLAN{VNI: l.vni, Port: l.port, Local: l.local, Learning: l.learning}
	if l.dev != 0 {
		dev, err := s.name(l.dev)
		if err != nil {
			return v, fmt.Errorf("looking for the device below %s: %w", l.name, err)
		}
		v.VXLAN.Dev = dev
	}
	on, err := txChecksum(s.ioctl, l.name)
	v.VXLAN.NoTxChecksum = err == nil && !on // one that cannot be told counts as on, as it is by itself
	return v, nil
}

// name returns the name of the link with an index.
func (s *survey) name(index int) (string, error) {
	if name, ok := s.names[index]; ok {
		return name, nil
	}
	l, err := s.linkByIndex(index)
	if err != nil {
		return "", err
	}
	s.names[index] = l.name
	return l.name, nil
}

func (s *survey) lookForStrangers(name string, want backend.Link, vxlans []link) error {
	have, there := s.have.Links[name]
	if !there {
		switch l, err := s.linkByName(name); {
		case errors.Is(err, unix.ENODEV):
		case err != nil:
			return err
		default:
			s.stranger(name, l.index, "a device called %s is there and is not ours (%s, group %d); remove it (ip link del %s) "+
				"or give it another name (ip link set dev %s name ...)", name, kindName(l), l.group, name, name)
			return nil
		}
	}
	if want.Type != backend.KindVXLAN ||
		there && have.VXLAN.VNI == want.VXLAN.VNI && have.VXLAN.Port == want.VXLAN.Port &&
			have.VXLAN.Local.Is4() == want.VXLAN.Local.Is4() {
		return nil
	}
	if l, ok := clash(want.VXLAN, vxlans); ok {
		s.stranger(name, l.index, "%s", clashText(l))
	}
	return nil
}

func kindName(l link) string {
	if l.kind == "" {
		return "a physical device or one end of a tunnel"
	}
	return "of kind " + l.kind
}

// clash returns the device that keeps the kernel from creating want: it allows one VXLAN device for each VNI, UDP port
// and underlay family.
func clash(want backend.VXLAN, vxlans []link) (link, bool) {
	for _, l := range vxlans {
		if !l.ours() && l.vni == want.VNI && l.port == want.Port && l.underlay6() == want.Local.Is6() {
			return l, true
		}
	}
	return link{}, false
}

func clashText(l link) string {
	return fmt.Sprintf("VXLAN device %s holds VNI %d on UDP port %d; delete it (ip link del %s, if what made it no "+
		"longer runs) or set another Backend.VNI or Backend.Port in net-conf.json", l.name, l.vni, l.port, l.name)
}

func (s *survey) lookAtAddrs() error {
	var led map[int]bool // links with an IPv4 address that is for all gateways; the kernel tells them in their order
	reset := func() {
		s.have.Addrs, led = make(map[backend.AddrKey]backend.Addr, len(s.want.Addrs)), map[int]bool{}
	}
	err := s.conn.dump(unix.RTM_GETADDR, make(message, unix.SizeofIfAddrmsg), reset, func(b []byte) {
		a, ok := parseAddr(b)
		l, ours := s.ours[a.index]
		if !ok || !ours {
			return
		}
		key := backend.AddrKey{Dev: l.name, Prefix: a.prefix, Toward: a.toward}
		led[a.index] = led[a.index] || a.prefix.Addr().Is4() && !a.toward.IsValid()
		_, wanted := s.want.Addrs[key]
		if a.prefix.Addr().IsLinkLocalUnicast() && !wanted { // the kernel's
			return
		}
		s.have.Addrs[key] = backend.Addr{
			AddrKey:       key,
			NoDAD:         a.flags&unix.IFA_F_NODAD != 0,
			NoPrefixRoute: a.flags&unix.IFA_F_NOPREFIXROUTE != 0,
			Late:          a.toward.Is4() && led[a.index],
		}
	})
	return wrap(err, "listing addresses")
}

// lookAtNeighs reads neighbours and FDB entries of our VXLAN devices. The bridge's are its own: it learns them.
func (s *survey) lookAtNeighs() error {
	s.neighsSeen, s.fdbSeen = newSeen(s.want.Neighs), newSeen(s.want.FDB)
	err := s.eachNeigh(func(l link, b []byte) {
		s.digests = append(s.digests, s.neighDigest(b))
		n, ok := parseNeigh(b)
		switch {
		case ok && n.family == unix.AF_BRIDGE:
			s.addFDB(l, n)
		case ok:
			s.addNeigh(l, n)
		}
	})
	s.have.Neighs, s.have.FDB = s.neighsSeen.all(), s.fdbSeen.all()
	return err
}

// eachNeigh calls take for the message of each permanent neighbour and FDB entry of our VXLAN devices. Nothing needs to be
// forgotten before another try: what is gone by then is found out by the next pass.
func (s *survey) eachNeigh(take func(l link, b []byte)) error {
	for _, index := range slices.Sorted(maps.Keys(s.ours)) {
		l := s.ours[index]
		if !l.is(backend.KindVXLAN) {
			continue
		}
		for _, family := range [...]uint8{unix.AF_UNSPEC, unix.AF_BRIDGE} {
			m := make(message, unix.SizeofNdMsg, 32)
			m[0] = family
			m.u32(unix.NDA_IFINDEX, uint32(index))
			err := s.conn.dump(unix.RTM_GETNEIGH, m, func() {}, func(b []byte) {
				if isPermanent(b, index) {
					take(l, b)
				}
			})
			if err != nil {
				return fmt.Errorf("listing neighbours and the FDB of %s: %w", l.name, err)
			}
		}
	}
	return nil
}

func (s *survey) addNeigh(l link, n neighbour) {
	if n.dst.IsValid() {
		v := backend.Neigh{NeighKey: backend.NeighKey{Dev: l.name, Addr: n.dst}, MAC: n.mac}
		want, ok := s.want.Neighs[v.NeighKey]
		v.Peer = want.Peer
		s.neighsSeen.add(v.NeighKey, v, ok && v == want)
	}
}

func (s *survey) addFDB(l link, n neighbour) {
	key := backend.FDBKey{Dev: l.name, MAC: n.mac}
	if n.odd { // with another VNI, port or device the same destination is another place
		n.dst = netip.Addr{}
	}
	v := backend.FDBEntry{FDBKey: key, Dst: n.dst}
	want, ok := s.want.FDB[key]
	v.Peer = want.Peer
	s.fdbSeen.add(key, v, ok && v == want)
}

func (s *survey) lookAtRules() error {
	var rules []rule
	m := make(message, sizeofRuleMsg)
	err := s.conn.dump(unix.RTM_GETRULE, m, func() { rules = rules[:0] }, func(b []byte) {
		if r, ok := parseRule(b); ok {
			rules = append(rules, r)
		}
	})
	if err != nil {
		return fmt.Errorf("listing rules: %w", err)
	}
	s.have.Rules = map[backend.RuleKey]backend.Rule{}
	for _, r := range rules {
		if r.protocol == backend.Owner {
			s.have.Rules[r.key] = backend.Rule{RuleKey: r.key}
			continue
		}
		for key := range s.want.Rules {
			if key.Table == r.key.Table && key.Table != backend.MainTable && ruleFamily(key) == ruleFamily(r.key) {
				s.stranger(key, r.key, "a rule that is not ours (protocol %d, priority %d) leads to the same table %d; remove it "+
					"(ip rule del priority %d)", r.protocol, r.key.Priority, r.key.Table, r.key.Priority)
			}
		}
	}
	return s.lookForStrangersBehindRules()
}

// lookForStrangersBehindRules keeps our rules from sending packets into a table that somebody else uses. While a rule
// stands, nobody looks for the routes of others behind it unless one of ours is missing there.
func (s *survey) lookForStrangersBehindRules() error {
	for key := range s.want.Rules {
		at := fib{ruleFamily(key), key.Table}
		if at.table == backend.MainTable {
			continue
		}
		if _, there := s.have.Rules[key]; !there {
			if err := s.lookForAliens(at); err != nil {
				return err
			}
		}
		if r := s.alien[at]; r != nil {
			s.stranger(key, r.key, "table %d holds a route that is not ours; remove it: ip route del %s", at.table, s.describe(*r))
		}
	}
	return nil
}

// lookForAliens reads all that is in a table, unless that was done before.
func (s *survey) lookForAliens(at fib) error {
	if _, done := s.alien[at]; done {
		return nil
	}
	routes, err := s.routes(at.family, 0, at.table)
	if err != nil {
		return err
	}
	s.noteAlien(at, routes)
	return nil
}

// noteAlien notes which of all routes of a table is not ours. In the main table others are at home.
func (s *survey) noteAlien(at fib, routes []route) {
	s.alien[at] = nil
	i := slices.IndexFunc(routes, func(r route) bool { return r.protocol != backend.Owner })
	if i >= 0 && at.table != backend.MainTable {
		s.alien[at] = &routes[i]
	}
}

func (s *survey) lookAtSysctls() error {
	s.have.Sysctls = make(map[string]backend.Sysctl, len(s.want.Sysctls))
	for name := range s.want.Sysctls {
		value, err := s.readSysctl(name)
		if errors.Is(err, os.ErrNotExist) { // its device is not there yet
			continue
		}
		if err != nil {
			return err
		}
		s.have.Sysctls[name] = backend.Sysctl{Name: name, Value: value}
	}
	return nil
}

func (k *Kernel) readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.root, name))
	if err != nil {
		return "", fmt.Errorf("reading a sysctl: %w", err)
	}
	return strings.Join(strings.Fields(string(b)), " "), nil
}

func wrap(err error, doing string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}

package kernel

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// A Fake is a host's network in memory, for tests. It refuses what the kernel refuses and takes away what the kernel
// takes away. It is safe for use by several goroutines.
type Fake struct {
	mu sync.Mutex
	// own is what carries our mark, others what does not.
	own, others backend.State
	added       []backend.AddrKey // of own.Addrs, in their order
	uplinks     map[string]backend.Interface
	filter      masq.Ruleset
	counts      map[masq.Chain][]uint64
	advertised  []string

	ops   []backend.Op
	fail  func(backend.Op) error
	bells map[*bell]bool
}

type bell struct {
	uplink func(string) bool
	ring   func()
}

// NewFake makes a host that has nothing but lo.
func NewFake() *Fake {
	lo := backend.Interface{Name: "lo", MTU: 65536, Up: true, Stub: true}
	return &Fake{
		own: emptyState(), others: emptyState(), bells: map[*bell]bool{},
		uplinks: map[string]backend.Interface{lo.Name: lo},
	}
}

func emptyState() backend.State {
	return backend.State{
		Links:   map[string]backend.Link{},
		Addrs:   map[backend.AddrKey]backend.Addr{},
		Neighs:  map[backend.NeighKey]backend.Neigh{},
		FDB:     map[backend.FDBKey]backend.FDBEntry{},
		Routes:  map[backend.RouteKey]backend.Route{},
		Rules:   map[backend.RuleKey]backend.Rule{},
		Sysctls: map[string]backend.Sysctl{},
		Ports:   map[string]backend.Port{},
	}
}

// Observe is as in Kernel.
func (f *Fake) Observe(ctx context.Context, want backend.State) (backend.Observed, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	have := backend.Observed{State: f.copyOwn()}
	have.Sysctls = map[string]backend.Sysctl{}
	for name := range want.Sysctls {
		if s, ok := f.sysctl(name); ok {
			have.Sysctls[name] = s
		}
	}
	have.Ports = maps.Clone(f.own.Ports)
	maps.DeleteFunc(have.Ports, func(name string, _ backend.Port) bool { return want.Ports[name] == backend.Port{} })
	have.Strangers = f.strangers(want)
	return have, ctx.Err()
}

func (f *Fake) copyOwn() backend.State {
	return backend.State{
		Links: maps.Clone(f.own.Links), Addrs: maps.Clone(f.own.Addrs), Neighs: maps.Clone(f.own.Neighs),
		FDB: maps.Clone(f.own.FDB), Routes: maps.Clone(f.own.Routes), Rules: maps.Clone(f.own.Rules),
	}
}

// strangers lists what is not ours at the keys of want.
func (f *Fake) strangers(want backend.State) []backend.Stranger {
	var found []backend.Stranger
	note := func(key any, format string, args ...any) {
		found = append(found, backend.Stranger{Key: key, What: fmt.Sprintf(format, args...)})
	}
	for name, w := range want.Links {
		_, up := f.uplinks[name]
		_, other := f.others.Links[name]
		clash := rival(w, f.others.Links)
		switch {
		case up || other:
			note(name, "%s exists and is not ours; delete it: ip link del %s", name, name)
		case clash != "":
			note(name, "%s has VNI %d and port %d; delete it (ip link del %s) or choose another Backend.VNI or Backend.Port",
				clash, w.VXLAN.VNI, w.VXLAN.Port, clash)
		}
	}
	for key := range want.Routes {
		if _, there := f.others.Routes[key]; there {
			note(key, "a route to %s exists and is not ours; delete it", key.Dst)
		}
	}
	for key := range want.Rules {
		for other := range f.others.Rules {
			if other.Table == key.Table && key.Table != backend.MainTable && ruleFamily(other) == ruleFamily(key) {
				note(key, "a rule with priority %d leads to table %d and is not ours; delete it", other.Priority, other.Table)
			}
		}
		for other := range f.others.Routes {
			if other.Table == key.Table && key.Table != backend.MainTable && family(other.Dst.Addr()) == ruleFamily(key) {
				note(key, "a route to %s is in table %d and is not ours; delete it", other.Dst, other.Table)
			}
		}
	}
	return found
}

// rival names the link among links that keeps the VXLAN device l from being.
func rival(l backend.Link, links map[string]backend.Link) string {
	for name, o := range links {
		if name != l.Name && o.Type == backend.KindVXLAN && l.Type == backend.KindVXLAN && o.VXLAN.VNI == l.VXLAN.VNI &&
			o.VXLAN.Port == l.VXLAN.Port && o.VXLAN.Local.Is4() == l.VXLAN.Local.Is4() {
			return name
		}
	}
	return ""
}

// ObserveFilter is as in Kernel.
func (f *Fake) ObserveFilter(ctx context.Context, _ masq.Ruleset) (masq.Ruleset, error) {
	have, err := f.ObserveAllFilters(ctx)
	maps.DeleteFunc(have.Chains, func(c masq.Chain, _ []masq.Rule) bool { return c.Variant != "" })
	maps.DeleteFunc(have.Jumps, func(j masq.Jump, _ bool) bool { return j.Chain.Variant != "" })
	return have, err
}

// ObserveAllFilters is as in Kernel, but for the iptables in use, whose variant a Fake does not name.
func (f *Fake) ObserveAllFilters(ctx context.Context) (masq.Ruleset, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	have := f.filter
	have.Chains, have.Jumps, have.Tables = maps.Clone(have.Chains), maps.Clone(have.Jumps), maps.Clone(have.Tables)
	have.Guests, have.Hosts = maps.Clone(have.Guests), maps.Clone(have.Hosts)
	have.Sets, have.Taken = maps.Clone(have.Sets), maps.Clone(have.Taken)
	return have, ctx.Err()
}

// SetFilterHost gives the packet filter a chain of others that rules of ours can be put in.
func (f *Fake) SetFilterHost(c masq.Chain, h masq.Host) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.filter.Hosts = maps.Clone(f.filter.Hosts)
	if f.filter.Hosts == nil {
		f.filter.Hosts = map[masq.Chain]masq.Host{}
	}
	f.filter.Hosts[c] = h
}

// RuleCounts is as in Kernel. What was not set is 0.
func (f *Fake) RuleCounts(ctx context.Context, c masq.Chain) ([]uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.Family == masq.Bridge {
		return slices.Clone(f.counts[c]), ctx.Err()
	}
	counts := make([]uint64, len(f.filter.Chains[c]))
	copy(counts, f.counts[c])
	return counts, ctx.Err()
}

// SetRuleCounts says what the rules of a chain have matched.
func (f *Fake) SetRuleCounts(c masq.Chain, counts ...uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counts == nil {
		f.counts = map[masq.Chain][]uint64{}
	}
	f.counts[c] = counts
}

// ObserveAll is as in Kernel. A Fake has no pods.
func (f *Fake) ObserveAll(ctx context.Context) (backend.State, error) {
	have, err := f.Observe(ctx, backend.State{})
	have.Sysctls = nil
	return have.State, err
}

// Interfaces is as in Kernel.
func (f *Fake) Interfaces(ctx context.Context) ([]backend.Interface, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []backend.Interface
	for _, name := range slices.Sorted(maps.Keys(f.uplinks)) {
		i := f.uplinks[name]
		i.Addrs, i.Ways = slices.Clone(i.Addrs), f.ways(i)
		all = append(all, i)
	}
	for _, links := range []map[string]backend.Link{f.own.Links, f.others.Links} {
		for _, name := range slices.Sorted(maps.Keys(links)) {
			_, ours := f.own.Links[name]
			i := backend.Interface{Name: name, MTU: links[name].MTU, Up: links[name].Up, Ours: ours}
			i.Ways = f.ways(i)
			all = append(all, i)
		}
	}
	return all, ctx.Err()
}

// RouterAdvertised is as in Kernel.
func (f *Fake) RouterAdvertised(ctx context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var devs []string
	for _, dev := range f.advertised {
		if s, ok := f.sysctl("net/ipv6/conf/" + dev + "/accept_ra"); ok && s.Value == "1" {
			devs = append(devs, dev)
		}
	}
	return devs, ctx.Err()
}

// Watch is as in Kernel.
func (f *Fake) Watch(ctx context.Context, uplink func(dev string) bool, ring func()) error {
	b := &bell{uplink, ring}
	f.mu.Lock()
	f.bells[b] = true
	f.mu.Unlock()
	ring()
	<-ctx.Done()
	f.mu.Lock()
	delete(f.bells, b)
	f.mu.Unlock()
	return nil
}

// Close is as in Kernel.
func (f *Fake) Close() {}

// Apply is as in Kernel.
func (f *Fake) Apply(ctx context.Context, op backend.Op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	fail := f.fail
	f.mu.Unlock()
	if fail != nil {
		if err := fail(op); err != nil {
			return err
		}
	}
	return f.change(op, true)
}

// ApplyAll is as in Kernel.
func (f *Fake) ApplyAll(ctx context.Context, ops []backend.Op) []error {
	errs := make([]error, len(ops))
	for i, op := range ops {
		errs[i] = f.Apply(ctx, op)
	}
	return errs
}

// ByHand makes a change as somebody else at this host would: it is not among Ops, and Fail does not see it.
func (f *Fake) ByHand(op backend.Op) error { return f.change(op, false) }

func (f *Fake) change(op backend.Op, count bool) error {
	f.mu.Lock()
	err := f.apply(op)
	if err == nil && count {
		f.ops = append(f.ops, op)
	}
	f.mu.Unlock()
	if err == nil {
		f.Ring()
	}
	return err
}

// Ops lists what Apply has done so far.
func (f *Fake) Ops() []backend.Op {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.ops)
}

// Fail makes Apply return what fail returns, where that is an error, and do nothing then. With nil it stops.
func (f *Fake) Fail(fail func(backend.Op) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

// Ring rings for everybody who watches.
func (f *Fake) Ring() { f.ring(func(*bell) bool { return true }) }

func (f *Fake) ring(which func(*bell) bool) {
	f.mu.Lock()
	bells := slices.Collect(maps.Keys(f.bells))
	f.mu.Unlock()
	for _, b := range bells {
		if which(b) {
			b.ring()
		}
	}
}

// SetInterface adds an interface that is not ours, or makes the one of that name so.
func (f *Fake) SetInterface(i backend.Interface) {
	f.mu.Lock()
	was := f.uplinks[i.Name]
	i.Addrs = slices.Clone(i.Addrs)
	f.uplinks[i.Name] = i
	if was.Up && !i.Up {
		f.loseRoutes(func(r backend.Route) bool { return r.Dev == i.Name })
	}
	if has4(was) && !has4(i) {
		f.loseRoutes(func(r backend.Route) bool { return r.Dev == i.Name && r.Dst.Addr().Is4() })
	}
	for _, a := range was.Addrs {
		f.loseSource(a.Addr())
	}
	f.mu.Unlock()
	f.ring(func(b *bell) bool { return b.uplink(i.Name) })
}

func has4(i backend.Interface) bool {
	return slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return p.Addr().Is4() })
}

// RemoveInterface removes an interface that is not ours, and with it VXLAN devices that stand on it.
func (f *Fake) RemoveInterface(name string) {
	f.mu.Lock()
	was := f.uplinks[name]
	delete(f.uplinks, name)
	before := len(f.own.Links)
	f.loseLink(name)
	for _, a := range was.Addrs {
		f.loseSource(a.Addr())
	}
	ours := len(f.own.Links) != before
	f.mu.Unlock()
	f.ring(func(b *bell) bool { return ours || b.uplink(name) })
}

// SetAdvertised says which interfaces have routes by router advertisement.
func (f *Fake) SetAdvertised(devs ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.advertised = devs
}

// AddStranger adds a link, route or rule that is not ours. It rings no bell: nothing of ours has changed.
func (f *Fake) AddStranger(o backend.Object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch o := o.(type) {
	case backend.Link:
		f.others.Links[o.Name] = o
	case backend.Route:
		f.others.Routes[o.RouteKey] = o
	case backend.Rule:
		f.others.Rules[o.RuleKey] = o
	}
}

// RemoveStranger removes what AddStranger added.
func (f *Fake) RemoveStranger(o backend.Object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch o := o.(type) {
	case backend.Link:
		delete(f.others.Links, o.Name)
		f.loseLink(o.Name)
	case backend.Route:
		delete(f.others.Routes, o.RouteKey)
	case backend.Rule:
		delete(f.others.Rules, o.RuleKey)
	}
}

// Strangers returns the links, routes and rules that are not ours.
func (f *Fake) Strangers() backend.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return backend.State{
		Links: maps.Clone(f.others.Links), Routes: maps.Clone(f.others.Routes), Rules: maps.Clone(f.others.Rules),
	}
}

func (f *Fake) apply(op backend.Op) error {
	switch o := op.What.(type) {
	case backend.Link:
		return f.applyLink(op.Do, o)
	case backend.Addr:
		return f.applyAddr(op.Do, o)
	case backend.Neigh:
		return f.applyNeigh(op.Do, o)
	case backend.FDBEntry:
		return f.applyFDB(op.Do, o)
	case backend.Route:
		return f.applyRoute(op.Do, o)
	case backend.Rule:
		return f.applyRule(op.Do, o)
	case backend.Sysctl:
		return f.applySysctl(o)
	case backend.Port:
		return f.applyPort(o)
	}
	return f.filter.Apply(op)
}

// link reports whether a link of any owner exists and is up.
func (f *Fake) link(name string) (there, up bool) {
	if i, ok := f.uplinks[name]; ok {
		return true, i.Up
	}
	if l, ok := f.own.Links[name]; ok {
		return true, l.Up
	}
	l, ok := f.others.Links[name]
	return ok, l.Up
}

func (f *Fake) applyLink(do backend.Verb, l backend.Link) error {
	old, ours := f.own.Links[l.Name]
	if do == backend.Delete {
		if !ours {
			return syscall.ENODEV
		}
		f.loseLink(l.Name)
		return nil
	}
	if there, _ := f.link(l.Name); do == backend.Add && there {
		return syscall.EEXIST
	}
	if do == backend.Change && !ours {
		return syscall.ENODEV
	}
	if err := f.checkLink(do, &l, old); err != nil {
		return err
	}
	f.own.Links[l.Name] = l
	if do == backend.Change {
		f.changedLink(l, old)
	}
	return nil
}

func (f *Fake) applyPort(p backend.Port) error {
	_, there := f.own.Ports[p.Name]
	if _, bridge := f.own.Links[p.Bridge]; !there || !bridge {
		return syscall.ENODEV
	}
	p.Others = false
	f.own.Ports[p.Name] = p
	return nil
}

// AddPort puts a pod's veth there, a port of nothing.
func (f *Fake) AddPort(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.own.Ports[name] = backend.Port{Name: name}
}

// checkLink refuses what the driver refuses, and lowers the MTU of a new device to what its underlay has room for.
func (f *Fake) checkLink(do backend.Verb, l *backend.Link, old backend.Link) error {
	if l.Type == backend.KindBridge && do == backend.Change && old.Type == l.Type {
		return nil
	}
	if do == backend.Change && (old.Type != l.Type || old.VXLAN.VNI != l.VXLAN.VNI || old.VXLAN.Port != l.VXLAN.Port ||
		old.VXLAN.Local.Is4() != l.VXLAN.Local.Is4() || old.VXLAN.Dev != "" && l.VXLAN.Dev == "") {
		return syscall.EOPNOTSUPP
	}
	if l.Type != backend.KindVXLAN {
		return nil
	}
	if name := rival(*l, f.own.Links) + rival(*l, f.others.Links); name != "" {
		return fmt.Errorf("%s has the same VNI and port: %w", name, syscall.EEXIST)
	}
	if l.VXLAN.Dev == "" {
		return nil
	}
	under, there := f.uplinks[l.VXLAN.Dev]
	if !there {
		return fmt.Errorf("no underlay device %s: %w", l.VXLAN.Dev, syscall.ENODEV)
	}
	room := under.MTU - 50
	if l.VXLAN.Local.Is6() {
		room = under.MTU - 70
	}
	if l.MTU > room && do == backend.Change && l.MTU != old.MTU {
		return syscall.EINVAL
	}
	if do == backend.Add || l.VXLAN != old.VXLAN {
		l.MTU = min(l.MTU, room)
	}
	return nil
}

// changedLink takes away what does not outlive a change.
func (f *Fake) changedLink(l, old backend.Link) {
	down := old.Up && !l.Up
	if down || l.MAC != old.MAC {
		f.loseNeighs(func(n backend.Neigh) bool { return n.Dev == l.Name })
	}
	if down {
		f.loseRoutes(func(r backend.Route) bool { return r.Dev == l.Name })
		f.loseAddrs(func(a backend.Addr) bool { return a.Dev == l.Name && a.Prefix.Addr().Is6() })
	}
}

// loseLink takes a link away with all that hangs on it.
func (f *Fake) loseLink(name string) {
	delete(f.own.Links, name)
	f.loseAddrs(func(a backend.Addr) bool { return a.Dev == name })
	f.loseNeighs(func(n backend.Neigh) bool { return n.Dev == name })
	maps.DeleteFunc(f.own.FDB, func(k backend.FDBKey, _ backend.FDBEntry) bool { return k.Dev == name })
	f.loseRoutes(func(r backend.Route) bool { return r.Dev == name })
	maps.DeleteFunc(f.own.Sysctls, func(path string, _ backend.Sysctl) bool { return sysctlDevice(path) == name })
	for port, p := range f.own.Ports {
		if p.Bridge == name {
			f.own.Ports[port] = backend.Port{Name: port, Up: p.Up}
		}
	}
	for _, l := range slices.Collect(maps.Values(f.own.Links)) {
		if l.VXLAN.Dev == name {
			f.loseLink(l.Name)
		}
	}
}

func (f *Fake) loseNeighs(which func(backend.Neigh) bool) {
	maps.DeleteFunc(f.own.Neighs, func(_ backend.NeighKey, n backend.Neigh) bool { return which(n) })
}

// loseRoutes takes routes away, whoever made them.
func (f *Fake) loseRoutes(which func(backend.Route) bool) {
	for _, routes := range []map[backend.RouteKey]backend.Route{f.own.Routes, f.others.Routes} {
		maps.DeleteFunc(routes, func(_ backend.RouteKey, r backend.Route) bool { return which(r) })
	}
}

func (f *Fake) loseAddrs(which func(backend.Addr) bool) {
	for _, a := range slices.Collect(maps.Values(f.own.Addrs)) {
		if which(a) {
			f.loseAddr(a)
		}
	}
}

// loseAddr takes an address away; with an interface's last IPv4 address go its IPv4 routes and neighbours
// (fib_disable_ip).
func (f *Fake) loseAddr(a backend.Addr) {
	delete(f.own.Addrs, a.AddrKey)
	f.added = slices.DeleteFunc(f.added, func(k backend.AddrKey) bool { return k == a.AddrKey })
	f.line()
	addr := a.Prefix.Addr()
	f.loseSource(addr)
	if addr.Is6() {
		return
	}
	for k := range f.own.Addrs {
		if k.Dev == a.Dev && k.Prefix.Addr().Is4() {
			return
		}
	}
	f.loseNeighs(func(n backend.Neigh) bool { return n.Dev == a.Dev && n.Addr.Is4() })
	f.loseRoutes(func(r backend.Route) bool { return r.Dev == a.Dev && r.Dst.Addr().Is4() })
}

// loseSource takes IPv4 routes from an address away (fib_sync_down_addr) and leaves IPv6 routes without it
// (fib6_remove_prefsrc), unless this host still has it.
func (f *Fake) loseSource(a netip.Addr) {
	if f.local(a) {
		return
	}
	f.loseRoutes(func(r backend.Route) bool { return r.Src == a && a.Is4() && r.Table == backend.MainTable })
	for k, r := range f.own.Routes {
		if r.Src == a && a.Is6() {
			r.Src = netip.Addr{}
			f.own.Routes[k] = r
		}
	}
}

// local reports whether a is an address of this host.
func (f *Fake) local(a netip.Addr) bool {
	for k := range f.own.Addrs {
		if k.Prefix.Addr() == a {
			return true
		}
	}
	for _, i := range f.uplinks {
		if slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return true
		}
	}
	return false
}

func (f *Fake) applyAddr(do backend.Verb, a backend.Addr) error {
	_, there := f.own.Addrs[a.AddrKey]
	switch do {
	case backend.Change:
		return syscall.EOPNOTSUPP // of an IPv4 address the kernel changes nothing, and says nothing
	case backend.Delete:
		if !there {
			return syscall.EADDRNOTAVAIL
		}
		f.loseAddr(a)
		return nil
	}
	if up, _ := f.link(a.Dev); !up {
		return syscall.ENODEV
	}
	for k := range f.own.Addrs {
		twice := k.Prefix.Addr().Is6() && k.Prefix.Addr() == a.Prefix.Addr()
		if k == a.AddrKey || k.Dev == a.Dev && twice {
			return syscall.EEXIST
		}
	}
	a.Peer = ""
	f.own.Addrs[a.AddrKey] = a
	f.added = append(f.added, a.AddrKey)
	f.line()
	return nil
}

// line says of addresses toward a gateway whether they stand behind one that is for all.
func (f *Fake) line() {
	led := map[string]bool{}
	for _, k := range f.added {
		a := f.own.Addrs[k]
		led[k.Dev] = led[k.Dev] || k.Prefix.Addr().Is4() && !k.Toward.IsValid()
		a.Late = k.Toward.Is4() && led[k.Dev]
		f.own.Addrs[k] = a
	}
}

func (f *Fake) applyNeigh(do backend.Verb, n backend.Neigh) error {
	if _, there := f.own.Neighs[n.NeighKey]; do != backend.Add && !there {
		return syscall.ENOENT
	}
	if do == backend.Delete {
		delete(f.own.Neighs, n.NeighKey)
		return nil
	}
	if there, _ := f.link(n.Dev); !there {
		return syscall.ENODEV
	}
	n.Peer = ""
	f.own.Neighs[n.NeighKey] = n
	return nil
}

func (f *Fake) applyFDB(do backend.Verb, e backend.FDBEntry) error {
	if _, there := f.own.FDB[e.FDBKey]; do != backend.Add && !there {
		return syscall.ENOENT
	}
	if do == backend.Delete {
		delete(f.own.FDB, e.FDBKey)
		return nil
	}
	l, ours := f.own.Links[e.Dev]
	switch {
	case !ours:
		return syscall.ENODEV
	case l.Type != backend.KindVXLAN:
		return syscall.EOPNOTSUPP
	case l.VXLAN.Local.Is4() != e.Dst.Is4():
		return syscall.EAFNOSUPPORT
	}
	e.Peer = ""
	f.own.FDB[e.FDBKey] = e
	return nil
}

func (f *Fake) applyRoute(do backend.Verb, r backend.Route) error {
	_, ours := f.own.Routes[r.RouteKey]
	_, theirs := f.others.Routes[r.RouteKey]
	switch {
	case do != backend.Add && !ours:
		return syscall.ESRCH
	case do == backend.Delete:
		delete(f.own.Routes, r.RouteKey)
		return nil
	case do == backend.Add && ours, theirs:
		return syscall.EEXIST
	}
	there, up := f.link(r.Dev)
	switch {
	case !there:
		return syscall.ENODEV
	case !up:
		return syscall.ENETDOWN
	case r.Src.IsValid() && !f.local(r.Src):
		return fmt.Errorf("preferred source %s is not an address of this host: %w", r.Src, syscall.EINVAL)
	case r.Via.IsValid() && f.local(r.Via):
		return fmt.Errorf("gateway %s is this host: %w", r.Via, syscall.EINVAL)
	case r.Via.IsValid() && !r.Onlink && !f.onLink(r.Via, r.Dev):
		return fmt.Errorf("gateway %s is not on the link: %w", r.Via, syscall.ENETUNREACH)
	}
	r.Peer = ""
	f.own.Routes[r.RouteKey] = r
	return nil
}

// onLink reports whether the kernel would ask dev for a itself.
func (f *Fake) onLink(a netip.Addr, dev string) bool {
	if a.Is6() && a.IsLinkLocalUnicast() {
		return true
	}
	for _, routes := range []map[backend.RouteKey]backend.Route{f.own.Routes, f.others.Routes} {
		for k, r := range routes {
			if r.Dev == dev && !r.Via.IsValid() && k.Table == backend.MainTable && k.Dst.Contains(a) {
				return true
			}
		}
	}
	for k, o := range f.own.Addrs {
		if k.Dev == dev && !o.NoPrefixRoute && k.Prefix.Contains(a) {
			return true
		}
	}
	return slices.ContainsFunc(f.uplinks[dev].Addrs, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (f *Fake) applyRule(do backend.Verb, r backend.Rule) error {
	_, there := f.own.Rules[r.RuleKey]
	switch {
	case do == backend.Add && there:
		return syscall.EEXIST
	case do != backend.Add && !there:
		return syscall.ENOENT
	case do == backend.Delete:
		delete(f.own.Rules, r.RuleKey)
	default:
		f.own.Rules[r.RuleKey] = r
	}
	return nil
}

func (f *Fake) applySysctl(s backend.Sysctl) error {
	if _, there := f.sysctl(s.Name); !there {
		return syscall.ENOENT
	}
	f.own.Sysctls[s.Name] = s
	return nil
}

// sysctl reads a setting; one of a link that does not exist is not there.
func (f *Fake) sysctl(name string) (backend.Sysctl, bool) {
	if dev := sysctlDevice(name); dev != "" {
		if there, _ := f.link(dev); !there {
			return backend.Sysctl{}, false
		}
	}
	if s, written := f.own.Sysctls[name]; written {
		return s, true
	}
	s := backend.Sysctl{Name: name, Value: "0"}
	if strings.HasSuffix(name, "/accept_ra") {
		s.Value = "1"
	}
	return s, true
}

func sysctlDevice(name string) string {
	p := strings.Split(name, "/")
	if len(p) != 5 || p[2] != "conf" || p[3] == "all" || p[3] == "default" {
		return ""
	}
	return p[3]
}

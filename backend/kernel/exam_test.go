package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// TestContract makes Fake and Kernel sit one exam, so that what is tried on the one can be believed of the other.
func TestContract(t *testing.T) {
	t.Run("fake", func(t *testing.T) { exam(t, func(*testing.T) host { return newFakeHost() }) })
	t.Run("kernel", func(t *testing.T) { exam(t, func(t *testing.T) host { return newRealHost(t) }) })
}

// A host is one that has lo and eth0, which is up, with MTU 1500, 192.0.2.11/24 and 2001:db8::11/64.
type host interface {
	Observe(context.Context, backend.State) (backend.Observed, error)
	Apply(context.Context, backend.Op) error
	ApplyAll(context.Context, []backend.Op) []error
	ObserveFilter(context.Context, masq.Ruleset) (masq.Ruleset, error)
	ObserveAll(context.Context) (backend.State, error)
	ObserveAllFilters(context.Context) (masq.Ruleset, error)
	Interfaces(context.Context) ([]backend.Interface, error)
	RouterAdvertised(context.Context) ([]string, error)
	RouteTo(context.Context, netip.Addr) (backend.Path, error)
	Watch(context.Context, func(string) bool, func()) error

	// What others at the host do:
	deleteUplink()
	addStranger(backend.Object)
	addPort(name string) // a veth of ours, which is down and a port of nothing
	byHand(backend.Op)
	dropForwarded() // by the policy of FORWARD, in both families
}

const (
	vtep   = "tweed.1"
	bridge = "tweed0"
)

func mac(s string) backend.MAC {
	m, err := backend.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// sample is a state with each kind of object, built anew by each call.
func sample() backend.State {
	s := backend.State{
		Links: map[string]backend.Link{}, Addrs: map[backend.AddrKey]backend.Addr{},
		Neighs: map[backend.NeighKey]backend.Neigh{}, FDB: map[backend.FDBKey]backend.FDBEntry{},
		Routes: map[backend.RouteKey]backend.Route{}, Rules: map[backend.RuleKey]backend.Rule{},
		Sysctls: map[string]backend.Sysctl{},
	}
	for _, o := range []backend.Object{
		tunnel(), sampleBridge(),
		addrOn(vtep, "10.244.3.0/32", false), addrOn(vtep, "fd00:10:244:3::2/128", true),
		gateway("10.244.3.1/24", false), gateway("fd00:10:244:3::1/64", true),
		toward("10.244.8.0"), toward("10.244.9.0"),
		neighTo("10.244.7.0"), neighTo("fe80::c00:ff:fe00:7"), fdb("192.0.2.17"),
		tunnelRoute("10.244.7.0/24", "10.244.7.0", 0), tunnelRoute("fd00:10:244:7::/64", "fe80::c00:ff:fe00:7", 0),
		tunnelRoute("10.245.7.0/24", "10.244.7.0", 50), tunnelRoute("fd00:10:245:7::/64", "fe80::c00:ff:fe00:7", 50),
		bridgeRoute("10.244.3.0/24", "10.244.3.1"), bridgeRoute("fd00:10:244:3::/64", ""),
		policy("10.244.3.0/24", 100), policy("fd00:10:244:3::/64", 101),
		sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv6/conf/tweed.1/accept_ra", "0"),
	} {
		put(s, o)
	}
	return s
}

func put(s backend.State, o backend.Object) {
	switch o := o.(type) {
	case backend.Link:
		s.Links[o.Name] = o
	case backend.Addr:
		s.Addrs[o.AddrKey] = o
	case backend.Neigh:
		s.Neighs[o.NeighKey] = o
	case backend.FDBEntry:
		s.FDB[o.FDBKey] = o
	case backend.Route:
		s.Routes[o.RouteKey] = o
	case backend.Rule:
		s.Rules[o.RuleKey] = o
	case backend.Sysctl:
		s.Sysctls[o.Name] = o
	}
}

func tunnel() backend.Link {
	return backend.Link{Name: vtep, Type: backend.KindVXLAN, MAC: mac("0e:00:00:00:00:03"), MTU: 1450, Up: true,
		VXLAN: backend.VXLAN{VNI: 1, Port: 8472, Local: netip.MustParseAddr("192.0.2.11"), Dev: "eth0"}}
}

func sampleBridge() backend.Link {
	return backend.Link{Name: bridge, Type: backend.KindBridge, MAC: mac("0e:00:00:00:01:03"), MTU: 1450, Up: true,
		Bridge: backend.Bridge{CallIptables: true, CallIp6tables: true}}
}

func addrOn(dev, prefix string, noDAD bool) backend.Addr {
	return backend.Addr{AddrKey: backend.AddrKey{Dev: dev, Prefix: netip.MustParsePrefix(prefix)}, NoDAD: noDAD}
}

func gateway(prefix string, noDAD bool) backend.Addr {
	a := addrOn(bridge, prefix, noDAD)
	a.NoPrefixRoute = true
	return a
}

func toward(via string) backend.Addr {
	a := addrOn(vtep, "10.244.3.1/32", false)
	a.Toward, a.NoPrefixRoute, a.Late = netip.MustParseAddr(via), true, true
	return a
}

func neighTo(addr string) backend.Neigh {
	return backend.Neigh{NeighKey: backend.NeighKey{Dev: vtep, Addr: netip.MustParseAddr(addr)},
		MAC: mac("0e:00:00:00:00:07"), Peer: "n7"}
}

func fdb(dst string) backend.FDBEntry {
	return backend.FDBEntry{FDBKey: backend.FDBKey{Dev: vtep, MAC: mac("0e:00:00:00:00:07")},
		Dst: netip.MustParseAddr(dst), Peer: "n7"}
}

func tunnelRoute(dst, via string, metric int) backend.Route {
	p := netip.MustParsePrefix(dst)
	return backend.Route{RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: p, Metric: metric}, Dev: vtep,
		Via: netip.MustParseAddr(via), Onlink: p.Addr().Is4(), Peer: "n7"}
}

func bridgeRoute(dst, src string) backend.Route {
	r := backend.Route{RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix(dst)}, Dev: bridge}
	if src != "" {
		r.Src = netip.MustParseAddr(src)
	}
	return r
}

func policy(from string, priority int) backend.Rule {
	return backend.Rule{RuleKey: backend.RuleKey{Priority: priority, From: netip.MustParsePrefix(from), Table: 1160}}
}

func sysctl(name, value string) backend.Sysctl { return backend.Sysctl{Name: name, Value: value} }

// plan is what a pass would do.
func plan(t *testing.T, h host, want backend.State) ([]backend.Op, []subnet.Problem) {
	t.Helper()
	have, err := h.Observe(t.Context(), want)
	if err != nil {
		t.Fatalf("observing: %v", err)
	}
	return backend.Diff(want, have)
}

// pass makes one pass and sees to it that it got there.
func pass(t *testing.T, h host, want backend.State) {
	t.Helper()
	ops, _ := plan(t, h, want)
	for _, op := range ops {
		if err := h.Apply(t.Context(), op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	settled(t, h, want)
}

func settled(t *testing.T, h host, want backend.State) {
	t.Helper()
	ops, _ := plan(t, h, want)
	for _, op := range ops {
		t.Errorf("still to do: %s (is %+v)", op, op.Was)
	}
}

func add(o backend.Object) backend.Op { return backend.Op{Do: backend.Add, What: o} }

func exam(t *testing.T, newHost func(*testing.T) host) {
	for _, question := range []struct {
		name string
		ask  func(*testing.T, host)
	}{
		{"EverythingFromNothing", askEverythingFromNothing},
		{"ObservedIsWhatWasWanted", askObserved},
		{"Ports", askPorts},
		{"EachKindChanges", askChanges},
		{"EachKindGoes", askEachKindGoes},
		{"FirstAddressIsForOneGateway", askLate},
		{"CleanupLeavesNothing", askCleanup},
		{"SecondAddIsRefused", askSecondAdd},
		{"FailuresAmongManyAtOnce", askFailuresAmongMany},
		{"ManyAtOnceLoseTheirOrder", askOrderOfMany},
		{"ChangeOfWhatIsGone", askChangeOfWhatIsGone},
		{"DeleteOfWhatIsGone", askDeleteOfWhatIsGone},
		{"SetDownAndUpByHand", askDownUp},
		{"MACChangedByHand", askMAC},
		{"UplinkVanishes", askUplinkVanishes},
		{"MissingUplink", askMissingUplink},
		{"StrangersAreSeenAndLeftAlone", askStrangers},
		{"VNIIsTaken", askVNITaken},
		{"OnDownLinkNoRoute", askDownLink},
		{"EventsRing", askEvents},
		{"InterfacesAreListed", askInterfaces},
		{"RouteIsLookedUp", askRouteTo},
		{"SegmentFollowsRoutes", askSegment},
		{"PlainRouteTakesTheTunnelsPlace", askPlainRoute},
		{"FilterIsKept", askFilter},
		{"FilterChangesItsForm", askForms},
		{"SetsAreFilledAndEmptied", askSets},
		{"PortIsGuarded", askGuard},
		{"PodsAreJudged", askSpoof},
		{"NodesAreKnown", askNodes},
		{"RouteOfOthersIsInOurTable", askRouteOfOthers},
		{"RuleOfOthersLeadsToOurTable", askRuleOfOthers},
		{"AllThatIsOursIsFound", askAll},
	} {
		t.Run(question.name, func(t *testing.T) { question.ask(t, newHost(t)) })
	}
}

func askEverythingFromNothing(t *testing.T, h host) {
	pass(t, h, sample())
	if ops, problems := plan(t, h, sample()); len(ops)+len(problems) > 0 {
		t.Errorf("a second pass finds %v, %v", ops, problems)
	}
}

func askObserved(t *testing.T, h host) {
	pass(t, h, sample())
	have, err := h.Observe(t.Context(), sample())
	if err != nil {
		t.Fatal(err)
	}
	want := sample()
	if got := have.Links[vtep]; got != want.Links[vtep] {
		t.Errorf("tunnel %+v\nwant   %+v", got, want.Links[vtep])
	}
	if got := have.Links[bridge]; got != want.Links[bridge] {
		t.Errorf("bridge %+v\nwant   %+v", got, want.Links[bridge])
	}
	counts := func(s backend.State) []int {
		return []int{len(s.Links), len(s.Addrs), len(s.Neighs), len(s.FDB), len(s.Routes), len(s.Rules), len(s.Sysctls)}
	}
	if got, want := counts(have.State), counts(want); !slices.Equal(got, want) {
		t.Errorf("observed %v objects of each kind, want %v", got, want)
	}
	if len(have.Strangers) > 0 {
		t.Errorf("strangers: %v", have.Strangers)
	}
}

func askChanges(t *testing.T, h host) {
	pass(t, h, sample())
	want := sample()
	l := tunnel()
	l.MTU, l.VXLAN.Learning, l.VXLAN.NoTxChecksum = 1400, true, true
	put(want, l)
	b := sampleBridge()
	b.MTU, b.Bridge = 1400, backend.Bridge{McastSnooping: true}
	put(want, b)
	put(want, fdb("192.0.2.18"))
	n := neighTo("10.244.7.0")
	n.MAC = mac("0e:00:00:00:00:08")
	put(want, n)
	r := bridgeRoute("10.244.3.0/24", "")
	put(want, r)
	put(want, sysctl("net/ipv4/ip_forward", "0"))
	ops, _ := plan(t, h, want)
	for _, op := range ops {
		if op.Do != backend.Change {
			t.Errorf("not in place: %s", op)
		}
	}
	pass(t, h, want)

	l.VXLAN.Port = 8473 // cannot be changed in place: all that hangs on it is made anew
	put(want, l)
	pass(t, h, want)
	l.VXLAN.Local, l.MTU = netip.MustParseAddr("2001:db8::11"), 1390
	put(want, l)
	e := fdb("2001:db8::17")
	put(want, e)
	pass(t, h, want)
}

func askEachKindGoes(t *testing.T, h host) {
	pass(t, h, sample())
	want := sample()
	clear(want.Rules)
	pass(t, h, want)
	delete(want.Routes, tunnelRoute("10.244.7.0/24", "10.244.7.0", 0).RouteKey)
	delete(want.Routes, tunnelRoute("fd00:10:244:7::/64", "fe80::c00:ff:fe00:7", 0).RouteKey)
	pass(t, h, want)
	clear(want.Routes)
	pass(t, h, want)
	clear(want.FDB)
	pass(t, h, want)
	clear(want.Neighs)
	pass(t, h, want)
	clear(want.Addrs)
	pass(t, h, want)
	delete(want.Links, bridge)
	pass(t, h, want)
}

// The kernel takes the first address of a device where none is for the gateway. That is the one for all gateways, whoever
// was there before it.
func askLate(t *testing.T, h host) {
	pass(t, h, sample())
	first := addrOn(vtep, "10.244.3.0/32", false)
	h.byHand(backend.Op{Do: backend.Delete, What: first})
	have, err := h.Observe(t.Context(), sample())
	if err != nil {
		t.Fatal(err)
	}
	if have.Addrs[toward("10.244.8.0").AddrKey].Late {
		t.Error("an address that has become the first does not read so")
	}
	h.byHand(backend.Op{Do: backend.Add, What: first})
	pass(t, h, sample())
	want := sample() // with another
	delete(want.Addrs, first.AddrKey)
	put(want, addrOn(vtep, "192.0.2.11/32", false))
	put(want, tunnelRoute("10.244.8.0/24", "10.244.8.0", 0))
	pass(t, h, want)
	if have, err = h.Observe(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	for _, via := range []string{"10.244.8.0", "10.244.9.0"} {
		if got := have.Addrs[toward(via).AddrKey]; got != toward(via) {
			t.Errorf("toward %s: %+v", via, got)
		}
	}
	for to, src := range map[string]string{"10.244.7.5": "192.0.2.11", "10.244.8.5": "10.244.3.1"} {
		if path := routeTo(t, h, to); path.Src.String() != src {
			t.Errorf("a packet to %s leaves from %s, want %s", to, path.Src, src)
		}
	}
	delete(want.Addrs, toward("10.244.9.0").AddrKey)
	pass(t, h, want)
	pass(t, h, sample())
}

func askCleanup(t *testing.T, h host) {
	pass(t, h, sample())
	pass(t, h, backend.State{})
	have, err := h.Observe(t.Context(), backend.State{})
	if err != nil {
		t.Fatal(err)
	}
	links := len(have.Links) + len(have.Addrs) + len(have.Neighs) + len(have.FDB)
	if links+len(have.Routes)+len(have.Rules) > 0 {
		t.Errorf("left: %+v", have.State)
	}
}

func askSecondAdd(t *testing.T, h host) {
	pass(t, h, sample())
	for _, o := range []backend.Object{
		tunnel(), sampleBridge(), addrOn(vtep, "10.244.3.0/32", false), gateway("fd00:10:244:3::1/64", true),
		tunnelRoute("10.244.7.0/24", "10.244.7.0", 0), tunnelRoute("fd00:10:244:7::/64", "fe80::c00:ff:fe00:7", 0),
		policy("10.244.3.0/24", 100),
	} {
		if err := h.Apply(t.Context(), add(o)); err == nil {
			t.Errorf("%s: done twice", add(o))
		}
	}
	// These may stand on what the kernel has learned.
	for _, o := range []backend.Object{neighTo("10.244.7.0"), fdb("192.0.2.17")} {
		if err := h.Apply(t.Context(), add(o)); err != nil {
			t.Errorf("%s: %v", add(o), err)
		}
	}
	settled(t, h, sample())
}

// askFailuresAmongMany makes many changes at once, of which every third must fail, and so many that their failures
// alone are more than one batch.
func askFailuresAmongMany(t *testing.T, h host) {
	want := sample()
	pass(t, h, want)
	var ops []backend.Op
	fails := map[int]string{}
	for i := range 1000 {
		r := tunnelRoute(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), "10.244.7.0", 0)
		switch i % 3 {
		case 0:
			r.Dst = netip.MustParsePrefix("10.244.7.0/24")
			fails[i] = "file exists"
		case 1:
			put(want, r)
		case 2:
			n := neighTo(fmt.Sprintf("10.%d.%d.0", 100+i/250, i%250))
			put(want, n)
			ops = append(ops, add(n))
			continue
		}
		ops = append(ops, add(r))
	}
	astray := bridgeRoute("10.9.0.0/16", "")
	astray.Dev = "nosuch"
	ops[500] = add(astray)
	fails[500] = "no such device"
	errs := h.ApplyAll(t.Context(), ops)
	if len(errs) != len(ops) {
		t.Fatalf("%d answers for %d changes", len(errs), len(ops))
	}
	for i, err := range errs {
		if why, bad := fails[i]; bad != (err != nil) || bad && !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", ops[i], err, why)
		}
	}
	pass(t, h, want) // the one that ops[500] was in place of
}

// askOrderOfMany makes at once what can only be made one after the other.
func askOrderOfMany(t *testing.T, h host) {
	ops, _ := plan(t, h, sample())
	// With the bridge goes what the kernel has been told to make before.
	ops = append(ops, backend.Op{Do: backend.Delete, What: sampleBridge(), Was: sampleBridge()})
	for i, err := range h.ApplyAll(t.Context(), ops) {
		if err != nil {
			t.Errorf("%s: %v", ops[i], err)
		}
	}
	pass(t, h, sample())
}

func askChangeOfWhatIsGone(t *testing.T, h host) {
	want := sample()
	put(want, tunnel())
	clear(want.Routes)
	clear(want.Neighs)
	clear(want.FDB)
	pass(t, h, want)
	for _, o := range []backend.Object{
		neighTo("10.244.7.0"), fdb("192.0.2.17"), tunnelRoute("10.244.7.0/24", "10.244.7.0", 0),
		tunnelRoute("fd00:10:244:7::/64", "fe80::c00:ff:fe00:7", 0),
	} {
		op := backend.Op{Do: backend.Change, What: o, Was: o}
		if err := h.Apply(t.Context(), op); err == nil {
			t.Errorf("%s: changed what is not there", op)
		}
	}
}

func askDeleteOfWhatIsGone(t *testing.T, h host) {
	want := backend.State{Links: map[string]backend.Link{vtep: tunnel()}}
	pass(t, h, want)
	for _, o := range []backend.Object{
		sampleBridge(), addrOn(vtep, "10.244.3.0/32", false), neighTo("10.244.7.0"), fdb("192.0.2.17"),
		tunnelRoute("10.244.7.0/24", "10.244.7.0", 0), policy("10.244.3.0/24", 100),
	} {
		op := backend.Op{Do: backend.Delete, What: o, Was: o}
		if err := h.Apply(t.Context(), op); err == nil {
			t.Errorf("%s: deleted what is not there", op)
		}
	}
}

func askDownUp(t *testing.T, h host) {
	pass(t, h, sample())
	down := tunnel()
	down.Up = false
	h.byHand(backend.Op{Do: backend.Change, What: down, Was: tunnel()})
	have, err := h.Observe(t.Context(), sample())
	if err != nil {
		t.Fatal(err)
	}
	if have.Links[vtep].Up {
		t.Error("the tunnel is not seen to be down")
	}
	for _, key := range []string{"10.244.7.0/24", "fd00:10:244:7::/64"} {
		if _, there := have.Routes[tunnelRoute(key, "10.244.7.0", 0).RouteKey]; there {
			t.Errorf("route to %s outlived the tunnel's going down", key)
		}
	}
	if len(have.Neighs) > 0 {
		t.Errorf("neighbours outlived the tunnel's going down: %v", have.Neighs)
	}
	if len(have.FDB) == 0 {
		t.Error("the FDB did not outlive the tunnel's going down")
	}
	if _, there := have.Addrs[addrOn(vtep, "10.244.3.0/32", false).AddrKey]; !there {
		t.Error("the IPv4 address did not outlive the tunnel's going down")
	}
	if _, there := have.Addrs[addrOn(vtep, "fd00:10:244:3::2/128", true).AddrKey]; there {
		t.Error("the IPv6 address outlived the tunnel's going down")
	}
	pass(t, h, sample())
}

func askMAC(t *testing.T, h host) {
	pass(t, h, sample())
	other := tunnel()
	other.MAC = mac("0e:00:00:00:00:ff")
	h.byHand(backend.Op{Do: backend.Change, What: other, Was: tunnel()})
	have, err := h.Observe(t.Context(), sample())
	if err != nil {
		t.Fatal(err)
	}
	if have.Links[vtep].MAC != other.MAC {
		t.Errorf("the tunnel's MAC reads %s", have.Links[vtep].MAC)
	}
	if len(have.Neighs) > 0 {
		t.Errorf("neighbours outlived the change of the MAC: %v", have.Neighs)
	}
	pass(t, h, sample())
}

func askUplinkVanishes(t *testing.T, h host) {
	pass(t, h, sample())
	h.deleteUplink()
	have, err := h.Observe(t.Context(), sample())
	if err != nil {
		t.Fatal(err)
	}
	if _, there := have.Links[vtep]; there {
		t.Error("the tunnel outlived its uplink")
	}
	if len(have.Neighs)+len(have.FDB) > 0 {
		t.Errorf("the tunnel's entries outlived it: %v %v", have.Neighs, have.FDB)
	}
	want := sample() // without a dev the tunnel can be had
	l := tunnel()
	l.VXLAN.Dev = ""
	put(want, l)
	pass(t, h, want)
}

func askMissingUplink(t *testing.T, h host) {
	l := tunnel()
	l.VXLAN.Dev = "eth7"
	if err := h.Apply(t.Context(), add(l)); err == nil || !strings.Contains(err.Error(), "eth7") {
		t.Errorf("a tunnel on a device that is not there: %v", err)
	}
}

func askStrangers(t *testing.T, h host) {
	want := sample()
	theirs := []backend.Object{
		backend.Link{Name: bridge, Type: backend.KindBridge, MAC: mac("0e:00:00:00:00:99"), MTU: 1500, Up: true},
		backend.Route{RouteKey: backend.RouteKey{Table: backend.MainTable, Dst: netip.MustParsePrefix("10.244.7.0/24")},
			Dev: "eth0"},
		backend.Route{RouteKey: backend.RouteKey{Table: backend.MainTable,
			Dst: netip.MustParsePrefix("fd00:10:244:7::/64")}, Dev: "eth0"},
		policy("10.244.3.0/24", 100),
	}
	for _, o := range theirs {
		h.addStranger(o)
	}
	ops, problems := plan(t, h, want)
	if len(problems) != len(theirs) {
		t.Errorf("%d problems for %d strangers: %v", len(problems), len(theirs), problems)
	}
	for _, op := range ops {
		if err := h.Apply(t.Context(), op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	settled(t, h, want)
	have, err := h.Observe(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	if len(have.Strangers) != len(theirs) {
		t.Errorf("%d strangers are left of %d: %v", len(have.Strangers), len(theirs), have.Strangers)
	}
	if _, ours := have.Links[bridge]; ours {
		t.Error("a stranger's bridge was taken for ours")
	}
	for key := range want.FDB {
		if _, there := have.FDB[key]; !there {
			t.Errorf("%v is not there for the sake of strangers elsewhere", key)
		}
	}
	for _, s := range have.Strangers {
		if !strings.Contains(s.What, "del") {
			t.Errorf("no way out: %s", s.What)
		}
	}
}

func askVNITaken(t *testing.T, h host) {
	flannel := tunnel()
	flannel.Name, flannel.MAC = "flannel.1", mac("0e:00:00:00:00:99")
	h.addStranger(flannel)
	if err := h.Apply(t.Context(), add(tunnel())); err == nil || !strings.Contains(err.Error(), "flannel.1") {
		t.Errorf("two VXLAN devices with one VNI: %v", err)
	}
	ops, problems := plan(t, h, sample())
	if len(problems) != 1 || !strings.Contains(problems[0].Text, "flannel.1") ||
		!strings.Contains(problems[0].Text, "Backend.VNI") {
		t.Errorf("problems: %v", problems)
	}
	for _, op := range ops {
		if l, ok := op.What.(backend.Link); ok && l.Name == vtep {
			t.Errorf("planned in vain: %s", op)
		}
	}
	other := sample() // with another VNI there is room for both
	l := tunnel()
	l.VXLAN.VNI = 2
	put(other, l)
	pass(t, h, other)
}

func askDownLink(t *testing.T, h host) {
	l := tunnel()
	l.Up = false
	pass(t, h, backend.State{Links: map[string]backend.Link{vtep: l}})
	if err := h.Apply(t.Context(), add(tunnelRoute("10.244.7.0/24", "10.244.7.0", 0))); err == nil {
		t.Error("a route over a link that is down")
	}
	l = tunnel()
	pass(t, h, backend.State{Links: map[string]backend.Link{vtep: l}})
	if err := h.Apply(t.Context(), add(bridgeRoute("10.9.0.0/16", ""))); err == nil {
		t.Error("a route over a link that is not there")
	}
	off := tunnelRoute("10.244.7.0/24", "203.0.113.9", 0)
	off.Onlink = false
	if err := h.Apply(t.Context(), add(off)); err == nil {
		t.Error("a route via a gateway that is not on the link")
	}
}

// Pods' ends are what they should be again after the bridge was lost, and are none of anybody's business who does not
// ask for them.
func askPorts(t *testing.T, h host) {
	h.addPort("pod1")
	h.addPort("pod2")
	want := sample()
	want.Ports = map[string]backend.Port{
		"pod1": {Name: "pod1", Bridge: bridge, Up: true, Hairpin: true, Locked: true, NoLearning: true, NoFlood: true,
			MAC: backend.MAC{0x0a, 0x58, 10, 244, 1, 2}},
		"never": {Name: "never", Bridge: bridge, Up: true, Hairpin: true},
	}
	for range 2 {
		pass(t, h, want)
		have, err := h.Observe(t.Context(), want)
		if err != nil || len(have.Ports) != 1 || have.Ports["pod1"] != want.Ports["pod1"] {
			t.Errorf("ports are %+v, %v", have.Ports, err)
		}
		settled(t, h, want)
		h.byHand(backend.Op{Do: backend.Delete, What: sampleBridge(), Was: sampleBridge()})
		have, err = h.Observe(t.Context(), want)
		if bare := (backend.Port{Name: "pod1", Up: true}); err != nil || have.Ports["pod1"] != bare {
			t.Errorf("without the bridge ports are %+v, %v", have.Ports, err)
		}
	}
	if err := h.Apply(t.Context(), backend.Op{Do: backend.Change, What: want.Ports["never"]}); err == nil {
		t.Error("a port that is not there")
	}
}

// rings counts, and waits for, rings.
type rings struct{ bell chan struct{} }

func watch(t *testing.T, h host, uplink func(string) bool) rings {
	t.Helper()
	r := rings{make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- h.Watch(ctx, uplink, func() {
			select {
			case r.bell <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("watching: %v", err)
		}
	})
	r.await(t, "the start")
	r.quiet()
	return r
}

func (r rings) await(t *testing.T, why string) {
	t.Helper()
	select {
	case <-r.bell:
	case <-time.After(20 * time.Second):
		t.Errorf("no ring for %s", why)
	}
}

// quiet waits until it has not rung for a while, and reports whether it had rung before.
func (r rings) quiet() (rang bool) {
	for {
		select {
		case <-r.bell:
			rang = true
		case <-time.After(100 * time.Millisecond):
			return rang
		}
	}
}

func askEvents(t *testing.T, h host) {
	pass(t, h, sample())
	r := watch(t, h, func(dev string) bool { return dev == "eth0" })
	for _, o := range []backend.Object{
		policy("10.244.3.0/24", 100),
		tunnelRoute("10.244.7.0/24", "10.244.7.0", 0), tunnelRoute("fd00:10:244:7::/64", "fe80::c00:ff:fe00:7", 0),
		bridgeRoute("fd00:10:244:3::/64", ""), fdb("192.0.2.17"), neighTo("10.244.7.0"), neighTo("fe80::c00:ff:fe00:7"),
		addrOn(vtep, "10.244.3.0/32", false), gateway("fd00:10:244:3::1/64", true), tunnel(),
	} {
		op := backend.Op{Do: backend.Delete, What: o, Was: o}
		h.byHand(op)
		r.await(t, op.String())
		r.quiet()
	}
	h.byHand(backend.Op{Do: backend.Change, What: sysctl("net/ipv4/ip_forward", "0")})
	r.await(t, "forwarding switched off")
	r.quiet()
	pass(t, h, sample())
	r.await(t, "a pass")
	if r.quiet(); r.quiet() {
		t.Error("rings with nothing going on")
	}
	h.deleteUplink()
	r.await(t, "the uplink's end")
}

func askInterfaces(t *testing.T, h host) {
	pass(t, h, sample())
	all, err := h.Interfaces(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]backend.Interface{}
	for _, i := range all {
		byName[i.Name] = i
	}
	eth0 := byName["eth0"]
	want := []netip.Prefix{netip.MustParsePrefix("192.0.2.11/24"), netip.MustParsePrefix("2001:db8::11/64")}
	if !eth0.Up || eth0.Ours || eth0.MTU != 1500 || !slices.Equal(eth0.Addrs, want) || !eth0.Default4 || !eth0.Default6 {
		t.Errorf("eth0: %+v", eth0)
	}
	for _, name := range []string{vtep, bridge} {
		if !byName[name].Ours {
			t.Errorf("%s is not said to be ours", name)
		}
	}
	if lo := byName["lo"]; lo.Name == "" || lo.Ours || !lo.Stub || eth0.Stub || len(lo.Addrs) > 0 {
		t.Errorf("lo: %+v", lo)
	}
	if devs, err := h.RouterAdvertised(t.Context()); err != nil || len(devs) > 0 {
		t.Errorf("routes by router advertisement on %v, %v", devs, err)
	}
}

func askFilter(t *testing.T, h host) {
	for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
		c := dualStack(t, form)
		filterPass(t, h, c.Desired())
		c.Subnets[0] = netip.MustParsePrefix("10.244.9.0/24")
		c.NonMasquerade = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::/0")}
		filterPass(t, h, c.Desired())
		h.dropForwarded()
		filterPass(t, h, c.Desired())
		filterPass(t, h, masq.Ruleset{})
	}
}

func askForms(t *testing.T, h host) {
	h.dropForwarded()
	for _, form := range []masq.Form{masq.NFTables, masq.IPTables, masq.NFTables, masq.IPTables} {
		filterPass(t, h, dualStack(t, form).Desired())
		other := map[masq.Form]masq.Form{masq.IPTables: masq.NFTables, masq.NFTables: masq.IPTables}[form]
		have, err := h.ObserveFilter(t.Context(), masq.Ruleset{})
		if err != nil || !have.Has(form) || have.Has(other) {
			t.Errorf("with %s: %+v, %v", form, have, err)
		}
		if guests := len(have.Guests); (guests > 0) != (form == masq.NFTables) {
			t.Errorf("with %s, %d guests in FORWARD", form, guests)
		}
	}
}

func filterPass(t testing.TB, h host, want masq.Ruleset) {
	t.Helper()
	have, err := h.ObserveFilter(t.Context(), want)
	if err != nil {
		t.Fatalf("observing the filter: %v", err)
	}
	ops := masq.Diff(want, have)
	for i, err := range h.ApplyAll(t.Context(), ops) {
		if err != nil {
			t.Errorf("%s: %v", ops[i], err)
		}
	}
	have, err = h.ObserveFilter(t.Context(), want)
	if err != nil {
		t.Fatalf("observing the filter: %v", err)
	}
	for _, op := range masq.Diff(want, have) {
		t.Errorf("still to do: %s", op)
	}
}

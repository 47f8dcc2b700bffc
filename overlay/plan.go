package overlay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/bridge"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// leastMTU6 is what a link must carry for the kernel to speak IPv6 on it, in bytes (RFC 8200, section 5).
const leastMTU6 = 1280

// staleSuffix ends a Problem with what is not known any more.
const staleSuffix = "; what was in force stays"

// BridgeName is the bridge that this node's pods are ports of.
const BridgeName = "tweed0"

// A Planner works out what a pass has to do. It changes nothing on the host, and is not safe for use by several
// goroutines.
type Planner struct {
	// Config is what is in force. What has changed in the file NetConf comes into force with the next plan.
	Config    Config
	NetConf   string // where Config was read; empty where it is not followed
	Choice    UplinkChoice
	Leases    Leases
	Publisher Publisher
	Kernel    Kernel
	// RunDir is where the plugin records what it handed out.
	RunDir string
	// SysctlRoot is where the host's /proc/sys is found.
	SysctlRoot string

	last    inputs         // of the last plan; kept in force where the next cannot be had
	listed  []subnet.Lease // in the list of the last plan
	desired desired        // what follows from both
	renewed bool           // no plan has compared the kernel with desired yet
	known   *known         // nil where only a look can tell
	netConf netConf
	roster  podnet.Roster
	grown   subnet.Network // as Plan.Grown, until a plan tells of it
	changes []difference   // as Plan.Changes, likewise
}

// A Plan is what one pass would do, and all that it was made from.
type Plan struct {
	Self     []subnet.Lease
	Uplink   backend.Uplink
	Info     podnet.NodeInfo
	Ops      []backend.Op
	Problems []subnet.Problem
	// Blocked is set where something that this node itself needs cannot be had.
	Blocked bool
	// Unread counts the halves, network state and packet filter, that could not be read, and for which no Ops are planned.
	// Blind is set where it is the network state.
	Unread int
	Blind  bool
	// Peers, Wanted and Found count leases of other nodes and objects in the kernel.
	Peers, Wanted, Found int
	// Again is set where the kernel should hold what it should have held by the plan before. Then Ops repair drift, but for
	// those that were planned before and have not been done since.
	Again bool
	// Nodes counts the nodes of Peers, and Refused the other leases of other nodes.
	Nodes, Refused int
	// Barred names those of Nodes that a stranger keeps from being reached.
	Barred []string
	// Counted are the chains whose drops are told, and what each of their rules drops packets for.
	Counted map[masq.Chain][]string
	// Unpublished is set where the list of leases does not hold Self as it is.
	Unpublished bool
	// Stale says what is not known of this node any more, so that what was in force stays, and nothing is published; nil
	// where all is known.
	Stale *Waiting
	// Grown is the network, where it has come into force since the last plan; nil otherwise.
	Grown subnet.Network
	// Changes are the other keys of net-conf.json that have come into force since the last plan.
	Changes []difference
}

// inputs are what the desired state depends on.
type inputs struct {
	config     Config
	node       subnet.Node
	uplink     backend.Uplink
	generation uint64
	advertised []string       // devices that need accept_ra=2
	former     []netip.Prefix // subnets that this node had, and that living pods still have addresses of
	netfilter  bool           // bridged packets can be passed through the packet filter
}

// desired is what the kernel should hold.
type desired struct {
	state    backend.State
	filtered masq.Config // what filter follows from, but for the peers
	filter   masq.Ruleset
	counted  map[masq.Chain][]string
	self     []subnet.Lease
	peers    int
	nodes    []string // of peers
	refused  int
	info     podnet.NodeInfo
	problems []subnet.Problem
	unsaid   bool // self is not what the list holds for this node
	plain    bool // no two nodes claim the same, and what leads to a peer depends on its own leases alone
}

// A Waiting error says what has to come before anything can be planned.
type Waiting struct {
	For string
	// Reason is one word for it where it is this node that lacks something; "" while the cluster is not known yet.
	Reason string
	// NoLease is set where no lease of this node stands.
	NoLease bool
	// NoNode is set where it is not known any more which subnets this node has.
	NoNode bool
}

func (w Waiting) Error() string { return w.For }

// Plan compares what the kernel should hold with what it holds. The error is a Waiting where there is nothing to compare
// with yet.
func (p *Planner) Plan(ctx context.Context) (Plan, error) {
	list, ok := p.Leases.List()
	if !ok {
		if err := p.Leases.Err(); err != nil {
			return Plan{}, Waiting{For: fmt.Sprintf("waiting for the first complete list of leases: %v", err)}
		}
		return Plan{}, Waiting{For: "waiting for the first complete list of leases"}
	}
	p.known = nil
	changed, refused := p.reconfigure(ctx, list)
	if refused != nil {
		return Plan{}, *refused
	}
	in, stale, err := p.inputs(ctx, list)
	if err != nil {
		return Plan{}, err
	}
	before := p.desired
	if p.want(in, list) {
		p.renewed = p.renewed || !p.desired.sameKernel(before)
	}
	plan := p.plan(list)
	plan.Stale = stale
	if changed != "" {
		plan.Problems = append(plan.Problems, subnet.Problem{
			Node: in.node.Name, Kind: subnet.KindConfig, Text: changed})
	}
	if stale != nil {
		plan.Problems = append(plan.Problems, subnet.Problem{
			Node: in.node.Name, Kind: subnet.KindLease, Text: stale.For + staleSuffix})
	}

	if err := p.compare(ctx, &plan); err != nil {
		return Plan{}, err
	}
	if stale != nil || changed != "" {
		p.known = nil
	}
	plan.Again, p.renewed = !p.renewed, plan.Unread > 0
	plan.Grown, p.grown = p.grown, nil
	plan.Changes, p.changes = p.changes, nil
	return plan, nil
}

// want brings the desired state up to date, and reports whether it had to.
func (p *Planner) want(in inputs, list subnet.List) bool {
	if reflect.DeepEqual(in, p.last) {
		return false
	}
	version := p.desired.state.Version + 1
	p.desired, p.last, p.listed = p.desire(in, list), in, list.Leases
	p.desired.state.Version = version
	return true
}

// plan is the part of a plan that follows from what is desired alone.
func (p *Planner) plan(list subnet.List) Plan {
	d := p.desired
	plan := Plan{
		Self: d.self, Uplink: p.last.uplink, Info: d.info, Peers: d.peers, Unpublished: d.unsaid,
		Nodes: len(d.nodes), Refused: d.refused, Counted: d.counted,
	}
	plan.Problems = append(plan.Problems, list.Problems...)
	plan.Problems = append(plan.Problems, d.problems...)
	return plan
}

// compare holds the kernel against what is desired. Neither of the two halves waits for the other: where one cannot be read, a
// Problem says so, and the other is planned. It fails where neither can be read.
func (p *Planner) compare(ctx context.Context, plan *Plan) error {
	node, want, told := p.last.node.Name, p.desired, len(plan.Problems)
	here := p.pods(want.info.Spoofing)
	filter, filterErr := p.compareFilter(ctx, want, here, plan)
	strangers, stateErr := p.compareState(ctx, want, here, plan)
	if filterErr != nil && stateErr != nil {
		return errors.Join(filterErr, stateErr)
	}
	if err := cmp.Or(filterErr, stateErr); err != nil {
		plan.Problems = append(plan.Problems, subnet.Problem{Node: node, Kind: subnet.KindKernel, Text: err.Error()})
		plan.Unread, plan.Blocked, plan.Blind = 1, true, stateErr != nil
	}
	if len(plan.Ops) == 0 && !plan.Blocked && strangers == 0 {
		filter.Spoof = want.filter.Spoof // the rest of it follows the pods, not the leases
		p.known = &known{filter, slices.Clone(plan.Problems[told:]), plan.Wanted - want.len()}
	}
	return nil
}

func (p *Planner) compareFilter(ctx context.Context, want desired, here inhabitants, plan *Plan) (masq.Ruleset, error) {
	rules, err := p.Kernel.ObserveFilter(ctx, want.filter)
	if err != nil {
		plan.Wanted += want.filter.Len()
		return rules, fmt.Errorf("reading the packet filter: %w", err)
	}
	here.judgeAll(&want.filter, rules)
	plan.Wanted += want.filter.Len()
	if rules.Unjudged != "" && want.filter.Spoof.Made {
		plan.Problems = append(plan.Problems, subnet.Problem{Node: p.last.node.Name, Kind: subnet.KindPods, Text: fmt.Sprintf(
			"what pods send is not judged (%s): those that have CAP_NET_RAW can send in each other's names; boot a kernel with "+
				"nf_tables, or have PodSpoofing in net-conf.json allow it", rules.Unjudged)})
	}
	for _, drop := range rules.Drops {
		plan.Problems = append(plan.Problems, subnet.Problem{Node: p.last.node.Name, Kind: subnet.KindPods, Text: drop})
	}
	for _, taken := range rules.Taken {
		plan.Problems = append(plan.Problems, subnet.Problem{Node: p.last.node.Name, Kind: subnet.KindStranger, Text: taken})
		plan.Blocked = true
	}
	plan.Ops = append(plan.Ops, slices.DeleteFunc(masq.Diff(want.filter, rules), p.inUse)...)
	plan.Found += rules.Len()
	return rules, nil
}

// compareState also counts the strangers.
func (p *Planner) compareState(ctx context.Context, want desired, here inhabitants, plan *Plan) (strangers int, err error) {
	if want.state.Ports = here.ports; here.err != nil {
		return 0, here.err
	}
	plan.Wanted += want.state.Len()
	have, err := p.Kernel.Observe(ctx, want.state)
	if err != nil {
		return 0, fmt.Errorf("reading the kernel's network state: %w", err)
	}
	ops, problems := backend.Diff(want.state, have)
	plan.Ops = append(plan.Ops, slices.DeleteFunc(ops, p.inUse)...)
	for _, pr := range problems {
		if pr.Node == "" {
			pr.Node, plan.Blocked = p.last.node.Name, true
		}
		plan.Problems = append(plan.Problems, pr)
	}
	plan.Barred = want.barred(problems, have.Strangers)
	plan.Found += have.Len()
	return len(have.Strangers), nil
}

// inputs gathers what the desired state depends on. Where the node or the uplink cannot be told any more, those of the
// last plan stay in force, and stale says why.
func (p *Planner) inputs(ctx context.Context, list subnet.List) (in inputs, stale *Waiting, err error) {
	ifaces, err := p.Kernel.Interfaces(ctx)
	if err != nil {
		return in, nil, fmt.Errorf("listing interfaces: %w", err)
	}
	in.node, in.uplink, stale = p.place(ctx, ifaces)
	if stale != nil {
		stale.NoLease = len(ofNode(list.Leases, in.node.Name)) == 0
		if p.last.node.Name == "" {
			return in, nil, *stale
		}
		in.node, in.uplink = p.last.node, p.last.uplink
	}
	// An uplink that has lost its address stays in force, but the copy of it on our device must not keep it alive: the host
	// would go on to answer for it.
	in.uplink.Held = slices.DeleteFunc(slices.Clone(in.uplink.Addrs), func(a netip.Addr) bool {
		return backend.Holder(ifaces, a) == ""
	})
	in.generation, in.config = list.Generation, p.Config
	if slices.ContainsFunc(in.node.Subnets, is6) {
		if in.advertised, err = p.Kernel.RouterAdvertised(ctx); err != nil {
			return in, nil, fmt.Errorf("listing routes by router advertisement: %w", err)
		}
		// A device that is right already does not show up any more, but it must stay right.
		in.advertised = union(in.advertised, present(p.last.advertised, ifaces))
	}
	if in.former, err = podnet.FormerSubnets(p.RunDir, in.node.Subnets); err != nil {
		return in, nil, fmt.Errorf("reading which addresses pods have: %w", err)
	}
	_, missing := os.Stat(p.SysctlRoot + "/net/bridge/bridge-nf-call-iptables")
	in.netfilter = missing == nil
	return in, stale, nil
}

// place tells which node this is, where packets for others leave it, and where theirs are to be sent.
func (p *Planner) place(ctx context.Context, ifaces []backend.Interface) (subnet.Node, backend.Uplink, *Waiting) {
	node, err := p.Publisher.Self()
	if err == nil {
		err = p.Config.checkSubnets(node)
	}
	if err != nil {
		return node, backend.Uplink{}, &Waiting{For: err.Error(), Reason: reasonNoSubnet, NoNode: true}
	}
	f := finder{UplinkChoice: p.Choice, family: p.Config.Underlay, ifaces: ifaces, nodeAddrs: node.Addrs}
	if f.Reach.IsValid() {
		f.path, err = p.Kernel.RouteTo(ctx, f.Reach)
	}
	var up backend.Uplink
	if err == nil {
		up, err = f.uplink()
	}
	if err != nil {
		return node, up, &Waiting{For: err.Error(), Reason: reasonNoUplink}
	}
	held := slices.Concat(node.Addrs, up.Addrs)
	up.Addrs = inPlace(up.Addrs, p.Choice.Public)
	if node.HostOverride.IsValid() {
		up.Addrs = inPlace(up.Addrs, []netip.Addr{node.HostOverride})
	}
	if err := p.Config.CheckAddrs(slices.Concat(held, up.Addrs)); err != nil {
		return node, up, &Waiting{For: err.Error(), Reason: reasonOverlap}
	}
	if p.Config.Backend.direct() {
		up.Segment = backend.NewSegment(ifaces, up)
	}
	return node, up, nil
}

// desire says what the kernel should hold. It is a function of its arguments and the configuration.
func (p *Planner) desire(in inputs, list subnet.List) (d desired) {
	w := p.Config.way(in.node.Name, in.uplink)
	d.self = own(in, w)
	peers := d.settle(in.node.Name, p.rules(in, w), list.Leases)
	d.plain = !p.Config.Backend.direct() &&
		!slices.ContainsFunc(d.problems, func(p subnet.Problem) bool { return p.Kind == subnet.KindConflict })

	d.info = podnet.NodeInfo{
		Node: in.node.Name, Networks: p.Config.Network.Prefixes(), Subnets: in.node.Subnets,
		Bridge: BridgeName, Device: w.device, MTU: w.mtu,
		PacketFilter: string(p.Config.PacketFilter), Spoofing: p.Config.Spoofing,
	}
	for _, s := range in.node.Subnets {
		d.info.Gateways = append(d.info.Gateways, bridge.Gateway(s))
	}
	served := slices.Concat(in.node.Subnets, in.former)
	reach, far := w.desired(d.self, peers)
	d.problems = append(d.problems, far...)
	own := w.own(in.uplink, reach)
	d.state = backend.Merge(
		bridge.Config{Name: BridgeName, Node: in.node.Name, MTU: d.info.MTU, Own: own}.Desired(served),
		acceptAdvertised(in.advertised),
		reach,
	)
	d.filtered = masq.Config{
		Form: p.Config.PacketFilter, Network: p.Config.Network, Subnets: served, Port: w.port,
		Device: w.device, Own: own, Near: p.Config.Backend.near(peers, reach),
		NonMasquerade: p.Config.NonMasquerade, Guard: p.Config.Backend.Guard, AcceptPeers: p.Config.Backend.AcceptPeers,
		Underlay: masq.FamilyOf(in.uplink.Local),
	}
	d.filter = d.filteredFor(peers)
	d.filter.Spoof.Made = !d.info.Spoofing.All
	if d.counted = d.filter.Counted(); d.filter.Spoof.Made {
		maps.Copy(d.counted, spoofCounted())
	}
	d.warn(in)
	return d
}

// rules say which leases are good for this node.
func (p *Planner) rules(in inputs, w way) subnet.Rules {
	return subnet.Rules{Network: p.Config.Network, ExactLength: in.node.Leased, Judge: w.judge}
}

// filteredFor is what the packet filter should hold for peers.
func (d *desired) filteredFor(peers []subnet.Lease) masq.Ruleset {
	c := d.filtered
	c.Peers = endpoints(peers)
	return c.Desired()
}

// endpoints lists the addresses that peers' encapsulated packets go to or come from.
func endpoints(peers []subnet.Lease) []netip.Addr {
	all := make([]netip.Addr, 0, len(peers))
	for _, l := range peers {
		all = append(append(all, l.Host), l.Sources...)
	}
	return all
}

// own makes the leases that this node publishes.
func own(in inputs, w way) (own []subnet.Lease) {
	for _, s := range in.node.Subnets {
		own = append(own, subnet.Lease{
			Node: in.node.Name, Subnet: s, Host: in.uplink.Addrs[0], NodeAddrs: in.uplink.Addrs,
			Accepts: in.config.Network.Prefixes(), Backend: w.backend, Data: w.data, Since: in.node.Since,
		})
	}
	return own
}

// settle returns the leases of other nodes that are to be reached. Of listed ones, this node's own are as old as the
// list; what counts is what they are now.
func (d *desired) settle(self string, rules subnet.Rules, listed []subnet.Lease) []subnet.Lease {
	d.compareOwn(self, listed)
	leases := append(make([]subnet.Lease, 0, len(d.self)+len(listed)), d.self...)
	for i := range listed {
		if listed[i].Node != self {
			leases = append(leases, listed[i])
		}
	}
	peers, problems := subnet.Settle(self, rules, leases)
	d.peers, d.problems, d.refused = len(peers), problems, len(leases)-len(d.self)-len(peers)
	d.nodes = make([]string, 0, len(peers))
	for _, l := range peers {
		d.nodes = append(d.nodes, l.Node)
	}
	d.nodes = slices.Compact(d.nodes) // peers are sorted by node
	return peers
}

// compareOwn notes whether this node's own leases are listed as they are.
func (d *desired) compareOwn(self string, listed []subnet.Lease) {
	d.unsaid = !slices.EqualFunc(ofNode(d.self, self), ofNode(listed, self), samePublished)
}

// warn names what keeps this node's pods from working although everything is as desired.
func (d *desired) warn(in inputs) {
	problem := func(kind, format string, args ...any) {
		d.problems = append(d.problems, subnet.Problem{Node: in.node.Name, Kind: kind, Text: fmt.Sprintf(format, args...)})
	}
	d.problems = append(d.problems, in.node.Problems...)
	for _, n := range d.info.Networks {
		if !slices.ContainsFunc(in.node.Subnets, n.Overlaps) {
			problem(subnet.KindLease, "this node has no subnet of %s; its pods get no address of that family", n)
		}
	}
	for _, s := range in.former {
		problem(subnet.KindPods, "pods on this node still have addresses of %s, which is no longer its subnet; "+
			"other nodes cannot reach them: restart these pods", s)
	}
	if !in.netfilter {
		problem(subnet.KindPods, "br_netfilter is not loaded: a service whose backend is on the caller's own node "+
			"times out; run `modprobe br_netfilter`, and name it in /etc/modules-load.d")
	}
	if d.info.MTU < leastMTU6 && slices.ContainsFunc(in.node.Subnets, is6) {
		problem(subnet.KindPods, "pods would have an MTU of %d, and IPv6 needs %d; raise the uplink's (%s), "+
			"or Backend.MTU in net-conf.json", d.info.MTU, leastMTU6, strings.Join(in.uplink.Devs, ", "))
	}
}

func is6(p netip.Prefix) bool { return p.Addr().Is6() }

// acceptAdvertised keeps router advertisements taken on devices that live by them: with forwarding on, the kernel
// ignores them unless accept_ra is 2 (Documentation/networking/ip-sysctl.rst).
func acceptAdvertised(devs []string) backend.State {
	s := backend.State{Sysctls: map[string]backend.Sysctl{}}
	for _, dev := range devs {
		s.SetSysctl("net/ipv6/conf/"+dev+"/accept_ra", "2")
	}
	return s
}

// ofNode returns a node's leases, sorted.
func ofNode(leases []subnet.Lease, node string) []subnet.Lease {
	var own []subnet.Lease
	for i := range leases {
		if leases[i].Node == node {
			own = append(own, leases[i])
		}
	}
	slices.SortFunc(own, func(a, b subnet.Lease) int { return a.Subnet.Addr().Compare(b.Subnet.Addr()) })
	return own
}

// samePublished compares what a node itself publishes of its lease.
func samePublished(a, b subnet.Lease) bool {
	a.Sources, b.Sources = nil, nil
	return a.Equal(b)
}

// present returns those of devs that exist.
func present(devs []string, ifaces []backend.Interface) []string {
	return slices.DeleteFunc(slices.Clone(devs), func(d string) bool {
		return !slices.ContainsFunc(ifaces, func(i backend.Interface) bool { return i.Name == d })
	})
}

func union(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

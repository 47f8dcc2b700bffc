package overlay

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// cluster is what other nodes have published, and what this node has been told.
type cluster struct {
	mu      sync.Mutex
	list    subnet.List
	listed  bool
	away    error
	self    subnet.Node
	selfErr error
	refuse  error
	network subnet.Network // as it has grown
	ownLeases
}

// ownLeases are what this node has published, in how many writes.
type ownLeases struct {
	published []subnet.Lease
	writes    int
}

func (c *cluster) Run(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }

func (c *cluster) List() (subnet.List, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.list
	l.Leases = append(slices.Clone(c.published), l.Leases...)
	slices.SortStableFunc(l.Leases, func(a, b subnet.Lease) int { return strings.Compare(a.Node, b.Node) })
	return l, c.listed
}

func (c *cluster) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.away
}

func (c *cluster) Self() (subnet.Node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.self, c.selfErr
}

func (c *cluster) look() ownLeases {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ownLeases
}

// with changes the cluster under a running daemon.
func (c *cluster) with(change func(*cluster)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

func (c *cluster) Publish(_ context.Context, leases []subnet.Lease) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		return c.refuse
	}
	c.published = leases
	c.list.Generation++
	c.writes++
	return nil
}

func (c *cluster) Grow(network subnet.Network) { c.with(func(c *cluster) { c.network = network }) }

func (c *cluster) set(leases ...subnet.Lease) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list.Leases, c.listed = leases, true
	c.list.Generation++
}

var born = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func peer(name, prefix, host string) subnet.Lease {
	return subnet.Lease{
		Node: name, Subnet: netip.MustParsePrefix(prefix), Host: netip.MustParseAddr(host),
		NodeAddrs: []netip.Addr{netip.MustParseAddr(host)}, Backend: vxlan.Name,
		Data: vxlan.Config{Node: name, VNI: 1, Port: 8472, Underlay: 4}.Data(), Since: born.Add(time.Hour),
	}
}

// node is one node with a kernel in memory.
type node struct {
	*Reconciler
	kern    *kernel.Fake
	cluster *cluster
	conf    string
}

func newNode(t testing.TB) *node {
	t.Helper()
	cfg, err := ParseConfig([]byte(`{"Network": "10.0.0.0/8", "SubnetLen": 24, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}`))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	n := &node{kern: kernel.NewFake(), conf: filepath.Join(dir, "cni"), cluster: &cluster{self: subnet.Node{
		Name: "n1", Since: born, Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.11")},
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
	}}}
	n.kern.SetInterface(backend.Interface{Name: "eth0", MTU: 1500, Up: true,
		Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.11/24")}})
	p := &Planner{
		Config: cfg, Leases: n.cluster, Publisher: n.cluster, Kernel: n.kern,
		RunDir: filepath.Join(dir, "run"), SysctlRoot: "/proc/sys",
	}
	n.Reconciler = NewReconciler(p, CNIConf{Dir: n.conf, RunDir: p.RunDir}, "test", slog.New(slog.DiscardHandler))
	return n
}

// step makes one pass that looks at the kernel, and has published what the pass asks for.
func (n *node) step(t testing.TB) Report {
	t.Helper()
	n.look.Store(true)
	return n.turn(t)
}

// turn makes one pass, as if the bell had just rung.
func (n *node) turn(t testing.TB) Report {
	t.Helper()
	rep := n.pass(t.Context())
	n.meter.note(rep)
	n.report.Store(&rep)
	select {
	case leases := <-n.publish:
		if n.cluster.Publish(t.Context(), leases) == nil {
			n.published.Store(true)
		}
	default:
	}
	return rep
}

func (n *node) state(t *testing.T) backend.State {
	t.Helper()
	have, err := n.kern.Observe(t.Context(), backend.State{})
	if err != nil {
		t.Fatal(err)
	}
	return have.State
}

func (n *node) routes(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for k, r := range n.state(t).Routes {
		if r.Via.IsValid() {
			out[k.Dst.String()] = r.Via.String()
		}
	}
	return out
}

func (n *node) hasConflist() bool {
	_, err := os.Stat(filepath.Join(n.conf, ConflistName))
	return err == nil
}

// TestNothingIsTouchedBeforeTheFirstList is the case of an API server that is away when the daemon starts.
func TestNothingIsTouchedBeforeTheFirstList(t *testing.T) {
	n := newNode(t)
	n.cluster.away = errors.New("cannot list nodes at https://192.0.2.1:6443: connection refused")
	rep := n.step(t)
	if len(n.kern.Ops()) != 0 {
		t.Errorf("did %v without a list", n.kern.Ops())
	}
	if rep.Converged || !strings.Contains(rep.Waiting, "https://192.0.2.1:6443") {
		t.Errorf("report is %+v; want not converged, waiting for the server by name", rep)
	}
	if got := n.Report().ListAge; got != -1 {
		t.Errorf("list age is %v before the first list, want -1", got)
	}
}

func TestPeersComeAndGo(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n2", "fd00:10:244:2::/64", "192.0.2.12"),
		peer("n3", "10.244.3.0/24", "192.0.2.13"))
	if rep := n.step(t); !rep.Converged || rep.Peers != 3 {
		t.Fatalf("report is %+v", rep)
	}
	got := n.routes(t)
	if got["10.244.2.0/24"] != "10.244.2.0" || got["10.244.3.0/24"] != "10.244.3.0" || len(got) != 3 {
		t.Errorf("routes are %v", got)
	}
	if fdb := n.state(t).FDB; len(fdb) != 2 {
		t.Errorf("FDB is %v, want one entry a peer", fdb)
	}

	n.cluster.set(peer("n3", "10.244.3.0/24", "192.0.2.13"))
	n.step(t)
	if got := n.routes(t); len(got) != 1 || got["10.244.3.0/24"] == "" {
		t.Errorf("routes after n2 left are %v", got)
	}
	if rep := n.step(t); rep.Done != 0 || rep.Failed != 0 {
		t.Errorf("a pass with nothing to do did something: %+v", rep)
	}
}

func TestPeerLeavesWhileDaemonIsDown(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	again := newNode(t)
	again.kern, again.planner.Kernel = n.kern, n.kern
	again.cluster.set(peer("n3", "10.244.3.0/24", "192.0.2.13"))
	again.step(t)
	if got := again.routes(t); len(got) != 1 || got["10.244.3.0/24"] == "" {
		t.Errorf("routes after a restart are %v", got)
	}
}

func TestDriftIsRepaired(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	before := n.state(t)
	link := before.Links["tweed.1"]
	if err := n.kern.ByHand(backend.Op{Do: backend.Delete, What: link, Was: link}); err != nil {
		t.Fatal(err)
	}
	n.cluster.away = errors.New("API server away")
	if rep := n.step(t); !rep.Converged {
		t.Errorf("report is %+v", rep)
	}
	if ops, _ := backend.Diff(before, backend.Observed{State: n.state(t)}); len(ops) > 0 {
		t.Errorf("still missing after the repair: %v", ops)
	}
}

func TestOnePeersEntryIsRefusedByTheKernel(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	n.kern.Fail(func(op backend.Op) error {
		if op.Peer == "n2" && op.What.Kind() == "fdb" {
			return errors.New("no buffer space available")
		}
		return nil
	})
	rep := n.step(t)
	if !rep.Converged || rep.Failed != 1 {
		t.Errorf("report is %+v; a peer's failure must not keep the node from converging", rep)
	}
	if got := n.routes(t); got["10.244.3.0/24"] == "" {
		t.Errorf("n3 is not reached: %v", got)
	}
	if len(rep.Problems) == 0 || !hasProblem(rep, "n2", "bridge fdb") {
		t.Errorf("problems are %v, want the failed command by n2's name", rep.Problems)
	}
}

// What hangs on a device that the kernel refused is not tried, wherever it stands among what is done at once.
func TestDeviceIsRefusedByTheKernel(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	var tried []string
	n.kern.Fail(func(op backend.Op) error {
		link, _ := op.What.(backend.Link)
		if link.Name == "tweed.1" || backend.Device(op.What) == "tweed.1" {
			tried = append(tried, op.What.Kind())
			return errors.New("no such device")
		}
		return nil
	})
	rep := n.step(t)
	if want := []string{"link"}; !slices.Equal(tried, want) {
		t.Errorf("tried on the device: %v, want %v", tried, want)
	}
	if rep.Converged || rep.Failed != 1 || rep.Skipped < 4 {
		t.Errorf("converged %v, failed %d, skipped %d; want one failure, and the device's entries skipped",
			rep.Converged, rep.Failed, rep.Skipped)
	}
	if have := n.state(t); len(have.Links) != 1 || len(have.Addrs) == 0 {
		t.Errorf("links %v, addresses %v; the bridge and its addresses do not hang on the device", have.Links, have.Addrs)
	}
}

func TestDeviceCannotBeHad(t *testing.T) {
	n := newNode(t)
	n.kern.AddStranger(backend.Link{Name: "tweed.1", Type: backend.KindVXLAN, MTU: 1450})
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	rep := n.step(t)
	if rep.Converged || !hasProblem(rep, "n1", "tweed.1") {
		t.Errorf("report is %+v; want not converged and a problem that names tweed.1", rep)
	}
	if n.hasConflist() {
		t.Error("the node was made ready although its device is missing")
	}
	if len(n.state(t).Links) == 0 {
		t.Error("the bridge was not made; only what hangs on the device must wait")
	}
}

func TestLinkThatCannotBeChangedStillTakesNewPeers(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	n.kern.SetInterface(backend.Interface{Name: "eth0", MTU: 9000, Up: true,
		Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.11/24")}})
	n.kern.Fail(func(op backend.Op) error {
		if op.What.Kind() == "link" {
			return errors.New("device or resource busy")
		}
		return nil
	})
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	rep := n.step(t)
	if rep.Converged || !hasProblem(rep, "n1", "mtu 8950") {
		t.Errorf("report is %+v; want a problem with the command that failed", rep)
	}
	if got := n.routes(t); rep.Skipped > 0 || got["10.244.3.0/24"] == "" {
		t.Errorf("n3 waits for another MTU: %d skipped, routes are %v", rep.Skipped, got)
	}
}

// A rule that drops whoever is not in a set would drop every peer while the set could not be filled.
func TestSetThatCannotBeFilledCutsOffNobody(t *testing.T) {
	n := newNode(t)
	n.kern.Fail(func(op backend.Op) error {
		if _, ok := op.What.(masq.Members); ok {
			return errors.New("no buffer space available")
		}
		return nil
	})
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	for range 2 {
		if rep := n.step(t); rep.Converged || rep.Skipped == 0 {
			t.Errorf("report is %+v; want not converged, and rules that wait", rep)
		}
	}
	named := func() (rules int) {
		have, err := n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
		if err != nil {
			t.Fatal(err)
		}
		for c, all := range have.Chains {
			if c.Name == masq.GuardInput {
				for _, r := range all {
					if strings.Contains(r.Unknown, "--match-set") || r.SrcIn != (masq.Set{}) {
						rules++
					}
				}
			}
		}
		return rules
	}
	if named() > 0 {
		t.Error("a rule goes by a set that is empty")
	}
	n.kern.Fail(nil)
	if rep := n.step(t); !rep.Converged || named() == 0 {
		t.Errorf("report is %+v, %d rules go by the set; want converged, and the guard", rep, named())
	}
}

// A pieces is a kernel that keeps what it is given at once.
type pieces struct {
	*kernel.Fake
	all [][]backend.Op
}

func (p *pieces) ApplyAll(ctx context.Context, ops []backend.Op) []error {
	p.all = append(p.all, ops)
	return p.Fake.ApplyAll(ctx, ops)
}

// The packet filter may be written by a program, so all of it goes there at once but for what has to wait for something
// else of it.
func TestPacketFilterIsWrittenPieceByPiece(t *testing.T) {
	for change, want := range map[string][]string{
		// Sets, what names them, and what stands in their place.
		"iptables": {"add set", "add filter"}, "nftables": {"add filter set", "add filter", "delete filter set"},
	} {
		n := newNode(t)
		n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
		if change == "nftables" {
			n.step(t)
			n.planner.Config.PacketFilter = masq.NFTables
		}
		p := &pieces{Fake: n.kern}
		n.planner.Kernel = p
		n.step(t)
		var got []string
		for _, ops := range p.all {
			if did := toFilter(ops); did != "" {
				got = append(got, did)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("to %s it goes in %q, want %q", change, got, want)
		}
	}
}

// toFilter says what operations do to the packet filter.
func toFilter(ops []backend.Op) string {
	var did []string
	for _, op := range ops {
		if kind := op.What.Kind(); kind == kindFilter || kind == kindSet {
			did = append(did, string(op.Do), kind)
		}
	}
	slices.Sort(did)
	return strings.Join(slices.Compact(did), " ")
}

func TestNodeIsMadeReadyOnlyWhenOthersCanReachIt(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.cluster.refuse = errors.New("forbidden")
	n.step(t)
	if n.hasConflist() {
		t.Error("the CNI configuration was written although nothing is published")
	}
	if _, err := podnet.ReadNodeInfo(n.planner.RunDir); err != nil {
		t.Errorf("no node.json after a converged pass: %v", err)
	}
	n.cluster.refuse = nil
	n.step(t)
	n.step(t)
	if !n.hasConflist() {
		t.Error("no CNI configuration after convergence and publication")
	}
	if len(n.cluster.published) != 2 || n.cluster.writes != 1 {
		t.Errorf("published %v in %d writes; want both families in one", n.cluster.published, n.cluster.writes)
	}
}

func TestConfigurationOfAnEarlierBootMakesANodeReady(t *testing.T) {
	n := newNode(t)
	if err := n.cni.Write(); err != nil {
		t.Fatal(err)
	}
	if err := n.forget(); err != nil {
		t.Fatal(err)
	}
	if n.hasConflist() {
		t.Error("the conflist of an earlier boot stayed")
	}
	n.cluster.set()
	n.step(t)
	n.step(t)
	if err := n.forget(); err != nil {
		t.Fatal(err)
	}
	if !n.hasConflist() {
		t.Error("the conflist of this boot was removed, and DEL needs it")
	}
}

func TestOwnNodeIsDeletedUnderTheDaemon(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	n.step(t)
	n.cluster.selfErr = errors.New("node n1 does not exist")
	n.cluster.set()
	rep := n.step(t)
	if got := n.state(t); got.Links["tweed.1"].Name == "" || got.Links[BridgeName].Name == "" {
		t.Errorf("links are %v; the data path must stay", got.Links)
	}
	if !hasProblem(rep, "n1", "does not exist") {
		t.Errorf("problems are %v", rep.Problems)
	}
}

func TestSubnetIsOutsideTheNetwork(t *testing.T) {
	n := newNode(t)
	n.cluster.self.Subnets = []netip.Prefix{netip.MustParsePrefix("172.16.1.0/24")}
	n.cluster.set()
	n.waitsNaming(t, "172.16.1.0/24", "10.0.0.0/8")
}

func TestPodNetworkHoldsTheNodesAddress(t *testing.T) {
	n := newNode(t)
	n.cluster.self.Addrs = []netip.Addr{netip.MustParseAddr("10.1.2.3")}
	n.cluster.set()
	n.waitsNaming(t, "10.1.2.3", "10.0.0.0/8")
}

// waitsNaming makes a pass, which must touch nothing and say what it waits for with these values in it.
func (n *node) waitsNaming(t *testing.T, values ...string) {
	t.Helper()
	rep := n.step(t)
	for _, v := range values {
		if rep.Converged || !strings.Contains(rep.Waiting, v) {
			t.Errorf("report is %+v; want it to name %s", rep, v)
		}
	}
	if len(n.kern.Ops()) != 0 {
		t.Errorf("did %v", n.kern.Ops())
	}
}

func TestSubnetChangesUnderLivingPods(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	attached(t, n.planner.RunDir, "10.244.1.5/24")
	n.cluster.self.Subnets = []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24")}
	rep := n.step(t)
	if !rep.Converged || !hasProblem(rep, "n1", "addresses of 10.244.1.0/24") {
		t.Errorf("report is %+v; want a problem that names the old subnet", rep)
	}
	for _, gateway := range []string{"10.244.1.1/24", "10.244.9.1/24"} {
		key := backend.AddrKey{Dev: BridgeName, Prefix: netip.MustParsePrefix(gateway)}
		if _, ok := n.state(t).Addrs[key]; !ok {
			t.Errorf("the bridge lacks %s", gateway)
		}
	}
	info, err := podnet.ReadNodeInfo(n.planner.RunDir)
	if err != nil || len(info.Subnets) != 1 || info.Subnets[0] != n.cluster.self.Subnets[0] {
		t.Errorf("new pods get addresses of %v (%v)", info.Subnets, err)
	}
	if err := os.RemoveAll(filepath.Join(n.planner.RunDir, "addrs")); err != nil {
		t.Fatal(err)
	}
	n.step(t)
	if got := len(n.state(t).Addrs); got != 3 {
		t.Errorf("%d addresses after the last old pod has gone, want the new gateway and the node's, twice", got)
	}
}

// attached makes the records of a pod, as docs/cni.md describes them.
func attached(t *testing.T, runDir, addr string) {
	t.Helper()
	pod := filepath.Join(runDir, "pods", "tweed0123456789")
	name := filepath.Join(runDir, "addrs", netip.MustParsePrefix(addr).Addr().String())
	record := `{"container":"c","interface":"eth0","veth":"tweed0123456789","ifindex":7,"addresses":["` + addr + `"]}`
	err := errors.Join(os.MkdirAll(filepath.Dir(pod), 0o755), os.MkdirAll(filepath.Dir(name), 0o755),
		os.WriteFile(pod, []byte(record), 0o600), os.Link(pod, name))
	if err != nil {
		t.Fatal(err)
	}
}

func TestForwardingWouldLoseAnAdvertisedRoute(t *testing.T) {
	n := newNode(t)
	n.kern.SetAdvertised("eth0")
	n.cluster.set()
	n.step(t)
	n.kern.SetAdvertised() // what is right already is not listed any more
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	accept, forward := -1, -1
	for i, op := range n.kern.Ops() {
		switch s, _ := op.What.(backend.Sysctl); s.Name {
		case "net/ipv6/conf/eth0/accept_ra":
			accept = i
		case "net/ipv6/conf/all/forwarding":
			forward = i
		}
	}
	if accept < 0 || forward < accept {
		t.Errorf("accept_ra at %d, forwarding at %d of %v", accept, forward, n.kern.Ops())
	}
}

func TestSecondDaemonOfANode(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	unlock, err := lock(t.Context(), dir, log)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	said := make(chan struct{})
	go func() {
		second, err := lock(t.Context(), dir, slog.New(notify{said}))
		if second != nil {
			second()
		}
		got <- err
	}()
	<-said
	select {
	case err := <-got:
		t.Fatalf("the second daemon did not wait: %v", err)
	default:
	}
	unlock()
	if err := <-got; err != nil {
		t.Errorf("the second daemon did not take over: %v", err)
	}
}

// notify is a log whose first line closes a channel.
type notify struct{ said chan struct{} }

func (n notify) Enabled(context.Context, slog.Level) bool  { return true }
func (n notify) Handle(context.Context, slog.Record) error { close(n.said); return nil }
func (n notify) WithAttrs([]slog.Attr) slog.Handler        { return n }
func (n notify) WithGroup(string) slog.Handler             { return n }

func hasProblem(rep Report, node, text string) bool {
	for _, p := range rep.Problems {
		if p.Node == node && strings.Contains(p.Text, text) {
			return true
		}
	}
	return false
}

// droppy is a host where something out of reach drops packets of pods.
type droppy struct{ Kernel }

func (d droppy) ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error) {
	have, err := d.Kernel.ObserveFilter(ctx, want)
	have.Drops = []string{"chain forward of table inet fw drops"}
	return have, err
}

func TestWhatDropsPacketsOfPodsIsToldOnTheNode(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.planner.Kernel = droppy{n.kern}
	want := subnet.Problem{Node: "n1", Kind: subnet.KindPods, Text: "chain forward of table inet fw drops"}
	if rep := n.step(t); !slices.Contains(rep.Problems, want) || !rep.Converged {
		t.Errorf("%+v", rep)
	}
}

package kube_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"tweed.dev/tweed/subnet"
	"tweed.dev/tweed/subnet/kube"
)

// A daemon is a Source that runs until its test ends.
type daemon struct {
	*kube.Source
	t     *testing.T
	bell  chan struct{}
	rings atomic.Int64
	log   *logBuffer
	stop  func()
}

// startDaemon is for a node whose subnets come from its podCIDRs.
func startDaemon(t *testing.T, a *apiServer, node string) *daemon {
	t.Helper()
	return start(t, a, kube.Options{Node: node, Origin: subnet.OriginNodeSpec})
}

func start(t *testing.T, a *apiServer, o kube.Options) *daemon {
	t.Helper()
	d := &daemon{t: t, bell: make(chan struct{}, 1), log: &logBuffer{}}
	var err error
	if d.Source, err = kube.New(a.config(), o, slog.New(slog.NewTextHandler(d.log, nil))); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, d.ring) }()
	d.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("Run goes on 20 s after its context has ended")
		}
	})
	t.Cleanup(func() { d.stop() })
	return d
}

func (d *daemon) ring() {
	d.rings.Add(1)
	select {
	case d.bell <- struct{}{}:
	default:
	}
}

// await returns once ok does so.
func (d *daemon) await(what string, ok func() bool) {
	d.t.Helper()
	deadline := time.After(time.Minute)
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for !ok() {
		select {
		case <-d.bell:
		case <-look.C:
		case <-deadline:
			list, _ := d.List()
			_, err := d.Self()
			d.t.Fatalf("waited in vain: %s\nlist: %+v\nself: %v\naway: %v\nlog: %s", what, list, err, d.Err(), d.log)
		}
	}
}

func (d *daemon) awaitNodes(names ...string) subnet.List {
	d.t.Helper()
	var list subnet.List
	d.await(fmt.Sprintf("leases of %v", names), func() bool {
		var ok bool
		list, ok = d.List()
		return ok && slices.Equal(holders(list), names)
	})
	return list
}

// awaitSelf waits until Self returns an error that has part in it, or none if part is empty.
func (d *daemon) awaitSelf(part string) subnet.Node {
	d.t.Helper()
	var self subnet.Node
	d.await("self: "+part, func() bool {
		var err error
		self, err = d.Self()
		return err == nil && part == "" || err != nil && part != "" && strings.Contains(err.Error(), part)
	})
	return self
}

// firstRings returns the number of rings once both watches have rung for their first list: what is there is seen before
// its bell rings.
func (d *daemon) firstRings() int64 {
	d.t.Helper()
	d.await("the first bells", func() bool { return d.rings.Load() >= 2 })
	return d.rings.Load()
}

func holders(list subnet.List) (names []string) {
	for _, l := range list.Leases {
		names = append(names, l.Node)
	}
	return names
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// servers calls f with each sort of API server: of the present and the past, in protobuf and in JSON.
func servers(t *testing.T, f func(t *testing.T, a *apiServer)) {
	for name, change := range map[string]func(*apiServer){
		"streamed protobuf": func(*apiServer) {},
		"listed protobuf":   func(a *apiServer) { a.listed = true },
		"streamed JSON":     func(a *apiServer) { a.onlyOf = runtime.ContentTypeJSON },
		"listed JSON":       func(a *apiServer) { a.onlyOf, a.listed = runtime.ContentTypeJSON, true },
	} {
		t.Run(name, func(t *testing.T) { f(t, newAPIServer(t, change)) })
	}
}

// populate gives the server three nodes, of which the third publishes nothing.
func populate(a *apiServer) {
	for i, name := range []string{"n1", "n2", "n3"} {
		a.put(name, func(n *corev1.Node) {
			if i < 2 {
				maps.Copy(n.Annotations, nth(i+1))
			}
			n.Annotations["example.com/other"] = "kept"
			n.Spec.PodCIDRs = []string{fmt.Sprintf("10.244.%d.0/24", i+1)}
			n.Status.Addresses = []corev1.NodeAddress{
				{Type: corev1.NodeHostName, Address: name},
				{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("192.0.2.%d", i+1)},
			}
		})
	}
}

func set(a *apiServer, name string, annotations map[string]string) {
	a.put(name, func(n *corev1.Node) { maps.Copy(n.Annotations, annotations) })
}

func TestNodesComeChangeAndLeave(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		d := startDaemon(t, a, "n1")
		first := d.awaitNodes("n1", "n2")
		if l := first.Leases[1]; l.Subnet.String() != "10.244.2.0/24" || l.Since.IsZero() {
			t.Errorf("lease of n2: %+v", l)
		}
		set(a, "n3", nth(3))
		second := d.awaitNodes("n1", "n2", "n3")
		a.remove("n2")
		third := d.awaitNodes("n1", "n3")
		set(a, "n3", map[string]string{kube.Host: "nowhere"})
		fourth := d.awaitNodes("n1")
		if len(fourth.Problems) != 1 || fourth.Problems[0].Node != "n3" {
			t.Errorf("problems: %v", fourth.Problems)
		}
		generations := []uint64{first.Generation, second.Generation, third.Generation, fourth.Generation}
		if len(slices.Compact(generations)) != 4 {
			t.Errorf("generations: %v", generations)
		}
		if log := d.log.String(); log != "" {
			t.Errorf("logged: %s", log)
		}
	})
}

func TestHeartbeatRingsNoBell(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		d := startDaemon(t, a, "n1")
		before := d.awaitNodes("n1", "n2")
		d.awaitSelf("")
		rings := d.firstRings()
		for range 20 {
			a.heartbeat("n1")
			a.heartbeat("n2")
			a.heartbeat("n3")
		}
		// The watches keep order: once this arrives by both of them, so have the heartbeats.
		set(a, "n1", map[string]string{kube.Host: "192.0.2.99"})
		d.await("both bells", func() bool { return d.rings.Load() >= rings+2 })
		after, _ := d.List()
		if n := d.rings.Load() - rings; n != 2 {
			t.Errorf("%d rings, want 2", n)
		}
		if after.Generation != before.Generation+1 || !after.At.After(before.At) {
			t.Errorf("generation %d at %v became %d at %v", before.Generation, before.At, after.Generation, after.At)
		}
	})
}

func TestBookmarkKeepsAQuietListCurrent(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n1")
	before := d.awaitNodes("n1", "n2")
	a.bookmark()
	d.await("a later time", func() bool {
		after, _ := d.List()
		return after.At.After(before.At) && after.Generation == before.Generation
	})
}

func TestListThatIsStillArriving(t *testing.T) {
	a := newAPIServer(t, func(a *apiServer) { a.silent = true })
	populate(a)
	d := startDaemon(t, a, "n1")
	for range 100 { // as long as the server takes to see that we wait
		a.heartbeat("n1")
		if list, ok := d.List(); ok {
			t.Fatalf("a list without its end: %v", list)
		}
	}
	if _, err := d.Self(); err == nil || !strings.Contains(err.Error(), "waiting for the API server at http://") {
		t.Errorf("self: %v", err)
	}
	a.with(func() { a.silent = false })
	d.awaitNodes("n1", "n2")
}

func TestServerAwayThenBack(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		d := startDaemon(t, a, "n1")
		before := d.awaitNodes("n1", "n2")
		d.awaitSelf("")
		a.stop()
		d.await("away", func() bool { return d.Err() != nil })
		if text := d.Err().Error(); !strings.Contains(text, "nodes at http://"+a.addr) {
			t.Errorf("away: %s", text)
		}
		if during, ok := d.List(); !ok || during.Generation != before.Generation {
			t.Errorf("while away the list is %v", during)
		}
		if _, err := d.Self(); err != nil {
			t.Errorf("while away self is %v", err)
		}
		a.remove("n2")
		set(a, "n3", nth(3))
		a.start()
		d.awaitNodes("n1", "n3")
		d.await("back", func() bool { return d.Err() == nil })
		if log := d.log.String(); strings.Count(log, "\n") != 2 || strings.Count(log, "level=WARN") != 1 {
			t.Errorf("logged:\n%s", log)
		}
	})
}

func TestServerAwayAtStart(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	a.stop()
	d := startDaemon(t, a, "n1")
	d.awaitSelf("connection refused")
	if list, ok := d.List(); ok {
		t.Errorf("a list from nowhere: %v", list)
	}
	a.start()
	d.awaitNodes("n1", "n2")
	d.awaitSelf("")
}

func TestShutdownWhileServerIsAway(t *testing.T) {
	a := newAPIServer(t)
	a.stop()
	d := startDaemon(t, a, "n1")
	d.await("away", func() bool { return d.Err() != nil })
	d.stop() // fails the test if Run goes on
}

func TestWatchIsCut(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		d := startDaemon(t, a, "n1")
		before := d.awaitNodes("n1", "n2")
		d.awaitSelf("")
		rings := d.firstRings()
		const cuts = 3
		for range cuts {
			a.cut()
			a.heartbeat("n2")
		}
		set(a, "n3", nth(3))
		after := d.awaitNodes("n1", "n2", "n3")
		// A watch that is cut while it is opened makes the server one that is away, and then one that is back.
		if n := d.rings.Load() - rings; n > 1+2*cuts || after.Generation != before.Generation+1 {
			t.Errorf("%d rings for one change; generation %d became %d", n, before.Generation, after.Generation)
		}
	})
}

func TestServerForgetsWhatHappened(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		d := startDaemon(t, a, "n1")
		before := d.awaitNodes("n1", "n2")
		d.awaitSelf("")
		rings := d.firstRings()
		a.forget()
		a.cut()
		d.await("the same list again", func() bool {
			list, _ := d.List()
			return list.At.After(before.At)
		})
		list, _ := d.List()
		if n := d.rings.Load() - rings; n != 0 || list.Generation != before.Generation {
			t.Errorf("%d rings for the same list; generation %d became %d", n, before.Generation, list.Generation)
		}
		a.with(func() { a.muted = true })
		a.remove("n2")
		a.forget()
		a.cut()
		a.with(func() { a.muted = false })
		d.awaitNodes("n1")
	})
}

func TestPermissionToListIsMissing(t *testing.T) {
	for code, want := range map[int]string{
		http.StatusForbidden:    `the verb "list" on the resource "nodes"`,
		http.StatusUnauthorized: "does not accept our token",
	} {
		a := newAPIServer(t, func(a *apiServer) { a.refuse["list"], a.refuse["watch"] = code, code })
		d := startDaemon(t, a, "n1")
		d.await(want, func() bool { err := d.Err(); return err != nil && strings.Contains(err.Error(), want) })
	}
}

func TestAnotherNodeOf256KB(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	set(a, "n3", nth(3))
	set(a, "n2", map[string]string{kube.BackendData: strings.Repeat("x", 256<<10)})
	d := startDaemon(t, a, "n1")
	list := d.awaitNodes("n1", "n3")
	if len(list.Problems) != 1 || list.Problems[0].Node != "n2" || len(list.Problems[0].Text) > 300 {
		t.Errorf("problems: %.500v", list.Problems)
	}
}

func TestSelfWaitsForPodCIDRs(t *testing.T) {
	a := newAPIServer(t)
	d := startDaemon(t, a, "n1")
	d.awaitSelf("node n1 does not exist")
	a.put("n1", func(n *corev1.Node) {
		n.Status.Addresses = []corev1.NodeAddress{
			{Type: corev1.NodeExternalIP, Address: "198.51.100.1"},
			{Type: corev1.NodeInternalIP, Address: "2001:db8::1"},
			{Type: corev1.NodeInternalIP, Address: "not an address"},
			{Type: corev1.NodeInternalIP, Address: "192.0.2.1"},
		}
	})
	d.awaitSelf("--allocate-node-cidrs")
	a.put("n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.1.5/24"} })
	d.awaitSelf(`spec.podCIDRs of node n1 holds "10.244.1.5/24"`)
	a.put("n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.1.0/24", "10.244.2.0/24"} })
	d.awaitSelf("two subnets of one address family")
	a.put("n1", func(n *corev1.Node) { n.Spec.PodCIDRs, n.Spec.PodCIDR = nil, "10.244.1.0/24" })
	d.awaitSelf("")
	a.put("n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"fd00:10:244:1::/64", "10.244.1.0/24"} })
	var self subnet.Node
	d.await("both subnets", func() (ok bool) {
		self, _ = d.Self()
		return len(self.Subnets) == 2
	})
	if got := fmt.Sprint(self.Name, self.Subnets, self.Addrs); got !=
		"n1[fd00:10:244:1::/64 10.244.1.0/24] [2001:db8::1 192.0.2.1]" || self.Since.IsZero() {
		t.Errorf("self: %s since %v", got, self.Since)
	}
	a.remove("n1")
	d.awaitSelf("node n1 does not exist")
	if _, err := kube.New(a.config(), kube.Options{}, slog.Default()); err == nil {
		t.Error("a daemon without a name")
	}
}

func mine(host string) []subnet.Lease {
	return []subnet.Lease{{
		Node: "n3", Subnet: netip.MustParsePrefix("10.244.3.0/24"), Host: netip.MustParseAddr(host),
		NodeAddrs: []netip.Addr{netip.MustParseAddr(host)}, Backend: "vxlan", Data: []byte(`{"vni":1}`),
	}}
}

func TestPublishWritesOnceAndOnlyOurs(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	set(a, "n3", map[string]string{kube.HostOverride: "198.51.100.3", kube.Sources: "198.51.100.4"})
	d := startDaemon(t, a, "n3")
	if err := d.Publish(t.Context(), mine("192.0.2.3")); err == nil && len(a.patched()) == 0 {
		t.Error("published to a Node that was never read")
	}
	d.awaitSelf("")
	for range 5 {
		if err := d.Publish(t.Context(), mine("192.0.2.3")); err != nil {
			t.Fatal(err)
		}
	}
	d.awaitNodes("n1", "n2", "n3")
	if p := a.patched(); len(p) != 1 {
		t.Errorf("%d writes: %v", len(p), p)
	}
	want := map[string]string{
		kube.Subnets: "10.244.3.0/24", kube.Host: "192.0.2.3", kube.Backend: "vxlan", kube.BackendData: `{"vni":1}`,
		kube.HostOverride: "198.51.100.3", kube.Sources: "198.51.100.4", "example.com/other": "kept",
	}
	if got := a.annotations("n3"); !maps.Equal(got, want) {
		t.Errorf("annotations: %v", got)
	}
	if err := d.Publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{kube.Subnets, kube.Host, kube.Backend, kube.BackendData} {
		delete(want, key)
	}
	if got := a.annotations("n3"); !maps.Equal(got, want) {
		t.Errorf("annotations after withdrawal: %v", got)
	}
	if err := d.Publish(t.Context(), []subnet.Lease{{Node: "n3"}}); err == nil {
		t.Error("published a lease without an address")
	}
}

func TestOthersOverwriteOurAnnotations(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	if err := d.Publish(t.Context(), mine("192.0.2.3")); err != nil {
		t.Fatal(err)
	}
	set(a, "n3", map[string]string{kube.Host: "203.0.113.66"})
	d.await("our own words again", func() bool {
		if err := d.Publish(t.Context(), mine("192.0.2.3")); err != nil {
			t.Fatal(err)
		}
		return a.annotations("n3")[kube.Host] == "192.0.2.3"
	})
}

func TestPublishMeetsANewerNode(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	a.with(func() { a.stale = 1 })
	if err := d.Publish(t.Context(), mine("192.0.2.3")); err != nil {
		t.Errorf("one conflict: %v", err)
	}
	if n := len(a.patched()); n != 2 {
		t.Errorf("%d writes", n)
	}
	a.with(func() { a.stale = 2 })
	err := d.Publish(t.Context(), mine("192.0.2.33"))
	if err == nil || !strings.Contains(err.Error(), "others keep changing the Node") {
		t.Errorf("two conflicts: %v", err)
	}
	if n := len(a.patched()); n != 4 {
		t.Errorf("%d writes", n)
	}
}

func TestPublishToANodeThatWasRecreated(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	a.with(func() { a.muted = true }) // the daemon does not know it yet
	a.remove("n3")
	a.put("n3", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.3.0/24"} })
	if err := d.Publish(t.Context(), mine("192.0.2.3")); err != nil || a.annotations("n3")[kube.Host] != "192.0.2.3" {
		t.Errorf("%v; annotations %v", err, a.annotations("n3"))
	}
}

func TestPublishIsRefused(t *testing.T) {
	for code, want := range map[int]string{
		http.StatusForbidden:           `the verb "patch" on the resource "nodes"`,
		http.StatusUnauthorized:        "does not accept our token",
		http.StatusInternalServerError: "cannot publish the lease of node n3",
	} {
		a := newAPIServer(t, func(a *apiServer) { a.refuse["patch"] = code })
		populate(a)
		d := startDaemon(t, a, "n3")
		d.awaitSelf("")
		if err := d.Publish(t.Context(), mine("192.0.2.3")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d: %v", code, err)
		}
	}
}

func TestListOnce(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		set(a, "n3", map[string]string{kube.Host: "nowhere"})
		list, err := kube.ListOnce(t.Context(), a.config())
		if err != nil || !slices.Equal(holders(list), []string{"n1", "n2"}) || len(list.Problems) != 4 || list.At.IsZero() {
			t.Errorf("got %+v, %v", list, err)
		}
		a.stop()
		_, err = kube.ListOnce(t.Context(), a.config())
		if err == nil || !strings.Contains(err.Error(), "cannot list nodes at http://"+a.addr) {
			t.Errorf("server away: %v", err)
		}
	})
}

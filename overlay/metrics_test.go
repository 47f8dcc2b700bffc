package overlay

import (
	"context"
	"errors"
	"maps"
	"math"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// scrape returns what /metrics says of tweed, by name and values of labels in order; of histograms the count.
func (n *node) scrape(t *testing.T) map[string]float64 {
	t.Helper()
	w := get(n, "/metrics")
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(w.Body)
	if err != nil || w.Code != http.StatusOK {
		t.Fatalf("status %d: %v", w.Code, err)
	}
	got := map[string]float64{}
	for name, f := range families {
		if !strings.HasPrefix(name, "tweed_") {
			continue
		}
		for _, m := range f.Metric {
			words := []string{name}
			for _, l := range m.Label {
				words = append(words, l.GetValue())
			}
			key := strings.Join(words, " ")
			got[key] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return got
}

// drift returns the counters of drift that are not 0.
func (n *node) drift(t *testing.T) map[string]int {
	t.Helper()
	moved := map[string]int{}
	for name, v := range n.scrape(t) {
		if kind, ok := strings.CutPrefix(name, "tweed_drift_repaired_total "); ok && v != 0 {
			moved[kind] = int(v)
		}
	}
	return moved
}

// wantDrift checks what has been counted as drift since the start.
func (n *node) wantDrift(t *testing.T, when string, want map[string]int) {
	t.Helper()
	if got := n.drift(t); !maps.Equal(got, want) {
		t.Errorf("%s: drift is %v, want %v", when, got, want)
	}
}

// byHand makes a change as somebody else on the host.
func (n *node) byHand(t *testing.T, do backend.Verb, what backend.Object) {
	t.Helper()
	op := backend.Op{Do: do, What: what}
	if do != backend.Add {
		op.Was = what
	}
	if err := n.kern.ByHand(op); err != nil {
		t.Fatal(err)
	}
}

// route is the one of a peer to a subnet.
func (n *node) route(t *testing.T, dst string) backend.Route {
	t.Helper()
	for k, r := range n.state(t).Routes {
		if k.Dst.String() == dst {
			return r
		}
	}
	t.Fatalf("no route to %s", dst)
	return backend.Route{}
}

func TestSeriesAppearOnlyOnceSomethingHappens(t *testing.T) {
	n := newNode(t)
	var want []string
	for _, kind := range backend.Kinds() {
		want = append(want, "tweed_drift_repaired_total "+kind)
		for _, result := range []string{"done", "failed", "skipped"} {
			want = append(want, "tweed_operations_total "+kind+" "+result)
		}
	}
	for _, kind := range subnet.Kinds() {
		want = append(want, "tweed_problems "+kind)
	}
	for _, state := range []string{"own", "unpublished", "peer", "refused"} {
		want = append(want, "tweed_leases "+state)
	}
	want = append(want, "tweed_peers_wanted", "tweed_peers_programmed", "tweed_pass_duration_seconds")
	got := n.scrape(t)
	for _, name := range want {
		if v, ok := got[name]; !ok || v != 0 {
			t.Errorf("%s is %v, there: %v; want 0 from the start", name, v, ok)
		}
	}
	if age := got["tweed_list_age_seconds"]; !math.IsInf(age, 1) {
		t.Errorf("the list is %v s old before there was one", age)
	}
	if len(got) != len(want)+1 {
		t.Errorf("%d series, want %d: %v", len(got), len(want)+1, slices.Sorted(maps.Keys(got)))
	}
	if lint, err := testutil.GatherAndLint(n.meter.registry); err != nil || len(lint) > 0 {
		t.Errorf("%v, %v", lint, err)
	}
}

// TestWhatIsNoDriftIsCountedAsDrift has all that makes a pass do something although nobody has touched the kernel.
func TestWhatIsNoDriftIsCountedAsDrift(t *testing.T) {
	n := newNode(t)
	n2, n3 := peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13")
	n.cluster.set(n2)
	n.step(t)
	n.wantDrift(t, "first pass", nil)
	n.cluster.set(n2, n3)
	n.step(t)
	n.wantDrift(t, "a peer has come", nil)
	n.cluster.set(n2)
	n.step(t)
	n.wantDrift(t, "a peer has left", nil)

	n.kern.Fail(func(op backend.Op) error { return failFor(op, "n3") })
	n.cluster.set(n2, n3)
	n.step(t)
	n.step(t)
	n.wantDrift(t, "an operation is refused twice", nil)
	n.kern.Fail(nil)
	if rep := n.step(t); rep.Done == 0 || rep.Drift != 0 {
		t.Errorf("report is %+v", rep)
	}
	n.wantDrift(t, "it is not refused any more", nil)

	n.kern.Fail(func(backend.Op) error { return errors.New("the kernel has no more room") })
	n.cluster.set(n3)
	n.cluster.with(func(c *cluster) { c.list.Problems = []subnet.Problem{{Node: "n4", Kind: subnet.KindAnnotation}} })
	n.step(t)
	n.kern.Fail(nil)
	n.step(t)
	n.wantDrift(t, "what goes is refused once", nil)
}

func failFor(op backend.Op, node string) error {
	if op.Peer == node {
		return errors.New("the kernel has no more room")
	}
	return nil
}

// TestPlanIsNeverCarriedOut has the kernel unreadable in the pass that a peer comes with.
func TestPlanIsNeverCarriedOut(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.planner.Kernel = unreadable{n.kern}
	if rep := n.step(t); rep.Failed != 1 {
		t.Fatalf("report is %+v", rep)
	}
	passes := n.scrape(t)["tweed_pass_duration_seconds"]
	n.planner.Kernel = n.kern
	if rep := n.step(t); rep.Done == 0 {
		t.Fatalf("report is %+v", rep)
	}
	n.wantDrift(t, "a peer has come", nil)
	if got := n.scrape(t)["tweed_pass_duration_seconds"]; passes != 1 || got != 2 {
		t.Errorf("%v passes with one that could not be made, %v in the end; want 1 and 2", passes, got)
	}
}

// unreadable is a kernel that cannot be read.
type unreadable struct{ Kernel }

func (unreadable) Observe(context.Context, backend.State) (backend.Observed, error) {
	return backend.Observed{}, errors.New("no buffer space available")
}

func (unreadable) ObserveFilter(context.Context, masq.Ruleset) (masq.Ruleset, error) {
	return masq.Ruleset{}, errors.New("no buffer space available")
}

func TestDriftIsRepairedOnlyAtTheSecondTry(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	n.byHand(t, backend.Delete, n.route(t, "10.244.2.0/24"))
	n.kern.Fail(func(op backend.Op) error { return failFor(op, "n2") })
	n.step(t)
	n.wantDrift(t, "the repair has failed", nil)
	n.kern.Fail(nil)
	if rep := n.step(t); rep.Drift != 1 {
		t.Errorf("report is %+v", rep)
	}
	n.wantDrift(t, "the repair has been made", map[string]int{"route": 1})
	if got := n.scrape(t)["tweed_operations_total route failed"]; got != 1 {
		t.Errorf("%v operations on routes have failed, want 1", got)
	}
}

// TestDriftHidesBehindAChangedList has a list that changes while what the kernel should hold does not.
func TestDriftHidesBehindAChangedList(t *testing.T) {
	n := newNode(t)
	n2 := peer("n2", "10.244.2.0/24", "192.0.2.12")
	n.cluster.set(n2)
	n.step(t)
	n.byHand(t, backend.Delete, n.route(t, "10.244.2.0/24"))
	n.cluster.set(n2, peer("n3", "172.16.3.0/24", "192.0.2.13"))
	n.step(t)
	n.wantDrift(t, "an unusable lease has come", map[string]int{"route": 1})
}

func TestLeasesAndPeersAreMiscounted(t *testing.T) {
	n := newNode(t)
	n.cluster.refuse = errors.New("forbidden")
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n2", "fd00:10:244:2::/64", "192.0.2.12"),
		peer("n3", "10.244.3.0/24", "192.0.2.13"), peer("n4", "172.16.4.0/24", "192.0.2.14"))
	n.kern.Fail(func(op backend.Op) error { return failFor(op, "n3") })
	n.step(t)
	n.wantSeries(t, map[string]float64{
		"tweed_leases own": 0, "tweed_leases unpublished": 2, "tweed_leases peer": 3, "tweed_leases refused": 1,
		"tweed_peers_wanted": 2, "tweed_peers_programmed": 1,
		"tweed_problems kernel": 3, "tweed_problems lease": 1, "tweed_problems stranger": 0,
	})
	n.kern.Fail(nil)
	n.cluster.refuse = nil
	n.step(t)
	n.wantSeries(t, map[string]float64{
		"tweed_leases own": 2, "tweed_leases unpublished": 0, "tweed_peers_wanted": 2, "tweed_peers_programmed": 2,
		"tweed_problems kernel": 0,
	})
	n.cluster.away = errors.New("connection refused")
	n.cluster.with(func(c *cluster) { c.list.At = time.Now().Add(-time.Hour) })
	if age := n.scrape(t)["tweed_list_age_seconds"]; age < 3600 || age > 3700 {
		t.Errorf("the list is %v s old, want an hour", age)
	}
}

// wantSeries checks some of what is served.
func (n *node) wantSeries(t *testing.T, want map[string]float64) {
	t.Helper()
	got := n.scrape(t)
	for name, v := range want {
		if have, ok := got[name]; !ok || have != v {
			t.Errorf("%s is %v, there: %v; want %v", name, have, ok, v)
		}
	}
}

func TestStrangerKeepsPeersFromBeingReached(t *testing.T) {
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	device := backend.Link{Name: "tweed.1", Type: backend.KindVXLAN, MTU: 1450}
	n.kern.AddStranger(device)
	n.step(t)
	n.wantSeries(t, map[string]float64{"tweed_peers_wanted": 2, "tweed_peers_programmed": 0})
	n.kern.RemoveStranger(device)
	n.step(t)
	n.wantSeries(t, map[string]float64{"tweed_peers_wanted": 2, "tweed_peers_programmed": 2})

	route := n.route(t, "10.244.2.0/24")
	n.byHand(t, backend.Delete, route)
	n.kern.AddStranger(route)
	n.step(t)
	n.wantSeries(t, map[string]float64{"tweed_peers_wanted": 2, "tweed_peers_programmed": 1})
}

func TestAddressesAreMiscounted(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	attached(t, n.planner.RunDir, "10.244.1.5/24")
	n.wantSeries(t, map[string]float64{
		"tweed_addresses_used 10.244.1.0/24": 1, "tweed_addresses_free 10.244.1.0/24": 252,
		"tweed_addresses_used fd00:10:244:1::/64": 0, "tweed_addresses_free fd00:10:244:1::/64": 65533,
	})
}

func TestMetricsAddressIsMistyped(t *testing.T) {
	for _, good := range []string{":9480", "[::]:9480", "0.0.0.0:9480", "192.0.2.11:9479", "[2001:db8::1]:1"} {
		if err := CheckMetricsAddress(good); err != nil {
			t.Errorf("%q is refused: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", "9480", ":", ":0", ":65536", ":http", "::1:9480", "localhost:9480", "http://:9480", ":-1", ":+1",
		":9479", "[::]:9479", "127.0.0.1:9479",
	} {
		if err := CheckMetricsAddress(bad); err == nil || !strings.Contains(err.Error(), `"`+bad+`"`) {
			t.Errorf("%q: %v; want an error that quotes it", bad, err)
		}
	}
}

func TestMetricsAddressIsInUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	n := newNode(t)
	n.MetricsAddress = ln.Addr().String()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := n.ServeMetrics(ctx); err == nil || !strings.Contains(err.Error(), n.MetricsAddress) ||
		!strings.Contains(err.Error(), "in use") {
		t.Errorf("%v; want an error that names %s", err, n.MetricsAddress)
	}
}

package overlay

import (
	"context"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// mostScrapes bounds how many scrapes are answered at a time; each reads the directory of pods' addresses.
const mostScrapes = 3

// CheckMetricsAddress refuses what is not HOST:PORT, or not a place to serve /metrics alone at. HOST is an address of
// this node, or empty for all of them, as 0.0.0.0 and [::] are for those of one family or both; names are not looked
// up. The error quotes s.
func CheckMetricsAddress(s string) error {
	host, number, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q: want HOST:PORT, such as :9480, 192.0.2.11:9480 or [::]:9480", s)
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("%q: port %q is not a number from 1 to 65535", s, number)
	}
	addr := netip.IPv6Unspecified()
	if host != "" {
		if addr, err = netip.ParseAddr(host); err != nil {
			return fmt.Errorf("%q: host %q is not an IP address; leave it empty for all of this node's", s, host)
		}
	}
	if port == Port && (addr.IsUnspecified() || addr.IsLoopback()) {
		return fmt.Errorf("%q: port %d of 127.0.0.1 is the daemon's own; choose another", s, Port)
	}
	return nil
}

// A meter adds up what passes do. All else is read from the last Report when somebody asks.
type meter struct {
	registry *prometheus.Registry
	ops      *prometheus.CounterVec
	drift    *prometheus.CounterVec
	took     prometheus.Histogram
}

func newMeter(r *Reconciler) *meter {
	m := &meter{
		registry: prometheus.NewRegistry(),
		ops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tweed_operations_total",
			Help: "Operations on the kernel, by the kind of object and by what became of them.",
		}, []string{"kind", "result"}),
		drift: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tweed_drift_repaired_total",
			Help: "Operations that repaired what somebody else had changed, by the kind of object.",
		}, []string{"kind"}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "tweed_pass_duration_seconds",
			Help:    "How long passes took.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}),
	}
	for _, kind := range backend.Kinds() {
		m.drift.WithLabelValues(kind)
		for _, result := range []string{done, failed, skipped} {
			m.ops.WithLabelValues(kind, result)
		}
	}
	m.registry.MustRegister(m.ops, m.drift, m.took, newGauges(r),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// note takes in what came of a pass.
func (m *meter) note(rep Report) {
	if rep.tally == nil {
		return
	}
	for o, n := range rep.tally.ops {
		m.ops.WithLabelValues(o.kind, o.result).Add(float64(n))
	}
	for kind, n := range rep.tally.drift {
		m.drift.WithLabelValues(kind).Add(float64(n))
	}
	m.took.Observe(rep.TookMs / 1000)
}

// handler answers GET /metrics. One value that cannot be had does not keep the others back.
func (m *meter) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: mostScrapes,
	})
}

// gauges reads what is the case at the moment of a scrape.
type gauges struct {
	r *Reconciler

	leases, wanted, programmed, listAge, used, free, problems, drops, spoofs *prometheus.Desc
}

func newGauges(r *Reconciler) *gauges {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("tweed_"+name, help, labels, nil)
	}
	return &gauges{
		r:          r,
		leases:     desc("leases", "Leases that this node knows of, by what they are to it.", "state"),
		wanted:     desc("peers_wanted", "Other nodes that this node has to reach."),
		programmed: desc("peers_programmed", "Other nodes that this node's kernel leads to."),
		listAge:    desc("list_age_seconds", "How long ago the list of leases was last known to be current."),
		used:       desc("addresses_used", "Addresses of this node's subnets that pods have.", "subnet"),
		free:       desc("addresses_free", "Addresses of this node's subnets that pods can still get.", "subnet"),
		problems:   desc("problems", "What is wrong, on this node and with others, by kind.", "kind"),
		drops: desc("guard_drops_total", "Packets to the tunnel's port that were dropped, by what they were dropped for.",
			"reason"),
		spoofs: desc("spoof_drops_total", "Frames of pods in others' names that were dropped, by what gave them away.",
			"reason"),
	}
}

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		g.leases, g.wanted, g.programmed, g.listAge, g.used, g.free, g.problems, g.drops, g.spoofs,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	rep := g.r.Report()
	c := rep.census
	for state, n := range c.leases(g.r.published.Load(), rep.Peers) {
		gauge(g.leases, float64(n), state)
	}
	gauge(g.wanted, float64(c.nodes))
	gauge(g.programmed, float64(c.programmed))
	age := rep.ListAge
	if age < 0 {
		age = math.Inf(1)
	}
	gauge(g.listAge, age)
	for kind, n := range rep.problemsByKind() {
		gauge(g.problems, float64(n), kind)
	}
	guard, pods := apart(c.counted)
	g.collectDrops(ch, g.drops, guard, masq.Reasons())
	g.collectDrops(ch, g.spoofs, pods, spoof.Reasons())
	usage, err := podnet.UsageOf(g.r.planner.RunDir, c.subnets)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(g.used, err)
	}
	for _, u := range usage {
		gauge(g.used, float64(u.Used), u.Subnet.String())
		gauge(g.free, float64(u.Free), u.Subnet.String())
	}
}

// collectDrops tells what some chains have dropped packets for.
func (g *gauges) collectDrops(ch chan<- prometheus.Metric, d *prometheus.Desc, counted map[masq.Chain][]string,
	reasons []string) {
	dropped, err := g.dropped(counted, reasons)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(d, err)
	}
	for reason, n := range dropped {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), reason)
	}
}

// dropped adds up the counters of some chains. A chain that holds other rules than it should, for as long as nobody has
// looked, counts nothing. There is nothing to tell where there are no chains.
func (g *gauges) dropped(counted map[masq.Chain][]string, all []string) (map[string]uint64, error) {
	if len(counted) == 0 {
		return nil, nil
	}
	n := map[string]uint64{}
	for _, reason := range all {
		n[reason] = 0
	}
	for chain, reasons := range counted {
		counts, err := g.r.planner.Kernel.RuleCounts(context.Background(), chain)
		if err != nil {
			return nil, err
		}
		for i, reason := range reasons {
			if len(counts) == len(reasons) && reason != "" {
				n[reason] += counts[i]
			}
		}
	}
	return n, nil
}

// leases counts them by what they are to this node.
func (c census) leases(published bool, peers int) map[string]int {
	n := map[string]int{"own": c.own, "unpublished": 0, "peer": peers, "refused": c.refused}
	if !published {
		n["own"], n["unpublished"] = 0, c.own
	}
	return n
}

func (r Report) problemsByKind() map[string]int {
	n := map[string]int{}
	for _, kind := range subnet.Kinds() {
		n[kind] = 0
	}
	for _, p := range r.Problems {
		n[p.Kind]++
	}
	return n
}

// ServeMetrics answers GET /metrics, and nothing else, at MetricsAddress until ctx ends.
func (r *Reconciler) ServeMetrics(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", r.meter.handler())
	ln, err := net.Listen("tcp", r.MetricsAddress)
	if err != nil {
		return fmt.Errorf("opening %s for /metrics (--metrics-address): %w", r.MetricsAddress, err)
	}
	return serve(ctx, ln, mux)
}

// serve answers on ln until ctx ends.
func serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); ctx.Err() == nil {
		return err
	}
	return nil
}

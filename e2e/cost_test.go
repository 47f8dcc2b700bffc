package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"tweed.dev/tweed/e2e/cluster"
)

const (
	fleetSize = 5000
	// beatsPerSecond is how many heartbeats kubelets send together: each one every five minutes.
	beatsPerSecond = (fleetSize + 299) / 300
	// aftermath is how long after a start what belongs to it may still come.
	aftermath = 5 * time.Second
)

// A source is a way by which nodes come by their subnets, and how many requests a first start takes at most.
type source struct {
	name     string
	podCIDRs []string
	keys     string // of net-conf.json, beside what all have
	first    float64
}

func sources() []source {
	return []source{
		{name: "node-spec", podCIDRs: cluster.FleetSubnets(fleetSize), keys: `"SubnetSource": "node-spec",`, first: 6},
		{name: "lease", keys: `"SubnetSource": "lease",`, first: 10},
	}
}

// BenchmarkCost prints what one daemon costs a cluster with 5,000 Nodes, and its machine, and how fast it is there,
// beside what is aimed at.
func BenchmarkCost(b *testing.B) {
	c := costs{Cluster: cluster.Start(b, programs(b))}
	c.Audit(b)
	c.fleet = c.AddFleet(b, fleetSize)
	c.wire = c.NewWire(b)
	c.Progress("%d Nodes are registered", fleetSize)
	b.Run("use", func(b *testing.B) {
		for i, s := range sources() {
			c.measure(b, s, i == 0)
		}
		c.print(b)
	})
	b.Run("speed", func(b *testing.B) { measureSpeed(b, c.Cluster, c.fleet) })
}

// A costs measures, and keeps the table.
type costs struct {
	*cluster.Cluster
	fleet *cluster.Fleet
	wire  *cluster.Wire
	rows  []costRow
}

type costRow struct {
	what           string
	goal, measured float64 // no goal is 0
	unit           string
}

func (c *costs) add(measured float64, unit string, goal float64, what string, args ...any) {
	c.rows = append(c.rows, costRow{fmt.Sprintf(what, args...), goal, measured, unit})
}

// measure starts the daemon of a new node for the first time and again, and between the two, if long, looks at it for
// two minutes.
func (c *costs) measure(b *testing.B, s source, long bool) {
	n := c.AddNode(b, "cost-"+s.name, s.podCIDRs...)
	c.fleet.Join(b, n, s.keys)
	n.GoBy(b, c.wire.URL)
	c.start(b, n, s.name+", first start", s.first)
	if long {
		c.minutes(b, n)
	}
	n.Daemon.Stop(b, syscall.SIGTERM)
	c.start(b, n, s.name+", restart", 4)
	c.RemoveNode(b, n)
}

// start measures a start of the node's daemon, up to some time after everything stands.
func (c *costs) start(b *testing.B, n *cluster.Node, what string, requests float64) {
	asked, received, sent := len(c.Requests(b)), c.wire.Received(), c.wire.Sent()
	begun := time.Now()
	n.StartDaemon(b)
	cluster.AwaitLong(b, "all peers on "+n.Name, 2*time.Minute, func() error { return hasPeers(b, n, 2*fleetSize) })
	took := time.Since(begun)
	time.Sleep(aftermath) // whether more comes can only be seen by waiting
	counted, pages := tally(c.Requests(b)[asked:])
	c.Progress("%s: %d requests, %d pages: %s", what, len(counted), pages, strings.Join(counted, "; "))
	u := n.Daemon.Usage(b)
	c.add(float64(len(counted)), "", requests, "%s: requests", what)
	c.add(perThousand(c.wire.Received()-received), "MB", 1.6, "%s: received per 1,000 Nodes", what)
	c.add(float64(c.wire.Sent()-sent)/1e3, "kB", 0, "%s: sent", what)
	c.add(took.Seconds(), "s", 0, "%s: until all peers are in the kernel", what)
	c.add(u.CPU.Seconds(), "s", 0, "%s: processor time", what)
	c.add(mega(u.Peak), "MB", 90, "%s: memory at most", what)
}

func hasPeers(b *testing.B, n *cluster.Node, want int) error {
	if !n.Daemon.Running() {
		b.Fatalf("the daemon on %s ended:\n%s", n.Name, n.Daemon.Tail(20))
	}
	r, err := n.Report()
	if err == nil && (r.Peers != want || !r.Converged) {
		err = fmt.Errorf("it has %d, converged %v, %d problems", r.Peers, r.Converged, len(r.Problems))
	}
	return cmp.Or(err, n.Ready())
}

// tally counts requests, apart from the pages of a list of whole Nodes.
func tally(all []cluster.Request) (counted []string, pages int) {
	for _, r := range all {
		if r.Verb == "list" && strings.Contains(r.URI, "limit=") {
			pages++
			continue
		}
		counted = append(counted, r.Verb+" "+r.URI)
	}
	return counted, pages
}

// minutes measures a minute in which nothing happens, and one of heartbeats alone.
func (c *costs) minutes(b *testing.B, n *cluster.Node) {
	idle := c.minute(b, n, func() { time.Sleep(time.Minute) })
	beats := 0
	busy := c.minute(b, n, func() { beats = c.fleet.Beat(b, beatsPerSecond, time.Minute) })
	u := n.Daemon.Usage(b)
	c.add(mega(u.Resident), "MB", 60, "memory after these minutes")
	c.add(mega(u.Peak), "MB", 90, "memory at most by then")
	c.add(idle.share(), "%", 0, "of a core, nothing happens, %d passes", idle.passes)
	c.add(busy.share()-idle.share(), "%", 2, "of a core more for %d heartbeats a second", beatsPerSecond)
	c.add(float64(busy.requests), "", 0, "requests in that minute")
	c.add(float64(busy.received-idle.received)/float64(beats)/1e3, "kB", 0, "received per heartbeat")
	// The slow timer asks for one every 30 s.
	c.add(float64(busy.passes), "", 3, "passes in the minute of %d heartbeats", beats)
}

// A minute is what happened in one.
type minute struct {
	cpu, took        time.Duration
	received         int64
	requests, passes int
}

func (m minute) share() float64 { return 100 * m.cpu.Seconds() / m.took.Seconds() }

func (c *costs) minute(b *testing.B, n *cluster.Node, f func()) (m minute) {
	received, requests, used, begun := c.wire.Received(), len(c.Requests(b)), n.Daemon.Usage(b).CPU, time.Now()
	stop := countPasses(n)
	f()
	passes, err := stop()
	if err != nil {
		b.Fatal(err)
	}
	return minute{
		cpu: n.Daemon.Usage(b).CPU - used, took: time.Since(begun), passes: passes,
		received: c.wire.Received() - received, requests: len(c.Requests(b)) - requests,
	}
}

// countPasses looks every second whether there was another pass.
func countPasses(n *cluster.Node) (stop func() (int, error)) {
	done := make(chan struct{})
	type result struct {
		passes int
		errs   error
	}
	out := make(chan result)
	go func() {
		var res result
		last := 0.0
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			r, err := n.Report()
			if res.errs = errors.Join(res.errs, err); r.TookMs != last && last != 0 {
				res.passes++
			}
			last = r.TookMs
			select {
			case <-done:
				out <- res
				return
			case <-ticker.C:
			}
		}
	}()
	return func() (int, error) {
		close(done)
		res := <-out
		return res.passes, res.errs
	}
}

func (c *costs) print(b *testing.B) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\none daemon at %d Nodes\tgoal\tmeasured\t\n", fleetSize)
	for _, r := range c.rows {
		goal, missed := "", ""
		if r.goal != 0 {
			goal = fmt.Sprintf("%v %s", r.goal, r.unit)
		}
		if r.goal != 0 && r.measured > r.goal {
			missed = "MISSED"
		}
		fmt.Fprintf(w, "%s\t%s\t%.4g %s\t%s\n", r.what, goal, r.measured, r.unit, missed)
	}
	if err := w.Flush(); err != nil {
		b.Error(err)
	}
}

func mega(bytes int64) float64 { return float64(bytes) / 1e6 }

func perThousand(bytes int64) float64 { return mega(bytes) / fleetSize * 1000 }

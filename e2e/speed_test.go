package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"tweed.dev/tweed/e2e/cluster"
)

const (
	coldRounds    = 5
	joinRounds    = 10
	replaceRounds = 5
	replaced      = 500
	idleRounds    = 4
	idlePasses    = 20 // a round; the kernel counts processor time in hundredths of a second
	// idlePause is longer than what a daemon lets pass between two passes.
	idlePause = 500 * time.Millisecond
	// podWorkers change one pod each, and together changesPerSecond.
	podWorkers       = 8
	changesPerSecond = 20
	podTime          = 30 * time.Second
)

// goals are what is aimed at: times in milliseconds, and how many times as long as the floor. Beside peers a
// daemon makes the packet filter, which the floor does not.
type goals struct {
	listed, started, joined, idle, ratio float64
}

// measureSpeed starts daemons where everything is new to them, and changes what they follow, in turns with the floor:
// the same objects made by one `ip -batch` and one `bridge -batch`.
//
// All are held to their goals by the median.
func measureSpeed(b *testing.B, c *cluster.Cluster, f *cluster.Fleet) {
	s := &speed{Cluster: c, fleet: f, floor: newFloor(b, c)}
	s.measure(b, "dual-stack", cluster.FleetSubnets(fleetSize),
		goals{listed: 1500, started: 2200, joined: 100, idle: 45, ratio: 2})
	f.OnlyIPv4(b)
	s.measure(b, "IPv4", cluster.FleetSubnets(fleetSize)[:1],
		goals{listed: 1000, started: 1500, joined: 100, idle: 45, ratio: 2})
	s.print(b)
}

// A speed measures, and keeps the table.
type speed struct {
	*cluster.Cluster
	fleet   *cluster.Fleet
	floor   *floor
	figures []*figure
}

// A figure is one thing measured several times.
type figure struct {
	what, unit string
	goal       float64 // 0 for none
	samples    []float64
}

func (f *figure) add(v float64) { f.samples = append(f.samples, v) }

func (f *figure) since(from, to time.Time) { f.add(float64(to.Sub(from).Microseconds()) / 1e3) }

func (f *figure) median() float64 {
	return slices.Sorted(slices.Values(f.samples))[len(f.samples)/2]
}

func (f *figure) missed() bool {
	return f.goal != 0 && f.median() > f.goal
}

func (s *speed) figure(goal float64, unit, what string, args ...any) *figure {
	f := &figure{what: fmt.Sprintf(what, args...), unit: unit, goal: goal}
	s.figures = append(s.figures, f)
	return f
}

func (s *speed) measure(b *testing.B, families string, subnets []string, g goals) {
	listed := s.figure(g.listed, "ms", "%s, cold start, from the list to the last route", families)
	started := s.figure(g.started, "ms", "%s, cold start, from the start of the process to the last route", families)
	bare := s.figure(0, "ms", "  floor: the same objects by -batch")
	cpu := s.figure(0, "ms", "  processor time of the daemon until its node is ready")
	ratio := s.figure(g.ratio, "", "  from the list, over the floor")
	var n *cluster.Node
	for round := range coldRounds {
		if n != nil {
			s.RemoveNode(b, n)
		}
		n = s.AddNode(b, fmt.Sprintf("speed-%d-%d", len(subnets), round), subnets...)
		s.fleet.Join(b, n, `"SubnetSource": "node-spec",`)
		list, start, last := s.start(b, n)
		listed.since(list, last)
		started.since(start, last)
		cpu.add(float64(n.Daemon.Usage(b).CPU.Milliseconds()))
		s.floor.empty(b)
		bare.add(s.floor.make(b, s.peers(0, fleetSize, 0), nil))
		s.compare(b, n)
	}
	ratio.add(listed.median() / bare.median())
	s.join(b, n, families, g.joined)
	s.replace(b, n, families)
	s.idle(b, n, families, g.idle)
	s.pods(b, n, families)
	u := n.Daemon.Usage(b)
	s.figure(60, "MB", "%s, memory in the end", families).add(mega(u.Resident))
	s.figure(90, "MB", "%s, memory at most", families).add(mega(u.Peak))
	s.RemoveNode(b, n)
}

// start starts the daemon of a new node, and returns when it was sent the list, when its process began and when the
// last route was there.
func (s *speed) start(b *testing.B, n *cluster.Node) (list, start, last time.Time) {
	routes := n.NetNS.ExpectRoutes(b, subnetsOf(s.peers(0, fleetSize, 0)), nil)
	start = time.Now()
	n.StartDaemon(b)
	last = routes.Last(b)
	n.AwaitReady(b)
	list = s.ListSent(b)
	s.Progress("%s: list after %v, last route after %v", n.Name, list.Sub(start), last.Sub(start))
	return list, start, last
}

// peers are those of the fleet from that number up to another, as Fleet.Replace makes them with that shift.
func (s *speed) peers(from, to, shift int) (all []cluster.Peer) {
	for i := from; i < to; i++ {
		all = append(all, s.fleet.Peer(i+shift))
	}
	return all
}

func subnetsOf(peers []cluster.Peer) (all []string) {
	for _, p := range peers {
		all = append(all, p.Subnets...)
	}
	return all
}

// compare holds the floor to the daemon's work: they made the same.
func (s *speed) compare(b *testing.B, n *cluster.Node) {
	for _, command := range []string{
		"ip route show dev tweed.1 proto 116", "ip -6 route show dev tweed.1 proto 116", "bridge fdb show dev tweed.1",
		"ip neigh show dev tweed.1 nud permanent", "ip -6 neigh show dev tweed.1 nud permanent",
	} {
		lines := func(ns cluster.NetNS) []string {
			return slices.Sorted(strings.Lines(ns.Run(b, command)))
		}
		if ours, theirs := lines(n.NetNS), lines(s.floor.node.NetNS); !slices.Equal(ours, theirs) {
			b.Fatalf("%s: %d lines of the daemon's, %d of the floor's, and not the same:\n%.500s\n%.500s",
				command, len(ours), len(theirs), strings.Join(ours, ""), strings.Join(theirs, ""))
		}
	}
}

// join has one Node after the other publish its lease for the first time.
func (s *speed) join(b *testing.B, n *cluster.Node, families string, goal float64) {
	joined := s.figure(goal, "ms", "%s, one peer added, from its write to its last route", families)
	bare := s.figure(0, "ms", "  floor: the same objects by -batch")
	for round := range joinRounds {
		peer := s.peers(round, round+1, 0)
		gone := n.NetNS.ExpectRoutes(b, nil, subnetsOf(peer))
		s.fleet.Withdraw(b, round)
		gone.Last(b)
		s.floor.make(b, nil, peer)
		time.Sleep(time.Second) // so that it comes to a daemon at rest, as it would
		come := n.NetNS.ExpectRoutes(b, subnetsOf(peer), nil)
		begun := time.Now()
		s.fleet.Replace(b, round, round+1, 0)
		joined.since(begun, come.Last(b))
		bare.add(s.floor.make(b, peer, nil))
	}
}

// replace has many Nodes publish, all at once, that they are other machines.
func (s *speed) replace(b *testing.B, n *cluster.Node, families string) {
	first := s.figure(0, "ms", "%s, %d peers replaced at once, from the first write to the last route", families, replaced)
	last := s.figure(0, "ms", "  from the API server's last answer")
	bare := s.figure(0, "ms", "  floor: the same objects by -batch")
	const from, to = fleetSize - replaced, fleetSize
	shift := 0
	for round := range replaceRounds {
		next := (round + 1) * replaced * 2
		before, after := s.peers(from, to, shift), s.peers(from, to, next)
		routes := n.NetNS.ExpectRoutes(b, subnetsOf(after), subnetsOf(before))
		begun := time.Now()
		s.fleet.Replace(b, from, to, next)
		written := time.Now()
		done := routes.Last(b)
		first.since(begun, done)
		last.add(max(0, float64(done.Sub(written).Microseconds())/1e3))
		bare.add(s.floor.make(b, after, before))
		shift = next
	}
	s.fleet.Replace(b, from, to, 0)
	cluster.Await(b, "the first machines to be back", func() error { return hasPeers(b, n, fleetSize*len(n.PodCIDRs)) })
}

// idle rings for passes that find nothing to do, by routes that others make.
func (s *speed) idle(b *testing.B, n *cluster.Node, families string, goal float64) {
	cpu := s.figure(goal, "ms of a processor", "%s, a pass with nothing to do", families)
	bare := s.figure(0, "ms of a processor", "  floor: ip and bridge show the same objects")
	for range idleRounds {
		used, passes := n.Daemon.Usage(b).CPU, n.Passes(b)
		for i := range idlePasses {
			n.NetNS.Run(b, "ip route "+[]string{"add", "del"}[i%2]+" 203.0.113.1/32 dev eth0")
			time.Sleep(idlePause)
		}
		made := n.Passes(b) - passes
		if made < idlePasses/2 {
			b.Fatalf("%d passes, although it rang %d times", made, idlePasses)
		}
		cpu.add(float64((n.Daemon.Usage(b).CPU - used).Milliseconds()) / float64(made))
		bare.add(s.floor.show(b))
	}
}

// pods attaches and detaches pods all the time.
func (s *speed) pods(b *testing.B, n *cluster.Node, families string) {
	share := s.figure(2, "% of a core", "%s, the daemon at %d changes of pods a second", families,
		changesPerSecond)
	rate := s.figure(0, "a second", "  changes that there were")
	passes := s.figure(0, "", "  passes meanwhile")
	var pods []*cluster.Pod
	for i := range podWorkers {
		pods = append(pods, n.NewPod(b, fmt.Sprintf("%s-%d", n.Name, i)))
	}
	used, made, begun := n.Daemon.Usage(b).CPU, n.Passes(b), time.Now()
	var changes atomic.Int64
	var all sync.WaitGroup
	for _, p := range pods {
		all.Go(func() { changePod(b, p, begun.Add(podTime), &changes) })
	}
	all.Wait()
	took := time.Since(begun).Seconds()
	if changes.Load() == 0 {
		b.Fatal("no pod changed")
	}
	rate.add(float64(changes.Load()) / took)
	passes.add(float64(n.Passes(b) - made))
	// A machine that is too busy for so many counts as if each change had cost the same at the full rate.
	share.add(100 * (n.Daemon.Usage(b).CPU - used).Seconds() / took * changesPerSecond / rate.median())
}

// changePod attaches a pod and detaches it, over and over, at its share of changesPerSecond.
func changePod(b *testing.B, p *cluster.Pod, end time.Time, changes *atomic.Int64) {
	ticker := time.NewTicker(podWorkers * time.Second / changesPerSecond)
	defer ticker.Stop()
	for time.Now().Before(end) {
		<-ticker.C
		if err := p.Attach(b.Context()); err != nil {
			b.Errorf("attaching %s: %v", p, err)
			return
		}
		<-ticker.C
		if err := p.Detach(b.Context()); err != nil {
			b.Errorf("detaching %s: %v", p, err)
			return
		}
		changes.Add(2)
	}
}

func (s *speed) print(b *testing.B) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\n%d peers\tgoal\tmedian\tfrom - to\ttimes\t\n", fleetSize)
	for _, f := range s.figures {
		goal, missed := "", ""
		if f.goal != 0 {
			goal = fmt.Sprintf("%.4g", f.goal)
		}
		if f.missed() {
			missed = "MISSED"
			b.Errorf("%s: missed its goal of %v %s", f.what, f.goal, f.unit)
		}
		fmt.Fprintf(w, "%s\t%s\t%.4g %s\t%.4g - %.4g\t%d\t%s\n", f.what, goal, f.median(), f.unit,
			slices.Min(f.samples), slices.Max(f.samples), len(f.samples), missed)
	}
	if err := w.Flush(); err != nil {
		b.Error(err)
	}
}

// A floor is a machine on which ip and bridge make what a daemon makes.
type floor struct {
	node *cluster.Node
	dir  string
}

func newFloor(b *testing.B, c *cluster.Cluster) *floor {
	return &floor{node: c.AddMachine(b, "floor"), dir: b.TempDir()}
}

// empty makes the device anew, with nothing on it.
func (f *floor) empty(b *testing.B) {
	_, _ = f.node.NetNS.Try("ip link del tweed.1") // there is none the first time
	f.node.NetNS.Run(b, "ip link add tweed.1 type vxlan id 1 dev eth0 dstport 8472 nolearning")
	f.node.NetNS.Run(b, "ip link set tweed.1 up")
}

// make has ip and bridge take away what some peers need and make what others do, and returns how many milliseconds it
// took.
func (f *floor) make(b *testing.B, come, gone []cluster.Peer) float64 {
	var ip, bridge []string
	object := func(verb string, p cluster.Peer) {
		bridge = append(bridge, fmt.Sprintf("fdb %s %s dev tweed.1 dst %s self permanent", verb, p.MAC, p.Host))
		for _, s := range p.Subnets {
			via, onlink := p.Gateway, ""
			if four, _, is4 := strings.Cut(s, ".0/"); is4 {
				via, onlink = four+".0", " onlink"
			}
			ip = append(ip, fmt.Sprintf("neigh %s %s lladdr %s dev tweed.1 nud permanent", verb, via, p.MAC))
			ip = append(ip, fmt.Sprintf("route %s %s via %s dev tweed.1%s proto 116", verb, s, via, onlink))
		}
	}
	for _, p := range gone {
		object("del", p)
	}
	for _, p := range come {
		object("add", p)
	}
	for name, lines := range map[string][]string{"ip": ip, "bridge": bridge} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	begun := time.Now()
	for _, name := range []string{"bridge", "ip"} {
		f.node.NetNS.Run(b, name+" -batch "+filepath.Join(f.dir, name))
	}
	return float64(time.Since(begun).Microseconds()) / 1e3
}

// show has ip and bridge read what a pass reads, and returns their processor time in milliseconds.
func (f *floor) show(b *testing.B) float64 {
	var cpu time.Duration
	for _, command := range []string{
		"ip route show proto 116", "ip -6 route show proto 116", "bridge fdb show dev tweed.1",
		"ip neigh show dev tweed.1", "ip -6 neigh show dev tweed.1",
	} {
		args := strings.Fields(command)
		cmd := exec.Command(args[0], args[1:]...) // its output goes nowhere
		if err := f.node.NetNS.Do(cmd.Run); err != nil {
			b.Fatalf("%s: %v", command, err)
		}
		cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	return float64(cpu.Microseconds()) / 1e3
}

package overlay

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// passRatio is how much longer than the floor a pass from nothing may take.
const passRatio = 1.3

// BenchmarkPass measures passes on a real kernel, with dual-stack peers: the one that programs them all, taking turns
// with the floor (ip -batch and bridge -batch making the same objects), and the one that finds nothing to do.
func BenchmarkPass(b *testing.B) {
	for _, peers := range []int{1000, 5000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			const rounds = 5
			var program, floor, idle, idleCPU samples
			for b.Loop() {
				for range rounds {
					measurePasses(b, peers, &program, &idle, &idleCPU)
					measureFloor(b, peers, &floor)
				}
			}
			b.Logf("program %d peers:           %v", peers, program)
			b.Logf("the same by ip -batch:        %v", floor)
			b.Logf("ratio of medians:             %.2f", float64(program.median())/float64(floor.median()))
			b.Logf("pass with nothing to do:      %v", idle)
			b.Logf("processor time of such a one: %v", idleCPU)
			if ratio := float64(program.median()) / float64(floor.median()); ratio > passRatio {
				b.Errorf("a pass took %.2f times as long as the floor; it is to be at most %v", ratio, passRatio)
			}
			b.ReportMetric(ms(program.median()), "program-ms")
			b.ReportMetric(ms(idle.median()), "idle-ms")
			b.ReportMetric(ms(idleCPU.median()), "idle-cpu-ms")
		})
	}
}

// objects is how many a dual-stack peer needs: two routes and neighbours, an FDB entry, and the route to its node.
const objects = 6

func measurePasses(b *testing.B, peers int, program, idle, idleCPU *samples) {
	inNamespace(b, func() {
		n := onKernel(b)
		n.cluster.set()
		n.step(b)
		n.step(b)
		n.cluster.set(manyPeers(peers)...)
		start := time.Now()
		rep := n.step(b)
		program.add(time.Since(start))
		if !rep.Converged || rep.Done < objects*peers { // and some for the guard's set
			b.Errorf("programmed %d objects: %v %v", rep.Done, rep.Waiting, rep.Problems)
		}
		n.step(b)
		for range 10 {
			start, cpu := time.Now(), processorTime(b)
			rep := n.step(b)
			idle.add(time.Since(start))
			idleCPU.add(processorTime(b) - cpu)
			if rep.Done+rep.Failed > 0 || !rep.Converged {
				b.Errorf("there was something to do: %+v", rep)
			}
		}
	})
}

// measureFloor has the programs that the operations name make the peers' objects.
func measureFloor(b *testing.B, peers int, floor *samples) {
	inNamespace(b, func() {
		n := onKernel(b)
		n.cluster.set()
		n.step(b)
		n.step(b)
		n.cluster.set(manyPeers(peers)...)
		plan, err := n.planner.Plan(b.Context())
		plan.Ops = slices.DeleteFunc(plan.Ops, func(op backend.Op) bool { return op.What.Kind() == "set" })
		if err != nil || len(plan.Ops) != objects*peers {
			b.Errorf("planned %d operations: %v", len(plan.Ops), err)
			return
		}
		batches := writeBatches(b, plan.Ops)
		start := time.Now()
		for _, batch := range batches {
			if out, err := exec.Command(batch[0], batch[1:]...).CombinedOutput(); err != nil {
				b.Errorf("%v: %v\n%s", batch, err, out)
			}
		}
		floor.add(time.Since(start))
	})
}

// writeBatches writes operations to files, one for each run of commands of one program, and returns how to run them.
func writeBatches(b *testing.B, ops []backend.Op) (commands [][]string) {
	dir, program := b.TempDir(), ""
	var lines []string
	flush := func() {
		if len(lines) == 0 {
			return
		}
		path := filepath.Join(dir, strconv.Itoa(len(commands)))
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			b.Error(err)
		}
		commands = append(commands, append(strings.Fields(program), "-batch", path))
		lines = nil
	}
	for _, op := range ops {
		of, line, _ := strings.Cut(op.String(), " ")
		if six, ok := strings.CutPrefix(line, "-6 "); ok {
			of, line = of+" -6", six
		}
		if of != program {
			flush()
			program = of
		}
		lines = append(lines, line)
	}
	flush()
	return commands
}

// samples are durations of one thing measured several times.
type samples []time.Duration

func (s *samples) add(d time.Duration) { *s = append(*s, d) }

func (s samples) median() time.Duration { return slices.Sorted(slices.Values(s))[len(s)/2] }

func (s samples) String() string {
	return fmt.Sprintf("median %7.1f ms, %7.1f to %7.1f ms, %d times",
		ms(s.median()), ms(slices.Min(s)), ms(slices.Max(s)), len(s))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// processorTime is what this process has had of the processors, in user and kernel mode.
func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Error(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// inNamespace calls f on a thread in a network namespace that has an uplink.
func inNamespace(b *testing.B, f func()) {
	b.Helper()
	ns := netnstest.New(b)
	for _, command := range []string{
		"ip link add eth0 type veth peer name world", "ip addr add 192.0.2.11/24 dev eth0",
		"ip link set eth0 up", "ip link set world up",
	} {
		ns.Run(b, command)
	}
	ns.Do(b, f)
}

// onKernel is a node whose kernel is that of the calling thread's network namespace.
func onKernel(b *testing.B) *node {
	n := newNode(b)
	k, err := kernel.New(kernel.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Error(err)
		return n
	}
	b.Cleanup(k.Close)
	n.planner.Kernel = k
	return n
}

func manyPeers(count int) []subnet.Lease {
	leases := make([]subnet.Lease, 0, 2*count)
	for i := range count {
		name, host := fmt.Sprintf("peer-%d", i), fmt.Sprintf("198.18.%d.%d", i/250, 1+i%250)
		// Its own address is inside.
		data := vxlan.Config{Node: name, VNI: 1, Port: 8472, Held: []netip.Addr{netip.MustParseAddr(host)}}.Data()
		four := peer(name, fmt.Sprintf("10.%d.%d.0/24", 128+i/256, i%256), host)
		six := peer(name, fmt.Sprintf("fd00:10:244:%x::/64", 0x1000+i), host)
		four.Data, six.Data = data, data
		leases = append(leases, four, six)
	}
	return leases
}

// idleGoal is what a pass with nothing to do may take of a processor at 5,000 peers. The quickest quarter of the
// passes is held to it, because a busy machine adds to processor time too.
const idleGoal = 45 * time.Millisecond

// BenchmarkIdlePass is the pass that finds nothing to do, and BenchmarkJoin the one after a peer has come, by what they
// take of the processor.
func BenchmarkIdlePass(b *testing.B) {
	benchmarkCPU(b, idleGoal, func(n *node, _ []subnet.Lease, _ int) { n.look.Store(true) })
}

func BenchmarkJoin(b *testing.B) {
	benchmarkCPU(b, 0, func(n *node, peers []subnet.Lease, pass int) {
		n.step(b)                        // which finds all in order, or what was done in the pass before
		n.cluster.set(peers[pass%2:]...) // every other time one goes
	})
}

func benchmarkCPU(b *testing.B, goal time.Duration, before func(n *node, peers []subnet.Lease, pass int)) {
	const passes = 50
	for name, peers := range map[string][]subnet.Lease{"ipv4": ipv4Peers(5000), "dual-stack": manyPeers(5000)} {
		b.Run(name, func(b *testing.B) {
			inNamespace(b, func() {
				n := onKernel(b)
				n.cluster.set()
				n.step(b)
				n.step(b)
				n.cluster.set(peers...)
				n.step(b)
				n.step(b)
				var cpu samples
				for b.Loop() {
					for i := range passes {
						before(n, peers, i)
						start := processorTime(b)
						n.turn(b)
						cpu.add(processorTime(b) - start)
					}
				}
				b.Logf("processor time of a pass, %s: %v", name, cpu)
				b.ReportMetric(ms(cpu.median()), "cpu-ms")
				if goal != 0 && cpu.median() > goal {
					b.Errorf("it is to be at most %v in the median", goal)
				}
			})
		})
	}
}

func ipv4Peers(count int) []subnet.Lease {
	return slices.DeleteFunc(manyPeers(count), func(l subnet.Lease) bool { return l.Subnet.Addr().Is6() })
}

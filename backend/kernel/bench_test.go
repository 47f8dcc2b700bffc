package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	bridges "tweed.dev/tweed/backend/bridge"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// cluster returns what a dual-stack node holds that has so many peers.
func cluster(peers int) backend.State {
	var leases []subnet.Lease
	for n := range peers + 1 {
		node := fmt.Sprintf("n%d", n)
		host := netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)})
		data := vxlan.Config{Node: node, VNI: 1, Port: 8472, Underlay: 4}.Data()
		for _, p := range []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(64 + n>>8), byte(n), 0}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 6: byte(n >> 8), 7: byte(n)}), 64),
		} {
			leases = append(leases, subnet.Lease{Node: node, Subnet: p, Host: host, Backend: vxlan.Name, Data: data})
		}
	}
	self := leases[:2]
	uplink := backend.Uplink{Devs: []string{"eth0"}, Local: netip.MustParseAddr("192.0.2.11"), MTU: 1500}
	return backend.Merge(
		bridges.Config{Name: bridge, Node: "n0", MTU: 1450}.Desired([]netip.Prefix{self[0].Subnet, self[1].Subnet}),
		vxlan.Config{Node: "n0", VNI: 1, Port: 8472, Underlay: 4}.Desired(self, leases[2:], uplink))
}

func (h *realHost) program(b testing.TB, want backend.State) {
	h.ns.Do(b, func() {
		have, err := h.Kernel.Observe(context.Background(), want)
		if err != nil {
			b.Error(err)
		}
		ops, _ := backend.Diff(want, have)
		for _, op := range ops {
			if err := h.Kernel.Apply(context.Background(), op); err != nil {
				b.Errorf("%s: %v", op, err)
			}
		}
	})
}

// cpu reports, beside the wall clock, which a busy machine stretches, the time that processors worked for an operation.
func cpu(b *testing.B) func() {
	used := func() time.Duration {
		var sum time.Duration
		for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
			var u unix.Rusage
			if err := unix.Getrusage(who, &u); err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
		return sum
	}
	before := used()
	return func() { b.ReportMetric(float64((used()-before).Microseconds())/1000/float64(b.N), "cpu-ms/op") }
}

// A pass with nothing to do: what it costs to be sure.
func benchmarkObserve(b *testing.B, peers int) {
	h := newRealHost(b)
	want := cluster(peers)
	h.program(b, want)
	h.ns.Do(b, func() {
		b.ReportAllocs()
		defer cpu(b)()
		for b.Loop() {
			have, err := h.Kernel.Observe(context.Background(), want)
			if err != nil {
				b.Error(err)
			}
			if ops, _ := backend.Diff(want, have); len(ops) > 0 {
				b.Errorf("to do: %s", ops[0])
			}
		}
	})
}

func BenchmarkObserve1000(b *testing.B) { benchmarkObserve(b, 1000) }
func BenchmarkObserve5000(b *testing.B) { benchmarkObserve(b, 5000) }

func BenchmarkInterfaces5000(b *testing.B) {
	h := newRealHost(b)
	h.program(b, cluster(5000))
	h.ns.Do(b, func() {
		defer cpu(b)()
		for b.Loop() {
			if _, err := h.Kernel.Interfaces(context.Background()); err != nil {
				b.Error(err)
			}
		}
	})
}

func benchmarkProgram(b *testing.B, peers int) {
	want := cluster(peers)
	for b.Loop() {
		b.StopTimer()
		h := newRealHost(b)
		b.StartTimer()
		h.program(b, want)
	}
}

func BenchmarkProgram1000(b *testing.B) { benchmarkProgram(b, 1000) }
func BenchmarkProgram5000(b *testing.B) { benchmarkProgram(b, 5000) }

// The floor: the same objects by the programs that the commands name.
func benchmarkBatch(b *testing.B, peers int) {
	want := cluster(peers)
	for b.Loop() {
		b.StopTimer()
		h := newRealHost(b)
		batches, order := batch(b, h, want)
		b.StartTimer()
		for i, commands := range batches {
			runBatch(b, h.ns, order[i], commands)
		}
	}
}

func BenchmarkBatch1000(b *testing.B) { benchmarkBatch(b, 1000) }
func BenchmarkBatch5000(b *testing.B) { benchmarkBatch(b, 5000) }

// batch turns a plan into input for ip -batch and bridge -batch, and makes the links and sysctls.
func batch(b *testing.B, h *realHost, want backend.State) (batches, programs []string) {
	have, err := h.Observe(context.Background(), want)
	if err != nil {
		b.Fatal(err)
	}
	ops, _ := backend.Diff(want, have)
	for _, op := range ops {
		switch op.What.(type) {
		case backend.Link, backend.Sysctl:
			if err := h.Apply(context.Background(), op); err != nil {
				b.Fatal(err)
			}
			continue
		}
		program, line, _ := strings.Cut(op.String(), " ")
		if six, ok := strings.CutPrefix(line, "-6 "); ok {
			program, line = "ip -6", six
		}
		if n := len(programs); n == 0 || programs[n-1] != program {
			batches, programs = append(batches, ""), append(programs, program)
		}
		batches[len(batches)-1] += line + "\n"
	}
	return batches, programs
}

// Reading the packet filter anew: a process for each of eight chains.
func BenchmarkFilterRead(b *testing.B) {
	h := newRealHost(b)
	for _, family := range []string{"iptables", "ip6tables"} {
		h.ns.Run(b, family+" -t nat -A POSTROUTING -j RETURN")
	}
	want := dualStackFilter(b)
	h.ns.Do(b, func() {
		defer cpu(b)()
		for b.Loop() {
			h.Kernel.filter.changes.Add(1)
			if _, err := h.Kernel.ObserveFilter(context.Background(), want); err != nil {
				b.Error(err)
			}
		}
	})
}

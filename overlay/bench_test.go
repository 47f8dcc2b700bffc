package overlay

import (
	"fmt"
	"log/slog"
	"testing"

	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/subnet"
)

// BenchmarkPassWithNothingToDo makes passes on a real kernel that holds all of the peers, dual-stack, already.
func BenchmarkPassWithNothingToDo(b *testing.B) {
	for _, peers := range []int{10, 1000, 5000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			inNamespace(b, func() {
				n := onKernel(b)
				n.cluster.set(manyPeers(peers)...)
				if rep := n.step(b); !rep.Converged {
					b.Errorf("did not converge: %+v", rep)
					return
				}
				n.step(b)
				for b.Loop() {
					if rep := n.step(b); rep.Done+rep.Failed > 0 || !rep.Converged {
						b.Errorf("there was something to do: %+v", rep)
						return
					}
				}
			})
		})
	}
}

// BenchmarkProgramPeers makes the one pass that programs all peers, dual-stack, from nothing.
func BenchmarkProgramPeers(b *testing.B) {
	for _, peers := range []int{1000, 5000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				inNamespace(b, func() {
					n := onKernel(b)
					n.cluster.set()
					n.step(b)
					n.step(b)
					n.cluster.set(manyPeers(peers)...)
					b.StartTimer()
					rep := n.step(b)
					b.StopTimer()
					if !rep.Converged || rep.Done != 5*peers {
						b.Errorf("programmed %d objects: %+v", rep.Done, rep.Waiting)
					}
				})
				b.StartTimer()
			}
		})
	}
}

// inNamespace calls f on a thread in a network namespace that has an uplink.
func inNamespace(b *testing.B, f func()) {
	b.Helper()
	ns := netnstest.New(b)
	ns.Run(b, "ip link add eth0 type veth peer name world")
	ns.Run(b, "ip addr add 192.0.2.11/24 dev eth0")
	ns.Run(b, "ip link set eth0 up")
	ns.Run(b, "ip link set world up")
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
		leases = append(leases,
			peer(name, fmt.Sprintf("10.%d.%d.0/24", 128+i/256, i%256), host),
			peer(name, fmt.Sprintf("fd00:10:244:%x::/64", 0x1000+i), host))
	}
	return leases
}

package kernel

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
			h.filter.changes.Add(1)
			if _, err := h.Kernel.ObserveFilter(context.Background(), want); err != nil {
				b.Error(err)
			}
		}
	})
}

package kernel

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
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

// Reading the packet filter anew: a process for each of ten chains, or netlink.
func BenchmarkFilterRead(b *testing.B) {
	for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
		b.Run(string(form), func(b *testing.B) { benchmarkFilterRead(b, form, true) })
	}
}

// At rest only the generation of nftables is asked for.
func BenchmarkFilterAtRest(b *testing.B) { benchmarkFilterRead(b, masq.NFTables, false) }

func benchmarkFilterRead(b *testing.B, form masq.Form, changed bool) {
	h := newRealHost(b)
	for _, family := range []string{"iptables", "ip6tables"} {
		h.ns.Run(b, family+" -t nat -A POSTROUTING -j RETURN")
	}
	want := dualStack(b, form).Desired()
	h.ns.Do(b, func() {
		defer cpu(b)()
		for b.Loop() {
			if changed {
				h.nft.seen = nil
				for _, f := range h.filters {
					for _, s := range f.sides {
						s.looked, s.reading = false, nil
					}
				}
			}
			if _, err := h.Kernel.ObserveFilter(context.Background(), want); err != nil {
				b.Error(err)
			}
		}
	})
}

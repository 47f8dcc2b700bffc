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

// What is done for the packet filter in a pass.
func BenchmarkFilter(b *testing.B) {
	forgotten := func(h *realHost) {
		h.nft.seen = nil
		for _, f := range h.filters {
			for _, s := range f.sides {
				s.looked, s.reading = false, nil
			}
		}
	}
	// Somebody changed nftables.
	generation := func(h *realHost) {
		h.nft.seen = nil
		for _, s := range h.filters[masq.NFT].sides {
			s.looked = false
		}
	}
	for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
		for name, before := range map[string]func(*realHost){
			"start": forgotten, "others changed": generation, "rest": func(*realHost) {},
		} {
			b.Run(string(form)+"/"+name, func(b *testing.B) { benchmarkFilter(b, form, before) })
		}
	}
}

func benchmarkFilter(b *testing.B, form masq.Form, before func(*realHost)) {
	h := newRealHost(b)
	for _, family := range []string{"iptables", "ip6tables"} {
		h.ns.Run(b, family+" -t nat -A POSTROUTING -j RETURN")
	}
	want := dualStack(b, form).Desired()
	filterPass(b, h, want)
	h.ns.Do(b, func() {
		defer cpu(b)()
		for b.Loop() {
			before(h)
			if _, err := h.Kernel.ObserveFilter(context.Background(), want); err != nil {
				b.Error(err)
			}
		}
	})
}

package kernel

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"tweed.dev/tweed/backend/masq"
)

// guarded is a filter that guards the tunnel's port, in one family of the underlay.
func guarded(t testing.TB, form masq.Form, underlay masq.Family, peers ...string) masq.Config {
	t.Helper()
	c := dualStack(t, form)
	c.Guard, c.Underlay = true, underlay
	for _, p := range peers {
		c.Peers = append(c.Peers, netip.MustParseAddr(p))
	}
	return c
}

func askGuard(t *testing.T, h host) {
	h.dropForwarded()
	for _, form := range []masq.Form{masq.NFTables, masq.IPTables, masq.NFTables} {
		c := guarded(t, form, masq.IPv4, "192.0.2.12", "192.0.2.13", "2001:db8::12")
		filterPass(t, h, c.Desired())
		c.Peers, c.AcceptPeers = c.Peers[1:], true
		filterPass(t, h, c.Desired())
		c.Guard = false
		filterPass(t, h, c.Desired())
		c.Guard, c.Underlay, c.Port = true, masq.IPv6, 4789
		filterPass(t, h, c.Desired())
	}
	takeAllAway(t, h)
}

func TestCommandsOfTheGuardDoWhatTheySay(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		for _, underlay := range []masq.Family{masq.IPv4, masq.IPv6} {
			h := newRealHost(t)
			h.dropForwarded()
			c := guarded(t, form, underlay, "192.0.2.12", "2001:db8::12")
			c.AcceptPeers = true
			for _, want := range []masq.Ruleset{c.Desired(), {}} {
				for _, op := range filterOps(t, h, want) {
					shell(t, h.ns, op.String())
				}
				h.filter.changes.Add(1)
				for _, op := range filterOps(t, h, want) {
					t.Errorf("IPv%d, still to do: %s", underlay, op)
				}
			}
		}
	})
}

// A rule that has counted is the rule that it was.
func TestCounterLooksLikeAChange(t *testing.T) {
	for _, how := range []string{"nftables", "nft", "legacy"} {
		for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
			t.Run(fmt.Sprintf("%s IPv%d", how, family), func(t *testing.T) {
				form, lo := masq.NFTables, map[masq.Family]string{masq.IPv4: "127.0.0.1", masq.IPv6: "::1"}[family]
				if how != "nftables" {
					form = masq.IPTables
					callIptables(t, how)
				}
				h := newRealHost(t)
				want := guarded(t, form, family, "192.0.2.12", "2001:db8::12").Desired()
				if n := counts(t, h, want); len(n) > 0 {
					t.Errorf("counted before there is anything: %v", n)
				}
				filterPass(t, h, want)
				c := bound(t, h.ns, netip.AddrPortFrom(netip.MustParseAddr(lo), 0))
				defer c.Close()
				for range 3 { // of which each arrives before the call ends
					_, _ = c.WriteToUDPAddrPort([]byte("who knocks"), netip.AddrPortFrom(netip.MustParseAddr(lo), 8472))
				}
				if n := counts(t, h, want); n[masq.DroppedStranger] != 3 || n[masq.DroppedPod]+n[masq.DroppedTranslated] != 0 {
					t.Errorf("of 3 packets of a stranger %v are counted", n)
				}
				h.filter.changes.Add(1)
				for _, op := range filterOps(t, h, want) {
					t.Errorf("to do: %s", op)
				}
			})
		}
	}
}

// counts adds up what a guard has dropped; nothing where its rules are not there.
func counts(t *testing.T, h *realHost, want masq.Ruleset) map[string]uint64 {
	t.Helper()
	n := map[string]uint64{}
	for c, reasons := range want.Counted() {
		var counts []uint64
		var err error
		h.ns.Do(t, func() { counts, err = h.RuleCounts(t.Context(), c) })
		if err != nil {
			t.Fatal(err)
		}
		for i := range counts {
			n[reasons[i]] += counts[i]
		}
	}
	return n
}

func FuzzLegacyCounts(f *testing.F) {
	f.Add([]byte{}, true)
	f.Add(make([]byte, 300), false)
	f.Fuzz(func(_ *testing.T, entries []byte, six bool) {
		family := masq.IPv4
		if six {
			family = masq.IPv6
		}
		_, _ = parseLegacyCounts(family, entries, masq.GuardInput)
	})
}

func TestGuardAtRestStartsAProcess(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		log := filepath.Join(t.TempDir(), "log")
		fakeIptables(t, "echo $* >> "+log+"\nexec $real \"$@\"")
		h := newRealHost(t)
		r := watch(t, h, func(string) bool { return false })
		want := guarded(t, form, masq.IPv4, "192.0.2.12").Desired()
		filterPass(t, h, want)
		r.await(t, "our own writes")
		r.quiet()
		filterPass(t, h, want) // the one more pass
		before, _ := os.ReadFile(log)
		for range 5 {
			filterPass(t, h, want)
			counts(t, h, want)
		}
		if after, _ := os.ReadFile(log); !bytes.Equal(before, after) {
			t.Errorf("started at rest:\n%s", after[len(before):])
		}
		if r.quiet() {
			t.Error("reading rings")
		}
	})
}

package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// allFilters is a filter with all that iptables can have of ours.
func allFilters(t testing.TB) masq.Ruleset {
	t.Helper()
	c := guarded(t, masq.IPTables, masq.IPv4, "192.0.2.12")
	c.Device, c.AcceptPeers = "tweed.1", true
	return c.Desired()
}

// printed is what iptables holds, in both families, but for what is counted.
func printed(t *testing.T, h *realHost, v masq.Variant) string {
	t.Helper()
	out := h.ns.Run(t, fmt.Sprintf("iptables-%s-save", v)) + h.ns.Run(t, fmt.Sprintf("ip6tables-%s-save", v))
	return regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]`).ReplaceAllString(out, "")
}

// strangers are rules and chains of others, some of them in chains of ours and where jumps of ours go.
func strangers(t *testing.T, h *realHost, v masq.Variant) {
	t.Helper()
	for _, rule := range []string{
		"-N KUBE-FORWARD", "-A KUBE-FORWARD -j ACCEPT", "-A FORWARD -j KUBE-FORWARD", "-A FORWARD -j DROP", "-P INPUT DROP",
		"-t nat -N KUBE-POSTROUTING", "-t nat -A POSTROUTING -j KUBE-POSTROUTING", "-t raw -A PREROUTING -p udp -j ACCEPT",
	} {
		inBothOf(t, h, v, rule)
	}
}

// Many changes in one process leave what as many processes leave, and what others have as it is.
func TestBatchLeavesSomethingElseThanItsChanges(t *testing.T) {
	inEachVariant(t, func(t *testing.T, v masq.Variant) {
		callIptables(t, string(v))
		one, all := newRealHost(t), newRealHost(t)
		strangers(t, one, v)
		strangers(t, all, v)
		before := printed(t, all, v)
		want, moved := allFilters(t), guarded(t, masq.IPTables, masq.IPv4, "192.0.2.12")
		moved.Subnets = []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24"), netip.MustParsePrefix("fd00:10:244:9::/64")}
		for _, step := range []struct {
			spoil string
			want  masq.Ruleset
		}{
			{"", want},
			{"-t nat -D TWEED-POSTRTG 3", want},
			{"-t nat -I TWEED-POSTRTG 2 -p tcp -j ACCEPT", want},
			{"-F TWEED-FWD", want},
			{"-I FORWARD 1 -m comment --comment tweed -j TWEED-FWD", masq.Ruleset{}},
			{"", want},
			{"-t nat -A TWEED-POSTRTG -p udp -j RETURN", moved.Desired()},
			{"", masq.Ruleset{}},
		} {
			for _, h := range []*realHost{one, all} {
				if step.spoil != "" {
					inBothOf(t, h, v, step.spoil)
					forget(h)
				}
			}
			for _, op := range filterOps(t, one, step.want) {
				if err := one.Apply(t.Context(), op); err != nil {
					t.Errorf("%s: %v", op, err)
				}
			}
			filterPass(t, all, step.want)
			if a, b := printed(t, one, v), printed(t, all, v); a != b {
				t.Fatalf("after %q one by one\n%s\nand at once\n%s", step.spoil, a, b)
			}
		}
		after := printed(t, all, v)
		for line := range strings.Lines(before) {
			if !strings.Contains(after, line) {
				t.Errorf("of others is gone: %s", line)
			}
		}
		if strings.Contains(after, "TWEED") {
			t.Errorf("of ours is left\n%s", after)
		}
	})
}

// What follows each other in a plan goes to as few processes as there are changes of family.
func TestEachChangeOfIptablesIsAProcess(t *testing.T) {
	inEachVariant(t, func(t *testing.T, v masq.Variant) {
		log := logIptables(t, v, "")
		h := newRealHost(t)
		ops := filterOps(t, h, allFilters(t))
		log.starts(t)
		for i, err := range h.ApplyAll(t.Context(), ops) {
			if err != nil {
				t.Errorf("%s: %v", ops[i], err)
			}
		}
		restore := func(family masq.Family) string {
			return fmt.Sprintf("/usr/sbin/%s-restore --noflush -w 2\n", v.Command(family))
		}
		// The chains of both families, and then what leads to them.
		want := strings.Repeat(restore(masq.IPv4)+restore(masq.IPv6), 2)
		if started := log.starts(t); started != want {
			t.Errorf("%d changes started\n%s\nwant\n%s", len(ops), started, want)
		}
	})
}

// One change that iptables refuses is named with iptables' reason for it, and all others are made.
func TestBadChangeHoldsUpOthers(t *testing.T) {
	inEachVariant(t, func(t *testing.T, v masq.Variant) {
		callIptables(t, string(v))
		for what, bad := range map[string]struct {
			op  func(c masq.Chain) masq.Entry
			why string
		}{
			"a set that is not there": {func(c masq.Chain) masq.Entry {
				set := masq.Set{Family: c.Family, Name: "nosuch"}
				return masq.Entry{Chain: c, At: 1, Rule: masq.Rule{SrcIn: set, Verdict: masq.Drop}}
			}, "Set nosuch doesn't exist"},
			"a place that is not there": {func(c masq.Chain) masq.Entry {
				return masq.Entry{Chain: c, At: 99, Rule: masq.Rule{Verdict: masq.Return}}
			}, "too big"},
			"what the kernel refuses": {func(c masq.Chain) masq.Entry {
				c.Table, c.Name = masq.FilterTable, masq.Forward
				return masq.Entry{Chain: c, At: 1, Rule: masq.Rule{Verdict: masq.Masquerade}}
			}, ""},
		} {
			h := newRealHost(t)
			want := allFilters(t)
			ops := filterOps(t, h, want)
			// Behind the last rule of a table, with others before and behind it.
			at := 1 + slices.IndexFunc(ops, func(op backend.Op) bool {
				e, ok := op.What.(masq.Entry)
				return ok && e.Chain.Table == masq.MangleTable
			})
			e := ops[at-1].What.(masq.Entry)
			ops = slices.Insert(ops, at, add(bad.op(e.Chain)))
			errs := h.ApplyAll(t.Context(), ops)
			for i, err := range errs {
				switch {
				case i != at && err != nil:
					t.Errorf("%s: %s: %v", what, ops[i], err)
				case i == at && (err == nil || !strings.Contains(err.Error(), "tables-"+string(v)+" ") ||
					!strings.Contains(err.Error(), bad.why)):
					t.Errorf("%s is no reason: %v", what, err)
				}
			}
			for _, op := range filterOps(t, h, want) {
				t.Errorf("%s: still to do: %s", what, op)
			}
		}
	})
}

// A batch of which nobody knows how far it came is not made again before somebody has looked.
func TestBatchThatEndsWithoutAWordIsDoubled(t *testing.T) {
	for what, script := range map[string]string{
		"before": `case $real in *-restore) kill -KILL $$;; esac`,
		"after":  `case $real in *-restore) $real "$@"; kill -KILL $$;; esac`,
		"late": `case $real in *-restore) $real "$@"; echo "line 3 failed: No buffer space available." >&2
			exit 1;; esac`,
		"silent": `case $real in *-restore) $real "$@"; exit 4;; esac`,
	} {
		inEachVariant(t, func(t *testing.T, v masq.Variant) {
			right := newRealHost(t)
			callIptables(t, string(v))
			filterPass(t, right, allFilters(t))
			logIptables(t, v, script)
			h := newRealHost(t)
			for try := range 2 {
				ops := filterOps(t, h, allFilters(t))
				failed := slices.ContainsFunc(h.ApplyAll(t.Context(), ops), func(err error) bool { return err != nil })
				if failed != (try == 0) {
					t.Errorf("%s: at try %d, of %d changes some failed: %v", what, try+1, len(ops), failed)
				}
			}
			if now, want := printed(t, h, v), printed(t, right, v); now != want {
				t.Errorf("%s: it is\n%s\nwant\n%s", what, now, want)
			}
		})
	}
}

func TestIptablesRestoreIsMissing(t *testing.T) {
	h := newRealHost(t)
	logIptables(t, masq.NFT, "")
	dir, _, _ := strings.Cut(os.Getenv("PATH"), ":")
	t.Setenv("PATH", dir)
	for _, name := range []string{"iptables-nft-restore", "ip6tables-nft-restore"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	filterPass(t, h, allFilters(t))
}

// A program that hangs, for whatever reason, is ended with all that it has started, and holds up one pass once.
func TestIptablesThatHangsWhileItWritesIsWaitedForForever(t *testing.T) {
	for which, at := range map[string]int{"-restore": 99, "": 1, "-save": 1} { // how many changes are made at once
		hold, child := filepath.Join(t.TempDir(), "hold"), filepath.Join(t.TempDir(), "child")
		log := logIptables(t, masq.NFT, fmt.Sprintf(`case $real in *-nft%s)
			if [ -e %s ]; then sleep 1000 & echo $! >%s; wait; fi;; esac`, which, hold, child))
		h := newRealHost(t)
		var want masq.Ruleset
		if which == "-save" { // which is asked what there is to take away
			filterPass(t, h, allFilters(t))
		} else {
			want = allFilters(t)
		}
		ops := filterOps(t, h, want)
		log.starts(t)
		if err := os.WriteFile(hold, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		f := h.filters[masq.NFT]
		f.limit = time.Second
		for some := range slices.Chunk(ops, at) {
			for i, err := range h.ApplyAll(t.Context(), some) {
				ofIptables := some[i].What.Kind() == "filter"
				if ofIptables && (err == nil || !strings.Contains(err.Error(), "had not ended after 1s")) {
					t.Errorf("%s while it hangs: %v", some[i], err)
				}
			}
		}
		if started := log.starts(t); strings.Count(started, "\n") != 1 {
			t.Errorf("started though the first hangs:\n%s", started)
		}
		awaitEnd(t, child)
		if err := os.Remove(hold); err != nil {
			t.Fatal(err)
		}
		f.limit = stuck
		filterPass(t, h, want)
	}
}

// awaitEnd waits until the process whose number is in a file is no more.
func awaitEnd(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithTimeout(t.Context(), 20*time.Second)
	defer end()
	for ctx.Err() == nil {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
	}
	t.Errorf("process %d outlives what has started it", pid)
	_ = unix.Kill(pid, unix.SIGKILL)
}

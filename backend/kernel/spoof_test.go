package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
)

// judging is a ruleset that judges some pods, built anew by each call.
func judging(pods ...int) masq.Ruleset {
	want := masq.Ruleset{Spoof: spoof.Table{Made: true, Entries: map[spoof.Entry]bool{}}}
	for _, n := range pods {
		for _, e := range podEntries(n) {
			want.Spoof.Entries[e] = true
		}
	}
	return want
}

func podEntries(n int) []spoof.Entry {
	return spoof.Entries(fmt.Sprintf("tweed000000000%d", n), podMAC(n), []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("10.244.3.%d", n)), netip.MustParseAddr(fmt.Sprintf("fd00:10:244:3::%d", n)),
		netip.MustParseAddr(fmt.Sprintf("10.244.3.10%d", n)),
	})
}

func podMAC(n int) backend.MAC { return backend.MAC{0x0a, 0x58, 10, 244, 3, byte(n)} }

// judgingPass does what is to be done for want, and sees that nothing is left to do.
func judgingPass(t *testing.T, h host, want masq.Ruleset) (ops []backend.Op) {
	t.Helper()
	ops = filterOps(t, h, want)
	for _, op := range ops {
		if err := h.Apply(t.Context(), op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	for _, op := range filterOps(t, h, want) {
		t.Errorf("still to do: %s", op)
	}
	return ops
}

// Pods come and go in the table, and it goes as a whole.
func askSpoof(t *testing.T, h host) {
	for _, want := range []masq.Ruleset{
		judging(), judging(3), judging(3, 4), judging(4), {}, judging(3, 4), {},
	} {
		judgingPass(t, h, want)
		have, err := h.ObserveAllFilters(t.Context())
		if err != nil || have.Spoof.Made != want.Spoof.Made || len(have.Spoof.Entries) != len(want.Spoof.Entries) ||
			have.Spoof.Len() != want.Spoof.Len() {
			t.Errorf("found %+v, %v\nwant %+v", have.Spoof, err, want.Spoof)
		}
	}
	for _, op := range []backend.Op{
		{Do: backend.Delete, What: spoof.Rules{}},
		{Do: backend.Add, What: spoof.Pod{Port: "tweed0000000003", Entries: podEntries(3)}},
	} {
		if err := h.Apply(t.Context(), op); err == nil {
			t.Errorf("without the table: %s", op)
		}
	}
	judgingPass(t, h, judging(3))
	if err := h.Apply(t.Context(), backend.Op{Do: backend.Delete, What: spoof.Pod{Entries: podEntries(4)}}); err == nil {
		t.Error("took away what was not there")
	}
}

// Whatever is done to the table by hand is undone.
func TestTableThatJudgesPodsIsChanged(t *testing.T) {
	h := newRealHost(t)
	want := judging(3, 4)
	judgingPass(t, h, want)
	element := "{ tweed0000000003 . " + podMAC(3).String() + " . 10.244.3.3 }"
	for _, command := range []string{
		"nft flush ruleset",
		"nft delete table bridge tweed",
		"nft delete table bridge tweed && nft add table bridge tweed",
		"nft flush chain bridge tweed pod-arp",
		"nft insert rule bridge tweed prerouting accept",
		"nft insert rule bridge tweed pod-ipv4 ip saddr 10.0.0.0/8 accept",
		"nft add rule bridge tweed pod-ipv6 counter",
		"nft 'add chain bridge tweed other { type filter hook prerouting priority -301 ; }'",
		"nft 'add chain bridge tweed prerouting { policy drop ; }'",
		"nft flush set bridge tweed ports",
		"nft flush set bridge tweed ipv6",
		"nft delete element bridge tweed ipv4 '" + element + "'",
		"nft add element bridge tweed ipv4 '" + strings.Replace(element, ".3 }", ".77 }", 1) + "'",
		"nft add element bridge tweed ports '{ tweed9999999999 }'",
	} {
		shell(t, h.ns, command)
		if ops := judgingPass(t, h, want); len(ops) == 0 {
			t.Errorf("%s: nothing was to be done", command)
		}
	}
	for _, c := range spoof.Chains() {
		counts, err := h.RuleCounts(t.Context(), masq.Chain{Family: masq.Bridge, Table: spoof.Name, Name: c.Name})
		if err != nil || len(counts) != len(c.Rules) {
			t.Errorf("%s counts %v, %v", c.Name, counts, err)
		}
	}
	// What others have in the family is theirs.
	shell(t, h.ns, "nft add table bridge other && nft add chain bridge other prerouting && "+
		"nft add set bridge other ports '{ type ifname ; }'")
	if ops := judgingPass(t, h, want); len(ops) > 0 {
		t.Errorf("for others' tables: %v", ops)
	}
}

// Where nothing has to be done, nothing but the number of the generation is asked for.
func TestNothingIsReadOfTheTableAtRest(t *testing.T) {
	h := newRealHost(t)
	judgingPass(t, h, judging(3))
	d := spoil(h.Kernel)
	var asked []call
	d.begin(func(_ int, c call) fate { asked = append(asked, c); return fate{} })
	filterOps(t, h, judging(3))
	d.end()
	for _, c := range asked {
		if strings.HasPrefix(fmt.Sprint(c), "nft") && !strings.Contains(fmt.Sprint(c), strconv.Itoa(unix.NFT_MSG_GETGEN)) {
			t.Errorf("asked for %v", c)
		}
	}
}

// nft makes the same of the words of a rule as we do. One that does not know icmpv6 taddr yet has those left out.
func TestRulesAgainstSpoofingInWordsOfNFT(t *testing.T) {
	h := newRealHost(t)
	shell(t, h.ns, "nft add table bridge tweed")
	sets, rules, _ := strings.Cut(spoof.Rules{}.Command(backend.Add, nil), "add rule ")
	shell(t, h.ns, strings.TrimSuffix(strings.TrimSpace(sets), ";")+"'")
	const taddr = "add table bridge t; add chain bridge t c; add rule bridge t c icmpv6 taddr ::1"
	known := exec.Command("nft", "--check", taddr).Run() == nil
	left := 0
	for rule := range strings.SplitSeq(strings.TrimSuffix("add rule "+rules, "'"), " ; ") {
		if strings.Contains(rule, "taddr") && !known {
			left++
			continue
		}
		shell(t, h.ns, "nft '"+rule+"'")
	}
	compared := 0
	for _, c := range spoof.Chains() {
		typed := typedRules(t, h, c.Name)
		for _, r := range c.Rules {
			if strings.Contains(r.Words, "taddr") && !known {
				continue
			}
			if len(typed) == 0 || !does(typed[0], r) {
				t.Fatalf("%s: %s\nnft makes %s", c.Name, r.Words, typed)
			}
			typed, compared = typed[1:], compared+1
		}
	}
	if compared < 15 || left > 2 {
		t.Errorf("compared %d rules, left out %d", compared, left)
	}
}

func typedRules(t *testing.T, h *realHost, chain string) (texts []string) {
	t.Helper()
	rules, err := h.nft.rules(masq.Chain{Family: masq.Bridge, Table: spoof.Name, Name: chain})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		texts = append(texts, textOf(r.exprs))
	}
	return texts
}

// A port that was opened by hand is closed again, and knows its pod and no other.
func TestPortIsOpenedByHand(t *testing.T) {
	for _, lockless := range []bool{false, true} {
		t.Run(fmt.Sprintf("lockless=%v", lockless), func(t *testing.T) {
			h := newRealHost(t)
			var log strings.Builder
			h.ns.Do(t, func() {
				h.Close()
				h.Kernel, _ = New(Options{NoPortLocks: lockless, Log: slog.New(slog.NewTextHandler(&log, nil))})
			})
			h.addPort("pod1")
			h.ns.Run(t, "ip link set pod1-in up")
			port := func(closed bool) backend.State {
				want := sample()
				want.Ports = map[string]backend.Port{"pod1": {Name: "pod1", Bridge: bridge, Up: true, Hairpin: true,
					Locked: closed, NoLearning: closed, NoFlood: closed, MAC: podMAC(3)}}
				return want
			}
			pass(t, h, port(true))
			for _, c := range []struct{ command, shows string }{
				{"ip link set pod1 type bridge_slave learning on", "learning off"},
				{"ip link set pod1 type bridge_slave flood on", "flood off"},
				{"ip link set pod1 type bridge_slave hairpin off", "hairpin on"},
				{"ip link set pod1 type bridge_slave locked off", "locked on"},
				{"bridge fdb del " + podMAC(3).String() + " dev pod1 master", ""},
				{"bridge fdb replace " + podMAC(3).String() + " dev pod1 master static", ""},
				{"bridge fdb add 02:00:00:00:00:01 dev pod1 master static", ""},
				{"bridge fdb add 02:00:00:00:00:01 dev pod1 master dynamic", ""},
			} {
				h.ns.Run(t, c.command)
				ops, _ := plan(t, h, port(true))
				if about := c.shows == "locked on"; about && lockless {
					if len(ops) > 0 {
						t.Errorf("a kernel without locks is to lock: %v", ops)
					}
					continue
				}
				if len(ops) != 1 {
					t.Fatalf("%s: %v", c.command, ops)
				}
				pass(t, h, port(true))
				if got := h.ns.Run(t, "bridge -d link show dev pod1"); !strings.Contains(got, c.shows) {
					t.Errorf("%s: not undone: %s", c.command, got)
				}
				macs := h.ns.Run(t, "bridge fdb show dev pod1")
				pod := podMAC(3).String() + " sticky master tweed0 static"
				if strings.Contains(macs, "02:00:00:00:00:01") || !strings.Contains(macs, pod) {
					t.Errorf("%s: not undone:\n%s", c.command, macs)
				}
			}
			pass(t, h, port(false))
			if got := h.ns.Run(t, "bridge -d link show dev pod1"); !strings.Contains(got, "learning on flood on") {
				t.Errorf("one that is exempt: %s", got)
			}
			if said := strings.Count(log.String(), "does not lock ports"); said > 1 || said == 1 != lockless {
				t.Errorf("the log says %s", &log)
			}
		})
	}
}

// What the operation prints, typed into a shell, does what the operation does.
func TestCommandsForPortsDoWhatTheySay(t *testing.T) {
	h := newRealHost(t)
	h.addPort("pod1")
	for _, closed := range []bool{true, false, true} {
		want := sample()
		want.Ports = map[string]backend.Port{"pod1": {Name: "pod1", Bridge: bridge, Up: true, Hairpin: true,
			Locked: closed, NoLearning: closed, NoFlood: closed, MAC: podMAC(3)}}
		for range 2 {
			ops, _ := plan(t, h, want)
			for _, op := range ops {
				shell(t, h.ns, op.String())
			}
			settled(t, h, want)
			h.ns.Run(t, "bridge fdb replace 02:00:00:00:00:01 dev pod1 master static")
		}
		h.ns.Run(t, "bridge fdb del 02:00:00:00:00:01 dev pod1 master")
	}
}

// What somebody does to what guards against spoofing rings, what the plugin does for its pods does not.
func TestSpoofingIsLetInByHand(t *testing.T) {
	h := newRealHost(t)
	h.addPort("pod1")
	want := sample()
	want.Ports = map[string]backend.Port{"pod1": {Name: "pod1", Bridge: bridge, Up: true, Hairpin: true,
		Locked: true, NoLearning: true, NoFlood: true, MAC: podMAC(3)}}
	pass(t, h, want)
	judgingPass(t, h, judging(3))
	r := watch(t, h, func(string) bool { return false })
	for _, command := range []string{
		"nft flush ruleset",
		"nft flush chain bridge tweed pod-arp",
		"nft delete element bridge tweed ports { tweed0000000003 }",
		"ip link set pod1 type bridge_slave locked off",
		"ip link set pod1 type bridge_slave learning on",
		"ip link set pod1 type bridge_slave flood on",
		"bridge fdb del " + podMAC(3).String() + " dev pod1 master",
	} {
		h.ns.Run(t, command)
		r.await(t, command)
		pass(t, h, want)
		judgingPass(t, h, judging(3))
		r.quiet()
	}

	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(nft)
	if err != nil {
		t.Fatal(err)
	}
	plugin := t.TempDir() + "/" + pluginName
	if err := os.WriteFile(plugin, program, 0o700); err != nil {
		t.Fatal(err)
	}
	h.ns.Run(t, plugin+" delete element bridge tweed ports { tweed0000000003 }")
	h.ns.Run(t, "nft add table bridge other")
	h.ns.Run(t, "ip link del pod1")
	if r.quiet() {
		t.Error("rang for a pod that goes")
	}
}

func TestPodsAreJudgedByAKernelThatCannot(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.ENOENT} {
		err := explainSpoof(backend.Op{Do: backend.Add, What: spoof.Rules{}}, errno)
		if !strings.Contains(err.Error(), "CONFIG_NF_TABLES_BRIDGE") {
			t.Errorf("%v", err)
		}
	}
	if err := explainSpoof(backend.Op{Do: backend.Add, What: spoof.Rules{}}, unix.ENOBUFS); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("%v", err)
	}
}

package kernel

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
)

// sortedLines is text without the order of its lines: tables come in the order in which they were made.
func sortedLines(text string) string {
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func nftFilter(t testing.TB) masq.Ruleset { return dualStack(t, masq.NFTables).Desired() }

// shell runs a line as a person would type it.
func shell(t testing.TB, ns *netnstest.NS, line string) string {
	t.Helper()
	var out []byte
	var err error
	ns.Do(t, func() { out, err = exec.Command("sh", "-ec", line).CombinedOutput() })
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// filterOps returns what is to be done.
func filterOps(t testing.TB, h host, want masq.Ruleset) []backend.Op {
	t.Helper()
	have, err := h.ObserveFilter(t.Context(), want)
	if err != nil {
		t.Fatalf("observing the filter: %v", err)
	}
	return masq.Diff(want, have)
}

// What an operation prints, typed into a shell, does what the operation does, and nft makes the same rules of it.
func TestCommandsOfNFTDoWhatTheySay(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	h.ns.Run(t, "iptables -A FORWARD -j DROP")
	typed := func(want masq.Ruleset) {
		t.Helper()
		for _, op := range filterOps(t, h, want) {
			shell(t, h.ns, op.String())
		}
		for _, op := range filterOps(t, h, want) {
			t.Errorf("still to do: %s", op)
		}
	}
	c := dualStack(t, masq.NFTables)
	typed(c.Desired())
	c.NonMasquerade = append(c.NonMasquerade, c.Network.Prefixes()[0].Masked(), c.Network.Prefixes()[1].Masked())
	typed(c.Desired())
	c.Port = 60000
	c.NonMasquerade = nil
	typed(c.Desired())
	if rules := h.ns.Run(t, "iptables -S FORWARD"); !strings.HasSuffix(rules, "-A FORWARD -j DROP\n") {
		t.Errorf("not in front of the drop:\n%s", rules)
	}
	typed(masq.Ruleset{})
	if left := h.ns.Run(t, "nft list ruleset"); strings.Contains(left, "tweed") {
		t.Errorf("left:\n%s", left)
	}
}

// A program that lists rules that it cannot express breaks, and with it whoever reads it: kube-proxy does.
func TestGuestsDoNotBreakIptables(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	h.ns.Run(t, "iptables -t nat -A POSTROUTING -j MASQUERADE")
	h.ns.Run(t, "ip6tables -t nat -A POSTROUTING -j MASQUERADE")
	filterPass(t, h, nftFilter(t))
	for command, rule := range map[string]string{
		"iptables-save -t filter": "-A FORWARD -s 10.244.0.0/16 -m comment --comment tweed -j ACCEPT\n",
		"ip6tables-save":          "-A FORWARD -d fd00:10:244::/48 -m comment --comment tweed -j ACCEPT\n",
		"iptables-save":           "-A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment tweed -j ACCEPT\n",
	} {
		if saved := h.ns.Run(t, command); !strings.Contains(saved, rule) {
			t.Errorf("%s has no %s in\n%s", command, rule, saved)
		}
	}
	// Who saves and restores leaves them ours.
	shell(t, h.ns, "iptables-save | iptables-restore; ip6tables-save | ip6tables-restore")
	for _, op := range filterOps(t, h, nftFilter(t)) {
		t.Errorf("to do: %s", op)
	}
}

func TestTablesOfNFTChangedByHandAreRepaired(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	want := nftFilter(t)
	filterPass(t, h, want)
	right := h.ns.Run(t, "nft -s list ruleset")
	h.ns.Run(t, "nft add table inet stranger")
	const foreign = "ip saddr 192.0.2.7"
	for _, c := range []string{
		"nft flush table ip tweed",
		"nft delete table ip6 tweed",
		"nft insert rule ip tweed translate ip saddr 192.0.2.1 masquerade",
		"nft insert rule ip tweed postrouting ip saddr 192.0.2.1 masquerade",
		"nft flush chain ip6 tweed postrouting",
		"nft 'flush chain ip tweed postrouting; delete chain ip tweed postrouting; " +
			"add chain ip tweed postrouting { type nat hook postrouting priority 99 ; }; " +
			"add rule ip tweed postrouting jump translate'",
		"nft flush chain ip filter FORWARD",
		"iptables -I FORWARD 1 -j DROP && nft insert rule ip filter FORWARD " + foreign + " accept",
	} {
		shell(t, h.ns, c)
		if len(filterOps(t, h, want)) == 0 {
			t.Errorf("%s: not seen", c)
		}
		filterPass(t, h, want)
		now := h.ns.Run(t, "nft -s list ruleset")
		if !strings.Contains(now, "table inet stranger") || strings.Contains(c, foreign) != strings.Contains(now, foreign) {
			t.Errorf("after %s, what others have written is not as it was:\n%s", c, now)
		}
	}
	shell(t, h.ns, "iptables -D FORWARD -j DROP; iptables -D FORWARD 1; nft delete table inet stranger")
	if now := h.ns.Run(t, "nft -s list ruleset"); sortedLines(now) != sortedLines(right) {
		t.Errorf("in the end:\n%s\nwant:\n%s", now, right)
	}

	shell(t, h.ns, "nft flush ruleset")
	filterPass(t, h, want)
	if now := h.ns.Run(t, "nft list ruleset"); !strings.Contains(now, "chain translate") {
		t.Errorf("after flush ruleset:\n%s", now)
	}
}

// A host that masquerades whatever it forwards would hide callers from pods, and pods from each other.
func TestMasqueradingOfEverythingIsOvertaken(t *testing.T) {
	h := newRealHost(t)
	world := outside(t, h)
	pass(t, h, sample())
	b := addPod(t, h, 11)
	inBoth(t, h, "-t nat -A POSTROUTING -j MASQUERADE")
	into := []hop{
		{"world to pod", world, b, "10.244.3.11", "", "10.244.3.1"},
		{"world to pod", world, b, "fd00:10:244:3::11", "", "fd00:10:244:3::1"},
	}
	for _, hop := range into {
		hop.check(t)
	}
	into[0].as, into[1].as = "192.0.2.1", "2001:db8::1"
	filterPass(t, h, nftFilter(t))
	for _, hop := range into {
		hop.check(t)
	}
}

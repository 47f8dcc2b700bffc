package masq

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
)

func underGuard(t testing.TB, form Form, underlay Family) Config {
	c := dualStack(t)
	c.Form, c.Guard, c.Underlay = form, true, underlay
	c.Peers = []netip.Addr{
		netip.MustParseAddr("192.0.2.13"), netip.MustParseAddr("192.0.2.12"), netip.MustParseAddr("2001:db8::12"),
	}
	return c
}

// added is what the guard adds to what there is without it, in the order of Diff.
func added(c Config) []backend.Op {
	plain := c
	plain.Guard = false
	have := Ruleset{}
	for _, op := range Diff(plain.Desired(), have) {
		if err := have.Apply(op); err != nil {
			panic(err)
		}
	}
	return Diff(c.Desired(), have)
}

func TestPortIsGuardedByIptables(t *testing.T) {
	c := underGuard(t, IPTables, IPv4)
	c.AcceptPeers = true
	want := strings.NewReplacer("%", "-p udp -m udp --dport 8472", "#", "-m comment --comment tweed").Replace(
		`ipset create tweed-peers4 hash:ip family inet maxelem 1048576
ipset -! add tweed-peers4 192.0.2.12 && ipset -! add tweed-peers4 192.0.2.13
iptables -t filter -N TWEED-INPUT
iptables -t filter -I TWEED-INPUT 1 % -m set --match-set tweed-peers4 src # -j ACCEPT
iptables -t mangle -N TWEED-GUARD-FWD
iptables -t mangle -I TWEED-GUARD-FWD 1 ! -d 10.244.0.0/16 -i tweed+ % # -j DROP
iptables -t mangle -I TWEED-GUARD-FWD 2 % -m conntrack --ctstate DNAT -m set --match-set tweed-peers4 dst # -j DROP
iptables -t mangle -N TWEED-GUARD-IN
iptables -t mangle -I TWEED-GUARD-IN 1 -i tweed+ % # -j DROP
iptables -t mangle -I TWEED-GUARD-IN 2 -d 10.244.0.0/16 % # -j DROP
iptables -t mangle -I TWEED-GUARD-IN 3 % -m conntrack --ctstate DNAT # -j DROP
iptables -t mangle -I TWEED-GUARD-IN 4 % -m set ! --match-set tweed-peers4 src # -j DROP
iptables -t raw -N TWEED-RAW-IN
iptables -t raw -I TWEED-RAW-IN 1 % -m addrtype --dst-type LOCAL -m set --match-set tweed-peers4 src # -j CT --notrack
iptables -t raw -N TWEED-RAW-OUT
iptables -t raw -I TWEED-RAW-OUT 1 % -m set --match-set tweed-peers4 dst # -j CT --notrack
iptables -t filter -A INPUT -p udp # -j TWEED-INPUT
iptables -t mangle -I FORWARD 1 -p udp # -j TWEED-GUARD-FWD
iptables -t mangle -I INPUT 1 -p udp # -j TWEED-GUARD-IN
iptables -t raw -I PREROUTING 1 -p udp # -j TWEED-RAW-IN
iptables -t raw -I OUTPUT 1 -p udp # -j TWEED-RAW-OUT
`)
	if got := commands(added(c)); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestPortIsGuardedByNftables(t *testing.T) {
	c := underGuard(t, NFTables, IPv6)
	c.Network = network(t, "10.244.0.0/16") // pods of the other family alone
	base := func(hook, priority, chain string) string {
		return "nft 'add chain ip6 tweed " + hook + " { type filter hook " + hook + " priority " + priority +
			" ; } ; flush chain ip6 tweed " + hook + " ; add rule ip6 tweed " + hook + " meta l4proto udp jump " + chain + " comment tweed'\n"
	}
	want := strings.NewReplacer("#", "comment tweed").Replace(`nft add table ip6 tweed
nft 'add set ip6 tweed peers { type ipv6_addr ; }'
nft 'add element ip6 tweed peers { 2001:db8::12 }'
nft add chain ip6 tweed guard-forward
nft insert rule ip6 tweed guard-forward iifname "tweed*" udp dport 8472 counter drop #
nft add rule ip6 tweed guard-forward index 0 udp dport 8472 ct status dnat ip6 daddr @peers counter drop #
nft add chain ip6 tweed guard-input
nft insert rule ip6 tweed guard-input iifname "tweed*" udp dport 8472 counter drop #
nft add rule ip6 tweed guard-input index 0 udp dport 8472 ct status dnat counter drop #
nft add rule ip6 tweed guard-input index 1 udp dport 8472 ip6 saddr != @peers counter drop #
nft add chain ip6 tweed untracked-in
nft insert rule ip6 tweed untracked-in udp dport 8472 fib daddr type local ip6 saddr @peers notrack #
nft add chain ip6 tweed untracked-out
nft insert rule ip6 tweed untracked-out udp dport 8472 ip6 daddr @peers notrack #
`) + base("forward", "-150", "guard-forward") + base("input", "-150", "guard-input") +
		base("prerouting", "-300", "untracked-in") + base("output", "-300", "untracked-out")
	if got := commands(added(c)); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// Without a tunnel there is no port.
func TestNodeWithoutATunnelIsNotGuarded(t *testing.T) {
	c := underGuard(t, NFTables, IPv4)
	c.Port = 0
	if ops := added(c); len(ops) > 0 {
		t.Errorf("%s", commands(ops))
	}
}

// At no moment in the life of a guard is a packet of a peer's dropped: while the port is taken under guard, while peers
// join and leave, while the form changes, while the guard is taken away.
func TestPeerIsLockedOutForAMoment(t *testing.T) {
	stays := netip.MustParseAddr("192.0.2.12")
	joined := underGuard(t, IPTables, IPv4)
	joined.Peers = append(joined.Peers, netip.MustParseAddr("192.0.2.14"))
	left := underGuard(t, IPTables, IPv4)
	left.Peers = []netip.Addr{stays}
	other := underGuard(t, NFTables, IPv4)
	now := Ruleset{}
	for _, want := range []Ruleset{
		underGuard(t, IPTables, IPv4).Desired(), joined.Desired(), left.Desired(), other.Desired(), left.Desired(), {},
	} {
		for _, op := range Diff(want, now) {
			if err := now.Apply(op); err != nil {
				t.Fatalf("%s: %v", op, err)
			}
			for c, rules := range now.Chains {
				if slices.ContainsFunc(rules, func(r Rule) bool { return r.NotSrcIn && !now.Sets[r.SrcIn][stays] }) {
					t.Errorf("after %s, %s drops what comes from %s", op, c.Name, stays)
				}
			}
		}
	}
}

func TestGuardSaysWhatItCounts(t *testing.T) {
	counted := underGuard(t, IPTables, IPv4).Desired().Counted()
	want := map[Chain][]string{
		IPv4.chain(MangleTable, GuardInput):   {DroppedPod, DroppedPod, DroppedTranslated, DroppedStranger},
		IPv4.chain(MangleTable, GuardForward): {DroppedPod, DroppedTranslated},
	}
	if !maps.EqualFunc(counted, want, slices.Equal) {
		t.Errorf("%v", counted)
	}
}

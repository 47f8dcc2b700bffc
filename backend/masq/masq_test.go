package masq

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

func network(t testing.TB, prefixes ...string) subnet.Network {
	t.Helper()
	var ranges []subnet.Range
	for _, p := range prefixes {
		ranges = append(ranges, subnet.Range{Prefix: netip.MustParsePrefix(p)})
	}
	n, err := subnet.NewNetwork(ranges...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func dualStack(t testing.TB) Config {
	return Config{
		Network: network(t, "10.244.0.0/16", "fd00:10:244::/48"),
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.244.3.0/24"), netip.MustParsePrefix("fd00:10:244:3::/64")},
		Port:    8472,
	}
}

func commands(ops []backend.Op) string {
	var b strings.Builder
	for _, op := range ops {
		b.WriteString(op.String() + "\n")
	}
	return b.String()
}

func TestFreshNodeGetsItsFilter(t *testing.T) {
	c := dualStack(t)
	c.Network, c.Subnets = network(t, "10.244.0.0/16"), c.Subnets[:1]
	want := strings.NewReplacer("#", "-m comment --comment tweed",
		"%", "-j MASQUERADE --to-ports 8473-65535 --random-fully").Replace(`iptables -t filter -N TWEED-FWD
iptables -t filter -I TWEED-FWD 1 -s 10.244.0.0/16 # -j ACCEPT
iptables -t filter -I TWEED-FWD 2 -d 10.244.0.0/16 # -j ACCEPT
iptables -t nat -N TWEED-POSTRTG
iptables -t nat -I TWEED-POSTRTG 1 -m mark --mark 0x4000/0x4000 # -j RETURN
iptables -t nat -I TWEED-POSTRTG 2 -s 10.244.0.0/16 -d 10.244.0.0/16 # -j RETURN
iptables -t nat -I TWEED-POSTRTG 3 -s 10.244.3.0/24 -d 224.0.0.0/4 # -j RETURN
iptables -t nat -I TWEED-POSTRTG 4 ! -s 10.244.0.0/16 -d 10.244.3.0/24 # -j RETURN
iptables -t nat -I TWEED-POSTRTG 5 ! -s 10.244.0.0/16 -d 10.244.0.0/16 -p udp # %
iptables -t nat -I TWEED-POSTRTG 6 ! -s 10.244.0.0/16 -d 10.244.0.0/16 # -j MASQUERADE --random-fully
iptables -t nat -I TWEED-POSTRTG 7 -s 10.244.3.0/24 ! -d 10.244.0.0/16 -p udp # %
iptables -t nat -I TWEED-POSTRTG 8 -s 10.244.3.0/24 ! -d 10.244.0.0/16 # -j MASQUERADE --random-fully
iptables -t filter -A FORWARD # -j TWEED-FWD
iptables -t nat -A POSTROUTING # -j TWEED-POSTRTG
`)
	if got := commands(Diff(c.Desired(), Ruleset{})); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestFreshNodeGetsItsTables(t *testing.T) {
	c := dualStack(t)
	c.Network, c.Form = network(t, "10.244.0.0/16"), NFTables
	c.NonMasquerade = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	want := strings.NewReplacer("#", "comment tweed", "%", "masquerade fully-random comment tweed",
		"UDP", "meta l4proto udp masquerade to :8473-65535 fully-random comment tweed").Replace(`nft add table ip tweed
nft add chain ip tweed translate
nft insert rule ip tweed translate meta mark and 0x4000 == 0x4000 return #
nft add rule ip tweed translate index 0 ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 return #
nft add rule ip tweed translate index 1 ip saddr 10.244.3.0/24 ip daddr 224.0.0.0/4 return #
nft add rule ip tweed translate index 2 ip saddr != 10.244.0.0/16 ip daddr 10.244.3.0/24 return #
nft add rule ip tweed translate index 3 ip saddr 10.244.3.0/24 ip daddr 192.0.2.0/24 return #
nft add rule ip tweed translate index 4 ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 UDP
nft add rule ip tweed translate index 5 ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 %
nft add rule ip tweed translate index 6 ip saddr 10.244.3.0/24 ip daddr != 10.244.0.0/16 UDP
nft add rule ip tweed translate index 7 ip saddr 10.244.3.0/24 ip daddr != 10.244.0.0/16 %
nft 'add chain ip tweed postrouting { type nat hook postrouting priority 101 ; } ; ` +
		`flush chain ip tweed postrouting ; add rule ip tweed postrouting jump translate #'
nft add rule ip filter FORWARD ip daddr 10.244.0.0/16 accept #
nft add rule ip filter FORWARD ip saddr 10.244.0.0/16 accept #
`)
	have := Ruleset{Hosts: map[Chain]Host{
		IPv4.chain(FilterTable, BaseForward): {}, IPv4.chain(FilterTable, DockerUser): {End: 1},
		IPv4.chain(NatTable, BasePostrouting): {},
	}}
	if got := commands(Diff(c.Desired(), have)); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// Guests accept, so where others decide after them they must not be; and what is gone from in front of them takes them
// with it.
func TestGuestsOvertakeNoMoreThanTheyMust(t *testing.T) {
	c := dualStack(t)
	c.Form = NFTables
	forward, user, nat := IPv4.chain(FilterTable, BaseForward), IPv4.chain(FilterTable, DockerUser),
		IPv4.chain(NatTable, BasePostrouting)
	now := Ruleset{}
	guests := func(hosts map[Chain]Host, want map[Chain]int) {
		t.Helper()
		now.Hosts = hosts
		for _, op := range Diff(c.Desired(), now) {
			if err := now.Apply(op); err != nil {
				t.Fatalf("%s: %v", op, err)
			}
		}
		got := map[Chain]int{}
		for g := range now.Guests {
			got[g.Host]++
		}
		if !maps.Equal(got, want) {
			t.Errorf("with %v: guests %v, want %v", hosts, got, want)
		}
	}
	guests(nil, map[Chain]int{})
	guests(map[Chain]Host{forward: {}, user: {End: 1}, nat: {End: 1}}, map[Chain]int{forward: 2})
	guests(map[Chain]Host{forward: {}, user: {End: 1, Harms: true}, nat: {End: 1, Harms: true}},
		map[Chain]int{forward: 2, user: 2, nat: 5})
	guests(map[Chain]Host{forward: {}, user: {}, nat: {}}, map[Chain]int{forward: 2})
}

// At every moment of a change of form, one of the two is there as a whole.
func TestFormChangesWithoutAGap(t *testing.T) {
	whole := func(want, now Ruleset) bool {
		for c, rules := range want.Chains {
			if !slices.Equal(now.Chains[c], rules) {
				return false
			}
		}
		for j := range want.Jumps {
			if j.From != DockerUser && !now.Jumps[j] {
				return false
			}
		}
		for g := range want.Guests {
			if _, there := now.Guests[g]; g.Host.Name == BaseForward && !there {
				return false
			}
		}
		return true
	}
	forms := map[Form]Config{IPTables: dualStack(t), NFTables: dualStack(t)}
	for from, to := range map[Form]Form{IPTables: NFTables, NFTables: IPTables} {
		before, after := forms[from], forms[to]
		before.Form, after.Form = from, to
		now := Ruleset{Hosts: map[Chain]Host{
			IPv4.chain(FilterTable, BaseForward): {}, IPv6.chain(FilterTable, BaseForward): {},
		}}
		for _, op := range Diff(before.Desired(), now) {
			if err := now.Apply(op); err != nil {
				t.Fatalf("%s: %v", op, err)
			}
		}
		for _, op := range Diff(after.Desired(), now) {
			if err := now.Apply(op); err != nil {
				t.Fatalf("%s: %v", op, err)
			}
			if !whole(before.Desired(), now) && !whole(after.Desired(), now) {
				t.Errorf("from %s to %s: neither is whole after %s", from, to, op)
			}
		}
		if now.Has(from) || !now.Has(to) {
			t.Errorf("from %s to %s: %+v", from, to, now)
		}
	}
}

func TestFamilyThatTheNetworkLacksGetsNoRules(t *testing.T) {
	c := dualStack(t)
	c.Network = network(t, "fd00:10:244::/48")
	for chain, rules := range c.Desired().Chains {
		if chain.Family != IPv6 {
			t.Errorf("%s %v in an IPv6 network", chain.Family.Command(), chain)
		}
		for _, r := range rules {
			if r.Src.IsValid() && r.Src.Addr().Is4() || r.Dst.IsValid() && r.Dst.Addr().Is4() {
				t.Errorf("IPv4 in an IPv6 rule: %v", r.Args())
			}
		}
	}
}

func TestRuleThatTakesEveryPacketIsOvertaken(t *testing.T) {
	want := dualStack(t).Desired()
	have := Ruleset{Hosts: map[Chain]Host{IPv4.chain(FilterTable, BaseForward): {End: 3, Harms: true}}}
	ops := commands(Diff(want, have))
	for _, line := range []string{
		"iptables -t filter -I FORWARD 3 -m comment --comment tweed -j TWEED-FWD\n",
		"ip6tables -t filter -A FORWARD -m comment --comment tweed -j TWEED-FWD\n",
	} {
		if !strings.Contains(ops, line) {
			t.Errorf("no %q in\n%s", line, ops)
		}
	}
}

func TestCleanupLeavesBeforeItEmpties(t *testing.T) {
	c := dualStack(t)
	c.Network, c.Subnets = network(t, "10.244.0.0/16"), c.Subnets[:1]
	want := `iptables -t filter -D FORWARD -m comment --comment tweed -j TWEED-FWD
iptables -t nat -D POSTROUTING -m comment --comment tweed -j TWEED-POSTRTG
iptables -t filter -F TWEED-FWD && iptables -t filter -X TWEED-FWD
iptables -t nat -F TWEED-POSTRTG && iptables -t nat -X TWEED-POSTRTG
`
	have := c.Desired()
	delete(have.Jumps, Jump{Chain: IPv4.chain(FilterTable, Forward), From: DockerUser})
	if got := commands(Diff(Ruleset{}, have)); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestTranslatedPacketsNeverLeaveFromTheTunnelsPort(t *testing.T) {
	for port, want := range map[uint16]PortRange{
		1: {1024, 65535}, 1023: {1024, 65535}, 1024: {1025, 65535}, 4789: {4790, 65535}, 8472: {8473, 65535},
		33279: {33280, 65535}, 33280: {1024, 33279}, 65535: {1024, 65534},
	} {
		if got := portsBeside(port); got != want {
			t.Errorf("beside port %d: %v, want %v", port, got, want)
		}
	}
}

// drawRuleset draws from few rules, so that chains share, repeat and reorder them.
func drawRuleset(t *rapid.T, label string) Ruleset {
	some := dualStackRules()
	r := Ruleset{
		Tables: map[Table]bool{}, Chains: map[Chain][]Rule{}, Jumps: map[Jump]bool{}, Guests: map[Guest]uint64{},
		Sets:  map[Set]map[netip.Addr]bool{},
		Hosts: map[Chain]Host{IPv6.chain(FilterTable, BaseForward): {End: rapid.IntRange(0, 3).Draw(t, label+" end")}},
	}
	if rapid.Bool().Draw(t, label+" has guest") {
		r.Guests[Guest{Host: IPv6.chain(FilterTable, BaseForward), Rule: rapid.SampledFrom(some).Draw(t, label)}] = 0
	}
	some = append(some, drawSets(t, r, label)...)
	for _, c := range []Chain{
		IPv4.chain(FilterTable, Forward), IPv4.chain(NatTable, Postrouting),
		{Family: IPv4, Table: NatTable, Name: Postrouting, Variant: Legacy},
		IPv6.chain(NatTable, Postrouting), IPv6.chain(OwnTable, Translate),
	} {
		if !rapid.Bool().Draw(t, label+" has chain") {
			continue
		}
		if c.Form() == NFTables {
			r.Tables[c.table()] = true
		}
		r.Chains[c] = rapid.SliceOfN(rapid.SampledFrom(some), 0, 8).Draw(t, label)
		if rapid.Bool().Draw(t, label+" has jump") {
			r.Jumps[Jump{Chain: c, From: BaseForward}] = true
		}
	}
	return r
}

// drawSets adds sets to r, and returns rules that name them.
func drawSets(t *rapid.T, r Ruleset, label string) (rules []Rule) {
	for _, s := range []Set{IPv4.set(IPTables, "peers"), IPv6.set(NFTables, "peers")} {
		if !rapid.Bool().Draw(t, label+" has set") {
			continue
		}
		if s.Form() == NFTables {
			r.Tables[s.table()] = true
		} else {
			rules = append(rules, Rule{SrcIn: s, NotSrcIn: true, Verdict: Return})
		}
		r.Sets[s] = map[netip.Addr]bool{}
		a := s.Family.first()
		for range rapid.IntRange(0, 250).Draw(t, label+" members") {
			for range rapid.IntRange(1, 3).Draw(t, label+" step") {
				a = a.Next()
			}
			r.Sets[s][a] = true
		}
	}
	return rules
}

func (f Family) first() netip.Addr {
	if f == IPv4 {
		return netip.MustParseAddr("192.0.2.0")
	}
	return netip.MustParseAddr("2001:db8::")
}

func dualStackRules() []Rule {
	pod, own := netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.244.3.0/24")
	return []Rule{
		{Mark: kubeProxyMark, Verdict: Return}, {Src: pod, Dst: pod, Verdict: Return},
		{Src: own, Dst: pod, NotDst: true, Verdict: Masquerade}, {Dst: own, Verdict: Return},
		{Unknown: "-s 192.0.2.1/32 -j DROP"},
	}
}

func TestDiffReachesWantFromAnyHave(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want, now := drawRuleset(t, "want"), drawRuleset(t, "have")
		for _, rules := range want.Chains {
			for i := range rules {
				rules[i].Unknown = strings.Replace(rules[i].Unknown, "DROP", "ACCEPT", 1)
			}
		}
		ops := Diff(want, now)
		stopped := rapid.IntRange(0, len(ops)).Draw(t, "stopped after")
		for i, op := range ops {
			if i == stopped { // killed here: the next start begins with what is there
				break
			}
			if err := now.Apply(op); err != nil {
				t.Fatalf("%s: %v", op, err)
			}
		}
		for _, op := range Diff(want, now) {
			if err := now.Apply(op); err != nil {
				t.Fatalf("%s: %v", op, err)
			}
		}
		if !maps.EqualFunc(want.Chains, now.Chains, slices.Equal) || !maps.Equal(want.Jumps, now.Jumps) ||
			!maps.Equal(want.Tables, now.Tables) || !maps.Equal(want.Guests, now.Guests) ||
			!maps.EqualFunc(want.Sets, now.Sets, maps.Equal) {
			t.Fatalf("reached %v\nwant %v", now, want)
		}
		if ops := Diff(want, now); len(ops) > 0 {
			t.Fatalf("nothing to do, but:\n%s", commands(ops))
		}
	})
}

// Whatever subnet follows on whatever subnet, no packet between pods is translated in any moment of the change.
func TestChangeOfSubnetNeverTranslatesBetweenPods(t *testing.T) {
	c := dualStack(t)
	now := c.Desired()
	c.Subnets = []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24"), netip.MustParsePrefix("fd00:10:244:9::/64")}
	ops := Diff(c.Desired(), now)
	if len(ops) == 0 {
		t.Fatal("no operations for a new subnet")
	}
	for _, op := range ops {
		if err := now.Apply(op); err != nil {
			t.Fatalf("%s: %v", op, err)
		}
		for chain, rules := range now.Chains {
			if chain.Name == Postrouting && translatesPods(rules) {
				t.Errorf("after %s a rule that masquerades stands above the exception for pods:\n%v", op, rules)
			}
		}
	}
}

func translatesPods(rules []Rule) bool {
	for _, r := range rules {
		switch {
		case r.Verdict == Masquerade:
			return true
		case r.Verdict == Return && r.Src == r.Dst:
			return false
		}
	}
	return false
}

// A rule that drops what is not in a set drops everything while the set is empty.
func TestSetIsFullBeforeARuleNamesIt(t *testing.T) {
	s := IPv4.set(NFTables, "peers")
	table, chain := s.table(), IPv4.chain(OwnTable, Translate)
	want := Ruleset{
		Tables: map[Table]bool{table: true},
		Sets:   map[Set]map[netip.Addr]bool{s: {netip.MustParseAddr("192.0.2.1"): true}},
		Chains: map[Chain][]Rule{chain: {{SrcIn: s, NotSrcIn: true, Verdict: Return}}},
	}
	up := `nft add table ip tweed
nft 'add set ip tweed peers { type ipv4_addr ; }'
nft 'add element ip tweed peers { 192.0.2.1 }'
nft add chain ip tweed translate
nft insert rule ip tweed translate ip saddr != @peers return comment tweed
`
	if got := commands(Diff(want, Ruleset{})); got != up {
		t.Errorf("got:\n%s\nwant:\n%s", got, up)
	}
	down := `nft flush chain ip tweed translate && nft delete chain ip tweed translate
nft delete set ip tweed peers
nft delete table ip tweed
`
	if got := commands(Diff(Ruleset{}, want)); got != down {
		t.Errorf("got:\n%s\nwant:\n%s", got, down)
	}
}

func TestWhatHangsOnAStrangersSetIsLeftOut(t *testing.T) {
	s := IPv4.set(IPTables, "peers")
	chain := IPv4.chain(FilterTable, Forward)
	rest := Rule{Src: netip.MustParsePrefix("10.244.0.0/16"), Verdict: Accept}
	want := Ruleset{
		Sets:   map[Set]map[netip.Addr]bool{s: {netip.MustParseAddr("192.0.2.1"): true}},
		Chains: map[Chain][]Rule{chain: {{SrcIn: s, NotSrcIn: true, Verdict: Return}, rest}},
	}
	now := Ruleset{Taken: map[Set]string{s: "somebody has it"}}
	for _, op := range Diff(want, now) {
		if err := now.Apply(op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	if len(now.Sets) > 0 || !slices.Equal(now.Chains[chain], []Rule{rest}) {
		t.Errorf("%+v", now)
	}
}

package subnet

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The leases of these tests have their VTEP's MAC for Data, without JSON around it.
func judgeMAC(l Lease) (string, error) {
	if l.Backend != "vxlan" {
		return "", fmt.Errorf("backend is %q here, want vxlan", l.Backend)
	}
	if string(l.Data) == "garbage" {
		return "", errors.New("garbage is not a MAC")
	}
	return string(l.Data), nil
}

func testRules() Rules {
	return Rules{
		Network: Network{
			{Prefix: prefix("10.244.0.0/16"), Len: 24, Min: prefix("10.244.0.0/24"), Max: prefix("10.244.255.0/24")},
			{Prefix: prefix("fd00::/48"), Len: 64, Min: prefix("fd00::/64"), Max: prefix("fd00:0:0:ffff::/64")},
		},
		Judge: judgeMAC,
	}
}

// leaseOf reads "node subnet [key=value...]", with the keys since (in hours), host, mac and backend.
func leaseOf(line string) Lease {
	f := strings.Fields(line)
	l := Lease{Node: f[0], Subnet: prefix(f[1]), Host: netip.MustParseAddr("192.0.2.1"), Backend: "vxlan"}
	for _, kv := range f[2:] {
		key, value, _ := strings.Cut(kv, "=")
		switch key {
		case "since":
			h, err := time.ParseDuration(value + "h")
			if err != nil {
				panic(err)
			}
			l.Since = time.Unix(0, 0).Add(h)
		case "host":
			l.Host, _ = netip.ParseAddr(value)
		case "mac":
			l.Data = []byte(value)
		case "backend":
			l.Backend = value
		}
	}
	return l
}

func leasesOf(lines ...string) (out []Lease) {
	for _, line := range lines {
		out = append(out, leaseOf(line))
	}
	return out
}

func brief(leases []Lease) string {
	var out []string
	for _, l := range leases {
		out = append(out, l.Node+" "+l.Subnet.String())
	}
	return strings.Join(out, ", ")
}

func TestLeaseThatIsNoGoodByItself(t *testing.T) {
	const cost = "; pods on n1 cannot be reached"
	for _, c := range []struct{ lease, want string }{
		{"n1 10.9.0.0/24", "subnet 10.9.0.0/24 is outside the network 10.244.0.0/16: " +
			"give the node another, or correct the network"},
		{"n1 10.0.0.0/8", "subnet 10.0.0.0/8 is outside the network 10.244.0.0/16: " +
			"give the node another, or correct the network"},
		{"n1 10.244.7.1/24", "subnet 10.244.7.1/24 has host bits set (did you mean 10.244.7.0/24?)"},
		{"n1 10.244.7.0/25", "subnet 10.244.7.0/25 has length /25 where the network 10.244.0.0/16 has /24: " +
			"give the node another, or correct the configured length"},
		{"n1 10.244.7.0/24 host=none", "the lease has no host to send packets to"},
		{"n1 10.244.7.0/24 host=224.0.0.5", "host 224.0.0.5 is a multicast address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=ff02::1", "host ff02::1 is a multicast address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=127.0.0.1", "host 127.0.0.1 is a loopback address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=::1", "host ::1 is a loopback address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=0.0.0.0", "host 0.0.0.0 is the unspecified address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=::", "host :: is the unspecified address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=255.255.255.255",
			"host 255.255.255.255 is the broadcast address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=169.254.1.1",
			"host 169.254.1.1 is a link-local address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=fe80::1", "host fe80::1 is a link-local address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=::ffff:192.0.2.1",
			"host ::ffff:192.0.2.1 is not a plain IPv4 or IPv6 address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=2001:db8::1%eth0",
			"host 2001:db8::1%eth0 is not a plain IPv4 or IPv6 address: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=10.244.9.9",
			"host 10.244.9.9 is inside the pod network 10.244.0.0/16: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 host=fd00::9",
			"host fd00::9 is inside the pod network fd00::/48: choose the node's uplink with --iface"},
		{"n1 10.244.7.0/24 mac=garbage", "garbage is not a MAC"},
		{"n1 10.244.7.0/24 backend=udp", `backend is "udp" here, want vxlan`},
	} {
		rules := testRules()
		rules.ExactLength = true
		good := leaseOf("n2 10.244.2.0/24 since=9 mac=b")
		peers, problems := Settle("self", rules, []Lease{leaseOf(c.lease), good})
		if brief(peers) != "n2 10.244.2.0/24" {
			t.Errorf("%s: peers are %s", c.lease, brief(peers))
		}
		if want := (Problem{"n1", KindLease, c.want + cost}); len(problems) != 1 || problems[0] != want {
			t.Errorf("%s:\n got %v\nwant %v", c.lease, problems, want)
		}
	}
}

func TestLeaseOfAFamilyThatTheNetworkLacks(t *testing.T) {
	rules := testRules()
	rules.Network = rules.Network[:1]
	peers, problems := Settle("self", rules, leasesOf("n1 10.244.1.0/24", "n1 fd00:0:0:1::/64"))
	if brief(peers) != "n1 10.244.1.0/24" || len(problems) != 1 || problems[0].Node != "n1" {
		t.Errorf("peers %s, problems %v", brief(peers), problems)
	}
}

func TestLeaseWithoutSubnet(t *testing.T) {
	l := leaseOf("n1 10.244.1.0/24")
	l.Subnet = netip.Prefix{}
	if peers, problems := Settle("self", testRules(), []Lease{l}); len(peers) != 0 || len(problems) != 1 {
		t.Errorf("peers %s, problems %v", brief(peers), problems)
	}
}

func TestClusterThatChoosesItsOwnLengths(t *testing.T) {
	peers, problems := Settle("self", testRules(), leasesOf("n1 10.244.1.0/25", "n2 10.244.2.0/23"))
	if len(peers) != 2 || len(problems) != 0 {
		t.Errorf("peers %s, problems %v", brief(peers), problems)
	}
}

func TestLeasesThatExcludeEachOther(t *testing.T) {
	for _, c := range []struct {
		name     string
		leases   []string
		peers    string
		problems []string
	}{
		{"same subnet", []string{"n1 10.244.1.0/24 since=2", "n2 10.244.1.0/24 since=1"}, "n2 10.244.1.0/24", []string{
			"n1: subnet 10.244.1.0/24 is also claimed by n2, which is older; " +
				"pods on n1 cannot be reached until one of the two gives it up"}},
		{"same age", []string{"n2 10.244.1.0/24", "n1 10.244.1.0/24"}, "n1 10.244.1.0/24", []string{
			"n2: subnet 10.244.1.0/24 is also claimed by n1, which is of the same age; " +
				"pods on n2 cannot be reached until one of the two gives it up"}},
		{"subnet inside another", []string{"n1 10.244.1.0/25 since=2", "n2 10.244.1.0/24 since=1"}, "n2 10.244.1.0/24",
			[]string{"n1: subnet 10.244.1.0/25 overlaps 10.244.1.0/24 of n2, which is older; " +
				"pods on n1 cannot be reached until one of the two gives it up"}},
		{"subnet around others", []string{"n1 10.244.0.0/16 since=2", "n2 10.244.9.0/24 since=1", "n3 10.244.7.0/24"},
			"n2 10.244.9.0/24, n3 10.244.7.0/24", []string{"n1: subnet 10.244.0.0/16 overlaps 10.244.7.0/24 of n3, " +
				"which is older; pods on n1 cannot be reached until one of the two gives it up"}},
		{"same VTEP", []string{"n1 10.244.1.0/24 since=2 mac=m", "n2 10.244.2.0/24 since=1 mac=m"}, "n2 10.244.2.0/24",
			[]string{"n1: VTEP address m is also that of n2, which is older; " +
				"pods on n1 cannot be reached until one of the two changes it"}},
		{"both", []string{"n1 10.244.1.0/24 since=2 mac=m", "n2 10.244.1.0/24 since=1 mac=m"}, "n2 10.244.1.0/24",
			[]string{"n1: subnet 10.244.1.0/24 is also claimed by n2, which is older; " +
				"pods on n1 cannot be reached until one of the two gives it up"}},
		{"a refused one takes neither subnet nor VTEP along", []string{
			"n1 10.244.1.0/24 since=1 mac=a", "n2 10.244.0.0/20 since=2 mac=b",
			"n3 10.244.3.0/24 since=3 mac=b", "n4 10.244.4.0/24 since=4 mac=d"},
			"n1 10.244.1.0/24, n3 10.244.3.0/24, n4 10.244.4.0/24", []string{
				"n2: subnet 10.244.0.0/20 overlaps 10.244.1.0/24 of n1, which is older; " +
					"pods on n2 cannot be reached until one of the two gives it up"}},
		{"one that is no good by itself takes nothing along", []string{
			"n1 10.244.1.0/24 mac=a host=::1", "n2 10.244.1.0/24 since=2 mac=a"}, "n2 10.244.1.0/24", []string{
			"n1: host ::1 is a loopback address: choose the node's uplink with --iface; pods on n1 cannot be reached"}},
		{"one family lost, the other kept", []string{
			"n1 10.244.1.0/24 since=2 mac=a", "n1 fd00:0:0:1::/64 since=2 mac=a", "n2 10.244.1.0/24 since=1 mac=b"},
			"n1 fd00:0:0:1::/64, n2 10.244.1.0/24", []string{
				"n1: subnet 10.244.1.0/24 is also claimed by n2, which is older; " +
					"pods on n1 cannot be reached until one of the two gives it up"}},
		{"one fault of a node said once", []string{"n1 10.244.1.0/24 mac=garbage", "n1 fd00:0:0:1::/64 mac=garbage"}, "",
			[]string{"n1: garbage is not a MAC; pods on n1 cannot be reached"}},
		{"two faults of a node said both", []string{"n1 10.9.1.0/24 mac=garbage"}, "", []string{
			"n1: garbage is not a MAC; pods on n1 cannot be reached",
			"n1: subnet 10.9.1.0/24 is outside the network 10.244.0.0/16: give the node another, or correct the network; " +
				"pods on n1 cannot be reached"}},
		{"a node against itself", []string{"n1 10.244.1.0/24 mac=a", "n1 10.244.1.128/25 mac=a"}, "n1 10.244.1.0/24",
			[]string{"n1: subnet 10.244.1.128/25 overlaps 10.244.1.0/24 of the same node; remove one of the two"}},
		{"older peer has our subnet", []string{"self 10.244.1.0/24 since=2", "n1 10.244.1.0/24 since=1"}, "", []string{
			"self: subnet 10.244.1.0/24 is also claimed by n1, which is older; " +
				"pods on self cannot be reached until one of the two gives it up"}},
		{"younger peer has our subnet", []string{"self 10.244.1.0/24 since=1", "n1 10.244.1.0/24 since=2"}, "", []string{
			"n1: subnet 10.244.1.0/24 is also claimed by self, which is older; " +
				"pods on n1 cannot be reached until one of the two gives it up"}},
		{"older peer has our VTEP", []string{"self 10.244.1.0/24 since=2 mac=m", "n1 10.244.2.0/24 since=1 mac=m"}, "",
			[]string{"self: VTEP address m is also that of n1, which is older; " +
				"pods on self cannot be reached until one of the two changes it"}},
		{"peers have parts of the subnet that we lost", []string{"self 10.244.0.0/23 since=2 mac=s",
			"n1 10.244.0.0/24 since=1 mac=m", "n2 10.244.1.0/24 since=3 mac=n"}, "", []string{
			"self: subnet 10.244.0.0/23 overlaps 10.244.0.0/24 of n1, which is older; " +
				"pods on self cannot be reached until one of the two gives it up",
			"self: subnet 10.244.0.0/23 overlaps 10.244.1.0/24 of n2, which is younger; " +
				"pods on self cannot be reached until one of the two gives it up"}},
		{"we are no good, and peers have our VTEP", []string{"self 10.9.0.0/24 mac=m", "n1 10.244.0.0/24 since=1 mac=m"}, "",
			[]string{"self: VTEP address m is also that of n1, which is younger; " +
				"pods on self cannot be reached until one of the two changes it",
				"self: subnet 10.9.0.0/24 is outside the network 10.244.0.0/16: give the node another, or correct the network; " +
					"pods on self cannot be reached"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			peers, problems := Settle("self", testRules(), leasesOf(c.leases...))
			if got := brief(peers); got != c.peers {
				t.Errorf("peers are %s\nwant %s", got, c.peers)
			}
			var got []string
			for _, p := range problems {
				got = append(got, p.String())
			}
			if !slices.Equal(got, c.problems) {
				t.Errorf("problems:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(c.problems, "\n"))
			}
		})
	}
}

// crowd draws leases that collide often: few subnets of many lengths, few VTEPs, few ages, some bad ones, and self.
func crowd() *rapid.Generator[[]Lease] {
	one := rapid.Custom(func(t *rapid.T) Lease {
		l := leaseOf("n 10.244.0.0/16")
		l.Node = rapid.SampledFrom([]string{"self", "n1", "n2", "n3", "n4", "n5", "n6"}).Draw(t, "node")
		a := netip.AddrFrom4([4]byte{10, 244, rapid.ByteRange(0, 3).Draw(t, "third"), rapid.Byte().Draw(t, "fourth")})
		longest := 26
		if rapid.Bool().Draw(t, "ipv6") {
			a, longest = netip.AddrFrom16([16]byte{0: 0xfd, 7: rapid.ByteRange(0, 7).Draw(t, "subnet")}), 64
		}
		l.Subnet = netip.PrefixFrom(a, rapid.IntRange(longest-6, longest).Draw(t, "length")).Masked()
		l.Host = rapid.SampledFrom([]netip.Addr{l.Host, l.Host, l.Host, netip.IPv6Loopback()}).Draw(t, "host")
		l.Data = []byte(rapid.SampledFrom([]string{"", "a", "b", "c", "d", "garbage"}).Draw(t, "mac"))
		l.Since = time.Unix(int64(rapid.IntRange(0, 5).Draw(t, "since")), 0)
		return l
	})
	return rapid.SliceOfN(one, 0, 20)
}

func TestOrderOfLeasesNeverMatters(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leases := crowd().Draw(t, "leases")
		peers, problems := Settle("self", testRules(), leases)
		shuffled := rapid.Permutation(leases).Draw(t, "shuffled")
		peers2, problems2 := Settle("self", testRules(), shuffled)
		if !slices.EqualFunc(peers, peers2, Lease.Equal) || !slices.Equal(problems, problems2) {
			t.Fatalf("%s %v\n%s %v", brief(peers), problems, brief(peers2), problems2)
		}
	})
}

func TestNodeThatSaysOneThingTwice(t *testing.T) {
	for _, second := range []string{"mac=b", "mac=a host=192.0.2.2", "mac=a backend=geneve"} {
		leases := leasesOf("n1 10.244.1.0/24 mac=a", "n1 10.244.1.0/24 "+second)
		rules := testRules()
		rules.Judge = nil
		peers, problems := Settle("self", rules, leases)
		slices.Reverse(leases)
		peers2, problems2 := Settle("self", rules, leases)
		if len(peers) != 1 || len(problems) != 1 || !slices.EqualFunc(peers, peers2, Lease.Equal) ||
			!slices.Equal(problems, problems2) {
			t.Errorf("%v %v\n%v %v", peers, problems, peers2, problems2)
		}
	}
}

func TestPeersNeverOverlapNorShareAnIdentity(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leases := crowd().Draw(t, "leases")
		peers, problems := Settle("self", testRules(), leases)
		for i, p := range peers {
			if p.Node == "self" {
				t.Fatalf("%s is a peer", p.Subnet)
			}
			for _, q := range peers[:i] {
				if p.Subnet.Overlaps(q.Subnet) || p.Node != q.Node && len(p.Data) > 0 && string(p.Data) == string(q.Data) {
					t.Fatalf("peers %s and %s", brief([]Lease{p}), brief([]Lease{q}))
				}
			}
			for _, own := range leases {
				if own.Node == "self" && (own.Subnet.Overlaps(p.Subnet) ||
					len(p.Data) > 0 && string(own.Data) == string(p.Data)) {
					t.Fatalf("peer %s has what is self's: %s", brief([]Lease{p}), brief([]Lease{own}))
				}
			}
		}
		named := map[string]bool{}
		for _, p := range problems {
			named[p.Node] = true
		}
		for _, l := range leases {
			isPeer := slices.ContainsFunc(peers, l.Equal)
			if l.Node != "self" && !isPeer && !named[l.Node] && !named["self"] {
				t.Fatalf("%s is not reached, and nobody is named", brief([]Lease{l}))
			}
		}
	})
}

// A loser is a lease that does not win. Without it everybody else stands as before, and is told the same; only if it was
// self's, there may be more peers, and fewer problems of self's.
func TestRemovingALoserTouchesNobodyElse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leases := crowd().Filter(func(l []Lease) bool { return len(l) > 0 }).Draw(t, "leases")
		// Seen from a node that has no lease, the peers are the winners.
		winners, _ := Settle("nobody", testRules(), leases)
		at := rapid.IntRange(0, len(leases)-1).Draw(t, "removed")
		removed := leases[at]
		if slices.ContainsFunc(winners, removed.Equal) {
			return
		}
		peers, problems := Settle("self", testRules(), leases)
		peers2, problems2 := Settle("self", testRules(), slices.Delete(slices.Clone(leases), at, at+1))
		others := func(p Problem) bool { return p.Node == removed.Node }
		if !slices.Equal(slices.DeleteFunc(problems, others), slices.DeleteFunc(problems2, others)) {
			t.Fatalf("without %v other nodes are told %v, with it %v", removed, problems2, problems)
		}
		for _, p := range peers {
			if !slices.ContainsFunc(peers2, p.Equal) {
				t.Fatalf("without %v, %s is lost", removed, brief([]Lease{p}))
			}
		}
		if removed.Node != "self" && len(peers) != len(peers2) {
			t.Fatalf("without %v, peers are %s; with it %s", removed, brief(peers2), brief(peers))
		}
	})
}

func TestYoungerLeaseNeverUnseatsAPeer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leases := crowd().Draw(t, "leases")
		peers, _ := Settle("self", testRules(), leases)
		for _, l := range crowd().Draw(t, "younger") {
			if l.Node != "self" {
				l.Since = l.Since.Add(time.Hour)
				leases = append(leases, l)
			}
		}
		after, _ := Settle("self", testRules(), leases)
		for _, p := range peers {
			if !slices.ContainsFunc(after, p.Equal) {
				t.Fatalf("%s was a peer, and is no more among %s", brief([]Lease{p}), brief(after))
			}
		}
	})
}

// Whatever comes after them and goes again, in whatever order it is told, winners win, and what a node has for peers
// are winners.
func TestWinnerNeverFlaps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leases := crowd().Draw(t, "leases")
		first, _ := Settle("nobody", testRules(), leases)
		for range rapid.IntRange(1, 10).Draw(t, "changes") {
			winners, _ := Settle("nobody", testRules(), leases)
			if rapid.Bool().Draw(t, "leave") {
				leases = slices.DeleteFunc(leases, func(l Lease) bool {
					return !slices.ContainsFunc(winners, l.Equal) && rapid.Bool().Draw(t, "leaves")
				})
			} else {
				for _, l := range crowd().Draw(t, "younger") {
					l.Since = l.Since.Add(time.Hour)
					leases = append(leases, l)
				}
			}
			leases = rapid.Permutation(leases).Draw(t, "order")
			winners, _ = Settle("nobody", testRules(), leases)
			for _, w := range first {
				if !slices.ContainsFunc(winners, w.Equal) {
					t.Fatalf("%s had won, and now there are %s", brief([]Lease{w}), brief(winners))
				}
			}
			peers, _ := Settle("self", testRules(), leases)
			for _, p := range peers {
				if !slices.ContainsFunc(winners, p.Equal) {
					t.Fatalf("peer %s is not one of %s", brief([]Lease{p}), brief(winners))
				}
			}
		}
	})
}

// The winners are those that a comparison of each with each finds.
func TestWinnersAreThoseOfThePlainRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules := testRules()
		leases := crowd().Draw(t, "leases")
		slices.SortFunc(leases, func(a, b Lease) int {
			return oldestFirst(&contender{Lease: &a}, &contender{Lease: &b})
		})
		var want []Lease
		for _, l := range leases {
			_, err := judgeMAC(l)
			beaten := func(w Lease) bool {
				return w.Subnet.Overlaps(l.Subnet) || len(l.Data) > 0 && w.Node != l.Node && string(w.Data) == string(l.Data)
			}
			if err == nil && !l.Host.IsLoopback() && rules.Network.Contains(l.Subnet) && !slices.ContainsFunc(want, beaten) {
				want = append(want, l)
			}
		}
		slices.SortFunc(want, func(a, b Lease) int { return byNode(&contender{Lease: &a}, &contender{Lease: &b}) })
		if got, _ := Settle("nobody", rules, leases); !slices.EqualFunc(got, want, Lease.Equal) {
			t.Fatalf("winners are %s\nwant %s", brief(got), brief(want))
		}
	})
}

// mob returns good dual-stack leases of n nodes, and as many that overlap them in every way.
func mob(n int) (leases []Lease) {
	for i := range n {
		good := Lease{Node: fmt.Sprintf("good-%d", i), Host: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}),
			Backend: "vxlan", Data: fmt.Appendf(nil, "mac-%d", i), Since: time.Unix(int64(i), 0)}
		bad := good
		bad.Node, bad.Since = fmt.Sprintf("bad-%d", i), time.Unix(int64(n+i), 0)
		bad.Data = fmt.Appendf(nil, "mac-%d", i+i%3*n)
		four := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i)})
		six := netip.AddrFrom16([16]byte{0: 0xfd, 6: byte(i >> 8), 7: byte(i)})
		for _, p := range []struct{ good, bad netip.Prefix }{
			{netip.PrefixFrom(four, 24), netip.PrefixFrom(four, 9+i%24).Masked()},
			{netip.PrefixFrom(six, 64), netip.PrefixFrom(six, 9+i%120).Masked()},
		} {
			good.Subnet, bad.Subnet = p.good, p.bad
			leases = append(leases, bad, good)
		}
	}
	return leases
}

func mobRules() Rules {
	return Rules{Network: Network{{Prefix: prefix("10.0.0.0/8"), Len: 24}, {Prefix: prefix("fd00::/8"), Len: 64}},
		Judge: judgeMAC}
}

// The measure is a comparison of each subnet with each, on the same machine at the same time.
func TestHostileLeasesCostLittle(t *testing.T) {
	leases := mob(1000)
	settle, compare := time.Duration(math.MaxInt64), time.Duration(math.MaxInt64)
	for range 3 {
		start := time.Now()
		peers, problems := Settle("good-7", mobRules(), leases)
		settle = min(settle, time.Since(start))
		if len(peers) != 2*999 || len(problems) == 0 {
			t.Fatalf("%d peers, %d problems", len(peers), len(problems))
		}
		const sample = 20 // one of so many is enough
		start = time.Now()
		for i := 0; i < len(leases); i += sample {
			for j := range leases {
				if !leases[i].Subnet.Overlaps(leases[j].Subnet) && i == j {
					t.Fatal(leases[i].Subnet)
				}
			}
		}
		compare = min(compare, sample*time.Since(start))
	}
	t.Logf("Settle took %v, a comparison of each with each would take %v", settle, compare)
	if settle > compare/2 {
		t.Errorf("Settle took %v, a comparison of each with each would take %v", settle, compare)
	}
}

// Each hostile lease costs the same, however many there are: it is judged once, and what it takes of memory is its own.
// These are counts and not times, so that they are the same on every machine.
func TestHostileLeasesCostTheSameEach(t *testing.T) {
	each := func(n int) float64 {
		hostile := mob(n)
		rules, judged := mobRules(), 0
		rules.Judge = func(l Lease) (string, error) { judged++; return judgeMAC(l) }
		Settle("good-7", rules, hostile)
		if judged != len(hostile) {
			t.Errorf("%d leases were judged %d times", len(hostile), judged)
		}
		cost := func(leases []Lease) float64 {
			return testing.AllocsPerRun(3, func() { Settle("good-7", mobRules(), leases) })
		}
		return (cost(hostile) - cost(goodOf(hostile))) / float64(n)
	}
	few, many := each(100), each(2000)
	t.Logf("%.1f allocations for each hostile node of 100, %.1f of 2000", few, many)
	if many > 1.5*few {
		t.Errorf("%.1f allocations for each hostile node of 2000, and %.1f of 100", many, few)
	}
}

// The good ones of a mob are peers as if they were alone, from the first Settle on.
func TestGoodNodesStandAsIfTheyWereAlone(t *testing.T) {
	all := mob(1000)
	alone, none := Settle("good-7", mobRules(), goodOf(all))
	if len(none) > 0 {
		t.Errorf("problems of good nodes: %v", none)
	}
	peers, problems := Settle("good-7", mobRules(), all)
	if !slices.EqualFunc(alone, peers, Lease.Equal) {
		t.Errorf("%d peers alone, %d in a mob", len(alone), len(peers))
	}
	named := map[string]bool{}
	for _, p := range problems {
		named[p.Node] = true
	}
	for i := range 1000 {
		if !named[fmt.Sprintf("bad-%d", i)] || named[fmt.Sprintf("good-%d", i)] {
			t.Errorf("number %d: the bad one is not named, or the good one is", i)
		}
	}
}

func goodOf(leases []Lease) (good []Lease) {
	for _, l := range leases {
		if strings.HasPrefix(l.Node, "good-") {
			good = append(good, l)
		}
	}
	return good
}

// BenchmarkSettle settles the leases of good nodes, taking turns with the same among as many hostile ones.
func BenchmarkSettle(b *testing.B) {
	for _, n := range []int{1000, 5000} {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			all := mob(n)
			good := goodOf(all)
			var with, without []time.Duration
			for b.Loop() {
				without = append(without, timeOf(good))
				with = append(with, timeOf(all))
			}
			slices.Sort(with)
			slices.Sort(without)
			alone, mobbed := without[len(without)/2], with[len(with)/2]
			b.ReportMetric(alone.Seconds()*1e3, "alone-ms")
			b.ReportMetric(mobbed.Seconds()*1e3, "hostile-ms")
			b.ReportMetric(float64(mobbed)/float64(alone), "ratio")
		})
	}
}

func timeOf(leases []Lease) time.Duration {
	start := time.Now()
	Settle("good-7", mobRules(), leases)
	return time.Since(start)
}

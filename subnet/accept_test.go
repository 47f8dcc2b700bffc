package subnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// A subnet is in no unaccepted part if and only if each node with a lease that says what it accepts says so of it.
func TestUnacceptedIsWhatSomeNodeDoesNotAccept(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bases := prefixes("10.0.0.0/20 10.0.0.0/26 fd00::/60 fd00::/120")
		r := Range{Prefix: rapid.SampledFrom(bases).Draw(t, "network")}
		r.Len = min(r.Prefix.Bits()+rapid.IntRange(0, 5).Draw(t, "bits"), maxLen(r.Prefix.Addr()))
		r, err := NewRange(r)
		if err != nil {
			t.Fatal(err)
		}
		subnets := slices.Collect(r.Free(0, nil))
		network := rapid.Custom(func(t *rapid.T) string {
			p := rapid.SampledFrom(subnets).Draw(t, "around")
			p = netip.PrefixFrom(p.Addr(), rapid.IntRange(max(r.Prefix.Bits()-2, 0), p.Bits()+1).Draw(t, "length")).Masked()
			other := "10.0.0.0/8"
			if p.Addr().Is4() {
				other = "fd00::/8"
			}
			return rapid.SampledFrom([]string{p.String(), p.String() + "," + other, other, "", "junk"}).Draw(t, "text")
		})
		var all Listing
		for i, text := range rapid.SliceOfN(network, 0, 4).Draw(t, "networks") {
			all = append(all, Standing{Node: fmt.Sprintf("n%d", i), Subnets: "192.168.1.0/24", Network: text})
		}
		all = append(all, Standing{Node: "self", Subnets: "192.168.1.0/24", Network: "192.168.0.0/16"},
			Standing{Node: "new", Network: "192.168.0.0/16"})

		parts, by := all.Unaccepted(r, "self")
		for _, s := range subnets {
			want := slices.ContainsFunc(all, func(n Standing) bool {
				return strings.HasPrefix(n.Node, "n") && n.Subnets != "" && !accepts(n.Network, s)
			})
			if got := slices.ContainsFunc(parts, s.Overlaps); got != want {
				t.Fatalf("%s of %v is unaccepted: %v (%v, by %v), want %v\n%+v", s, r.Prefix, got, parts, by, want, all)
			}
		}
		if (len(by) == 0) != (len(parts) == 0) {
			t.Fatalf("%v, by %v", parts, by)
		}
	})
}

// accepts says the same of one subnet, as plainly as can be.
func accepts(network string, s netip.Prefix) bool {
	if network == "" || network == "junk" {
		return true
	}
	for text := range strings.SplitSeq(network, ",") {
		if p := prefix(text); p.Overlaps(s) && p.Bits() <= s.Bits() {
			return true
		}
	}
	return false
}

func grownNetwork(t testing.TB) Network {
	t.Helper()
	return Network{mustRange(t, Range{Prefix: prefix("10.0.0.0/22"), Len: 24})}
}

const notAccepted = "every free subnet of 10.0.0.0/22 is one that not all nodes accept yet, because their pod network " +
	"does not hold it: "

func TestSubnetThatAllNodesAcceptIsChosenFirst(t *testing.T) {
	for _, c := range []struct{ others, want string }{
		{"+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/23", "patch claim=10.0.1.0/24/me" + at1},
		{"+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/23,fd00::/48", "patch claim=10.0.1.0/24/me" + at1},
		// the hash of "self" leads to 10.0.3.0/24
		{"+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/22", "patch claim=10.0.3.0/24/me" + at1},
		{"+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/8", "patch claim=10.0.3.0/24/me" + at1},
		{"+ n1@1 subnets=10.0.0.0/24", "patch claim=10.0.3.0/24/me" + at1},
		{"+ n1@1 subnets=10.0.0.0/24 network=junk", "patch claim=10.0.3.0/24/me" + at1},
		{"+ n1@1 network=10.0.0.0/23", "patch claim=10.0.3.0/24/me" + at1}, // it holds no lease
		{"+ n1@1 subnets=10.0.0.0/24 network=192.168.0.0/16", "wait 5s: " + notAccepted + "n1"},
		{"+ n1@1 subnets=10.0.0.0/24 network=fd00::/48", "wait 5s: " + notAccepted + "n1"},
	} {
		play(t, claimantOf(t, grownNetwork(t)), c.others, "self@1 => "+c.want)
	}
	play(t, claimantOf(t, grownNetwork(t)),
		"+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/23",
		"+ n2@1 subnets=10.0.2.0/24 network=10.0.2.0/23",
		"self@1 => wait 5s: "+notAccepted+"n1, n2")
}

func TestNodesThatDoNotAcceptYetAreNamed(t *testing.T) {
	var lines []string
	for i := range 5 {
		lines = append(lines, fmt.Sprintf("+ n%d@1 subnets=10.0.0.0/24 network=10.0.0.0/24", 9-i))
	}
	play(t, claimantOf(t, grownNetwork(t)), append(lines, "self@1 => wait 5s: "+notAccepted+"n5, n6, n7 and 2 more")...)
}

func TestRememberedSubnetIsTakenWhoeverAcceptsIt(t *testing.T) {
	play(t, claimantOf(t, grownNetwork(t), prefix("10.0.2.0/24")),
		"+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/23",
		"self@1 => patch claim=10.0.2.0/24/me"+at1)
}

func TestNodeThatNeverAcceptsDelaysOthersOnly(t *testing.T) {
	c := claimantOf(t, grownNetwork(t))
	const stubborn = "+ n1@1 subnets=10.0.0.0/24 network=10.0.0.0/24"
	for range acceptLists {
		play(t, c, stubborn, "self@1 => wait 5s: "+notAccepted+"n1", "self@1 => list all Nodes")
	}
	play(t, c, stubborn, "self@1 => patch claim=10.0.3.0/24/me"+at1,
		// a lost claim does not have it wait anew
		"self@2 claim=10.0.3.0/24/me => list all Nodes anew",
		stubborn, "+ n2@1 subnets=10.0.3.0/24",
		"self@2 claim=10.0.3.0/24/me => patch claim-"+at2+": node n2 has or wants 10.0.3.0/24",
		"self@3 => wait 0s: another node wanted the same subnet",
		stubborn, "+ n2@1 subnets=10.0.3.0/24",
		"self@3 => patch claim=10.0.1.0/24/me"+at3)
}

func TestNetworkThatIsFullDoesNotWaitForOthersToAccept(t *testing.T) {
	var all Listing
	for i := range 4 {
		all = append(all, standingOf(fmt.Sprintf("n%d@1 subnets=10.0.%d.0/24 network=10.0.0.0/23", i, i), i))
	}
	c := claimantOf(t, grownNetwork(t))
	if s, ok := c.Next(standingOf("self@1", 0), all).(Stuck); !ok {
		t.Errorf("got %v", s)
	}
}

func TestLeasesThatDifferInWhatTheirNodeAccepts(t *testing.T) {
	a, b := leaseOf("n1 10.244.1.0/24"), leaseOf("n1 10.244.1.0/24")
	a.Accepts, b.Accepts = prefixes("10.244.0.0/16"), prefixes("10.244.0.0/16")
	if !a.Equal(b) {
		t.Error("the same is different")
	}
	if b.Accepts = prefixes("10.240.0.0/12"); a.Equal(b) {
		t.Error("a grown network would not be published")
	}
}

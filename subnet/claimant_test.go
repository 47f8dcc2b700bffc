package subnet

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func testNetwork(t testing.TB) Network {
	t.Helper()
	n, err := NewNetwork(Range{Prefix: prefix("10.0.0.0/22")}, Range{Prefix: prefix("fd00::/62"), Len: 64})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func claimantOf(t testing.TB, network Network, remembered ...netip.Prefix) *Claimant {
	t.Helper()
	c, err := NewClaimant("self", network, "me", remembered, func() uint64 { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// standingOf reads "node@version [subnets=...] [network=...] [claim=.../nonce]"; the Node is created that many hours after 1970.
func standingOf(line string, hours int) Standing {
	f := strings.Fields(line)
	name, version, _ := strings.Cut(f[0], "@")
	s := Standing{Node: name, Version: Version{"uid-" + name, version}, Since: time.Unix(int64(hours)*3600, 0)}
	for _, kv := range f[1:] {
		switch key, value, _ := strings.Cut(kv, "="); key {
		case "subnets":
			s.Subnets = value
		case "network":
			s.Network = value
		case "claim":
			i := strings.LastIndex(value, "/")
			s.Claim = value[:i] + " " + value[i+1:]
		}
	}
	return s
}

// play tells c, line by line, what was read and expects what it wants then: "self@1 ... => step". Lines before that
// with a plus are the other Nodes of a list.
func play(t *testing.T, c *Claimant, lines ...string) {
	t.Helper()
	var all Listing
	for _, line := range lines {
		if node, ok := strings.CutPrefix(line, "+ "); ok {
			all = append(all, standingOf(node, len(all)))
			continue
		}
		tell, want, _ := strings.Cut(line, " => ")
		own := standingOf(tell, 0)
		if all != nil {
			all = append(all, own)
		}
		if step := c.Next(own, all); step.String() != want {
			t.Fatalf("%s\n got %s\nwant %s", tell, step, want)
		}
		all = nil
	}
}

const (
	at1  = " uid=uid-self resourceVersion=1"
	at2  = " uid=uid-self resourceVersion=2"
	at3  = " uid=uid-self resourceVersion=3"
	mine = "10.0.1.0/24,fd00:0:0:1::/64"
)

func TestLeaseIsTakenWhenNobodyWantsIt(t *testing.T) {
	play(t, claimantOf(t, testNetwork(t), prefixes("10.0.1.0/24 fd00:0:0:1::/64")...),
		"self@1 => list all Nodes",
		"+ n1@1 subnets=10.0.0.0/24",
		"self@1 => patch claim="+mine+"/me"+at1,
		"self@2 claim="+mine+"/me => list all Nodes anew",
		"+ n1@1 subnets=10.0.0.0/24",
		"self@2 claim="+mine+"/me => patch subnets="+mine+" claim-"+at2,
		"self@3 claim="+mine+"/me => patch subnets="+mine+" claim-"+at3, // somebody else wrote; no other list is needed
		"self@4 subnets="+mine+" => done: "+mine)
}

func TestRivalOfOneFamilyEndsTheClaimOfBoth(t *testing.T) {
	for _, rival := range []string{
		"subnets=fd00:0:0:1::/64", "claim=fd00:0:0:1::/64/other", "subnets=junk,fd00:0:0:1::/65",
	} {
		_, theirs, _ := strings.Cut(rival, "fd")
		theirs, _, _ = strings.Cut("fd"+theirs, "/other")
		play(t, claimantOf(t, testNetwork(t), prefixes("10.0.1.0/24 fd00:0:0:1::/64")...),
			"self@1 => list all Nodes",
			"+ n1@1",
			"self@1 => patch claim="+mine+"/me"+at1,
			"self@2 claim="+mine+"/me => list all Nodes anew",
			"+ n1@1 "+rival,
			"self@2 claim="+mine+"/me => patch claim-"+at2+": node n1 has or wants "+theirs,
			"self@3 => wait 0s: another node wanted the same subnet",
			"self@3 => list all Nodes",
			"+ n1@1 "+rival,
			"self@3 => patch claim=10.0.1.0/24,fd00::/64/me"+at3)
	}
}

func TestClaimOfAnEarlierProcess(t *testing.T) {
	for _, claim := range []string{"10.0.1.0/24/other", "10.0.1.0/24/me", "10.9.1.0/24,fd00:0:0:1::/64/me", "junk/me"} {
		play(t, claimantOf(t, testNetwork(t)),
			"self@1 claim="+claim+" => patch claim-"+at1+": it is not of this process",
			"self@2 => list all Nodes")
	}
}

func TestListThatDoesNotShowTheClaim(t *testing.T) {
	c := claimantOf(t, testNetwork(t))
	own := standingOf("self@2 claim="+mine+"/me", 0)
	if s := c.Next(own, nil); s != (ListNodes{Fresh: true}) {
		t.Fatal(s)
	}
	for _, old := range []Listing{{}, {standingOf("self@1", 0)}, {standingOf("self@1 claim="+mine+"/me", 0)}} {
		if s, ok := c.Next(own, old).(Wait); !ok {
			t.Errorf("%v: %v", old, s)
		}
		if s := c.Next(own, nil); s != (ListNodes{Fresh: true}) {
			t.Error(s)
		}
	}
}

// A list that was made before the claim was read cannot be used, even if the caller passes it on.
func TestListThatWasNotAskedFor(t *testing.T) {
	own := standingOf("self@2 claim="+mine+"/me", 0)
	if s := claimantOf(t, testNetwork(t)).Next(own, Listing{own}); s != (ListNodes{Fresh: true}) {
		t.Error(s)
	}
}

func TestLeaseStays(t *testing.T) {
	n := testNetwork(t)
	n[0].Min, n[0].Reserved = prefix("10.0.2.0/24"), prefixes("10.0.1.0/24")
	play(t, claimantOf(t, n),
		"self@1 subnets="+mine+" => done: "+mine,
		"self@2 subnets="+mine+" claim=10.0.2.0/24/me => patch claim-"+at2+": it is not of this process")
	play(t, claimantOf(t, testNetwork(t)),
		"self@1 subnets=10.9.0.0/24 claim="+mine+"/me => patch claim-"+at1+": the node leases nothing for now",
		"self@1 subnets=10.9.0.0/24 => stuck: node self has leased 10.9.0.0/24, which is outside the network "+
			"[10.0.0.0/22 fd00::/62]: correct the network, or drain the node and remove the lease",
		`self@1 subnets=junk => stuck: the lease of node self cannot be read: "junk" is not a subnet such as 10.244.3.0/24; `+
			"correct or remove it")
}

func TestSecondFamilyComesLater(t *testing.T) {
	play(t, claimantOf(t, testNetwork(t), prefixes("fd00:0:0:1::/64")...),
		"self@1 subnets=10.0.1.0/24 => list all Nodes",
		"+ n1@1 claim=10.0.1.0/24/other",
		"self@1 subnets=10.0.1.0/24 => patch claim=fd00:0:0:1::/64/me"+at1,
		"self@2 subnets=10.0.1.0/24 claim=fd00:0:0:1::/64/me => list all Nodes anew",
		"+ n1@1 claim=10.0.1.0/24/other",
		"self@2 subnets=10.0.1.0/24 claim=fd00:0:0:1::/64/me => patch subnets="+mine+" claim-"+at2)
}

func TestNodeIsCreatedAgain(t *testing.T) {
	c := claimantOf(t, testNetwork(t))
	play(t, c, "self@7 subnets="+mine+" => done: "+mine)
	if s := c.Next(Standing{}, nil).String(); !strings.HasSuffix(s, ": node self is not registered") {
		t.Error(s)
	}
	play(t, c, "self@1 => list all Nodes", "+ n1@1", "self@1 => patch claim="+mine+"/me"+at1)
	c = claimantOf(t, testNetwork(t), prefixes("10.0.1.0/24 fd00:0:0:1::/64")...)
	play(t, c, "self@1 => list all Nodes", "+ n1@1 subnets=10.0.1.0/24",
		// the hash of "self" leads there
		"self@1 => patch claim=10.0.3.0/24,fd00:0:0:1::/64/me"+at1)
}

func TestNoSubnetIsFree(t *testing.T) {
	n := testNetwork(t)[:1]
	n[0].Reserved = prefixes("10.0.3.0/24")
	c := claimantOf(t, n)
	full := []string{"+ n1@1 subnets=10.0.0.0/24", "+ n2@1 claim=10.0.1.0/24/x", "+ n3@1 subnets=10.0.2.0/24"}
	const crowded = "self@1 => wait 0s: other nodes' claims take all that is free of 10.0.0.0/22"
	for range patience {
		play(t, c, append(slices.Clone(full), crowded)...)
	}
	const text = "no subnet is free for node self: all 3 of length /24 in 10.0.0.0/22 are taken, 2 by leases " +
		"(the oldest: 10.0.0.0/24 by n1 since 1970-01-01T00:00:00Z, 10.0.2.0/24 by n3 since 1970-01-01T02:00:00Z) " +
		"and 1 by claims of nodes that have not finished leasing " +
		"(the oldest: 10.0.1.0/24 by n2 since 1970-01-01T01:00:00Z); " +
		"delete the Nodes that are gone, or configure a larger network"
	play(t, c, append(slices.Clone(full), "self@1 => stuck: "+text)...)
	play(t, c, "self@1 => list all Nodes", "+ n1@1 subnets=10.0.0.0/24", "+ n3@1 subnets=10.0.2.0/24",
		"self@1 => patch claim=10.0.1.0/24/me"+at1)
}

func TestAllSubnetsAreLeased(t *testing.T) {
	n := testNetwork(t)[:1]
	var all Listing
	for i := range 4 {
		all = append(all, standingOf(fmt.Sprintf("n%d@1 subnets=10.0.%d.0/24", i, i), i))
	}
	s, _ := claimantOf(t, n).Next(standingOf("self@1", 0), all).(Stuck)
	var none *ExhaustedError
	if !errors.As(s.Err, &none) || none.Total != 4 || len(none.Leased) != 4 || len(none.Claimed) != 0 || s.For <= 0 {
		t.Errorf("%+v", s)
	}
}

func TestBadDataOfOneNodeStopsNobody(t *testing.T) {
	play(t, claimantOf(t, testNetwork(t), prefixes("10.0.1.0/24 fd00:0:0:1::/64")...),
		"self@1 => list all Nodes",
		"+ n1@1 subnets=0.0.0.0/0,::/0",
		"+ n2@1 claim=garbage/x",
		"self@1 => patch claim="+mine+"/me"+at1)
}

func TestClaimantThatCannotWork(t *testing.T) {
	if _, err := NewClaimant("self", nil, "me", nil, rand.Uint64); err == nil {
		t.Error("no network")
	}
	if _, err := NewClaimant("self", testNetwork(t), "ME", nil, rand.Uint64); err == nil {
		t.Error("bad nonce")
	}
}

// Free subnets of a random number are those of Range.Free, each once.
func TestRandomFreeSubnet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, err := NewRange(Range{
			Prefix: prefix("10.0.0.0/20"), Min: prefix("10.0.2.0/24"), Reserved: prefixes("10.0.4.0/23"),
		})
		if err != nil {
			t.Fatal(err)
		}
		var taken []netip.Prefix
		for _, i := range rapid.SliceOf(rapid.IntRange(0, 15)).Draw(t, "taken") {
			taken = append(taken, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24))
		}
		want := slices.Collect(r.Free(0, taken))
		for i := range uint64(2 * len(want)) {
			if got, ok := r.nth(i, taken); !ok || got != want[i%uint64(len(want))] {
				t.Fatalf("number %d is %v, want %v", i, got, want)
			}
		}
		if got, ok := r.nth(7, taken); ok != (len(want) > 0) {
			t.Fatalf("%v of %v", got, want)
		}
	})
}

// A crowd of nodes, as many as there are subnets, start at the same moment and take turns.
func TestCrowdTakesExactlyWhatThereIs(t *testing.T) {
	const crowd = 60
	random := rand.New(rand.NewPCG(1, 2))
	network := Network{mustRange(t, Range{Prefix: prefix("10.0.0.0/18"), Max: prefix("10.0.59.0/24")})}
	nodes := make(Listing, crowd+1)
	steps := make([]Step, crowd+1)
	claimants := make([]*Claimant, crowd+1)
	for i := range nodes {
		nodes[i] = standingOf(fmt.Sprintf("node-%d@0", i), i)
		c, err := NewClaimant(nodes[i].Node, network, "n"+strconv.Itoa(i), nil, random.Uint64)
		if err != nil {
			t.Fatal(err)
		}
		claimants[i] = c
		steps[i] = c.Next(nodes[i], nil)
	}
	turns, claims := 0, make([]int, crowd)
	for ; slices.ContainsFunc(steps[:crowd], func(s Step) bool { _, done := s.(Done); return !done }); turns++ {
		if turns > 1000 {
			t.Fatal("they do not finish")
		}
		for _, i := range random.Perm(crowd) {
			var all Listing
			if _, ok := steps[i].(ListNodes); ok {
				all = slices.Clone(nodes)
			} else {
				write(&nodes[i], steps[i])
			}
			steps[i] = claimants[i].Next(nodes[i], all)
			if _, ok := steps[i].(PatchClaim); ok {
				claims[i]++
			}
		}
	}
	held := map[string]string{}
	for _, n := range nodes[:crowd] {
		if other, ok := held[n.Subnets]; ok {
			t.Errorf("%s and %s both hold %s", other, n.Node, n.Subnets)
		}
		held[n.Subnets] = n.Node
	}
	slices.Sort(claims)
	t.Logf("%d turns; claims of a node: %d in the median, %d at most", turns, claims[crowd/2], claims[crowd-1])
	var none *ExhaustedError
	s, _ := claimants[crowd].Next(nodes[crowd], nodes).(Stuck)
	if !errors.As(s.Err, &none) || none.Total != crowd {
		t.Errorf("one more: %v", s)
	}
}

// write does to n what s asks for.
func write(n *Standing, s Step) {
	switch s := s.(type) {
	case PatchClaim:
		n.Claim = s.Claim.String()
	case PatchSubnets:
		n.Subnets, n.Claim = join(s.Subnets), ""
	case RemoveClaim:
		n.Claim = ""
	default:
		return
	}
	*n = touched(*n)
}

package masq

import (
	"net/netip"

	"tweed.dev/tweed/backend"
)

// The chains of ours that mark packets, by the names that a person sees in iptables -S and in nft.
const (
	Marks    = "TWEED-MARK"
	MarksNFT = "marks"
)

// Near is the set of the addresses of nodes that know this node's pods by their addresses without the tunnel.
const Near = "near"

func marksWay(form Form, family Family) Jump {
	if form == NFTables {
		return Jump{Chain: family.chain(OwnTable, MarksNFT), From: MarksHook}
	}
	return Jump{Chain: family.chain(MangleTable, Marks), From: BasePrerouting}
}

// near returns the set of c.Near of a family; the zero one if there are none.
func (c Config) near(family Family) Set {
	for _, a := range c.Near {
		if FamilyOf(a) == family {
			return family.set(c.Form, Near)
		}
	}
	return Set{}
}

func (c Config) addNear(r *Ruleset, network netip.Prefix) {
	family := FamilyOf(network.Addr())
	set := c.near(family)
	if set == (Set{}) {
		return
	}
	r.Sets[set] = map[netip.Addr]bool{}
	for _, a := range c.Near {
		if FamilyOf(a) == family {
			r.Sets[set][a] = true
		}
	}
}

// toNodes returns the rules by which pods of a subnet are known to other nodes by their own addresses.
func (c Config) toNodes(subnet netip.Prefix) (rules []Rule) {
	if c.Device != "" {
		rules = append(rules, Rule{Src: subnet, Out: c.Device, Verdict: Return})
	}
	if near := c.near(FamilyOf(subnet.Addr())); near != (Set{}) {
		rules = append(rules, Rule{Src: subnet, DstIn: near, Verdict: Return})
	}
	return rules
}

// addMarks marks the packets that belong into the tunnel if they are between a pod here and another node: all from pods
// here and for pods here, but for the answers to what came to a port of this node and was sent on to a pod. The caller
// sent that past the tunnel, and so it is to be answered. Both have the same addresses on their way through this host;
// only who tracks connections knows them apart.
//
// What pods send each other needs no mark to get there, and with one the tunnel would look up the way to the other node
// for each packet.
func (c Config) addMarks(r *Ruleset, network netip.Prefix) {
	own := inFamily(c.Subnets, network)
	if c.Device == "" || len(own) == 0 {
		return
	}
	way := marksWay(c.Form, FamilyOf(network.Addr()))
	rules := []Rule{{Src: network, Dst: network, Verdict: Return}}
	for _, s := range own {
		rules = append(rules,
			Rule{Src: s, Translated: true, Answers: true, Verdict: Return},
			Rule{Src: s, Verdict: SetMark, Bits: backend.PodMark},
			Rule{Dst: s, Verdict: SetMark, Bits: backend.PodMark})
	}
	r.Chains[way.Chain], r.Jumps[way] = rules, true
}

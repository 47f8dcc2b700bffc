package masq

import (
	"net/netip"
	"slices"
)

// The chains of ours that guard the tunnel's port, by the names that a person sees in iptables -S and in nft.
const (
	GuardInput   = "TWEED-GUARD-IN"
	GuardForward = "TWEED-GUARD-FWD"
	UntrackedIn  = "TWEED-RAW-IN"
	UntrackedOut = "TWEED-RAW-OUT"
	Input        = "TWEED-INPUT"

	GuardInputNFT   = "guard-input"
	GuardForwardNFT = "guard-forward"
	UntrackedInNFT  = "untracked-in"
	UntrackedOutNFT = "untracked-out"
)

// The tables and the kernel's chains that these are reached from. In mangle a drop is final, and comes before whatever
// filter accepts.
const (
	MangleTable    = "mangle"
	RawTable       = "raw"
	BaseInput      = "INPUT"
	BaseOutput     = "OUTPUT"
	BasePrerouting = "PREROUTING"
)

// Peers is the set of the addresses that other nodes' encapsulated packets come from and go to.
const Peers = "peers"

// OurDevices begins the names of all devices that packets of pods arrive from: bridge, VXLAN device and pods' veths.
const OurDevices = "tweed"

// What packets were dropped for: they were a pod's, or of a host that is no peer, or came to the tunnel's port by a
// change of their destination.
const (
	DroppedPod        = "pod"
	DroppedStranger   = "stranger"
	DroppedTranslated = "translated"
)

// Reasons lists what packets can be dropped for.
func Reasons() []string { return []string{DroppedPod, DroppedStranger, DroppedTranslated} }

// Counted returns, for each chain that drops, what each of its rules drops packets for; "" for a rule that does not.
func (r Ruleset) Counted() map[Chain][]string {
	counted := map[Chain][]string{}
	for c, rules := range r.Chains {
		if !slices.ContainsFunc(rules, func(r Rule) bool { return r.Counts != "" }) {
			continue
		}
		for _, rule := range rules {
			counted[c] = append(counted[c], rule.Counts)
		}
	}
	return counted
}

// guarded is one chain of the guard in each form, and the way into it.
type guarded struct {
	table, name, from string // of iptables
	nft, hook         string
}

func guards() []guarded {
	return []guarded{
		{MangleTable, GuardInput, BaseInput, GuardInputNFT, InputHook},
		{MangleTable, GuardForward, BaseForward, GuardForwardNFT, ForwardHook},
		{RawTable, UntrackedIn, BasePrerouting, UntrackedInNFT, PreroutingHook},
		{RawTable, UntrackedOut, BaseOutput, UntrackedOutNFT, OutputHook},
	}
}

func (g guarded) way(form Form, family Family) Jump {
	if form == NFTables {
		return Jump{Chain: family.chain(OwnTable, g.nft), From: g.hook}
	}
	return Jump{Chain: family.chain(g.table, g.name), From: g.from}
}

// Ways lists the ways into all chains of ours that a family can have in one form.
func Ways(form Form, family Family) []Jump {
	var ways []Jump
	if form == NFTables {
		ways = append(ways, Jump{Chain: family.chain(OwnTable, Translate), From: NatHook})
	} else {
		fwd := family.chain(FilterTable, Forward)
		ways = append(ways, Jump{Chain: fwd, From: BaseForward}, Jump{Chain: fwd, From: DockerUser},
			Jump{Chain: family.chain(NatTable, Postrouting), From: BasePostrouting},
			Jump{Chain: family.chain(FilterTable, Input), From: BaseInput})
	}
	for _, g := range guards() {
		ways = append(ways, g.way(form, family))
	}
	return append(ways, marksWay(form, family))
}

// addGuard keeps all but the peers away from the tunnel's port, of which nothing that arrives there proves who sent it.
//
// A list of peers alone would not do: what a pod sends, masqueraded by its node, comes from a peer. So pods are stopped
// where they are sent on, and where they arrive. Both are judged when it is known where a packet goes in the end.
func (c Config) addGuard(r *Ruleset) {
	if c.Port == 0 || !c.Guard {
		return
	}
	peers := c.Underlay.set(c.Form, Peers)
	if c.Form == NFTables {
		r.Tables[peers.table()] = true
	}
	members := make(map[netip.Addr]bool, len(c.Peers))
	for _, a := range c.Peers {
		if FamilyOf(a) == c.Underlay {
			members[a] = true
		}
	}
	r.Sets[peers] = members
	chains := [][]Rule{c.guardInput(peers), c.guardForward(peers), c.untrackedIn(peers), c.untrackedOut(peers)}
	for i, g := range guards() {
		way := g.way(c.Form, c.Underlay)
		r.Chains[way.Chain], r.Jumps[way] = chains[i], true
	}
	if c.AcceptPeers {
		c.addAccept(r, peers)
	}
}

// pods returns the addresses of pods of the underlay's family, if there are any.
func (c Config) pods() netip.Prefix {
	for _, p := range c.Network.Prefixes() {
		if FamilyOf(p.Addr()) == c.Underlay {
			return p
		}
	}
	return netip.Prefix{}
}

// drop completes a rule.
func (c Config) drop(match Rule, reason string) Rule {
	match.UDP, match.DstPort, match.Verdict, match.Counts = true, c.Port, Drop, reason
	return match
}

// guardInput is for packets to this node. That a peer's packets are not tracked, and so not translated, is why one that
// was can be none.
func (c Config) guardInput(peers Set) []Rule {
	rules := []Rule{c.drop(Rule{In: OurDevices}, DroppedPod)}
	if pods := c.pods(); pods.IsValid() { // by a plain route from another node's pod
		rules = append(rules, c.drop(Rule{Dst: pods}, DroppedPod))
	}
	return append(rules,
		c.drop(Rule{Translated: true}, DroppedTranslated),
		c.drop(Rule{SrcIn: peers, NotSrcIn: true}, DroppedStranger))
}

// guardForward is for packets to others: what this node sends on may get a peer's address, its own.
func (c Config) guardForward(peers Set) []Rule {
	pods := c.pods()
	return []Rule{
		c.drop(Rule{In: OurDevices, Dst: pods, NotDst: pods.IsValid()}, DroppedPod),
		c.drop(Rule{Translated: true, DstIn: peers}, DroppedTranslated),
	}
}

// untrackedIn takes no more than what will be let in: of any other packet others may want to know the connection.
func (c Config) untrackedIn(peers Set) []Rule {
	return []Rule{{UDP: true, DstPort: c.Port, Local: true, SrcIn: peers, Verdict: NoTrack}}
}

func (c Config) untrackedOut(peers Set) []Rule {
	return []Rule{{UDP: true, DstPort: c.Port, DstIn: peers, Verdict: NoTrack}}
}

// addAccept puts a rule where a host may drop what it does not know. A chain of others in nftables cannot name our set;
// what gets there has passed the guard.
func (c Config) addAccept(r *Ruleset, peers Set) {
	accept := Rule{UDP: true, DstPort: c.Port, Verdict: Accept}
	if c.Form == NFTables {
		r.Guests[Guest{Host: c.Underlay.chain(FilterTable, BaseInput), Rule: accept}] = 0
		return
	}
	accept.SrcIn = peers
	chain := c.Underlay.chain(FilterTable, Input)
	r.Chains[chain], r.Jumps[Jump{Chain: chain, From: BaseInput}] = []Rule{accept}, true
}

// Package masq says what the packet filter must hold so that pods reach each other untranslated and the world
// masqueraded, and nobody but other nodes the tunnel's port.
//
// It is pure, and knows nothing of how a packet filter is read or written.
package masq

import (
	"math"
	"net/netip"

	"tweed.dev/tweed/subnet"
)

// The chains of ours, by the names that a person sees in iptables -S.
const (
	Forward     = "TWEED-FWD"
	Postrouting = "TWEED-POSTRTG"
)

// The tables and the kernel's chains in them that ours are reached from.
const (
	FilterTable     = "filter"
	NatTable        = "nat"
	BaseForward     = "FORWARD"
	BasePostrouting = "POSTROUTING"
)

// The table of ours in nftables, one for each family, and what is in it: a chain of nftables' own making that the hook
// postrouting leads to, and the chain of ours that it jumps to.
const (
	OwnTable  = "tweed"
	Translate = "translate"
)

// DockerUser is a chain that Docker's way through FORWARD begins with, and that it leaves to others to fill.
const DockerUser = "DOCKER-USER"

// Comment marks every rule of ours, the jumps from the kernel's chains first of all.
const Comment = "tweed"

// kubeProxyMark is the bit by which kube-proxy marks packets that it will masquerade (--iptables-masquerade-bit).
const kubeProxyMark = 0x4000

// A Form is one way of writing down a packet filter.
type Form string

// The forms.
const (
	IPTables Form = "iptables" // chains of ours in the tables that iptables has, reached by jumps
	NFTables Form = "nftables" // tables of ours
)

// A Config says whose packets are whose.
type Config struct {
	// Form is what the filter is written in; IPTables if empty.
	Form Form
	// Network holds the addresses of all pods.
	Network subnet.Network
	// Subnets hold the addresses of this node's pods.
	Subnets []netip.Prefix
	// Port is the UDP port that nodes receive encapsulated packets at. No translated packet leaves from it, or its
	// replies would be taken for encapsulated ones. 0 stands for none.
	Port uint16
	// Device is the tunnel's. What leaves by it arrives where this node's pods are known by their addresses, and their
	// packets that may do so carry PodMark. Empty where there is none.
	Device string
	// Own are the addresses that other nodes know this node by, and answer to the way they were asked.
	Own []netip.Addr
	// Near are the addresses of nodes that know this node's pods by their addresses without the tunnel.
	Near []netip.Addr
	// NonMasquerade holds addresses outside the network that see pods by their own addresses.
	NonMasquerade []netip.Prefix
	// Guard drops what comes to Port from others than Peers, and keeps pods from sending to it.
	Guard bool
	// AcceptPeers lets what Guard lets in past a host that drops what it does not know.
	AcceptPeers bool
	// Underlay is the family that encapsulated packets travel by.
	Underlay Family
	// Peers are the addresses that other nodes' encapsulated packets come from and go to; of another family than
	// Underlay's they mean nothing.
	Peers []netip.Addr
}

// Desired returns what the packet filter must hold.
//
// Jumps and guests stand behind what others decide: a network policy, a drop that an administrator wants, kube-proxy's
// own masquerading. Only a rule that takes every packet is overtaken, because behind it they would never be reached.
// The jumps to what drops stand first: it takes nothing that anybody could want.
func (c Config) Desired() Ruleset {
	r := Ruleset{
		Tables: map[Table]bool{}, Sets: map[Set]map[netip.Addr]bool{}, Chains: map[Chain][]Rule{}, Jumps: map[Jump]bool{},
		Guests: map[Guest]uint64{},
	}
	for _, network := range c.Network.Prefixes() {
		c.addNear(&r, network)
		if c.Form == NFTables {
			c.addNFTables(&r, network)
		} else {
			c.addIPTables(&r, network)
		}
		c.addMarks(&r, network)
	}
	c.addGuard(&r)
	return r
}

func (c Config) addIPTables(r *Ruleset, network netip.Prefix) {
	family := FamilyOf(network.Addr())
	fwd := family.chain(FilterTable, Forward)
	nat := family.chain(NatTable, Postrouting)
	r.Chains[fwd], r.Chains[nat] = forward(network), c.nat(network)
	r.Jumps[Jump{Chain: fwd, From: BaseForward}] = true
	r.Jumps[Jump{Chain: fwd, From: DockerUser}] = true
	r.Jumps[Jump{Chain: nat, From: BasePostrouting}] = true
}

// addNFTables adds no chain for what is forwarded: nftables drops a packet that any one table drops, and to accept it
// in a table of ours changes nothing. So the rules that accept are guests where others drop. In the like way guests in the
// nat chain of others keep what is ours to translate, or not to, from a rule there that translates everything.
func (c Config) addNFTables(r *Ruleset, network netip.Prefix) {
	family := FamilyOf(network.Addr())
	translate := family.chain(OwnTable, Translate)
	r.Tables[translate.table()] = true
	r.Chains[translate] = c.nat(network)
	r.Jumps[Jump{Chain: translate, From: NatHook}] = true
	for _, rule := range forward(network) {
		r.Guests[Guest{Host: family.chain(FilterTable, BaseForward), Rule: rule}] = 0
		r.Guests[Guest{Host: family.chain(FilterTable, DockerUser), Rule: rule}] = 0
	}
	for _, rule := range r.Chains[translate] {
		// The one is kube-proxy's, the other a part of the rule behind it, the third names what only our table has.
		if rule.Mark == 0 && !rule.UDP && rule.DstIn == (Set{}) {
			rule.Verdict = Accept
			r.Guests[Guest{Host: family.chain(NatTable, BasePostrouting), Rule: rule}] = 0
		}
	}
}

// forward returns the rules by which packets from and to pods may be forwarded.
func forward(network netip.Prefix) []Rule {
	return []Rule{{Src: network, Verdict: Accept}, {Dst: network, Verdict: Accept}}
}

// nat returns the rules of the nat chain for one family. Each names source and destination in full, so that at no
// moment of a change does one rule depend on another that is not there yet, but for the first and those of multicast,
// of nodes and of what is not masqueraded, which stand, and are written, before those that masquerade.
func (c Config) nat(network netip.Prefix) []Rule {
	own := inFamily(c.Subnets, network)
	rules := []Rule{
		{Mark: kubeProxyMark, Verdict: Return},
		{Src: network, Dst: network, Verdict: Return},
	}
	for _, s := range own {
		rules = append(rules,
			Rule{Src: s, Dst: multicast(network.Addr()), Verdict: Return},
			// A pod here sees who calls it: the reply comes back through this node in any case.
			Rule{Src: network, NotSrc: true, Dst: s, Verdict: Return})
		rules = append(rules, c.toNodes(s)...)
		for _, outside := range inFamily(c.NonMasquerade, network) {
			if outside.Bits() == 0 {
				outside = netip.Prefix{} // no packet filter prints a match that matches everything
			}
			rules = append(rules, Rule{Src: s, Dst: outside, Verdict: Return})
		}
	}
	for _, a := range c.Own {
		if FamilyOf(a) == FamilyOf(network.Addr()) {
			rules = append(rules, Rule{Src: netip.PrefixFrom(a, a.BitLen()), Dst: network, Verdict: Return})
		}
	}
	// The reply of a pod on another node would go to the caller directly, past the tunnel it came by.
	rules = append(rules, c.masquerade(Rule{Src: network, NotSrc: true, Dst: network})...)
	for _, s := range own {
		rules = append(rules, c.masquerade(Rule{Src: s, Dst: network, NotDst: true})...)
	}
	return rules
}

// inFamily returns those of prefixes that are of the same family as network.
func inFamily(prefixes []netip.Prefix, network netip.Prefix) (same []netip.Prefix) {
	for _, p := range prefixes {
		if FamilyOf(p.Addr()) == FamilyOf(network.Addr()) {
			same = append(same, p)
		}
	}
	return same
}

func (c Config) masquerade(match Rule) []Rule {
	match.Verdict = Masquerade
	if c.Port == 0 {
		return []Rule{match}
	}
	udp := match
	udp.UDP, udp.Ports = true, portsBeside(c.Port)
	return []Rule{udp, match}
}

// portsBeside returns the larger of the ranges of unprivileged ports below and above port.
func portsBeside(port uint16) PortRange {
	const lowest = 1024 // the ports below are privileged
	if int(port)-lowest > math.MaxUint16-int(port) {
		return PortRange{lowest, port - 1}
	}
	return PortRange{max(port+1, lowest), math.MaxUint16}
}

// multicast returns all multicast addresses of the family of a (RFC 5771; RFC 4291, section 2.7).
func multicast(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{224}), 4)
	}
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xff}), 8)
}

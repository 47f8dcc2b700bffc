// Package masq says what the packet filter must hold so that pods reach each other untranslated and the world
// masqueraded.
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

// Comment marks every rule of ours, the jumps from the kernel's chains first of all.
const Comment = "tweed"

// kubeProxyMark is the bit by which kube-proxy marks packets that it will masquerade (--iptables-masquerade-bit).
const kubeProxyMark = 0x4000

// A Config says whose packets are whose.
type Config struct {
	// Network holds the addresses of all pods.
	Network subnet.Network
	// Subnets hold the addresses of this node's pods.
	Subnets []netip.Prefix
	// Port is the UDP port that nodes receive encapsulated packets at. No translated packet leaves from it, or its
	// replies would be taken for encapsulated ones. 0 stands for none.
	Port uint16
}

// Desired returns what the packet filter must hold.
//
// Both jumps stand behind what others decide: a network policy, a drop that an administrator wants, kube-proxy's own
// masquerading. Only a rule that takes every packet is overtaken, because behind it a jump would never be reached.
func (c Config) Desired() Ruleset {
	r := Ruleset{Chains: map[Chain][]Rule{}, Jumps: map[Jump]bool{}}
	for _, network := range c.Network.Prefixes() {
		family := FamilyOf(network.Addr())
		fwd := Chain{Family: family, Table: FilterTable, Name: Forward}
		nat := Chain{Family: family, Table: NatTable, Name: Postrouting}
		r.Chains[fwd] = []Rule{{Src: network, Verdict: Accept}, {Dst: network, Verdict: Accept}}
		r.Chains[nat] = c.nat(network)
		r.Jumps[Jump{Chain: fwd, From: BaseForward}] = true
		r.Jumps[Jump{Chain: nat, From: BasePostrouting}] = true
	}
	return r
}

// nat returns the rules of the nat chain for one family. Each names source and destination in full, so that at no
// moment of a change does one rule depend on another that is not there yet, but for the first and the multicast ones,
// which stand, and are written, before those that masquerade.
func (c Config) nat(network netip.Prefix) []Rule {
	own := c.own(network)
	rules := []Rule{
		{Mark: kubeProxyMark, Verdict: Return},
		{Src: network, Dst: network, Verdict: Return},
	}
	for _, s := range own {
		rules = append(rules,
			Rule{Src: s, Dst: multicast(network.Addr()), Verdict: Return},
			// A pod here sees who calls it: the reply comes back through this node in any case.
			Rule{Src: network, NotSrc: true, Dst: s, Verdict: Return})
	}
	// The reply of a pod on another node would go to the caller directly, past the tunnel it came by.
	rules = append(rules, c.masquerade(Rule{Src: network, NotSrc: true, Dst: network})...)
	for _, s := range own {
		rules = append(rules, c.masquerade(Rule{Src: s, Dst: network, NotDst: true})...)
	}
	return rules
}

func (c Config) own(network netip.Prefix) (own []netip.Prefix) {
	for _, s := range c.Subnets {
		if FamilyOf(s.Addr()) == FamilyOf(network.Addr()) {
			own = append(own, s)
		}
	}
	return own
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

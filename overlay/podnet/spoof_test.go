package podnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
)

// A deed is a frame that a pod sends to another.
type deed struct {
	name  string
	frame []byte
}

// Types of ICMPv6 (RFC 4861, RFC 3810).
const (
	routerAdvert, neighSolicit, neighAdvert, mld2Report = 134, 135, 136, 143
	sourceMAC, targetMAC                                = 1, 2 // options
	override                                            = 1 << 29
)

// misdeeds are what a pod does to another in the name of a third.
func misdeeds(p, to, third identity) []deed {
	gateway4, gateway6 := netip.MustParseAddr("10.244.3.1"), netip.MustParseAddr("fd00:10:244:3::1")
	all6, solicited := netip.MustParseAddr("ff02::1"), netip.MustParseAddr("ff02::1:ff00:1")
	other := backend.MAC{0x0a, 0x58, 1, 2, 3, 4}
	ip4 := func(from, mac identity, text string) []byte {
		return ether2(to.mac, mac.mac, unix.ETH_P_IP, packet4(from.ip4, to.ip4, udp4(9, 9, text)))
	}
	ip6 := func(from netip.Addr, mac backend.MAC, text string) []byte {
		return ether2(to.mac, mac, unix.ETH_P_IPV6, packet6(from, to.ip6, unix.IPPROTO_UDP, 64, udp4(9, 9, text)))
	}
	icmp := func(from, dest netip.Addr, mac backend.MAC, m []byte) []byte {
		return ether2(multicastMAC(dest), mac, unix.ETH_P_IPV6, packet6(from, dest, unix.IPPROTO_ICMPV6, 255, m))
	}
	none := netip.IPv6Unspecified()
	ll := p.mac.LinkLocal()
	odd := arp(2, p.mac, third.ip4, to.mac, to.ip4)
	odd[1] = 6 // IEEE 802, which Linux takes for Ethernet
	advert := append([]byte{routerAdvert, 0, 0, 0, 64, 0, 7, 8}, make([]byte, 8)...)
	return []deed{
		{"another's MAC", ip4(p, third, "mac")},
		{"a made up MAC", ether2(to.mac, other, unix.ETH_P_IP, packet4(p.ip4, to.ip4, udp4(9, 9, "made up")))},
		{"another's IPv4", ip4(third, p, "ip")},
		{"another's MAC and IPv4", ip4(third, third, "both")},
		{"an address from outside", ether2(to.mac, p.mac, unix.ETH_P_IP,
			packet4(netip.MustParseAddr("192.0.2.1"), to.ip4, udp4(9, 9, "out")))},
		{"another's IPv6", ip6(third.ip6, p.mac, "ip")},
		{"another's link-local address", ip6(third.mac.LinkLocal(), p.mac, "ll")},
		{"another's MAC with IPv6", ip6(p.ip6, third.mac, "mac")},
		{"another's MAC and IPv6", ip6(third.ip6, third.mac, "both")},
		{"ARP answer for a neighbour", ether2(to.mac, p.mac, unix.ETH_P_ARP, arp(2, p.mac, third.ip4, to.mac, to.ip4))},
		{"ARP answer for the gateway", ether2(to.mac, p.mac, unix.ETH_P_ARP, arp(2, p.mac, gateway4, to.mac, to.ip4))},
		{"ARP announcement of a neighbour's address", ether2(everybody(), p.mac, unix.ETH_P_ARP,
			arp(1, p.mac, third.ip4, backend.MAC{}, third.ip4))},
		{"ARP with a neighbour's MAC", ether2(to.mac, p.mac, unix.ETH_P_ARP, arp(2, third.mac, p.ip4, to.mac, to.ip4))},
		{"ARP from a neighbour's MAC", ether2(to.mac, third.mac, unix.ETH_P_ARP, arp(2, p.mac, p.ip4, to.mac, to.ip4))},
		{"ARP probe for a neighbour's address", ether2(everybody(), p.mac, unix.ETH_P_ARP,
			arp(1, p.mac, netip.IPv4Unspecified(), backend.MAC{}, to.ip4))},
		{"ARP probe with a neighbour's MAC", ether2(everybody(), p.mac, unix.ETH_P_ARP,
			arp(1, third.mac, netip.IPv4Unspecified(), backend.MAC{}, p.ip4))},
		{"ARP of another form", ether2(to.mac, p.mac, unix.ETH_P_ARP, odd)},
		{"ND answer for a neighbour", icmp(p.ip6, all6, p.mac, nd(neighAdvert, override, third.ip6, targetMAC, p.mac))},
		{"ND answer for the gateway", icmp(ll, all6, p.mac, nd(neighAdvert, override, gateway6, targetMAC, p.mac))},
		{"ND question in a neighbour's name", icmp(third.ip6, solicited, p.mac,
			nd(neighSolicit, 0, to.ip6, sourceMAC, p.mac))},
		{"ND probe for a neighbour's address", icmp(none, solicited, p.mac, nd(neighSolicit, 0, to.ip6, 0, p.mac))},
		{"ND probe from a neighbour's MAC", icmp(none, solicited, third.mac, nd(neighSolicit, 0, p.ip6, 0, p.mac))},
		{"MLD from a neighbour's MAC", icmp(none, netip.MustParseAddr("ff02::16"), third.mac,
			append([]byte{mld2Report, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0}, solicited.AsSlice()...))},
		{"IPv6 from nowhere", ip6(none, p.mac, "none")},
		{"router advertisement", icmp(ll, all6, p.mac, advert)},
		{"router advertisement behind options", ether2(multicastMAC(all6), p.mac, unix.ETH_P_IPV6, behindOptions(
			packet6(ll, all6, unix.IPPROTO_ICMPV6, 255, advert)))},
		{"DHCP answer", ether2(everybody(), p.mac, unix.ETH_P_IP,
			packet4(p.ip4, netip.MustParseAddr("255.255.255.255"), udp4(67, 68, "offer")))},
		{"DHCPv6 answer", ether2(to.mac, p.mac, unix.ETH_P_IPV6,
			packet6(ll, to.mac.LinkLocal(), unix.IPPROTO_UDP, 64, udp4(547, 546, "advertise")))},
		{"another protocol", ether2(to.mac, p.mac, 0x88b5, []byte("of nobody's"))}, // IEEE 802, for experiments
		{"another's IPv4 behind a VLAN tag", tagged(ip4(third, p, "tagged"))},
		{"another's IPv4 behind two VLAN tags", tagged(tagged(ip4(third, p, "tagged twice")))},
	}
}

// tagged puts a VLAN tag into a frame (IEEE 802.1Q).
func tagged(frame []byte) []byte {
	return slices.Concat(frame[:12], []byte{0x81, 0, 0, 5}, frame[12:])
}

// behindOptions puts an empty header of options between a packet's header and what it carries (RFC 8200, section 4.6).
func behindOptions(packet []byte) []byte {
	next := packet[6]
	packet[6] = unix.IPPROTO_DSTOPTS
	binary.BigEndian.PutUint16(packet[4:], binary.BigEndian.Uint16(packet[4:])+8)
	return append(packet[:40:40], append([]byte{next, 0, 1, 4, 0, 0, 0, 0}, packet[40:]...)...)
}

// owndeeds are what a pod does in its own name.
func owndeeds(p, to identity) []deed {
	all6, solicited := netip.MustParseAddr("ff02::1"), netip.MustParseAddr("ff02::1:ff00:1")
	icmp := func(from, dest netip.Addr, m []byte) []byte {
		return ether2(multicastMAC(dest), p.mac, unix.ETH_P_IPV6, packet6(from, dest, unix.IPPROTO_ICMPV6, 255, m))
	}
	arps := func(dest backend.MAC, packet []byte) []byte { return ether2(dest, p.mac, unix.ETH_P_ARP, packet) }
	none := netip.IPv6Unspecified()
	return []deed{
		{"IPv4", ether2(to.mac, p.mac, unix.ETH_P_IP, packet4(p.ip4, to.ip4, udp4(9, 9, "own")))},
		{"IPv6", ether2(to.mac, p.mac, unix.ETH_P_IPV6, packet6(p.ip6, to.ip6, unix.IPPROTO_UDP, 64, udp4(9, 9, "own")))},
		{"link-local", ether2(to.mac, p.mac, unix.ETH_P_IPV6,
			packet6(p.mac.LinkLocal(), to.mac.LinkLocal(), unix.IPPROTO_UDP, 64, udp4(9, 9, "own")))},
		{"ARP question", arps(everybody(), arp(1, p.mac, p.ip4, backend.MAC{}, to.ip4))},
		{"ARP answer", arps(to.mac, arp(2, p.mac, p.ip4, to.mac, to.ip4))},
		{"ARP announcement", arps(everybody(), arp(1, p.mac, p.ip4, backend.MAC{}, p.ip4))},
		{"ARP probe", arps(everybody(), arp(1, p.mac, netip.IPv4Unspecified(), backend.MAC{}, p.ip4))},
		{"ND question", icmp(p.ip6, solicited, nd(neighSolicit, 0, to.ip6, sourceMAC, p.mac))},
		{"ND answer", icmp(p.ip6, all6, nd(neighAdvert, override, p.ip6, targetMAC, p.mac))},
		{"ND answer of link-local", icmp(p.mac.LinkLocal(), all6,
			nd(neighAdvert, override, p.mac.LinkLocal(), targetMAC, p.mac))},
		{"ND probe", icmp(none, solicited, nd(neighSolicit, 0, p.ip6, 0, p.mac))},
		{"MLD before it has an address", icmp(none, netip.MustParseAddr("ff02::16"),
			append([]byte{mld2Report, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0}, solicited.AsSlice()...))},
		{"a DHCP client's question", ether2(everybody(), p.mac, unix.ETH_P_IP,
			packet4(p.ip4, netip.MustParseAddr("255.255.255.255"), udp4(68, 67, "discover")))},
	}
}

func TestPodSendsInAnothersName(t *testing.T) {
	for _, c := range []struct {
		name     string
		spoofing Spoofing
		then     string // done to each port
		passes   bool
	}{
		{name: "denied"},
		{name: "denied by a kernel before 5.18", then: "ip link set dev %s type bridge_slave locked off"},
		{name: "allowed", spoofing: Spoofing{All: true}, passes: true},
		{name: "allowed in the namespace", spoofing: Spoofing{Namespaces: []string{"lab", "apps"}}, passes: true},
		{name: "allowed in another namespace", spoofing: Spoofing{Namespaces: []string{"lab"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			n.info.Spoofing = c.spoofing
			n.publish(n.info)
			args := [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "apps"}, {"K8S_POD_NAME", "p"}}
			p, to, third := n.attached("p", args...), n.attached("to", args...), n.attached("third", args...)
			for _, pod := range []identity{p, to, third} {
				if c.then != "" {
					n.Run(t, fmt.Sprintf(c.then, pod.veth))
				}
			}
			compareDeeds(t, p, to, owndeeds(p, to), true)
			compareDeeds(t, p, to, misdeeds(p, to, third), c.passes)
		})
	}
}

func compareDeeds(t *testing.T, p, to identity, deeds []deed, want bool) {
	t.Helper()
	var frames [][]byte
	for _, d := range deeds {
		frames = append(frames, d.frame)
	}
	for i, passes := range p.passes(t, to, frames...) {
		if passes != want {
			t.Errorf("%s: passes: %v", deeds[i].name, passes)
		}
	}
}

func TestPodFloodsTheBridgesTable(t *testing.T) {
	for _, c := range []struct {
		name     string
		spoofing Spoofing
		then     string
		floods   bool
	}{
		{name: "denied"},
		{name: "denied by the port alone", then: "nft delete table bridge tweed"},
		{name: "allowed", spoofing: Spoofing{All: true}, floods: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, subnet4)
			n.info.Spoofing = c.spoofing
			n.publish(n.info)
			p, to := n.attached("p"), n.attached("to")
			if c.then != "" {
				n.Run(t, c.then)
			}
			var frames [][]byte
			for i := range 200 {
				frames = append(frames, ether2(to.mac, backend.MAC{0x02, 0, 0, 0, 1, byte(i)}, unix.ETH_P_IP,
					packet4(p.ip4, to.ip4, udp4(9, 9, "flood"))))
			}
			p.passes(t, to, frames...)
			if n := strings.Count(n.Run(t, "bridge fdb show br tweed0"), "02:00:00:00:01:"); n > 0 != c.floods {
				t.Errorf("the bridge knows %d made up addresses", n)
			}
		})
	}
}

// One that may send as anybody draws no frames for others to itself.
func TestExemptPodTakesAnothersPlace(t *testing.T) {
	n := newNode(t, subnet4)
	n.info.Spoofing = Spoofing{Namespaces: []string{"lab"}}
	n.publish(n.info)
	p, to, third := n.attached("p", [2]string{"K8S_POD_NAMESPACE", "lab"}), n.attached("to"), n.attached("third")
	p.passes(t, to, ether2(to.mac, third.mac, unix.ETH_P_IP, packet4(third.ip4, to.ip4, udp4(9, 9, "mine"))))
	frame := ether2(third.mac, to.mac, unix.ETH_P_IP, packet4(to.ip4, third.ip4, udp4(9, 9, "for third")))
	if !to.passes(t, third, frame)[0] {
		t.Error("what is for a pod does not get there")
	}
	if fdb := n.Run(t, "bridge fdb show br tweed0"); !strings.Contains(fdb, third.mac.String()+" dev "+third.veth) {
		t.Errorf("the pod is elsewhere now:\n%s", fdb)
	}
}

// What nftables knows of a pod goes with it, however it goes, and not with another.
func TestNftablesRemembersAPod(t *testing.T) {
	for _, c := range []struct{ name, before string }{
		{"DEL", "true"},
		{"DEL without the veth", "ip link del " + vethName("one", "eth0")},
		{"DEL without the bridge", "ip link del tweed0"},
		{"DEL of one that is no port", "ip link set " + vethName("one", "eth0") + " nomaster"},
		{"DEL without the table", "nft delete table bridge tweed"},
		{"DEL of one that nftables does not know", "nft flush set bridge tweed ipv6"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			pod := netnstest.New(t)
			n.mustAdd("other", netnstest.New(t))
			n.mustAdd("one", pod)
			n.Run(t, c.before)
			if err := n.del("one", pod.Path()); err != nil {
				t.Error(err)
			}
			left, _ := n.Try(t, "nft list table bridge tweed")
			whole := strings.Contains(left, vethName("other", "eth0")) || strings.Contains(c.before, "nft")
			if knows := strings.Contains(left, vethName("one", "eth0")); knows && !strings.Contains(c.before, "nft") || !whole {
				t.Errorf("after DEL: %s", left)
			}
		})
	}
	t.Run("sweep", func(t *testing.T) {
		n := newNode(t, subnet4)
		n.mustAdd("one", netnstest.New(t))
		n.Run(t, "ip link del "+vethName("one", "eth0"))
		if err := n.sweep(""); err != nil {
			t.Error(err)
		}
		if left := n.Run(t, "nft list table bridge tweed"); strings.Contains(left, vethName("one", "eth0")) {
			t.Errorf("after the sweep: %s", left)
		}
	})
}

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// seenPort is where each host of these tests tells callers, by TCP and UDP, which address it sees them with.
const seenPort = 7007

// tells starts to do so, until the test ends.
func (h host) tells() {
	h.t.Helper()
	var l net.Listener
	var u *net.UDPConn
	var err error
	h.Do(h.t, func() {
		if l, err = net.Listen("tcp", fmt.Sprintf(":%d", seenPort)); err == nil {
			u, err = net.ListenUDP("udp", &net.UDPAddr{Port: seenPort})
		}
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { l.Close(); u.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, addrOf(c.RemoteAddr())) // the caller misses what is not written
			c.Close()
		}
	}()
	go func() {
		buf := make([]byte, 1)
		for {
			_, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort([]byte(from.Addr().Unmap().String()), from)
		}
	}()
}

func addrOf(a net.Addr) string { return netip.MustParseAddrPort(a.String()).Addr().Unmap().String() }

// asks calls an address by tcp or udp and returns what it is told; of an answer that does not come, the reason.
func (h host) asks(network, addr string, port int) (seen string) {
	h.Do(h.t, func() {
		d := net.Dialer{Timeout: time.Second}
		c, err := d.DialContext(context.Background(), network, net.JoinHostPort(addr, strconv.Itoa(port)))
		if err != nil {
			seen = err.Error()
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		buf := make([]byte, 100)
		n := 0
		if _, err = c.Write([]byte("?")); err == nil {
			n, err = c.Read(buf)
		}
		if seen = string(buf[:n]); err != nil {
			seen = err.Error()
		}
	})
	return seen
}

// isSeen has a host call another by TCP and UDP until it is seen with an address.
func (h host) isSeen(as, addr string, port int) {
	h.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		seen := ""
		for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline) && seen != as; {
			seen = h.asks(network, addr, port)
		}
		if seen != as {
			h.t.Errorf("%s: a caller of %s is seen as %q, want %q", network, addr, seen, as)
		}
	}
}

// nodeAddrs are those of node n.
func nodeAddrs(n int) []string {
	if n == 3 {
		return []string{"198.51.100.13", "2001:db8:1::13"}
	}
	return []string{fmt.Sprintf("192.0.2.1%d", n), fmt.Sprintf("2001:db8::1%d", n)}
}

// strict has nodes check strictly, on every interface that there is or will be.
func (c *threeNodes) strict() {
	for n := 1; n <= 3; n++ {
		c.nodes[n].types("sysctl -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1")
	}
}

// tell has nodes and pods tell callers how they are seen.
func (c *threeNodes) tell() {
	for n := 1; n <= 3; n++ {
		c.nodes[n].tells()
		if c.pods[n].NS != nil {
			c.pods[n].tells()
		}
	}
	c.router.tells()
}

// asThemselves checks that node a and a pod of b see each other with their own addresses, and the pod of a and node b.
func (c *threeNodes) asThemselves(a, b int) {
	c.router.t.Helper()
	for i := range 2 {
		c.nodes[a].isSeen(nodeAddrs(a)[i], podAddrs(b)[i], seenPort)
		c.pods[b].isSeen(podAddrs(b)[i], nodeAddrs(a)[i], seenPort)
	}
}

// ways are all that leads from node to node, in each form of the packet filter.
func ways() (all []string) {
	for _, form := range []string{"iptables", "nftables"} {
		for _, backend := range []string{`{}`, `{"DirectRouting": true}`, `{"Type": "host-gw"}`} {
			all = append(all, fmt.Sprintf(`%s, "PacketFilter": %q`, backend, form))
		}
	}
	return all
}

// Each way round, by each way, with nodes that check strictly where packets come from.
func TestNodeAndPodSeeSomebodyElse(t *testing.T) {
	for _, way := range ways() {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.strict()
			c.run(way)
			c.tell()
			pairs := [][2]int{{1, 2}, {2, 1}}
			if !strings.Contains(way, "host-gw") {
				pairs = append(pairs, [][2]int{{1, 3}, {3, 1}, {2, 3}, {3, 2}}...)
			}
			for n := 1; n <= 3; n++ {
				c.nodes[n].counting()
			}
			for _, p := range append(pairs, [][2]int{{1, 1}, {2, 2}, {3, 3}}...) {
				c.asThemselves(p[0], p[1])
			}
			for n := 1; n <= 3; n++ {
				// A cloud would not let them pass.
				if _, plain4, plain6 := c.nodes[n].counted(); plain4+plain6 > 0 && strings.HasPrefix(way, "{}") {
					t.Errorf("n%d is sent %d and %d packets of pods past the tunnel", n, plain4, plain6)
				}
			}
			// What is no node of the cluster, and knows nothing of pods, sees the node.
			for i, addr := range []string{"192.0.2.1", "2001:db8::1"} {
				c.pods[1].isSeen(nodeAddrs(1)[i], addr, seenPort)
			}
		})
	}
}

// serve does on a node what kube-proxy does for a service with one pod: its own calls to the cluster's address, and
// everybody's to the node's port 30000 with the traffic policy Cluster, are masqueraded; those to port 30001, with the
// policy Local, are not.
func (c *threeNodes) serve(node, pod int) {
	for i, iptables := range []string{"iptables -t nat", "ip6tables -t nat"} {
		dst, vip := fmt.Sprintf(podAddrsForm[i], pod), []string{"10.96.0.10", "fd00:96::a"}[i]
		c.nodes[node].types(strings.NewReplacer("X", iptables, "DST", dst, "VIP", vip).Replace(`
			X -N SVC
			X -A SVC -p tcp -j DNAT --to-destination DST
			X -A SVC -p udp -j DNAT --to-destination DST
			X -A OUTPUT -d VIP -j MARK --set-xmark 0x4000/0x4000
			X -A OUTPUT -d VIP -j SVC
			X -A PREROUTING -d VIP -j SVC
			X -N MARKED
			X -A MARKED -j MARK --set-xmark 0x4000/0x4000
			X -A MARKED -j SVC
			X -A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 30000 -j MARKED
			X -A PREROUTING -m addrtype --dst-type LOCAL -p udp --dport 30000 -j MARKED
			X -A OUTPUT -m addrtype --dst-type LOCAL -p tcp --dport 30000 -j MARKED
			X -A OUTPUT -m addrtype --dst-type LOCAL -p udp --dport 30000 -j MARKED
			X -A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 30001 -j SVC
			X -A PREROUTING -m addrtype --dst-type LOCAL -p udp --dport 30001 -j SVC
			X -I POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully`))
	}
}

var podAddrsForm = []string{fmt.Sprintf("10.244.%%d.5:%d", seenPort), fmt.Sprintf("[fd00:10:244:%%d::5]:%d", seenPort)}

// A service is called as kube-proxy has it: who is masqueraded is seen with a node's address, not with one of its
// tunnel, and who is not with its own.
func TestServiceSeesTheTunnelsAddress(t *testing.T) {
	for _, way := range ways() {
		if strings.Contains(way, "host-gw") {
			continue
		}
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.strict()
			c.run(way)
			c.tell()
			c.reaches(1, 3)
			c.reaches(2, 1)
			c.serve(1, 3)
			c.serve(2, 2)
			c.serve(3, 3)
			for i, vip := range []string{"10.96.0.10", "fd00:96::a"} {
				c.nodes[1].isSeen(nodeAddrs(1)[i], vip, seenPort)
				c.pods[1].isSeen(podAddrs(1)[i], vip, seenPort)
				c.nodes[1].isSeen(nodeAddrs(1)[i], nodeAddrs(1)[i], 30000)
				c.nodes[3].isSeen(nodeAddrs(1)[i], nodeAddrs(1)[i], 30000)
				c.router.isSeen(nodeAddrs(1)[i], nodeAddrs(1)[i], 30000)
				// To a pod on the node that is called, whoever calls. A node calls past the tunnel, and is answered past it.
				c.nodes[1].isSeen(nodeAddrs(1)[i], nodeAddrs(2)[i], 30001)
				c.nodes[2].isSeen(nodeAddrs(2)[i], nodeAddrs(3)[i], 30001)
				c.nodes[3].isSeen(nodeAddrs(3)[i], nodeAddrs(2)[i], 30001)
				c.pods[3].isSeen(podAddrs(3)[i], nodeAddrs(2)[i], 30001)
			}
			c.router.isSeen("192.0.2.1", nodeAddrs(2)[0], 30001)
			c.router.isSeen("2001:db8::1", nodeAddrs(2)[1], 30001)
		})
	}
}

// old makes n3 a node of an older version, by hand: its own packets in the tunnel have an address of its subnet, and its
// pods answer other nodes past it. Its file does not say what is inside.
func (c *threeNodes) old() {
	n3 := c.nodes[3]
	n3.types(`
		sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip link add tweed0 type bridge
		ip link set tweed0 up
		ip addr add 10.244.3.1/24 dev tweed0
		ip addr add fd00:10:244:3::1/64 dev tweed0 nodad
		ip link add tweed.1 address 0e:00:00:00:00:03 mtu 1450 type vxlan id 1 dstport 8472 local 198.51.100.13 nolearning
		ip link set tweed.1 up
		ip addr add 10.244.3.0/32 dev tweed.1
		ip addr add fd00:10:244:3::2/128 dev tweed.1 nodad
		iptables -t nat -A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN
		iptables -t nat -A POSTROUTING -s 10.244.3.0/24 -j MASQUERADE
		iptables -t nat -A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.3.0/24 -j RETURN
		iptables -t nat -A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE
		ip6tables -t nat -A POSTROUTING -s fd00:10:244::/48 -d fd00:10:244::/48 -j RETURN
		ip6tables -t nat -A POSTROUTING -s fd00:10:244:3::/64 -j MASQUERADE
		ip6tables -t nat -A POSTROUTING ! -s fd00:10:244::/48 -d fd00:10:244:3::/64 -j RETURN
		ip6tables -t nat -A POSTROUTING ! -s fd00:10:244::/48 -d fd00:10:244::/48 -j MASQUERADE`)
	for n := 1; n <= 2; n++ {
		mac := strings.Fields(c.nodes[n].Run(c.router.t, "ip -brief link show dev tweed.1"))[2]
		link := strings.Fields(c.nodes[n].Run(c.router.t, "ip -6 -brief addr show dev tweed.1 scope link"))[2]
		n3.types(strings.NewReplacer("MAC", mac, "LINK", strings.TrimSuffix(link, "/64"), "#", strconv.Itoa(n)).Replace(`
			ip neigh replace 10.244.#.0 lladdr MAC dev tweed.1 nud permanent
			ip neigh replace LINK lladdr MAC dev tweed.1 nud permanent
			bridge fdb replace MAC dev tweed.1 dst 192.0.2.1# self permanent
			ip route add 10.244.#.0/24 via 10.244.#.0 dev tweed.1 onlink
			ip -6 route add fd00:10:244:#::/64 via LINK dev tweed.1`))
	}
	c.record()
	c.pods[3] = pod(n3, 3)
}

func (c *threeNodes) record() {
	c.router.t.Helper()
	err := os.WriteFile(filepath.Join(c.leases, "n3.json"), []byte(`{"node":"n3","since":"2026-01-02T03:04:03Z",
		"subnets":"10.244.3.0/24,fd00:10:244:3::/64","host":"198.51.100.13,2001:db8:1::13","backend":"vxlan",
		"backend-data":{"vni":1,"port":8472,"mac":"0e:00:00:00:00:03"}}`), 0o644)
	if err != nil {
		c.router.t.Fatal(err)
	}
}

// runTwo starts the daemons of n1 and n2 alone.
func (c *threeNodes) runTwo(backend string) {
	for n := 1; n <= 2; n++ {
		daemon(c.nodes[n], c.leases, n, fmt.Sprintf(`{
			"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": %s}`, backend))
		c.pods[n] = pod(c.nodes[n], n)
	}
}

// towardOld are the addresses that an older node sees node n with: of n's subnet, which it answers through the tunnel.
func towardOld(n int) []string {
	return []string{fmt.Sprintf("10.244.%d.1", n), fmt.Sprintf("fd00:10:244:%d::1", n)}
}

// Whoever runs an older version is reached as before, by pods, by nodes and by what kube-proxy masquerades, although its
// host drops what the tunnel brings from an address that it would not answer there. What is masqueraded by IPv6 it answers
// past the tunnel: the kernel does not check IPv6.
func TestPeerOfAnOlderVersionIsOutOfReach(t *testing.T) {
	for _, form := range []string{"iptables", "nftables"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.strict()
			c.runTwo(fmt.Sprintf(`{}, "PacketFilter": %q`, form))
			c.old()
			c.tell()
			c.reaches(1, 3)
			c.serve(1, 3)
			masqueraded := []string{towardOld(1)[0], nodeAddrs(1)[1]}
			for i, vip := range []string{"10.96.0.10", "fd00:96::a"} {
				c.nodes[1].isSeen(towardOld(1)[i], podAddrs(3)[i], seenPort)
				c.nodes[1].isSeen(masqueraded[i], vip, seenPort)
				c.router.isSeen(masqueraded[i], nodeAddrs(1)[i], 30000)
				c.nodes[3].isSeen([]string{"10.244.3.0", "fd00:10:244:3::2"}[i], podAddrs(1)[i], seenPort)
				c.pods[1].isSeen(nodeAddrs(1)[i], nodeAddrs(3)[i], seenPort)
				c.pods[3].isSeen(nodeAddrs(3)[i], nodeAddrs(1)[i], seenPort)
				c.pods[3].isSeen(podAddrs(3)[i], towardOld(1)[i], seenPort)
			}
		})
	}
}

// One node that says nothing of what is inside, be it of an older version or a thief's, comes and goes. How nodes and
// services are seen by everybody else's pods is none of its business, and no call of theirs is missed.
func TestOlderPeerChangesHowOthersAreSeen(t *testing.T) {
	for _, form := range []string{"iptables", "nftables"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.strict()
			c.runTwo(fmt.Sprintf(`{}, "PacketFilter": %q`, form))
			c.tell()
			c.reaches(1, 2)
			c.serve(1, 2)
			pings := c.pings(1, 2)
			c.allAnswered(pings)
			for range 2 {
				c.record()
				for n := 1; n <= 2; n++ {
					c.nodes[n].awaitShows("ip route show proto 116", "10.244.3.0/24 ")
					c.nodes[n].awaitShows("ip -6 route show proto 116", "fd00:10:244:3::/64 ")
				}
				c.asThemselves(1, 2)
				c.asThemselves(2, 1)
				c.nodes[1].types("ip addr del 192.0.2.11/32 dev tweed.1") // what comes again is the last of its addresses
				for i, vip := range []string{"10.96.0.10", "fd00:96::a"} {
					c.nodes[1].isSeen(nodeAddrs(1)[i], vip, seenPort)
					c.router.isSeen(nodeAddrs(1)[i], nodeAddrs(1)[i], 30000)
				}
				if err := os.Remove(filepath.Join(c.leases, "n3.json")); err != nil {
					t.Fatal(err)
				}
				if t.Failed() {
					return // what else fails would each take its time
				}
				for n := 1; n <= 2; n++ {
					c.nodes[n].awaitNot("ip route show proto 116", "10.244.3.0/24 ")
				}
			}
			if lost := c.lost(pings); lost > every { // the last may have been under way
				t.Errorf("calls are unanswered for %v", lost)
			}
		})
	}
}

// The copy of a node's address on the tunnel follows it, and does not keep alive what the uplink has lost: the host would
// go on to answer others who ask for it.
func TestNodeAnswersForAnAddressThatItHasLost(t *testing.T) {
	c := newThreeNodes(t)
	c.runTwo(`{}`)
	const show = "ip addr show dev tweed.1"
	for _, want := range []string{"inet 192.0.2.11/32 ", "inet6 2001:db8::11/128 "} {
		c.nodes[1].awaitShows(show, want)
	}
	c.nodes[1].types("ip addr flush dev eth0 scope global")
	for _, want := range []string{"inet 10.244.1.0/32 ", "inet6 fd00:10:244:1::2/128 "} {
		c.nodes[1].awaitShows(show, want)
	}
	if out := c.nodes[1].Run(t, "ip addr"); strings.Contains(out, "192.0.2.11") || strings.Contains(out, "2001:db8::11") {
		t.Errorf("n1 still has an address that its uplink has lost:\n%s", out)
	}
	c.nodes[1].types(`
		ip addr add 192.0.2.201/24 dev eth0
		ip addr add 2001:db8::201/64 dev eth0 nodad`)
	for _, want := range []string{"inet 192.0.2.201/32 ", "inet6 2001:db8::201/128 "} {
		c.nodes[1].awaitShows(show, want)
	}
}

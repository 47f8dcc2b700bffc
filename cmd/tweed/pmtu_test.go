package main

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"testing"
	"time"
)

// carries has a host send a megabyte to another by TCP.
func (h host) carries(what string, to host, addr string) {
	h.t.Helper()
	const size = 1 << 20
	var l *net.TCPListener
	var out net.Conn
	var err error
	to.Do(to.t, func() { l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(addr)}) })
	if err == nil {
		defer l.Close()
		h.Do(h.t, func() { out, err = net.DialTimeout("tcp", l.Addr().String(), carryTime) })
	}
	if err != nil {
		h.t.Errorf("%s, to %s: %v", what, addr, err)
		return
	}
	deadline := time.Now().Add(carryTime)
	_ = out.SetDeadline(deadline)
	go func() {
		_, _ = out.Write(make([]byte, size)) // the other end misses what is not written
		out.Close()
	}()
	_ = l.SetDeadline(deadline)
	in, err := l.Accept()
	n := int64(0)
	if err == nil {
		defer in.Close()
		_ = in.SetDeadline(deadline)
		n, err = io.Copy(io.Discard, in)
	}
	if err != nil || n != size {
		h.t.Errorf("%s: of %d bytes to %s %d have arrived: %v", what, size, addr, n, err)
	}
}

// carryTime is how long that may take.
const carryTime = 15 * time.Second

// carry has pods and nodes of n1 and n3 send to each other.
func (c *threeNodes) carry() {
	for _, way := range [][2]int{{1, 3}, {3, 1}} {
		a, b := way[0], way[1]
		for i := range 2 {
			c.pods[a].carries("pod to pod", c.pods[b], podAddrs(b)[i])
			c.pods[a].carries("pod to node", c.nodes[b], nodeAddrs(b)[i])
			c.nodes[a].carries("node to pod", c.pods[b], podAddrs(b)[i])
		}
	}
}

// told waits until a host that sends packets of 1,408 bytes and more to another learns how much there is room for.
func (h host) told(mtu int, addr string) {
	h.t.Helper()
	says := regexp.MustCompile(fmt.Sprintf(`mtu ?[=:] ?%d\b`, mtu))
	out := ""
	for deadline := time.Now().Add(2 * carryTime); time.Now().Before(deadline); {
		if out, _ = h.Try(h.t, "ping -M do -c 1 -W 1 -s 1380 "+addr); says.MatchString(out) {
			return
		}
	}
	h.t.Errorf("who sends to %s is not told of an MTU of %d:\n%s", addr, mtu, out)
}

// headers are what the tunnel adds to a packet, in bytes, by the family that it goes by.
func headers() map[string]int { return map[string]int{"ipv4": 50, "ipv6": 70} }

func (c *threeNodes) runOver(underlay string) {
	c.runAs(confOf(fmt.Sprintf(`"Underlay": %q, "Backend": {}`, underlay)))
	c.reaches(1, 3)
}

// Somewhere on the way between two nodes there is less room than at both ends. By IPv4 routers cut the tunnel's packets
// into pieces, by IPv6 they do not, and senders have to learn of it.
func TestNarrowWayBetweenNodes(t *testing.T) {
	t.Parallel()
	for underlay, header := range headers() {
		t.Run(underlay, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.strict()
			c.runOver(underlay)
			c.router.types(`
				ip route replace 198.51.100.13/32 dev n3 mtu lock 1400
				ip route replace 192.0.2.11/32 dev lan mtu lock 1400
				ip -6 route replace 2001:db8:1::13/128 dev n3 mtu lock 1400
				ip -6 route replace 2001:db8::11/128 dev lan mtu lock 1400`)
			c.carry()
			for i := range 2 {
				if underlay == "ipv6" {
					c.pods[1].told(1400-header, podAddrs(3)[i])
					c.nodes[1].told(1400-header, podAddrs(3)[i])
				}
			}
		})
	}
}

// One node's interface, and so its pods', carries less than those of the others.
func TestNodeIsNarrowerThanOthers(t *testing.T) {
	t.Parallel()
	for underlay, header := range headers() {
		t.Run(underlay, func(t *testing.T) {
			t.Parallel()
			c := newThreeNodes(t)
			c.strict()
			c.nodes[3].types("ip link set eth0 mtu 1400")
			c.router.types("ip link set n3 mtu 1400")
			c.runOver(underlay)
			for i := range 2 {
				c.pods[1].told(1400-header, podAddrs(3)[i])
				c.nodes[1].told(1400-header, podAddrs(3)[i])
			}
			c.carry()
		})
	}
}

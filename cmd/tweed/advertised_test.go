package main

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// An advertiser is a router as far as it tells that it is one (RFC 4861, section 4.2).
type advertiser struct {
	host
	socket int
	index  int
}

// newAdvertiser makes a router with a cable to dev of the host.
func newAdvertiser(h host, dev string) *advertiser {
	h.t.Helper()
	a := &advertiser{host: newHost(h.t)}
	cable(h, dev, a.host, "inside")
	a.types(`
		sysctl -w net.ipv6.conf.inside.accept_dad=0 net.ipv6.conf.all.forwarding=1
		ip link set inside up`)
	h.types(`
		sysctl -w net.ipv6.conf.` + dev + `.accept_dad=0
		ip link set ` + dev + ` up`)
	var err error
	a.Do(h.t, func() {
		var inside *net.Interface
		if inside, err = net.InterfaceByName("inside"); err != nil {
			return
		}
		a.index = inside.Index
		a.socket, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { unix.Close(a.socket) })
	for option, value := range map[int]int{unix.IPV6_MULTICAST_IF: a.index, unix.IPV6_MULTICAST_HOPS: 255} {
		if err := unix.SetsockoptInt(a.socket, unix.IPPROTO_IPV6, option, value); err != nil {
			h.t.Fatal(err)
		}
	}
	return a
}

// advertise sends one advertisement to all on the link: a default router for so long, and the prefix for addresses. The
// kernel fills in the checksum.
func (a *advertiser) advertise(lifetime time.Duration, prefix netip.Prefix) error {
	b := []byte{134, 0, 0, 0, 64, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(lifetime.Seconds()))
	b = append(b, make([]byte, 8)...) // reachable and retransmission time: as it was
	const onLinkAutonomous, hour = 0xc0, 3600
	b = append(b, 3, 4, byte(prefix.Bits()), onLinkAutonomous) // RFC 4861, section 4.6.2
	b = binary.BigEndian.AppendUint32(b, hour)
	b = binary.BigEndian.AppendUint32(b, hour)
	b = append(b, 0, 0, 0, 0)
	b = append(b, prefix.Addr().AsSlice()...)
	to := &unix.SockaddrInet6{Addr: netip.IPv6LinkLocalAllNodes().As16(), ZoneId: uint32(a.index)}
	return unix.Sendto(a.socket, b, 0, to)
}

// until advertises again and again until a command on a host prints, or does not print, a text.
func (a *advertiser) until(lifetime time.Duration, h host, command, want string, there bool) {
	h.t.Helper()
	var err error
	out := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		err = a.advertise(lifetime, netip.MustParsePrefix("2001:db8::/64"))
		if out = h.Run(h.t, command); strings.Contains(out, want) == there {
			return
		}
	}
	h.t.Fatalf("with a router for %v (%v), after 30 s %s prints\n%s", lifetime, err, command, out)
}

// A node that has its address and its default route from a router's advertisements forwards from the daemon's start on,
// and a host that forwards does not believe advertisements, unless told to.
func TestDefaultRouteByAdvertisementIsLost(t *testing.T) {
	node := newHost(t)
	router := newAdvertiser(node, "eth0")
	const routes, advertised = "ip -6 route show default", "proto ra"
	router.until(time.Hour, node, routes, advertised, true)
	router.until(time.Hour, node, "ip -6 addr show dev eth0 -tentative", "inet6 2001:db8::", true)

	daemon(node, t.TempDir(), 1, underlay{family: "ipv6"}.conf())
	node.shows("sysctl net.ipv6.conf.eth0.forwarding", "= 1")
	node.shows(routes, advertised)
	node.shows("ip -d link show tweed.1", "dev eth0")

	// What the router says from now on is heard as well: that it is none any more, and that it is one again.
	router.until(0, node, routes, advertised, false)
	router.until(time.Hour, node, routes, advertised, true)
}

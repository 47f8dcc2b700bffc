package podnet

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
)

// An identity is what a pod has on its interface.
type identity struct {
	veth       string
	mac        backend.MAC
	ip4, ip6   netip.Addr
	namespace  *netnstest.NS
	raw, index int // a packet socket (packet(7)) on the interface
}

// attached is a pod with its interface open for raw frames.
func (n *node) attached(container string, args ...[2]string) identity {
	n.t.Helper()
	p := identity{namespace: netnstest.New(n.t), veth: vethName(container, "eth0")}
	rt := runtimeConf(container, p.namespace.Path())
	rt.Args = args
	r, err := n.addAs(rt, n.conflist("1.1.0"))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, ip := range r.IPs {
		if a, _ := netip.AddrFromSlice(ip.Address.IP); a.Unmap().Is4() {
			p.ip4 = a.Unmap()
		} else {
			p.ip6 = a
		}
	}
	if p.mac, err = backend.ParseMAC(r.Interfaces[1].Mac); err != nil {
		n.t.Fatal(err)
	}
	p.namespace.Do(n.t, func() {
		var link *net.Interface
		if link, err = net.InterfaceByName("eth0"); err != nil {
			return
		}
		p.index = link.Index
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8
		if p.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err == nil {
			err = unix.Bind(p.raw, &unix.SockaddrLinklayer{Ifindex: p.index, Protocol: all})
		}
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { unix.Close(p.raw) })
	timeout := unix.Timeval{Sec: 20}
	if err := unix.SetsockoptTimeval(p.raw, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		n.t.Fatal(err)
	}
	return p
}

// send puts frames on the wire. They get to another pod in their order.
func (p identity) send(t testing.TB, frames ...[]byte) {
	t.Helper()
	var err error
	p.namespace.Do(t, func() { // on one thread, and one processor, which hands them on by one queue
		var one unix.CPUSet
		one.Set(0)
		_ = unix.SchedSetaffinity(0, &one)
		for _, f := range frames {
			if err == nil {
				err = unix.Sendto(p.raw, f, 0, &unix.SockaddrLinklayer{Ifindex: p.index})
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// until receives frames up to the one that is last, and tells which of some were among them.
func (p identity) until(t testing.TB, last []byte, some ...[]byte) []bool {
	t.Helper()
	got := make([]bool, len(some))
	buf := make([]byte, 4096)
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(p.raw, buf, 0)
		if err != nil {
			t.Fatalf("waiting for the frame that is sent last: %v", err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if bytes.Equal(buf[:n], last) {
			return got
		}
		if i := slices.IndexFunc(some, func(f []byte) bool { return bytes.Equal(untagged(f), buf[:n]) }); i >= 0 {
			got[i] = true
		}
	}
	t.Fatal("the frame that is sent last never came")
	return nil
}

// untagged is a frame as a packet socket has it: without its first VLAN tag, which is told beside it.
func untagged(frame []byte) []byte {
	if binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_8021Q {
		return slices.Concat(frame[:12], frame[16:])
	}
	return frame
}

// passes sends frames, and tells which of them another pod gets.
func (p identity) passes(t testing.TB, to identity, frames ...[]byte) []bool {
	t.Helper()
	last := ether2(to.mac, p.mac, unix.ETH_P_IP, packet4(p.ip4, to.ip4, udp4(1, 2, strconv.FormatInt(time.Now().UnixNano(), 10))))
	p.send(t, append(slices.Clone(frames), last)...)
	return to.until(t, last, frames...)
}

func everybody() backend.MAC { return backend.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }

func multicastMAC(to netip.Addr) backend.MAC {
	b := to.As16()
	return backend.MAC{0x33, 0x33, b[12], b[13], b[14], b[15]}
}

func ether2(to, from backend.MAC, protocol uint16, payload []byte) []byte {
	f := binary.BigEndian.AppendUint16(slices.Concat(to[:], from[:]), protocol)
	return append(f, payload...) // unpadded, for br_netfilter cuts off what is not IP
}

// arp is a packet as of RFC 826.
func arp(op uint16, fromMAC backend.MAC, from netip.Addr, toMAC backend.MAC, to netip.Addr) []byte {
	p := []byte{0, 1, 8, 0, 6, 4}
	p = binary.BigEndian.AppendUint16(p, op)
	return slices.Concat(p, fromMAC[:], from.AsSlice(), toMAC[:], to.AsSlice())
}

func checksum(b []byte, start uint32) uint16 {
	sum := start
	for i := 0; i < len(b); i += 2 {
		if sum += uint32(b[i]) << 8; i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func packet4(from, to netip.Addr, udp []byte) []byte {
	h := []byte{0x45, 0}
	h = binary.BigEndian.AppendUint16(h, uint16(20+len(udp)))
	h = append(h, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	h = slices.Concat(h, from.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h, 0))
	return append(h, udp...)
}

// udp4 has no checksum, which IPv4 allows.
func udp4(from, to uint16, text string) []byte {
	d := binary.BigEndian.AppendUint16(nil, from)
	d = binary.BigEndian.AppendUint16(d, to)
	d = binary.BigEndian.AppendUint16(d, uint16(8+len(text)))
	return append(append(d, 0, 0), text...)
}

func packet6(from, to netip.Addr, next byte, hops byte, payload []byte) []byte {
	h := []byte{0x60, 0, 0, 0}
	h = binary.BigEndian.AppendUint16(h, uint16(len(payload)))
	h = slices.Concat(append(h, next, hops), from.AsSlice(), to.AsSlice())
	at := map[byte]int{unix.IPPROTO_UDP: 6, unix.IPPROTO_ICMPV6: 2}[next]
	pseudo := binary.BigEndian.AppendUint32(slices.Concat(from.AsSlice(), to.AsSlice()), uint32(len(payload)))
	pseudo = append(pseudo, 0, 0, 0, next)
	payload = slices.Clone(payload)
	binary.BigEndian.PutUint16(payload[at:], checksum(append(pseudo, payload...), 0))
	return append(h, payload...)
}

// nd is a message of neighbour discovery (RFC 4861, section 4) about a target, with one option that holds a MAC.
func nd(typ byte, flags uint32, target netip.Addr, option byte, mac backend.MAC) []byte {
	m := binary.BigEndian.AppendUint32([]byte{typ, 0, 0, 0}, flags)
	m = append(m, target.AsSlice()...)
	if option == 0 {
		return m
	}
	return append(append(m, option, 1), mac[:]...)
}

package probe

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A Tunneled is a VXLAN packet (RFC 7348) seen on the underlay.
type Tunneled struct {
	From, To           netip.Addr // of the outer packet
	Port               uint16     // UDP destination
	VNI                uint32
	InnerFrom, InnerTo netip.Addr
	Length             int // of the outer IP packet, bytes
	Fragment           bool
}

// A Capture sees every packet that an interface sends or receives.
type Capture struct {
	fd int
}

// StartCapture begins to look at an interface.
func StartCapture(in Place, device string) (*Capture, error) {
	c := &Capture{fd: -1}
	const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // htons
	err := in.Do(func() error {
		iface, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: iface.Index})
	})
	if err == nil {
		err = unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	}
	if err != nil {
		if c.fd >= 0 {
			unix.Close(c.fd)
		}
		return nil, fmt.Errorf("capturing on %s: %w", device, err)
	}
	return c, nil
}

// Stop reads everything that was seen until then and ends the capture.
func (c *Capture) Stop() ([]Tunneled, error) {
	defer unix.Close(c.fd)
	var seen []Tunneled
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(c.fd, b, 0)
		switch err {
		case nil:
			if t, ok := parse(b[:n]); ok {
				seen = append(seen, t)
			}
		case unix.EINTR:
		case unix.EAGAIN: // silent for as long as SO_RCVTIMEO
			return seen, nil
		default:
			return nil, err
		}
	}
}

const udp, ipv6FragmentHeader = 17, 44

// ip reads one IP header.
func ip(b []byte) (from, to netip.Addr, protocol byte, fragment bool, payload []byte) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		from, to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		fragment = binary.BigEndian.Uint16(b[6:])&0x3fff != 0
		return from, to, b[9], fragment, b[min(len(b), int(b[0]&15)*4):]
	case len(b) >= 40 && b[0]>>4 == 6:
		from, to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		return from, to, b[6], b[6] == ipv6FragmentHeader, b[40:]
	}
	return from, to, 0, false, nil
}

func parse(b []byte) (t Tunneled, ok bool) {
	var protocol byte
	var payload []byte
	t.Length = len(b)
	t.From, t.To, protocol, t.Fragment, payload = ip(b)
	const udpHeader, vxlanHeader, ethernetHeader = 8, 8, 14
	if protocol != udp || len(payload) < udpHeader+vxlanHeader+ethernetHeader {
		return t, false
	}
	t.Port = binary.BigEndian.Uint16(payload[2:])
	vxlan := payload[udpHeader:]
	if vxlan[0] != 0x08 { // the I flag alone (RFC 7348 section 5)
		return t, false
	}
	t.VNI = binary.BigEndian.Uint32(vxlan[4:]) >> 8
	t.InnerFrom, t.InnerTo, _, _, _ = ip(vxlan[vxlanHeader+ethernetHeader:])
	return t, true
}

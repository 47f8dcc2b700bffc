package probe

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

const answerWithin = 5 * time.Second

// WhoAmI connects over TCP and returns the address that the other side sees.
func WhoAmI(from Place, to netip.Addr) (netip.Addr, error) {
	c, err := dial(from, "tcp", net.JoinHostPort(to.String(), whoPort), nil)
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		return netip.Addr{}, err
	}
	seen, err := netip.ParseAddrPort(string(b))
	return seen.Addr().Unmap(), err
}

// Ping sends one echo request and waits for its reply.
func Ping(from Place, to netip.Addr) error {
	network, protocol, request := "ip4:icmp", 1, icmp.Type(ipv4.ICMPTypeEcho)
	if to.Is6() {
		network, protocol, request = "ip6:ipv6-icmp", 58, ipv6.ICMPTypeEchoRequest
	}
	c, err := dial(from, network, to.String(), nil)
	if err != nil {
		return err
	}
	defer c.Close()
	echo := &icmp.Echo{ID: rand.IntN(1 << 16), Seq: 1, Data: []byte("tweed")}
	b, err := (&icmp.Message{Type: request, Body: echo}).Marshal(nil)
	if err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	return awaitReply(c.(*net.IPConn), protocol, echo)
}

func awaitReply(c *net.IPConn, protocol int, echo *icmp.Echo) error {
	b := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(b) // Read would leave the IPv4 header in
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(protocol, b[:n])
		if err != nil {
			return err
		}
		reply := m.Type == ipv4.ICMPTypeEchoReply || m.Type == ipv6.ICMPTypeEchoReply
		if body, ok := m.Body.(*icmp.Echo); ok && reply && body.ID == echo.ID {
			return nil
		}
	}
}

// Transfer sends size bytes over TCP and compares checksums of what was sent and what arrived.
func Transfer(from Place, to netip.Addr, size int64) error {
	c, err := dial(from, "tcp", net.JoinHostPort(to.String(), sinkPort), nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	sum := sha256.New()
	source := io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
	if _, err := io.Copy(io.MultiWriter(c, sum), source); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	arrived, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.Equal(arrived, sum.Sum(nil)) {
		return fmt.Errorf("sent %d bytes with SHA-256 %x; the other side has %x", size, sum.Sum(nil), arrived)
	}
	return nil
}

// Unfragmented sends one UDP packet of that size in bytes, IP header included, which nobody may fragment, and waits for
// it to come back. A packet that is too large for the first link gives EMSGSIZE.
func Unfragmented(from Place, to netip.Addr, size int) error {
	header, level, option, value := 28, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if to.Is6() {
		header, level, option, value = 48, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	}
	c, err := dial(from, "udp", net.JoinHostPort(to.String(), whoPort), func(fd int) error {
		return unix.SetsockoptInt(fd, level, option, value)
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, size-header)); err != nil {
		return err
	}
	n, err := c.Read(make([]byte, 1<<16))
	if err == nil && n != size-header {
		err = fmt.Errorf("sent %d bytes, %d came back", size-header, n)
	}
	return err
}

// dial opens a connection from inside a place, which fails if it stays silent for answerWithin.
func dial(from Place, network, address string, prepare func(fd int) error) (c net.Conn, err error) {
	d := net.Dialer{Timeout: answerWithin}
	if prepare != nil {
		d.Control = func(_, _ string, raw syscall.RawConn) (err error) {
			return errors.Join(raw.Control(func(fd uintptr) { err = prepare(int(fd)) }), err)
		}
	}
	err = from.Do(func() (err error) {
		c, err = d.Dial(network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(answerWithin))
}

package main

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/vxlan"
)

// nobody is a user without any rights.
const nobody = 65534

// forge sends one datagram, of bytes in hexadecimal, as a process of nobody's without any capability:
//
//	forge FROM TO BYTES
//
// FROM is an address of this host, or - for the one that routing chooses; TO has a port.
func forge() {
	if err := forgeTo(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func forgeTo(from, to, text string) error {
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(nobody, nobody, nobody),
		syscall.Setresuid(nobody, nobody, nobody)); err != nil {
		return fmt.Errorf("becoming nobody: %w", err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil || !strings.Contains(string(status), "CapEff:\t0000000000000000\n") {
		return fmt.Errorf("still has rights: %w\n%s", err, status)
	}
	datagram, err := hex.DecodeString(text)
	if err != nil {
		return err
	}
	var local *net.UDPAddr
	if from != "-" {
		local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))
	}
	c, err := net.DialUDP("udp", local, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write(datagram)
	return err
}

// A frame is what a node takes out of a datagram that looks like VXLAN, and hands to one of its pods.
type frame struct {
	node     string // whose VTEP it is for
	from, to string // IPv4 addresses of pods; the one is made up
	text     string // what the pod gets, at UDP port 5555
	size     int    // of the datagram at least, in bytes
}

// encapsulated returns the datagram (RFC 7348, section 5).
func (f frame) encapsulated() string {
	const headers = 20 + 8
	d := []byte{0x08, 0, 0, 0, 0, 0, 1, 0} // VNI 1
	mac := vxlan.MAC(f.node)
	d = append(d, mac[:]...)
	d = append(d, 0x02, 0, 0, 0, 0, 0x66, 0x08, 0x00) // from nobody's MAC, IPv4
	ip := []byte{0x45, 0}
	ip = binary.BigEndian.AppendUint16(ip, uint16(headers+len(f.text)))
	ip = append(ip, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	ip = append(ip, netip.MustParseAddr(f.from).AsSlice()...)
	ip = append(ip, netip.MustParseAddr(f.to).AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	d = append(d, ip...)
	for _, v := range []int{4444, 5555, 8 + len(f.text), 0} {
		d = binary.BigEndian.AppendUint16(d, uint16(v))
	}
	d = append(d, f.text...)
	if len(d) < f.size {
		d = append(d, make([]byte, f.size-len(d))...) // padding, as short frames have
	}
	return hex.EncodeToString(d)
}

// A victim is a pod that notes what it gets.
type victim struct {
	t    *testing.T
	conn *net.UDPConn
	got  map[string]bool
}

func newVictim(t *testing.T, pod host) *victim {
	t.Helper()
	v := &victim{t: t, got: map[string]bool{}}
	var err error
	pod.Do(t, func() { v.conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 5555}) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.conn.Close() })
	return v
}

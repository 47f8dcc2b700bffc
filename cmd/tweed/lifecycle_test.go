package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRestartWritesToTheKernel ends and starts the daemon of one of two nodes in each way that there is, while a pod of
// the one talks to a pod of the other. Nothing is lost, nothing is written where nothing has changed, and no process is
// started but the two that read the packet filter, if that is iptables'.
func TestRestartWritesToTheKernel(t *testing.T) {
	next := filepath.Join(t.TempDir(), "tweed")
	build := exec.Command("go", "build", "-ldflags", "-X main.version=next", "-o", next, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building tweed: %v\n%s", err, out)
	}
	for _, filter := range []string{"iptables", "nftables"} {
		for _, backend := range []string{"vxlan", "host-gw"} {
			t.Run(filter+" and "+backend, func(t *testing.T) {
				t.Parallel()
				newRestarted(t, filter, backend).isRestarted(next)
			})
		}
	}
}

// A restarted is a node whose daemon is ended and started again.
type restarted struct {
	*running
	filter string // the form of its packet filter
	leases string
	execs  string // the programs that were started
	talks  []traffic
}

// newRestarted has a pod on each of the two nodes talk to the other.
func newRestarted(t *testing.T, filter, backend string) *restarted {
	t.Helper()
	r, other := newPair(t, filter, backend)
	r.logged()
	r.start()
	one, two := pod(r.host, 1), pod(other, 2)
	reach(one, two)
	for r.Run(t, "ip -6 addr show tentative") != "" { // the kernel tells when it is through with its own addresses
	}
	for i := range 2 {
		r.talks = append(r.talks, startNumbered(one, two, podAddrs(2)[i]), startNumbered(two, one, podAddrs(1)[i]),
			startTransfer(one, two, podAddrs(2)[i]))
	}
	return r
}

// newPair makes a node whose daemon has not been started yet, and another whose has.
func newPair(t *testing.T, filter, backend string) (r *restarted, other host) {
	t.Helper()
	one, other, leases := newHost(t), newHost(t), t.TempDir()
	cable(one, "eth0", other, "eth0")
	for n, h := range []host{one, other} {
		h.types(fmt.Sprintf(`
			ip link set eth0 up
			ip addr add 192.0.2.1%[1]d/24 dev eth0
			ip addr add 2001:db8::1%[1]d/64 dev eth0 nodad`, n+1))
	}
	conf := fmt.Sprintf(`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",
		"PacketFilter": %q, "Backend": {"Type": %q}}`, filter, backend)
	daemon(other, leases, 2, conf, "--iface", "eth0")
	r = &restarted{
		running: newRunning(one, nil, "tweed", leases, 1, conf, "--iface", "eth0"), filter: filter, leases: leases,
	}
	r.env = []string{"PATH=" + r.dir + ":" + os.Getenv("PATH")}
	return r, other
}

func (r *restarted) write(name, text string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

// logged puts a program in front of each that a daemon could start and that has to do with a host's network, which logs
// that it was called.
func (r *restarted) logged() {
	r.t.Helper()
	r.execs = filepath.Join(r.dir, "execs")
	names := []string{"ip", "nft", "sysctl", "modprobe", "ipset", "bridge"}
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			names = append(names, name+variant, name+variant+"-save", name+variant+"-restore")
		}
	}
	for _, name := range names {
		if real, err := exec.LookPath(name); err == nil {
			r.write(name, fmt.Sprintf("#!/bin/sh\necho %s $* >> %s\nexec %s \"$@\"\n", name, r.execs, real))
		}
	}
	r.write("execs", "")
	// A kubelet's hint says which iptables is in use, so that nobody has to ask the program.
	r.types(`
		iptables-nft -t mangle -N KUBE-IPTABLES-HINT
		ip6tables-nft -t mangle -N KUBE-IPTABLES-HINT`)
}

// hadChildren reports whether a daemon that runs has ever waited for a process of its own: then there are page faults of
// theirs (proc_pid_stat(5), cminflt).
func (r *restarted) hadChildren() bool {
	r.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
	if err != nil {
		r.t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	return fields[8] != "0" // the 11th of all
}

// pacing is more than the time from one pass to the next, if something asks for it.
const pacing = 500 * time.Millisecond

func (r *restarted) isRestarted(next string) {
	t := r.t
	want := ""
	if r.filter == "iptables" {
		want = "iptables-nft-save\nip6tables-nft-save\n"
	}
	for _, step := range []struct {
		how     syscall.Signal
		program string
		version string
		watched time.Duration // behind the first pass
	}{
		{unix.SIGTERM, "tweed", "unreleased", 2 * time.Second},
		{unix.SIGKILL, "tweed", "unreleased", pacing},
		{unix.SIGTERM, next, "next", pacing},
	} {
		m := startMonitor(r.host)
		r.write("execs", "")
		r.end(step.how)
		r.program = step.program
		r.start()
		time.Sleep(step.watched) // for what may come then
		if heard := m.stop(); len(heard) > 0 {
			t.Errorf("after %v and a start of %s the kernel tells of\n%s", step.how, step.version, strings.Join(heard, "\n"))
		}
		r.shows("curl -s http://127.0.0.1:9479/report", fmt.Sprintf(`"version": %q`, step.version))
		execs, err := os.ReadFile(r.execs)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.ReplaceAll(string(execs), " \n", "\n"); got != want || r.hadChildren() != (want != "") {
			t.Errorf("after %v a start of %s has started %q, want %q; had children: %v", step.how, step.version, got, want,
				r.hadChildren())
		}
	}
	for _, talk := range r.talks {
		talk.end(t)
	}
	m := startMonitor(r.host)
	r.types(`
		ip route del 10.244.2.0/24
		nft add table ip theirs`)
	if heard := m.stop(); len(heard) < 3 { // of the route, of the table, and that a generation ends
		t.Errorf("of changes the monitor hears %q: the test proves nothing", heard)
	}
}

// TestLockOfIptablesIsHeldByAnother starts a daemon while another program changes iptables and comes to no end. Peers are
// reached all the same, those that are there and those that come.
func TestLockOfIptablesIsHeldByAnother(t *testing.T) {
	r, _ := newPair(t, "iptables", "vxlan")
	r.types(`
		iptables-legacy -t mangle -N KUBE-IPTABLES-HINT
		ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT`)
	lock, err := os.OpenFile("/run/xtables.lock", os.O_CREATE, 0o600)
	if err == nil {
		defer lock.Close()
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.launch()
	r.awaitShows("ip route", "10.244.2.0/24 via")
	r.awaitShows("curl -s http://127.0.0.1:9479/report", "another program holds the packet filter")
	third := strings.NewReplacer("n2", "n3", "10.244.2.", "10.244.3.", "244:2:", "244:3:", "02\"", "03\"", ".12", ".13")
	if err := os.WriteFile(filepath.Join(r.leases, "n3.json"), []byte(third.Replace(peerFile)), 0o644); err != nil {
		t.Fatal(err)
	}
	r.awaitShows("ip route", "10.244.3.0/24 via")
	if out, err := r.Try(t, "curl -sf http://127.0.0.1:9479/readyz"); err == nil {
		t.Errorf("ready without a packet filter: %s", out)
	}
	lock.Close()
	r.await("curl -sf http://127.0.0.1:9479/readyz")
	r.shows("iptables-legacy -S FORWARD", "-j TWEED-FWD")
}

// A monitor hears what the kernel tells of changes of a host's network.
type monitor struct {
	t       *testing.T
	sockets []int
	heard   []string
	tunnel  int32 // index of the VXLAN device
}

func startMonitor(h host) *monitor {
	h.t.Helper()
	m := &monitor{t: h.t}
	var err error
	h.Do(h.t, func() {
		if dev, err := net.InterfaceByName("tweed.1"); err == nil {
			m.tunnel = int32(dev.Index)
		}
		const last = 40 // there are not as many groups of rtnetlink yet
		var routing []int
		for group := 1; group <= last; group++ {
			routing = append(routing, group)
		}
		err = errors.Join(m.listen(unix.NETLINK_ROUTE, routing...), m.listen(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES))
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return m
}

func (m *monitor) listen(protocol int, groups ...int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	m.sockets = append(m.sockets, fd)
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})); err != nil {
		return err
	}
	for _, group := range groups {
		err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
		if err != nil && !errors.Is(err, unix.EINVAL) { // a group that this kernel does not have
			return err
		}
	}
	return nil
}

// stop returns what was heard, but for what becomes of neighbours by their own talking.
func (m *monitor) stop() []string {
	m.t.Helper()
	for _, fd := range m.sockets {
		buf := make([]byte, 1<<16)
		for {
			n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				m.t.Fatalf("the monitor: %v", err)
			}
			msgs, err := syscall.ParseNetlinkMessage(buf[:n])
			if err != nil {
				m.t.Fatalf("the monitor: %v", err)
			}
			for _, msg := range msgs {
				if !m.isTalk(msg) {
					m.heard = append(m.heard, fmt.Sprintf("message %d: % x", msg.Header.Type, msg.Data))
				}
			}
		}
		unix.Close(fd)
	}
	return m.heard
}

// isTalk reports whether a neighbour that nobody has written was found, or forgotten. Those that need no asking (NOARP) are
// the kernel's own, of multicast addresses; ours are permanent.
func (m *monitor) isTalk(msg syscall.NetlinkMessage) bool {
	if t := msg.Header.Type; t != unix.RTM_NEWNEIGH && t != unix.RTM_DELNEIGH || len(msg.Data) < unix.SizeofNdMsg {
		return false
	}
	dev, state := int32(binary.NativeEndian.Uint32(msg.Data[4:])), binary.NativeEndian.Uint16(msg.Data[8:])
	return state&unix.NUD_PERMANENT == 0 && (dev != m.tunnel || state&unix.NUD_NOARP != 0)
}

// A traffic goes on between two pods until it is ended, and then has lost nothing.
type traffic interface{ end(t *testing.T) }

// A numbered is a stream of numbered datagrams, one a millisecond.
type numbered struct {
	to       string
	stop     chan struct{}
	all      sync.WaitGroup
	out, in  *net.UDPConn
	sent     uint64
	arrived  map[uint64]int
	received chan struct{} // closed when as many have arrived as were sent
	failed   error
}

func startNumbered(from, to host, addr string) *numbered {
	from.t.Helper()
	s := &numbered{to: addr, stop: make(chan struct{}), arrived: map[uint64]int{}, received: make(chan struct{})}
	var err error
	to.Do(to.t, func() {
		if s.in, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr)}); err == nil {
			err = s.in.SetReadBuffer(8 << 20)
		}
	})
	if err == nil {
		from.Do(from.t, func() { s.out, err = net.DialUDP("udp", nil, s.in.LocalAddr().(*net.UDPAddr)) })
	}
	if err != nil {
		from.t.Fatal(err)
	}
	s.all.Go(s.send)
	s.all.Go(s.receive)
	return s
}

// last is the number of a datagram that tells how many were sent before it.
const last = 1 << 63

func (s *numbered) send() {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); s.failed == nil; {
		select {
		case <-s.stop:
			for range 50 { // that one may get lost
				_, _ = s.out.Write(binary.BigEndian.AppendUint64(nil, last|s.sent))
				select {
				case <-s.received:
					return
				case <-time.After(100 * time.Millisecond):
				}
			}
			s.in.Close()
			return
		case <-tick.C:
		}
		for s.sent < uint64(time.Since(begun)/time.Millisecond) && s.failed == nil {
			if _, s.failed = s.out.Write(binary.BigEndian.AppendUint64(nil, s.sent)); s.failed == nil {
				s.sent++
			}
		}
	}
	s.in.Close()
}

func (s *numbered) receive() {
	b := make([]byte, 8)
	for {
		if n, err := s.in.Read(b); err != nil || n < len(b) {
			return
		}
		switch number := binary.BigEndian.Uint64(b); {
		case number < last:
			s.arrived[number]++
		case uint64(len(s.arrived)) >= number&^last:
			close(s.received)
			return
		}
	}
}

func (s *numbered) end(t *testing.T) {
	t.Helper()
	close(s.stop)
	s.all.Wait()
	s.in.Close()
	s.out.Close()
	lost, twice := 0, 0
	for n := range s.sent {
		switch s.arrived[n] {
		case 0:
			lost++
		case 1:
		default:
			twice++
		}
	}
	t.Logf("%d datagrams to %s", s.sent, s.to)
	if s.failed != nil || lost+twice > 0 || s.sent < 1000 {
		t.Errorf("of %d datagrams to %s %d are lost and %d came twice: %v", s.sent, s.to, lost, twice, s.failed)
	}
}

// A transfer is a TCP connection that bytes go through all the time.
type transfer struct {
	to        string
	stop      chan struct{}
	all       sync.WaitGroup
	sum, seen hash.Hash
	bytes     int
	failed    [2]error
}

func startTransfer(from, to host, addr string) *transfer {
	from.t.Helper()
	c := &transfer{to: addr, stop: make(chan struct{}), sum: sha256.New(), seen: sha256.New()}
	var l *net.TCPListener
	var out *net.TCPConn
	var err error
	to.Do(to.t, func() { l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(addr)}) })
	if err == nil {
		from.Do(from.t, func() { out, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr)) })
	}
	if err != nil {
		from.t.Fatal(err)
	}
	c.all.Go(func() { c.failed[0] = c.send(out) })
	c.all.Go(func() { c.failed[1] = c.receive(l) })
	return c
}

// stalled is how long nothing may arrive.
const stalled = 5 * time.Second

func (c *transfer) send(out *net.TCPConn) error {
	defer out.Close()
	source := rand.NewChaCha8([32]byte{1})
	b := make([]byte, 64<<10)
	for {
		select {
		case <-c.stop:
			return out.CloseWrite()
		case <-time.After(5 * time.Millisecond): // some 100 Mbit/s: others need the processors too
		}
		_, _ = source.Read(b)
		c.sum.Write(b)
		c.bytes += len(b)
		_ = out.SetWriteDeadline(time.Now().Add(stalled))
		if _, err := out.Write(b); err != nil {
			return err
		}
	}
}

func (c *transfer) receive(l *net.TCPListener) error {
	defer l.Close()
	in, err := l.AcceptTCP()
	if err != nil {
		return err
	}
	defer in.Close()
	b := make([]byte, 256<<10)
	for {
		_ = in.SetReadDeadline(time.Now().Add(stalled))
		n, err := in.Read(b)
		c.seen.Write(b[:n])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *transfer) end(t *testing.T) {
	t.Helper()
	close(c.stop)
	c.all.Wait()
	t.Logf("%d bytes to %s", c.bytes, c.to)
	if err := errors.Join(c.failed[:]...); err != nil || !bytes.Equal(c.sum.Sum(nil), c.seen.Sum(nil)) || c.bytes == 0 {
		t.Errorf("of %d bytes to %s other ones have arrived: %v", c.bytes, c.to, err)
	}
}

package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tweedProtocol is the protocol number of tweed's routes.
const tweedProtocol = 116

// Routes waits for routes of tweed's to come and to go, as the kernel tells of them.
type Routes struct {
	fd   int
	done chan routesSeen
}

type routesSeen struct {
	last time.Time
	err  error // of a watch that ended before it had seen all
}

type routeEvent struct {
	typ uint16 // RTM_NEWROUTE or RTM_DELROUTE
	dst netip.Prefix
}

// ExpectRoutes begins to watch for the routes to some subnets to come and to others to go.
func (ns NetNS) ExpectRoutes(t testing.TB, come, gone []string) *Routes {
	t.Helper()
	owed := map[routeEvent]bool{}
	for _, s := range come {
		owed[routeEvent{unix.RTM_NEWROUTE, netip.MustParsePrefix(s)}] = true
	}
	for _, s := range gone {
		owed[routeEvent{unix.RTM_DELROUTE, netip.MustParsePrefix(s)}] = true
	}
	w := &Routes{fd: -1, done: make(chan routesSeen, 1)}
	if err := ns.Do(w.listen); err != nil {
		t.Fatalf("subscribing to routes: %v", err)
	}
	go func() {
		defer unix.Close(w.fd)
		last, err := w.watch(owed)
		for e := range owed {
			err = fmt.Errorf("%d have not come, as that to %v: %w", len(owed), e.dst, err)
			break
		}
		w.done <- routesSeen{last, err}
	}()
	return w
}

func (w *Routes) listen() (err error) {
	if w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
		return err
	}
	const groups = 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1)
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	return errors.Join(
		unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}),
	)
}

// watch returns when the last of what is owed happened.
func (w *Routes) watch(owed map[routeEvent]bool) (time.Time, error) {
	b := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(w.fd, b, 0)
		now := time.Now()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return now, err
		}
		msgs, err := syscall.ParseNetlinkMessage(b[:n])
		if err != nil {
			return now, err
		}
		for i := range msgs {
			delete(owed, eventOf(&msgs[i]))
		}
		if len(owed) == 0 {
			return now, nil
		}
	}
}

// eventOf reads a message; one that is not of tweed's routes is nothing that anybody waits for.
func eventOf(m *syscall.NetlinkMessage) (e routeEvent) {
	if len(m.Data) < unix.SizeofRtMsg || m.Data[5] != tweedProtocol {
		return e
	}
	for b := m.Data[unix.SizeofRtMsg:]; len(b) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[2:]) == unix.RTA_DST {
			dst, _ := netip.AddrFromSlice(b[unix.SizeofRtAttr:size])
			return routeEvent{m.Header.Type, netip.PrefixFrom(dst, int(m.Data[1]))}
		}
		b = b[min(len(b), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
	}
	return e
}

// Last waits until all has happened, and returns when the last of it did.
func (w *Routes) Last(t testing.TB) time.Time {
	t.Helper()
	seen := <-w.done
	if seen.err != nil {
		t.Fatalf("waiting for changes of routes: %v", seen.err)
	}
	return seen.last
}

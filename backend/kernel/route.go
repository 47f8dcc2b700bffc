package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// RouteTo asks the kernel how a packet of this host to addr would leave. Where nothing leads there, or a route forbids
// it, the path is the zero one.
func (k *Kernel) RouteTo(ctx context.Context, addr netip.Addr) (backend.Path, error) {
	if err := ctx.Err(); err != nil {
		return backend.Path{}, err
	}
	m := make(message, unix.SizeofRtMsg, 32)
	m[0], m[1] = family(addr), uint8(addr.BitLen())
	m.addr(unix.RTA_DST, addr)
	b, err := k.conn.get(unix.RTM_GETROUTE, m)
	if isNoRoute(err) {
		return backend.Path{}, nil
	}
	if err != nil {
		return backend.Path{}, fmt.Errorf("looking up the route to %s: %w", addr, err)
	}
	r, ok := parseRoute(b)
	if !ok || r.typ != unix.RTN_UNICAST && r.typ != unix.RTN_LOCAL {
		return backend.Path{}, nil
	}
	l, err := k.linkByIndex(r.dev)
	if errors.Is(err, unix.ENODEV) { // gone, and with it the route
		return backend.Path{}, nil
	}
	return backend.Path{Dev: l.name, Src: r.src}, err
}

// isNoRoute reports whether a lookup failed because there is no route, or one of type unreachable, prohibit or
// blackhole, which answer by these (fib_props in net/ipv4/fib_semantics.c).
func isNoRoute(err error) bool {
	for _, answer := range []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL} {
		if errors.Is(err, answer) {
			return true
		}
	}
	return false
}

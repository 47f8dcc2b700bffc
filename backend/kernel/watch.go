package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// Of linux/netconf.h; x/sys/unix does not have them.
const (
	netconfIfindex    = 1  // NETCONFA_IFINDEX
	netconfForwarding = 2  // NETCONFA_FORWARDING
	netconfAll        = -1 // NETCONFA_IFINDEX_ALL
	sizeofNetconf     = 4  // struct netconfmsg, padded
)

// Watch calls ring whenever something changed that a pass might have to repair: on links of ours and what hangs on
// them, on devices for which uplink says yes, on routes and rules with our protocol, on strangers that stood in our way
// when Observe looked last, in forwarding, in the packet filter. It rings once at the start, when nothing can be missed
// any more, and where notifications were lost. It returns nil when ctx ends. ring must not block.
func (k *Kernel) Watch(ctx context.Context, uplink func(dev string) bool, ring func()) error {
	routing, err := subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF)
	if err != nil {
		return err
	}
	defer routing.close()
	w := &watcher{kernel: k, uplink: uplink}
	w.reset()
	g, ctx := errgroup.WithContext(ctx)
	if filter, err := subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES); err != nil {
		k.log.Info("changes of the packet filter are found by looking, not at once", "why", err)
	} else {
		defer filter.close()
		var ear filterEar
		g.Go(func() error { return k.listen(ctx, filter, ear.heard, func() {}, ring) })
	}
	g.Go(func() error { return k.listen(ctx, routing, w.heard, w.reset, ring) })
	ring()
	return g.Wait()
}

// listen rings for each batch of notifications in which one was heard that matters. The socket stays subscribed while
// it loses some, so a ring after a loss is never too early.
func (k *Kernel) listen(ctx context.Context, s *subscription, heard func(syscall.NetlinkMessage) bool,
	reset, ring func()) error {
	stop := context.AfterFunc(ctx, s.close)
	defer stop()
	for {
		msgs, err := s.receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINVAL): // lost, or longer than could be read
			reset()
			ring()
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("receiving the kernel's notifications: %w", err)
		}
		matters := false
		for _, m := range msgs {
			matters = heard(m) || matters
		}
		if matters {
			ring()
		}
	}
}

// A watcher tells which notifications matter. It remembers what it heard, because the kernel repeats itself: a router
// advertisement renews an address, a device's counters make a link message.
type watcher struct {
	kernel *Kernel
	uplink func(dev string) bool
	links  map[int]link
	addrs  map[addrAt]uint32 // flags
	closed map[int]bool      // ports of bridges that are Locked, NoLearning and NoFlood
	// forwarding is what was last heard of it, by family and index.
	forwarding map[[2]int]uint32
	// blind is set where what the kernel holds could not be read. Then all that is heard matters.
	blind bool
	tried time.Time // when it was read last
}

type addrAt struct {
	index  int
	prefix netip.Prefix
}

// sight is how long a blind watcher waits before it reads again: what keeps it from reading may be a storm of changes.
const sight = time.Second

// reset starts over from what the kernel holds.
func (w *watcher) reset() {
	err := w.read()
	if err != nil && !w.blind {
		w.kernel.log.Warn("cannot tell which of the kernel's notifications matter, so that all do", "why", err)
	}
	w.blind, w.tried = err != nil, time.Now()
}

func (w *watcher) read() error {
	links, err := w.kernel.links("")
	if err != nil {
		return err
	}
	w.links, w.closed = map[int]link{}, map[int]bool{}
	for _, l := range links {
		w.links[l.index] = l
		w.closed[l.index] = l.closed()
	}
	w.forwarding = map[[2]int]uint32{}
	m := make(message, unix.SizeofIfAddrmsg)
	err = w.kernel.conn.dump(unix.RTM_GETADDR, m, func() { w.addrs = map[addrAt]uint32{} }, func(b []byte) {
		if a, ok := parseAddr(b); ok {
			w.addrs[addrAt{a.index, a.prefix}] = a.flags
		}
	})
	return wrap(err, "listing addresses")
}

func (w *watcher) heard(m syscall.NetlinkMessage) bool {
	if w.blind && time.Since(w.tried) >= sight {
		w.reset()
	}
	if w.blind {
		return true
	}
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return w.heardLink(m.Header.Type, m.Data)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return w.heardAddr(m.Header.Type, m.Data)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return w.heardNeigh(m.Header.Type, m.Data)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return w.heardRoute(m.Data)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		r, ok := parseRule(m.Data)
		return ok && (r.protocol == backend.Owner || w.kernel.isInWay(r.key))
	case unix.RTM_NEWNETCONF:
		return w.heardNetconf(m.Data)
	}
	return false
}

func (w *watcher) matters(l link) bool {
	return l.ours() || w.uplink(l.name) || w.kernel.isInWay(l.index)
}

func (w *watcher) heardLink(typ uint16, b []byte) bool {
	// Bridges tell of their ports in messages of a family of their own, which do not hold what the link itself is.
	if len(b) > 0 && b[0] == unix.AF_BRIDGE {
		return w.heardPort(typ, b)
	}
	if len(b) == 0 || b[0] != unix.AF_UNSPEC {
		return false
	}
	l, ok := parseLink(b)
	if !ok {
		return false
	}
	was, known := w.links[l.index]
	if typ == unix.RTM_DELLINK {
		delete(w.links, l.index)
		return w.matters(l) || known && w.matters(was)
	}
	if l.features { // a bridge's change with its ports, and none of them is of ours
		l.features = false
		w.links[l.index] = l
		return l.ours() && l.is(backend.KindVXLAN) || known && was != l && (w.matters(l) || w.matters(was))
	}
	w.links[l.index] = l
	return (!known || was != l) && (w.matters(l) || known && w.matters(was))
}

func (w *watcher) heardAddr(typ uint16, b []byte) bool {
	a, ok := parseAddr(b)
	if !ok {
		return false
	}
	at := addrAt{a.index, a.prefix}
	flags, known := w.addrs[at]
	if typ == unix.RTM_DELADDR {
		delete(w.addrs, at)
	} else {
		w.addrs[at] = a.flags
	}
	// The link-local IPv6 addresses are the kernel's own, and change while it tries whether they are unique.
	ip := a.prefix.Addr()
	if ip.Is6() && ip.IsLinkLocalUnicast() || !w.matters(w.links[a.index]) {
		return false
	}
	return typ == unix.RTM_DELADDR || !known || flags != a.flags
}

// heardRoute hears of ours, of what stands in our way, of default routes, which an uplink may be chosen by, and of what may
// move the border of an uplink's segment.
func (w *watcher) heardRoute(b []byte) bool {
	if len(b) >= unix.SizeofRtMsg && b[5] == backend.Owner {
		return true
	}
	r, ok := parseRoute(b)
	if !ok || r.isDefault() || w.kernel.isInWay(r.key) {
		return ok
	}
	leaves := func(dev int) bool { return w.uplink(w.links[dev].name) }
	near := func(dst netip.Prefix) bool {
		for at := range w.addrs {
			if isNear(at.prefix, dst) && leaves(at.index) {
				return true
			}
		}
		return false
	}
	return r.isWay(near) && (slices.ContainsFunc(r.devs(), leaves) || near(r.key.Dst))
}

// heardPort hears of a port that is not closed any more. The plugin closes those of pods, and before a port goes with
// its pod, the bridge says that it is none any more.
func (w *watcher) heardPort(typ uint16, b []byte) bool {
	l, ok := parseLink(b)
	if !ok {
		return false
	}
	was := w.closed[l.index]
	if typ == unix.RTM_DELLINK {
		delete(w.closed, l.index)
		return false
	}
	w.closed[l.index] = l.closed()
	return was && !l.closed() && w.links[l.index].group == backend.Owner
}

// heardNeigh hears only of our VXLAN devices, and of MACs that a bridge does not know any more to be behind a closed
// port: what else pods ask and answer on the bridge is their own affair. What needs no asking (NOARP) is the kernel's
// own, of multicast addresses, unless it is permanent as well, which is how the bridge command makes it.
func (w *watcher) heardNeigh(typ uint16, b []byte) bool {
	n, ok := parseNeigh(b)
	l := w.links[n.index]
	if typ == unix.RTM_DELNEIGH && n.family == unix.AF_BRIDGE && w.closed[n.index] {
		return ok && l.group == backend.Owner && n.state&unix.NUD_NOARP != 0 && n.flags&unix.NTF_SELF == 0
	}
	return ok && l.ours() && l.is(backend.KindVXLAN) && n.state&(unix.NUD_NOARP|unix.NUD_PERMANENT) != unix.NUD_NOARP
}

func (w *watcher) heardNetconf(b []byte) bool {
	if len(b) < sizeofNetconf {
		return false
	}
	index, forwarding, has := 0, uint32(0), false
	for typ, v := range attrs(b[sizeofNetconf:]) {
		switch typ {
		case netconfIfindex:
			index = int(int32(getU32(v)))
		case netconfForwarding:
			forwarding, has = getU32(v), true
		}
	}
	if !has || index != netconfAll && !w.links[index].ours() {
		return false
	}
	at := [2]int{int(b[0]), index}
	was, known := w.forwarding[at]
	w.forwarding[at] = forwarding
	return !known || was != forwarding
}

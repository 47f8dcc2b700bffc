package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// kernelMetric6 is the metric that the kernel gives an IPv6 route that comes without one (IP6_RT_PRIO_USER).
const kernelMetric6 = 1024

func (s *survey) lookAtRoutes() error {
	s.routesSeen = newSeen(s.want.Routes)
	for _, family := range routeFamilies() {
		var unnamed []route // whose device has to be asked for, which the socket cannot be in the middle of a dump
		// Nothing needs to be forgotten before another try: what is gone by then is found out by the next pass.
		err := s.eachRouteMessage(family, backend.Owner, unix.RT_TABLE_UNSPEC, func() {}, func(b []byte) {
			s.digests = append(s.digests, s.routeDigest(b))
			r, ok := parseRoute(b)
			if !ok || !r.is(family, backend.Owner, unix.RT_TABLE_UNSPEC) {
				return
			}
			if _, named := s.names[r.dev]; named || r.dev == 0 {
				s.addRoute(r, s.names[r.dev])
			} else {
				unnamed = append(unnamed, r)
			}
		})
		if err != nil {
			return err
		}
		for _, r := range unnamed {
			dev, err := s.name(r.dev)
			if errors.Is(err, unix.ENODEV) { // gone since, and the route with it
				continue
			}
			if err != nil {
				return err
			}
			s.addRoute(r, dev)
		}
	}
	s.have.Routes = s.routesSeen.all()
	if s.routesSeen.asWanted() {
		return nil
	}
	return s.lookForStrangeRoutes()
}

// routes returns the routes of one family that have the protocol and are in the table; 0 stands for all tables, and for
// all protocols but ours.
func (k *Kernel) routes(family, protocol uint8, table int) (routes []route, err error) {
	err = k.eachRoute(family, protocol, table, func() { routes = routes[:0] }, func(r route) { routes = append(routes, r) })
	return routes, err
}

// eachRoute calls take for each of these routes, and reset before each try.
func (k *Kernel) eachRoute(family, protocol uint8, table int, reset func(), take func(route)) error {
	return k.eachRouteMessage(family, protocol, table, reset, func(b []byte) {
		if protocol == 0 && len(b) >= unix.SizeofRtMsg && b[5] == backend.Owner {
			return // there are thousands
		}
		r, ok := parseRoute(b)
		if ok && r.is(family, protocol, table) {
			take(r)
		}
	})
}

// is reports whether r is one of those that are asked for.
func (r route) is(family, protocol uint8, table int) bool {
	return r.family == family && r.flags&unix.RTM_F_CLONED == 0 &&
		(protocol == 0 || r.protocol == protocol) && (table == unix.RT_TABLE_UNSPEC || r.key.Table == table)
}

// routeFamilies are those that routes are read of, one after the other.
func routeFamilies() [2]uint8 { return [...]uint8{unix.AF_INET, unix.AF_INET6} }

// eachRouteMessage is eachRoute before anything is read. An old kernel lists other routes as well.
func (k *Kernel) eachRouteMessage(family, protocol uint8, table int, reset func(), take func(b []byte)) error {
	m := make(message, unix.SizeofRtMsg, 32)
	m[0], m[5] = family, protocol
	// To ask for a table that nobody has used yet is an error, and the library does not survive how it is told.
	if table == unix.RT_TABLE_MAIN {
		m.u32(unix.RTA_TABLE, uint32(table))
	}
	err := k.conn.dump(unix.RTM_GETROUTE, m, reset, take)
	if errors.Is(err, unix.ENOENT) { // nobody has used the table yet
		return nil
	}
	return wrap(err, "listing routes")
}

func (s *survey) addRoute(r route, dev string) {
	v := backend.Route{RouteKey: s.routeKey(r)}
	// One of another type, or with several nexthops, cannot be told by a value: without a device it is like none we want.
	if r.typ == unix.RTN_UNICAST && r.hops == nil && r.dev != 0 {
		v.Dev, v.Via, v.Src, v.Onlink = dev, r.via, r.src, r.flags&unix.RTNH_F_ONLINK != 0
	}
	want, ok := s.want.Routes[v.RouteKey]
	v.Peer = want.Peer
	s.routesSeen.add(v.RouteKey, v, ok && v == want)
}

// routeKey writes the kernel's own metric as State does.
func (s *survey) routeKey(r route) backend.RouteKey {
	if r.family != unix.AF_INET6 || r.key.Metric != kernelMetric6 {
		return r.key
	}
	if _, spelled := s.want.Routes[r.key]; spelled {
		return r.key
	}
	r.key.Metric = 0
	return r.key
}

// lookForStrangeRoutes reads all routes, but only if there is one to add or to change: at rest others' routes, which
// may be very many, are of no interest.
func (s *survey) lookForStrangeRoutes() error {
	missing := map[backend.RouteKey]bool{}
	tables := map[fib]bool{}
	for key, want := range s.want.Routes {
		if have, there := s.have.Routes[key]; !there || have != want {
			missing[key] = true
			tables[fib{family(key.Dst.Addr()), key.Table}] = true
		}
	}
	for p := range tables {
		routes, err := s.routes(p.family, 0, p.table)
		if err != nil {
			return err
		}
		s.noteAlien(p, routes)
		for _, r := range routes {
			key := s.routeKey(r)
			if r.tos != 0 || !missing[key] {
				continue
			}
			delete(missing, key) // one stranger in a place is enough
			what := s.describe(r)
			s.stranger(key, r.key, "the route %s is there and is not ours; remove it: ip route del %s", what, what)
		}
	}
	return nil
}

// describe writes a route as the ip command does.
func (s *survey) describe(r route) string {
	var b strings.Builder
	if r.typ != unix.RTN_UNICAST {
		fmt.Fprintf(&b, "%s ", routeType(r.typ))
	}
	b.WriteString(r.key.Dst.String())
	if r.via.IsValid() {
		fmt.Fprintf(&b, " via %s", r.via)
	}
	if name, err := s.name(r.dev); r.dev != 0 && err == nil {
		fmt.Fprintf(&b, " dev %s", name)
	}
	if r.key.Table != unix.RT_TABLE_MAIN {
		fmt.Fprintf(&b, " table %d", r.key.Table)
	}
	if r.key.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.key.Metric)
	}
	fmt.Fprintf(&b, " proto %d", r.protocol)
	return b.String()
}

func routeType(typ uint8) string {
	switch typ {
	case unix.RTN_LOCAL:
		return "local"
	case unix.RTN_BROADCAST:
		return "broadcast"
	case unix.RTN_ANYCAST:
		return "anycast"
	case unix.RTN_MULTICAST:
		return "multicast"
	case unix.RTN_BLACKHOLE:
		return "blackhole"
	case unix.RTN_UNREACHABLE:
		return "unreachable"
	case unix.RTN_PROHIBIT:
		return "prohibit"
	}
	return fmt.Sprintf("type %d", typ)
}

// isDefault reports whether r sends what no other route of the main table does.
func (r route) isDefault() bool {
	return r.typ == unix.RTN_UNICAST && r.key.Table == unix.RT_TABLE_MAIN && r.key.Dst.Bits() == 0
}

// isWay reports whether r is a backend.Way, where near says whether a destination is in the network of an address of this
// host: of the routes past a router others, which may be very many, say nothing about a link.
func (r route) isWay(near func(netip.Prefix) bool) bool {
	return r.typ == unix.RTN_UNICAST && r.key.Table == unix.RT_TABLE_MAIN && r.key.Dst.Bits() != 0 && r.tos == 0 &&
		r.flags&(unix.RTNH_F_DEAD|unix.RTM_F_CLONED) == 0 && !r.key.Dst.Addr().IsLinkLocalUnicast() &&
		len(r.devs()) > 0 && (!r.routed() || near(r.key.Dst))
}

// routed reports whether r leads past a router. What has several nexthops counts as if it did.
func (r route) routed() bool { return r.via.IsValid() || r.hops != nil }

// isNear reports whether dst is in the network of an address. That of a single address holds no other.
func isNear(addr, dst netip.Prefix) bool {
	return !addr.IsSingleIP() && addr.Bits() <= dst.Bits() && addr.Contains(dst.Addr())
}

// devs returns the indexes of the devices that r leaves by.
func (r route) devs() []int {
	if r.dev != 0 {
		return []int{r.dev}
	}
	return r.hops
}

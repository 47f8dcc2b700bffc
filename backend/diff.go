package backend

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"tweed.dev/tweed/subnet"
)

// Diff returns the operations that lead from have to want, in an order that the kernel accepts: first what goes, from
// rules down to links, then what comes or changes, from links up to rules. It counts in what the kernel itself takes
// away on the way, such as everything that hung on a link that is replaced, and plans it again. An address that another
// of its family takes over from on the same link goes last of all: with a link's last one the kernel takes its routes.
//
// What a stranger stands in the way of is not planned, nor anything that hangs on a link that a stranger's name or
// identifiers keep from being; each stranger makes one Problem, of the peer that the object was for, or with no Node
// where it was for this node. Settings (Sysctls) have no absence: one that is not wanted is left as it is. Ports are
// changed and nothing else: one that is not there went with its pod, or has yet to come.
func Diff(want State, have Observed) (ops []Op, problems []subnet.Problem) {
	d := &differ{}
	d.heed(want, have.Strangers)
	d.links(want.Links, have.Links)
	have.Addrs = d.overtaken(want.Addrs, have.Addrs)
	d.addresses(want.Addrs, have.Addrs)
	compare(d, want.Addrs, have.Addrs, sameAddr)
	compare(d, want.Neighs, have.Neighs, func(a, b Neigh) bool { a.Peer = b.Peer; return a == b })
	compare(d, want.FDB, have.FDB, func(a, b FDBEntry) bool { a.Peer = b.Peer; return a == b })
	compare(d, want.Routes, have.Routes, func(a, b Route) bool { a.Peer = b.Peer; return a == b })
	compare(d, want.Rules, have.Rules, equal)
	d.sysctls(want.Sysctls, have.Sysctls)
	d.ports(want.Ports, have.Ports)
	slices.SortFunc(d.ops, order)
	slices.SortFunc(d.last, order)
	return append(d.ops, d.last...), d.problems
}

func equal[V comparable](a, b V) bool { return a == b }

func sameAddr(a, b Addr) bool { a.Peer = b.Peer; return a == b }

// A differ is one Diff under way.
type differ struct {
	ops      []Op
	last     []Op // come after ops
	problems []subnet.Problem

	// taken are the keys, and blocked the links, that a stranger keeps us from.
	taken   map[any]bool
	blocked map[string]bool

	// What the operations on links and addresses take away besides, as the kernel does.
	gone    map[string]bool     // links that do not exist, or will not for a moment: with all on them
	down    map[string]bool     // links set down: with routes, neighbours and IPv6 addresses
	renamed map[string]bool     // links with another MAC: with neighbours
	bare4   map[string]bool     // links without their last IPv4 address: with IPv4 routes and neighbours
	sources map[netip.Addr]bool // addresses that are not this host's any more: with IPv4 routes from them
	// relieved are the addresses that go only when others are there.
	relieved map[AddrKey]bool
}

func (d *differ) plan(do Verb, what, was Object) {
	op := Op{Do: do, What: what, Was: was, Peer: peer(what)}
	if a, ok := what.(Addr); ok && do == Delete && d.relieved[a.AddrKey] {
		d.last = append(d.last, op)
		return
	}
	d.ops = append(d.ops, op)
}

// heed notes the strangers in the way of want.
func (d *differ) heed(want State, strangers []Stranger) {
	d.taken, d.blocked = map[any]bool{}, map[string]bool{}
	for _, s := range strangers {
		if name, ok := s.Key.(string); ok {
			d.blocked[name] = true
		}
	}
	for _, s := range strangers {
		o, wanted := want.at(s.Key)
		if !wanted || d.taken[s.Key] || d.blocked[Device(o)] {
			continue
		}
		d.taken[s.Key] = true
		d.problems = append(d.problems, subnet.Problem{
			Node: peer(o), Kind: subnet.KindStranger, Text: fmt.Sprintf("%s: %s", Op{Do: Add, What: o}, s.What)})
	}
	slices.SortFunc(d.problems, func(a, b subnet.Problem) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), strings.Compare(a.Text, b.Text))
	})
}

// at finds the object with the key of a Stranger.
func (s State) at(key any) (o Object, ok bool) {
	switch k := key.(type) {
	case string:
		o, ok = s.Links[k]
	case AddrKey:
		o, ok = s.Addrs[k]
	case NeighKey:
		o, ok = s.Neighs[k]
	case FDBKey:
		o, ok = s.FDB[k]
	case RouteKey:
		o, ok = s.Routes[k]
	case RuleKey:
		o, ok = s.Rules[k]
	}
	return o, ok
}

// links plans what happens to links, and notes what the kernel takes away with it.
func (d *differ) links(want, have map[string]Link) {
	d.gone, d.down, d.renamed = map[string]bool{}, map[string]bool{}, map[string]bool{}
	for name, w := range want {
		h, there := have[name]
		switch {
		case d.blocked[name] || w == h:
		case !there:
			d.gone[name] = true
			d.plan(Add, w, nil)
		case w.replaces(h):
			d.gone[name] = true
			d.plan(Delete, h, h)
			d.plan(Add, w, nil)
		default:
			d.down[name] = h.Up && !w.Up
			d.renamed[name] = h.MAC != w.MAC
			d.plan(Change, w, h)
		}
	}
	for name, h := range have {
		if _, wanted := want[name]; !wanted && !d.blocked[name] {
			d.gone[name] = true
			d.plan(Delete, h, h)
		}
	}
}

// replaces reports whether the kernel cannot make was into l in place: it refuses another VNI, port or family, and ip
// has no word for "no underlay device any more".
func (l Link) replaces(was Link) bool {
	v, w := l.VXLAN, was.VXLAN
	return l.Type != was.Type || v.VNI != w.VNI || v.Port != w.Port || v.Local.Is4() != w.Local.Is4() ||
		v.Dev == "" && w.Dev != ""
}

// overtaken returns have as it is of use: where no address that is for all gateways stays in its place, those toward one
// will stand before the one that comes, and have to be added behind it.
func (d *differ) overtaken(want, have map[AddrKey]Addr) map[AddrKey]Addr {
	led := map[string]bool{}
	for k, h := range have {
		led[k.Dev] = led[k.Dev] || k.plain4() && sameAddr(want[k], h) && !d.loses(h)
	}
	use := have
	for k, h := range have {
		if !h.Late || led[k.Dev] {
			continue
		}
		if isSame(use, have) {
			use = maps.Clone(have)
		}
		h.Late = false
		use[k] = h
	}
	return use
}

// addresses notes what the kernel takes away with addresses that go.
func (d *differ) addresses(want, have map[AddrKey]Addr) {
	d.bare4, d.sources = map[string]bool{}, map[netip.Addr]bool{}
	d.relieve(want, have)
	stay4, stay := map[string]bool{}, map[netip.Addr]bool{}
	for k, h := range have {
		goes := !sameAddr(want[k], h) && !d.blocked[k.Dev] && !d.taken[k] && !d.relieved[k]
		switch {
		case goes && k.Prefix.Addr().Is4():
			d.bare4[k.Dev] = true
			fallthrough
		case goes || d.loses(h):
			d.sources[k.Prefix.Addr()] = true
		default:
			stay[k.Prefix.Addr()] = true
			stay4[k.Dev] = stay4[k.Dev] || k.Prefix.Addr().Is4()
		}
	}
	for dev, stays := range stay4 {
		if stays {
			delete(d.bare4, dev)
		}
	}
	for a := range stay {
		delete(d.sources, a)
	}
}

// relieve finds the addresses that are not wanted any more while another of their family is, on the same link. One that
// is wanted with another prefix length is not among them: the kernel refuses an IPv6 address that is there already.
func (d *differ) relieve(want, have map[AddrKey]Addr) {
	d.relieved = map[AddrKey]bool{}
	for k, h := range have {
		if _, wanted := want[k]; wanted || d.gone[k.Dev] || d.blocked[k.Dev] || d.loses(h) {
			continue
		}
		other, same := false, false
		for w := range want {
			if w.Dev == k.Dev && w.Prefix.Addr().Is4() == k.Prefix.Addr().Is4() && !d.taken[w] {
				other, same = true, same || w.Prefix.Addr() == k.Prefix.Addr() && !w.Toward.IsValid()
			}
		}
		d.relieved[k] = other && !same
	}
}

// compare plans one kind of object, other than links and sysctls.
func compare[K comparable, V Object](d *differ, want, have map[K]V, same func(a, b V) bool) {
	careful := len(d.gone)+len(d.down)+len(d.bare4)+len(d.sources)+len(d.taken)+len(d.blocked) > 0
	if !careful && isSame(want, have) {
		return
	}
	matched := 0
	for k, w := range want {
		h, there := have[k]
		if there {
			matched++
			if !careful && same(w, h) {
				continue
			}
		}
		switch {
		case d.taken[k] || d.blocked[Device(w)]:
		case !there || d.loses(h):
			d.plan(Add, w, nil)
		case same(w, h) && !d.strips(h):
		case fixed(w):
			d.plan(Delete, h, h)
			d.plan(Add, w, nil)
		default:
			d.plan(Change, w, h)
		}
	}
	if matched == len(have) {
		return
	}
	for k, h := range have {
		if _, wanted := want[k]; !wanted && !d.gone[Device(h)] && !d.blocked[Device(h)] {
			d.plan(Delete, h, h)
		}
	}
}

// isSame reports whether two maps are one and the same, which is how a host says that it holds what is wanted.
func isSame[K comparable, V any](a, b map[K]V) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}

// loses reports whether the kernel takes o away, or has done so, because of another operation.
func (d *differ) loses(o Object) bool {
	dev := Device(o)
	if d.gone[dev] {
		return true
	}
	switch o := o.(type) {
	case Addr:
		return d.down[dev] && o.Prefix.Addr().Is6()
	case Neigh:
		return d.down[dev] || d.renamed[dev] || d.bare4[dev] && o.Addr.Is4()
	case Route:
		if o.Dst.Addr().Is6() {
			return d.down[dev]
		}
		return d.down[dev] || d.bare4[dev] || d.sources[o.Src] && o.Table == MainTable
	}
	return false
}

// strips reports whether the kernel leaves o but takes its preferred source away, as it does with IPv6 routes.
func (d *differ) strips(o Object) bool {
	r, ok := o.(Route)
	return ok && r.Dst.Addr().Is6() && d.sources[r.Src]
}

// fixed reports whether the kernel cannot change o in place: it ignores other flags of an IPv4 address.
func fixed(o Object) bool {
	_, ok := o.(Addr)
	return ok
}

func (d *differ) sysctls(want, have map[string]Sysctl) {
	for name, w := range want {
		h, there := have[name]
		switch {
		case d.blocked[Device(w)]:
		case !there || d.gone[Device(w)]:
			d.plan(Add, w, nil)
		case w != h:
			d.plan(Change, w, h)
		}
	}
}

func (d *differ) ports(want, have map[string]Port) {
	for name, w := range want {
		if h, there := have[name]; there && !d.blocked[w.Bridge] && (w != h || d.gone[w.Bridge]) {
			d.plan(Change, w, h)
		}
	}
}

// Device is the name of the link that o hangs on, and goes with; "" where there is none.
func Device(o Object) string {
	switch o := o.(type) {
	case Addr:
		return o.Dev
	case Neigh:
		return o.Dev
	case FDBEntry:
		return o.Dev
	case Route:
		return o.Dev
	case Sysctl:
		return o.device()
	case Port:
		return o.Bridge
	}
	return ""
}

// device is the interface that a setting of net/ipv4 or net/ipv6 is for, or "".
func (s Sysctl) device() string {
	p := strings.Split(s.Name, "/")
	if len(p) != 5 || p[0] != "net" || p[2] != "conf" && p[2] != "neigh" || p[3] == "all" || p[3] == "default" {
		return ""
	}
	return p[3]
}

// peer is the node that o serves, or "" for this one.
func peer(o Object) string {
	switch o := o.(type) {
	case Addr:
		return o.Peer
	case Neigh:
		return o.Peer
	case FDBEntry:
		return o.Peer
	case Route:
		return o.Peer
	}
	return ""
}

// order compares operations by their place in a pass.
func order(a, b Op) int {
	if n := stage(a) - stage(b); n != 0 {
		return n
	}
	return inStage(a.What, b.What)
}

// stage numbers the steps of a pass. Objects of one stage are of one type.
func stage(o Op) int {
	const build = 10 // what goes comes first, in the opposite order
	n := 0
	switch what := o.What.(type) {
	case Link:
		n = 0
	case Sysctl:
		// Forwarding last: an interface that is not ready for it yet would lose its default route.
		n = 2
		if what.device() != "" {
			n = 1
		}
	case Addr:
		n = 3
	case Neigh:
		n = 4
	case FDBEntry:
		n = 5
	case Route:
		// Another route's gateway may be on the link only because a route without one says so.
		n = 6
		if what.Via.IsValid() {
			n = 7
		}
	case Rule:
		n = 8
	case Port:
		n = 9
	}
	if o.Do == Delete {
		return build - n
	}
	return build + 1 + n
}

func inStage(a, b Object) int {
	switch a := a.(type) {
	case Link:
		return strings.Compare(a.Name, b.(Link).Name)
	case Sysctl:
		return strings.Compare(a.Name, b.(Sysctl).Name)
	case Addr:
		b := b.(Addr)
		// Those toward a gateway come last, so that they are late.
		return cmp.Or(strings.Compare(a.Dev, b.Dev), a.Toward.Compare(b.Toward), a.Prefix.Compare(b.Prefix))
	case Neigh:
		b := b.(Neigh)
		return cmp.Or(strings.Compare(a.Dev, b.Dev), a.Addr.Compare(b.Addr))
	case FDBEntry:
		b := b.(FDBEntry)
		return cmp.Or(strings.Compare(a.Dev, b.Dev), bytes.Compare(a.MAC[:], b.MAC[:]))
	case Route:
		b := b.(Route)
		return cmp.Or(a.Dst.Compare(b.Dst), cmp.Compare(a.Table, b.Table), cmp.Compare(a.Metric, b.Metric))
	case Rule:
		b := b.(Rule)
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), a.From.Compare(b.From), a.To.Compare(b.To),
			cmp.Compare(a.Mark, b.Mark), cmp.Compare(a.Table, b.Table))
	case Port:
		return strings.Compare(a.Name, b.(Port).Name)
	}
	return 0
}

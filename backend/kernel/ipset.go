package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// Of linux/netfilter/ipset/ip_set.h; neither x/sys/unix nor the library has them.
const (
	ipsetType         = "hash:ip"
	ipsetAttrADT      = 8      // IPSET_ATTR_ADT: many elements
	ipsetFlagSetName  = 1 << 1 // IPSET_FLAG_LIST_SETNAME: names alone
	ipsetErrFindType  = syscall.Errno(4098)
	ipsetErrBusy      = syscall.Errno(4100)
	ipsetErrHashFull  = syscall.Errno(4352)
	ipsetBusyFor      = time.Second
	ipsetBusyInterval = time.Millisecond
)

// ipsets are the sets that rules of iptables name, by netlink. The kernel tells nobody of their changes, so each pass
// reads them.
type ipsets struct {
	conn   *conn
	noConn error

	mu    sync.Mutex
	clean bool // none of ours was there when it was looked last
}

func dialIPSet() *ipsets {
	s := &ipsets{}
	s.conn, s.noConn = dial(unix.NETLINK_NETFILTER)
	return s
}

func (s *ipsets) close() {
	if s.conn != nil {
		s.conn.close()
	}
}

// observe adds to have the sets that have names of ours. It reports whether more rules name one than were read: then
// that one is added only if it is wanted, for it could not be destroyed. Where none is wanted it looks until none was
// there: to ask a kernel without IP sets makes it start modprobe.
func (s *ipsets) observe(want masq.Ruleset, have *masq.Ruleset) (held bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := map[string]masq.Set{}
	for set := range want.Sets {
		if set.Form() == masq.IPTables {
			wanted[set.Name] = set
		}
	}
	if len(wanted) == 0 && s.clean {
		return false, nil
	}
	names, err := s.names()
	if err != nil {
		return false, fmt.Errorf("listing IP sets: %w", err)
	}
	s.clean = len(names) == 0
	for _, name := range names {
		set, err := s.read(name)
		switch {
		case errors.Is(err, unix.ENOENT): // gone meanwhile
			continue
		case err != nil:
			return false, fmt.Errorf("reading the IP set %s: %w", name, err)
		}
		more := set.named > mentions(*have, set.set)
		if _, is := wanted[name]; is || !more {
			set.tell(wanted[name], have)
		}
		held = held || more && set.ours()
	}
	return held, nil
}

// mentions counts in how many places rules that were read name s.
func mentions(have masq.Ruleset, s masq.Set) (n int) {
	for _, rules := range have.Chains {
		for _, r := range rules {
			n += strings.Count(r.Unknown, "--match-set "+s.Name+" ")
			for _, named := range []masq.Set{r.SrcIn, r.DstIn} {
				if named == s {
					n++
				}
			}
		}
	}
	return n
}

// forget has the next look trust nothing that was seen before.
func (s *ipsets) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clean = false
}

// names lists the sets with names of ours. A kernel without IP sets has none.
func (s *ipsets) names() (names []string, err error) {
	if s.noConn != nil {
		return nil, s.noConn
	}
	m := ipsetMessage("")
	m.be32(nl.IPSET_ATTR_FLAGS|unix.NLA_F_NET_BYTEORDER, ipsetFlagSetName)
	err = s.conn.dump(ipsetCommand(nl.IPSET_CMD_LIST), m, func() { names = nil }, func(b []byte) {
		name := getString(attr(nfBody(b), nl.IPSET_ATTR_SETNAME))
		if strings.HasPrefix(name, masq.SetPrefix) {
			names = append(names, name)
		}
	})
	if isNoIPSet(err) {
		return nil, nil
	}
	return names, err
}

// isNoIPSet reports whether err says that this kernel has no IP sets.
func isNoIPSet(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// An ipset is what the kernel says of one set.
type ipset struct {
	set   masq.Set
	typ   string
	odd   bool // it is not made as we make it
	named int  // how many rules name it
	holds map[netip.Addr]bool
}

func (s *ipsets) read(name string) (set ipset, err error) {
	m := ipsetMessage(name)
	reset := func() { set = ipset{set: masq.Set{Name: name}, holds: map[netip.Addr]bool{}} }
	err = s.conn.dump(ipsetCommand(nl.IPSET_CMD_LIST), m, reset, func(b []byte) { set.parse(nfBody(b)) })
	return set, err
}

func (s *ipset) parse(b []byte) {
	for typ, v := range attrs(b) {
		switch typ {
		case nl.IPSET_ATTR_TYPENAME:
			s.typ = getString(v)
		case nl.IPSET_ATTR_FAMILY:
			if s.set.Family = masq.IPv4; getU8(v) == unix.NFPROTO_IPV6 {
				s.set.Family = masq.IPv6
			}
		case nl.IPSET_ATTR_DATA:
			s.odd = s.odd || attr(v, nl.IPSET_ATTR_TIMEOUT) != nil || attr(v, nl.IPSET_ATTR_NETMASK) != nil
			s.named = max(s.named, int(getBE32(attr(v, nl.IPSET_ATTR_REFERENCES))))
		case ipsetAttrADT:
			for _, element := range attrs(v) {
				for _, addr := range attrs(attr(element, nl.IPSET_ATTR_IP)) {
					s.holds[getAddr(addr)] = true
				}
			}
		}
	}
}

func (s ipset) ours() bool { return s.typ == ipsetType && !s.odd }

// tell adds s to have. One of another kind is a stranger's.
func (s ipset) tell(want masq.Set, have *masq.Ruleset) {
	wanted := want != masq.Set{}
	switch {
	case s.ours() && (!wanted || want == s.set):
		have.Sets[s.set] = s.holds
	case wanted:
		have.Taken[want] = fmt.Sprintf("the IP set %s exists and is not ours; what it is needed for is left out; destroy "+
			"it (ipset destroy %s), or set PacketFilter in net-conf.json to \"nftables\"", want.Name, want.Name)
	}
}

func ipsetCommand(cmd int) uint16 { return unix.NFNL_SUBSYS_IPSET<<8 | uint16(cmd) }

func ipsetMessage(name string) message {
	m := nfMessage(unix.NFPROTO_IPV4)
	m.u8(nl.IPSET_ATTR_PROTOCOL, nl.IPSET_PROTOCOL)
	if name != "" {
		m.string(nl.IPSET_ATTR_SETNAME, name)
	}
	return m
}

// apply makes one change.
func (s *ipsets) apply(op backend.Op) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noConn != nil {
		return s.noConn
	}
	s.clean = false
	switch o := op.What.(type) {
	case masq.Set:
		if op.Do == backend.Delete {
			return explainIPSet(s.destroy(o))
		}
		return explainIPSet(s.create(o))
	case masq.Members:
		cmd := nl.IPSET_CMD_ADD
		if op.Do == backend.Delete {
			cmd = nl.IPSET_CMD_DEL
		}
		return explainIPSet(s.conn.do(ipsetCommand(cmd), 0, membersMessage(o)))
	}
	return fmt.Errorf("the kernel has no IP set of the kind %s", op.What.Kind())
}

func (s *ipsets) create(set masq.Set) error {
	m := ipsetMessage(set.Name)
	m.string(nl.IPSET_ATTR_TYPENAME, ipsetType)
	m.u8(nl.IPSET_ATTR_REVISION, 0)
	m.u8(nl.IPSET_ATTR_FAMILY, nfproto(set.Family))
	m.nest(nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED, func(m *message) {
		m.be32(nl.IPSET_ATTR_MAXELEM|unix.NLA_F_NET_BYTEORDER, masq.MaxMembers)
	})
	return s.conn.do(ipsetCommand(nl.IPSET_CMD_CREATE), unix.NLM_F_CREATE|unix.NLM_F_EXCL, m)
}

// destroy tries for a while: the kernel lets go of a set some time after the rule that named it is gone.
func (s *ipsets) destroy(set masq.Set) error {
	for end := time.Now().Add(ipsetBusyFor); ; time.Sleep(ipsetBusyInterval) {
		err := s.conn.do(ipsetCommand(nl.IPSET_CMD_DESTROY), 0, ipsetMessage(set.Name))
		if !errors.Is(err, ipsetErrBusy) || time.Now().After(end) {
			return err
		}
	}
}

// membersMessage has many elements in one message. Those that are there already, or not any more, are no error.
func membersMessage(o masq.Members) message {
	m := ipsetMessage(o.Set.Name)
	ip := uint16(nl.IPSET_ATTR_IPADDR_IPV4)
	if o.Set.Family == masq.IPv6 {
		ip = nl.IPSET_ATTR_IPADDR_IPV6
	}
	m.be32(nl.IPSET_ATTR_LINENO|unix.NLA_F_NET_BYTEORDER, 0)
	m.nest(ipsetAttrADT|unix.NLA_F_NESTED, func(m *message) {
		for _, a := range o.Addrs {
			m.nest(nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED, func(m *message) {
				m.nest(nl.IPSET_ATTR_IP|unix.NLA_F_NESTED, func(m *message) {
					m.addr(ip|unix.NLA_F_NET_BYTEORDER, a)
				})
			})
		}
	})
	return m
}

// explainIPSet puts the kernel's private error numbers into words.
func explainIPSet(err error) error {
	switch {
	case isNoIPSet(err), errors.Is(err, ipsetErrFindType):
		return fmt.Errorf("this kernel has no IP sets of the type %s; load the module ip_set_hash_ip, or set PacketFilter "+
			"in net-conf.json to \"nftables\": %w", ipsetType, err)
	case errors.Is(err, ipsetErrBusy):
		return errors.New("a rule still names it")
	case errors.Is(err, ipsetErrHashFull):
		return errors.New("it is full")
	}
	return err
}

package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
)

// Apply makes one change. The error says why the kernel refused; what was to be done is for the caller to say.
func (k *Kernel) Apply(ctx context.Context, op backend.Op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return explain(op, k.apply(op))
}

// explain says what is behind an errno.
func explain(op backend.Op, err error) error {
	if r, ok := op.What.(backend.Route); ok && op.Do != backend.Delete {
		err = explainRoute(r, err)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w", err, errPermission)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: this kernel was built without it, or a module is missing", err)
	}
	return err
}

func (k *Kernel) apply(op backend.Op) error {
	if c, ok, err := k.changeOf(op); ok || err != nil {
		if err != nil {
			return err
		}
		return k.conn.do(c.typ, c.flags, c.body)
	}
	switch o := op.What.(type) {
	case backend.Link:
		return k.applyLink(op.Do, o, op.Was)
	case backend.Rule:
		return k.applyRule(op.Do, o)
	case backend.Sysctl:
		return k.applySysctl(op.Do, o)
	case backend.Port:
		return k.applyPort(o)
	case masq.Table, masq.Set, masq.Members, masq.Chain, masq.Jump, masq.Entry, masq.Guest,
		spoof.Rules, spoof.Pod:
		return k.formOf(o).apply(op)
	}
	return fmt.Errorf("the kernel has no %s", op.What.Kind())
}

func (k *Kernel) addrChange(do backend.Verb, a backend.Addr) (change, error) {
	if do == backend.Change {
		return change{}, errors.New("an address cannot be changed in place: of an IPv4 one the kernel keeps the flags")
	}
	index, err := k.indexOf(a.Dev)
	if err != nil {
		return change{}, err
	}
	ip, other := a.Prefix.Addr(), a.Prefix.Addr()
	if a.Toward.IsValid() {
		other = a.Toward
	}
	m := make(message, unix.SizeofIfAddrmsg, 64)
	m[0], m[1] = family(ip), uint8(a.Prefix.Bits())
	putIndex(m, index)
	m.addr(unix.IFA_LOCAL, ip)
	m.addr(unix.IFA_ADDRESS, other)
	if do == backend.Delete {
		return change{unix.RTM_DELADDR, 0, m}, nil
	}
	var flags uint32
	if a.NoDAD {
		flags |= unix.IFA_F_NODAD
	}
	if a.NoPrefixRoute {
		flags |= unix.IFA_F_NOPREFIXROUTE
	}
	m.u32(unix.IFA_FLAGS, flags)
	return change{unix.RTM_NEWADDR, unix.NLM_F_CREATE | unix.NLM_F_EXCL, m}, nil
}

func (k *Kernel) neighChange(do backend.Verb, n backend.Neigh) (change, error) {
	m, err := k.neighMessage(family(n.Addr), n.Dev, 0)
	if err != nil {
		return change{}, err
	}
	m.addr(unix.NDA_DST, n.Addr)
	m.bytes(unix.NDA_LLADDR, n.MAC[:])
	return neighRequest(do, m), nil
}

func (k *Kernel) fdbChange(do backend.Verb, e backend.FDBEntry) (change, error) {
	m, err := k.neighMessage(unix.AF_BRIDGE, e.Dev, unix.NTF_SELF)
	if err != nil {
		return change{}, err
	}
	m.bytes(unix.NDA_LLADDR, e.MAC[:])
	if e.Dst.IsValid() {
		m.addr(unix.NDA_DST, e.Dst)
	}
	return neighRequest(do, m), nil
}

func (k *Kernel) neighMessage(family uint8, dev string, flags uint8) (message, error) {
	index, err := k.indexOf(dev)
	if err != nil {
		return nil, err
	}
	m := make(message, unix.SizeofNdMsg, 64)
	m[0], m[8], m[10] = family, unix.NUD_PERMANENT, flags
	putIndex(m, index)
	return m, nil
}

// neighRequest replaces also when it adds: the kernel may have an entry of its own making there, which is worth nothing
// beside a permanent one.
func neighRequest(do backend.Verb, m message) change {
	switch do {
	case backend.Delete:
		return change{unix.RTM_DELNEIGH, 0, m}
	case backend.Change:
		return change{unix.RTM_NEWNEIGH, unix.NLM_F_REPLACE, m}
	}
	return change{unix.RTM_NEWNEIGH, unix.NLM_F_CREATE | unix.NLM_F_REPLACE, m}
}

func (k *Kernel) routeChange(do backend.Verb, r backend.Route) (change, error) {
	m := make(message, unix.SizeofRtMsg, 96)
	m[0], m[1], m[5] = family(r.Dst.Addr()), uint8(r.Dst.Bits()), backend.Owner
	m.addr(unix.RTA_DST, r.Dst.Addr())
	m.u32(unix.RTA_TABLE, uint32(r.Table))
	if r.Metric != 0 {
		m.u32(unix.RTA_PRIORITY, uint32(r.Metric))
	}
	if do == backend.Delete {
		// Only what tells it apart, and the protocol: so it goes whatever became of it, and a stranger's stays.
		m[6] = unix.RT_SCOPE_NOWHERE
		if r.Dst.Addr().Is6() && r.Metric == 0 {
			m.u32(unix.RTA_PRIORITY, kernelMetric6)
		}
		return change{unix.RTM_DELROUTE, 0, m}, nil
	}
	index, err := k.indexOf(r.Dev)
	if err != nil {
		return change{}, err
	}
	m[7] = unix.RTN_UNICAST
	m.u32(unix.RTA_OIF, uint32(index))
	if r.Via.IsValid() {
		m.addr(unix.RTA_GATEWAY, r.Via)
	} else {
		m[6] = unix.RT_SCOPE_LINK
	}
	if r.Src.IsValid() {
		m.addr(unix.RTA_PREFSRC, r.Src)
	}
	if r.Onlink {
		m[8] = unix.RTNH_F_ONLINK
	}
	flags := unix.NLM_F_CREATE | unix.NLM_F_EXCL
	if do == backend.Change {
		flags = unix.NLM_F_REPLACE
	}
	return change{unix.RTM_NEWROUTE, flags, m}, nil
}

func explainRoute(r backend.Route, err error) error {
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: a route came to be there since the last look", err)
	case errors.Is(err, unix.ENETDOWN):
		return fmt.Errorf("%w: %s is down", err, r.Dev)
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return fmt.Errorf("%w: no route says that %s is on %s", err, r.Via, r.Dev)
	}
	return err
}

func (k *Kernel) applyRule(do backend.Verb, r backend.Rule) error {
	m := make(message, sizeofRuleMsg, 96)
	m[0] = unix.AF_INET
	put := func(typ uint16, p netip.Prefix, bits int) {
		if p.IsValid() {
			m[0], m[bits] = family(p.Addr()), uint8(p.Bits())
			if p.Bits() > 0 {
				m.addr(typ, p.Addr())
			}
		}
	}
	put(unix.FRA_DST, r.To, 1)
	put(unix.FRA_SRC, r.From, 2)
	m[7] = unix.FR_ACT_TO_TBL
	m.u32(unix.FRA_PRIORITY, uint32(r.Priority))
	m.u32(unix.FRA_TABLE, uint32(r.Table))
	if r.Mark != 0 {
		m.u32(unix.FRA_FWMARK, r.Mark)
		m.u32(unix.FRA_FWMASK, r.Mark)
	}
	m.u8(unix.FRA_PROTOCOL, backend.Owner)
	if do == backend.Delete {
		return k.conn.do(unix.RTM_DELRULE, 0, m)
	}
	return k.conn.do(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, m)
}

func (k *Kernel) applySysctl(do backend.Verb, s backend.Sysctl) error {
	if do == backend.Delete {
		return errors.New("a sysctl cannot be deleted")
	}
	f, err := os.OpenFile(filepath.Join(k.root, s.Name), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(s.Value)
		err = errors.Join(err, f.Close())
	}
	switch {
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %s cannot be written to; in a container, mount the host's /proc/sys/net and say where by "+
			"--sysctl-root", err, k.root)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: the kernel lacks it, or its device is gone", err)
	case err != nil:
		return err
	}
	value, err := k.readSysctl(s.Name)
	if err != nil {
		return err
	}
	if value != strings.Join(strings.Fields(s.Value), " ") {
		return fmt.Errorf("the kernel took the value, but %s still reads %q", filepath.Join(k.root, s.Name), value)
	}
	return nil
}

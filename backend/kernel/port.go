package kernel

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// ntfSticky is NTF_STICKY of linux/neighbour.h; x/sys/unix does not have it.
const ntfSticky = 1 << 6

// lookAtPorts reads those ports in want that are there.
func (s *survey) lookAtPorts() error {
	s.have.Ports = make(map[string]backend.Port, len(s.want.Ports))
	if len(s.want.Ports) == 0 {
		return nil
	}
	veths, err := s.links(string(backend.KindVeth))
	if err != nil {
		return err
	}
	macs := map[int][]placed{} // by port
	for _, l := range s.ours {
		if l.is(backend.KindBridge) && err == nil {
			err = s.fdbOf(l.index, func(port int, p placed) { macs[port] = append(macs[port], p) })
		}
	}
	if err != nil {
		return err
	}
	for _, l := range veths {
		if want, wanted := s.want.Ports[l.name]; wanted && l.group == backend.Owner {
			// A master that is not a bridge of ours has no name here.
			s.have.Ports[l.name] = s.port(l, s.ours[l.master].name, want, macs[l.index])
		}
	}
	return nil
}

func (k *Kernel) port(l link, bridge string, want backend.Port, macs []placed) backend.Port {
	p := backend.Port{
		Name: l.name, Bridge: bridge, Up: l.up, Hairpin: l.hairpin,
		Locked: l.locked, NoLearning: l.noLearning, NoFlood: l.noFlood,
	}
	if bridge != "" && (!l.hasLock || k.noLocks) {
		k.lockless.Do(func() {
			k.log.Info("this kernel does not lock ports of bridges (5.18 and later do); nftables alone keeps pods to their MAC")
		})
		p.Locked = want.Locked
	}
	for _, m := range macs {
		switch {
		case m.mac == want.MAC && m.sticky:
			p.MAC = m.mac
		case m.mac != want.MAC && want.Locked:
			p.Others = true
		}
	}
	return p
}

// A placed is a MAC that a bridge knows to be behind a port, and whether it stays there.
type placed struct {
	mac    backend.MAC
	sticky bool
}

// fdbOf reads what a bridge knows to be behind its ports, but for their own MACs.
func (k *Kernel) fdbOf(bridge int, each func(port int, p placed)) error {
	m := make(message, unix.SizeofNdMsg, 32)
	m[0] = unix.AF_BRIDGE
	m.u32(unix.NDA_MASTER, uint32(bridge))
	// What others change meanwhile is found out by the next pass.
	err := k.conn.dump(unix.RTM_GETNEIGH, m, func() {}, func(b []byte) {
		if n, ok := parseNeigh(b); ok && n.flags&unix.NTF_SELF == 0 && n.state&unix.NUD_PERMANENT == 0 && n.index != bridge {
			each(n.index, placed{n.mac, n.state&unix.NUD_NOARP != 0 && n.flags&ntfSticky != 0})
		}
	})
	return wrap(err, "listing the bridge's FDB")
}

// applyPort opens a port. What makes it a port goes first: before, the kernel knows nothing of hairpins.
func (k *Kernel) applyPort(p backend.Port) error {
	bridge, err := k.indexOf(p.Bridge)
	if err != nil {
		return err
	}
	now, err := k.linkByName(p.Name)
	if err != nil {
		return err
	}
	if now.group != backend.Owner || !now.is(backend.KindVeth) {
		return fmt.Errorf("%s is not ours any more (%s, group %d)", p.Name, kindName(now), now.group)
	}
	m := linkMessage(now.index, upFlag(p.Up), unix.IFF_UP)
	m.u32(unix.IFLA_MASTER, uint32(bridge))
	if err := k.conn.do(unix.RTM_NEWLINK, 0, m); err != nil {
		return err
	}
	m = linkMessage(now.index, 0, 0)
	m.nest(unix.IFLA_LINKINFO, func(m *message) {
		m.bytes(unix.IFLA_INFO_SLAVE_KIND, []byte(backend.KindBridge))
		m.nest(unix.IFLA_INFO_SLAVE_DATA, func(m *message) {
			m.bool(unix.IFLA_BRPORT_MODE, p.Hairpin)
			m.bool(unix.IFLA_BRPORT_LEARNING, !p.NoLearning)
			m.bool(unix.IFLA_BRPORT_UNICAST_FLOOD, !p.NoFlood)
			if !k.noLocks {
				m.bool(unix.IFLA_BRPORT_LOCKED, p.Locked) // older kernels pass over it
			}
		})
	})
	if err := k.conn.do(unix.RTM_NEWLINK, 0, m); err != nil {
		return err
	}
	return k.placeMACs(bridge, now.index, p)
}

// placeMACs has a bridge know the pod's MAC, and no other where the port is locked.
func (k *Kernel) placeMACs(bridge, port int, p backend.Port) error {
	var others []backend.MAC
	if p.Locked {
		err := k.fdbOf(bridge, func(at int, m placed) {
			if at == port && m.mac != p.MAC {
				others = append(others, m.mac)
			}
		})
		if err != nil {
			return err
		}
	}
	for _, mac := range others {
		if err := k.conn.do(unix.RTM_DELNEIGH, 0, placeMessage(port, mac)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("bridge fdb del %s dev %s master: %w", mac, p.Name, err)
		}
	}
	if p.MAC == (backend.MAC{}) {
		return nil
	}
	return k.conn.do(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, placeMessage(port, p.MAC))
}

func placeMessage(port int, mac backend.MAC) message {
	m := make(message, unix.SizeofNdMsg, 32)
	m[0], m[8], m[10] = unix.AF_BRIDGE, unix.NUD_NOARP, unix.NTF_MASTER|ntfSticky
	putIndex(m, port)
	m.bytes(unix.NDA_LLADDR, mac[:])
	return m
}

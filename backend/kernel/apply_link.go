package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// putIndex writes an interface index where ifaddrmsg, ndmsg and ifinfomsg have it.
func putIndex(m message, index int) { binary.NativeEndian.PutUint32(m[4:], uint32(index)) }

func (k *Kernel) applyLink(do backend.Verb, l backend.Link, was backend.Object) error {
	k.remember(l.Name, 0)
	if do == backend.Add {
		return k.addLink(l)
	}
	// Somebody may have put another device in its place since the last look.
	now, err := k.linkByName(l.Name)
	if err != nil {
		return err
	}
	if now.group != backend.Owner || !now.is(l.Type) {
		return fmt.Errorf("%s is not ours any more (%s, group %d)", l.Name, kindName(now), now.group)
	}
	if do == backend.Delete {
		return k.conn.do(unix.RTM_DELLINK, 0, linkMessage(now.index, 0, 0))
	}
	have, ok := was.(backend.Link)
	if !ok {
		return errors.New("a link can only be changed from what it was")
	}
	return k.changeLink(now.index, have, l)
}

// addLink creates the link with all it needs in one message, so that there is no moment in which it exists without
// our mark, or with another MAC than peers know.
func (k *Kernel) addLink(l backend.Link) error {
	m := linkMessage(0, upFlag(l.Up), unix.IFF_UP)
	m.string(unix.IFLA_IFNAME, l.Name)
	m.u32(unix.IFLA_GROUP, backend.Owner)
	if l.MAC != (backend.MAC{}) {
		m.bytes(unix.IFLA_ADDRESS, l.MAC[:])
	}
	mtu := l.MTU
	if l.Type == backend.KindBridge {
		mtu-- // for keepMTU to have something to change
	}
	m.u32(unix.IFLA_MTU, uint32(mtu))
	data, err := k.kindData(l)
	if err != nil {
		return err
	}
	putInfo(&m, l.Type, data)
	if err := k.conn.do(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, m); err != nil {
		return k.explainLink(l, err)
	}
	switch {
	case l.VXLAN.NoTxChecksum:
		return k.setNoTxChecksum(l)
	case l.Type == backend.KindBridge:
		return k.keepMTU(l)
	}
	return nil
}

// keepMTU sets a new bridge's MTU. One that a living bridge is changed to stays; one that it was made with would follow
// the ports (br_mtu_auto_adjust in the kernel).
func (k *Kernel) keepMTU(l backend.Link) error {
	now, err := k.linkByName(l.Name)
	if err != nil {
		return err
	}
	m := linkMessage(now.index, 0, 0)
	m.u32(unix.IFLA_MTU, uint32(l.MTU))
	return k.conn.do(unix.RTM_NEWLINK, 0, m)
}

// kindData returns what makes up a new link of its kind.
func (k *Kernel) kindData(l backend.Link) (message, error) {
	var m message
	if l.Type == backend.KindBridge {
		m.bool(unix.IFLA_BR_MCAST_SNOOPING, l.Bridge.McastSnooping)
		m.bool(unix.IFLA_BR_NF_CALL_IPTABLES, l.Bridge.CallIptables)
		m.bool(unix.IFLA_BR_NF_CALL_IP6TABLES, l.Bridge.CallIp6tables)
		return m, nil
	}
	m.u32(unix.IFLA_VXLAN_ID, l.VXLAN.VNI)
	m.be16(unix.IFLA_VXLAN_PORT, l.VXLAN.Port)
	m.bool(unix.IFLA_VXLAN_LEARNING, l.VXLAN.Learning)
	return m, k.putUnderlay(&m, l.VXLAN)
}

func (k *Kernel) putUnderlay(m *message, v backend.VXLAN) error {
	switch {
	case v.Local.Is4():
		m.addr(unix.IFLA_VXLAN_LOCAL, v.Local)
	case v.Local.Is6():
		m.addr(unix.IFLA_VXLAN_LOCAL6, v.Local)
	}
	index := 0
	if v.Dev != "" {
		dev, err := k.linkByName(v.Dev)
		if err != nil {
			return err
		}
		index = dev.index
	}
	m.u32(unix.IFLA_VXLAN_LINK, uint32(index))
	return nil
}

func putInfo(m *message, kind backend.LinkKind, data message) {
	m.nest(unix.IFLA_LINKINFO, func(m *message) {
		m.bytes(unix.IFLA_INFO_KIND, []byte(kind))
		m.bytes(unix.IFLA_INFO_DATA, data)
	})
}

// changeLink writes only what differs.
func (k *Kernel) changeLink(index int, have, want backend.Link) error {
	if have.Type != want.Type || have.VXLAN.VNI != want.VXLAN.VNI || have.VXLAN.Port != want.VXLAN.Port ||
		have.VXLAN.Local.Is4() != want.VXLAN.Local.Is4() {
		return fmt.Errorf("kind, VNI, port and underlay family of %s cannot be changed; it must be made anew", want.Name)
	}
	data, err := k.kindChange(have, want)
	if err != nil {
		return err
	}
	if len(data) > 0 { // in a message of its own: beside it the kernel takes no MTU of a VXLAN device
		m := linkMessage(index, 0, 0)
		putInfo(&m, want.Type, data)
		if err := k.conn.do(unix.RTM_NEWLINK, 0, m); err != nil {
			return k.explainLink(want, err)
		}
	}
	if err := k.changeCommon(index, have, want); err != nil {
		return k.explainLink(want, err)
	}
	if have.VXLAN.NoTxChecksum != want.VXLAN.NoTxChecksum {
		return k.setNoTxChecksum(want)
	}
	return nil
}

// changeCommon changes what every kind of link has.
func (k *Kernel) changeCommon(index int, have, want backend.Link) error {
	m := linkMessage(index, 0, 0)
	if have.Up != want.Up {
		m = linkMessage(index, upFlag(want.Up), unix.IFF_UP)
	}
	if have.MAC != want.MAC {
		m.bytes(unix.IFLA_ADDRESS, want.MAC[:])
	}
	if have.MTU != want.MTU {
		m.u32(unix.IFLA_MTU, uint32(want.MTU))
	}
	return k.conn.do(unix.RTM_NEWLINK, 0, m)
}

func (k *Kernel) kindChange(have, want backend.Link) (message, error) {
	var m message
	change := func(typ uint16, have, want bool) {
		if have != want {
			m.bool(typ, want)
		}
	}
	change(unix.IFLA_BR_MCAST_SNOOPING, have.Bridge.McastSnooping, want.Bridge.McastSnooping)
	change(unix.IFLA_BR_NF_CALL_IPTABLES, have.Bridge.CallIptables, want.Bridge.CallIptables)
	change(unix.IFLA_BR_NF_CALL_IP6TABLES, have.Bridge.CallIp6tables, want.Bridge.CallIp6tables)
	change(unix.IFLA_VXLAN_LEARNING, have.VXLAN.Learning, want.VXLAN.Learning)
	var err error
	if have.VXLAN.Local != want.VXLAN.Local || have.VXLAN.Dev != want.VXLAN.Dev {
		m.u32(unix.IFLA_VXLAN_ID, want.VXLAN.VNI)
		err = k.putUnderlay(&m, want.VXLAN)
	}
	return m, err
}

func (k *Kernel) setNoTxChecksum(l backend.Link) error {
	return wrap(setTxChecksum(k.ioctl, l.Name, !l.VXLAN.NoTxChecksum), "setting the transmit checksum offload")
}

// explainLink says what is behind an errno.
func (k *Kernel) explainLink(l backend.Link, err error) error {
	switch {
	case errors.Is(err, unix.EEXIST) && l.Type == backend.KindVXLAN:
		vxlans, listErr := k.links(string(backend.KindVXLAN))
		if other, ok := clash(l.VXLAN, vxlans); ok && listErr == nil {
			return fmt.Errorf("%w: %s", err, clashText(other))
		}
		return fmt.Errorf("%w: a device called %s came to be there since the last look, or one of VNI %d and UDP port %d "+
			"was made here and moved to another network namespace", err, l.Name, l.VXLAN.VNI, l.VXLAN.Port)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: a device called %s came to be there since the last look", err, l.Name)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%w: UDP port %d is held by another program or by a VXLAN device of another kind "+
			"(ss -lunp, ip -d link show type vxlan); end that, or set another Backend.Port in net-conf.json",
			err, l.VXLAN.Port)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w: this kernel makes no %s links; load the module (modprobe %s), or boot a kernel that has it",
			err, l.Type, l.Type)
	case errors.Is(err, unix.EINVAL) && l.Type == backend.KindVXLAN:
		return fmt.Errorf("%w: perhaps MTU %d does not fit into that of %s", err, l.MTU, l.VXLAN.Dev)
	}
	return err
}

func upFlag(up bool) uint32 {
	if up {
		return unix.IFF_UP
	}
	return 0
}

package podnet

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// skipStats spares the kernel collecting counters for an answer (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h).
const skipStats = 1 << 3

// A link is what the host knows of a network device.
type link struct {
	netlink.LinkAttrs
	kind string
	// port has the settings of a bridge's port (IFLA_BRPORT_*) that are of one byte.
	port map[uint16]byte
}

func (l link) ours(kind string) bool { return l.Group == backend.Owner && l.kind == kind }

func (h *host) store(runDir string, call caller) *store {
	return &store{runDir: runDir, call: call, alive: func(veth string, index int) (bool, error) {
		l, err := h.link(veth)
		if errors.Is(err, unix.ENODEV) {
			return false, nil
		}
		return err == nil && (index == 0 || l.Index == index), err
	}}
}

// link looks a device up. The error is ENODEV where there is none of the name.
func (h *host) link(name string) (link, error) {
	req := h.request(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return link{}, fmt.Errorf("looking up %s: %w", name, meaning(err))
	}
	if len(msgs) != 1 {
		return link{}, fmt.Errorf("looking up %s: the kernel gave %d answers", name, len(msgs))
	}
	return parseLink(msgs[0])
}

// parseLink reads what is of interest here in a message about a link.
func parseLink(msg []byte) (l link, err error) {
	attrs, err := nl.ParseRouteAttr(msg[unix.SizeofIfInfomsg:])
	if err != nil {
		return l, fmt.Errorf("reading the kernel's answer about a link: %w", err)
	}
	head := nl.DeserializeIfInfomsg(msg)
	l.Index, l.RawFlags = int(head.Index), head.Flags
	for _, a := range attrs {
		switch a.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.IFLA_IFNAME:
			l.Name = unix.ByteSliceToString(a.Value)
		case unix.IFLA_ADDRESS:
			l.HardwareAddr = a.Value
		case unix.IFLA_MASTER:
			l.MasterIndex = int(binary.NativeEndian.Uint32(a.Value))
		case unix.IFLA_GROUP:
			l.Group = binary.NativeEndian.Uint32(a.Value)
		case unix.IFLA_OPERSTATE:
			l.OperState = netlink.LinkOperState(a.Value[0])
		case unix.IFLA_LINKINFO:
			l.kind = unix.ByteSliceToString(nested(a.Value, nl.IFLA_INFO_KIND))
			l.port = portSettings(nested(a.Value, nl.IFLA_INFO_SLAVE_DATA))
		}
	}
	return l, nil
}

// portSettings reads the settings of a bridge's port.
func portSettings(data []byte) map[uint16]byte {
	attrs, err := nl.ParseRouteAttr(data)
	if err != nil {
		return nil
	}
	settings := make(map[uint16]byte, len(attrs))
	for _, a := range attrs {
		if len(a.Value) == 1 {
			settings[a.Attr.Type&nl.NLA_TYPE_MASK] = a.Value[0]
		}
	}
	return settings
}

// nested finds an attribute by the types on the way to it; nil where there is none.
func nested(value []byte, path ...uint16) []byte {
	for _, kind := range path {
		attrs, err := nl.ParseRouteAttr(value)
		if err != nil {
			return nil
		}
		i := slices.IndexFunc(attrs, func(a syscall.NetlinkRouteAttr) bool { return a.Attr.Type&^unix.NLA_F_NESTED == kind })
		if i < 0 {
			return nil
		}
		value = attrs[i].Value
	}
	return value
}

// A veth is a pair of devices: one end a port of the bridge, the other in the pod.
type veth struct {
	name    string
	mac     backend.MAC
	mtu     int // bytes, of both ends
	bridge  int // ifindex
	podName string
	podMAC  backend.MAC
	podNS   *os.File
	// guarded keeps the pod to its own addresses.
	guarded bool
}

// add makes the pair in one message, so that there is no moment at which one end is where it should not be.
func (h *host) add(v veth) error {
	req := h.request(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, v.mac[:]))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.mtu))))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(backend.Owner)))
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(v.bridge))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.podName))
	peer.AddRtAttr(unix.IFLA_ADDRESS, v.podMAC[:])
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.mtu)))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(v.podNS.Fd())))
	req.AddData(info)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("ip link add %s type veth peer %s: %w", v.name, v.podName, meaning(err))
	}
	return nil
}

// open lets traffic through a bridge port: up, and with hairpin, so that a pod reaches itself by a service's address. A
// guarded one takes what its pod sends as itself, and nothing else.
func (h *host) open(index int, guarded bool) error {
	settings := append(isolation(guarded), nl.NewRtAttr(nl.IFLA_BRPORT_MODE, nl.Uint8Attr(1)))
	return h.setPort(index, unix.IFF_UP, settings...)
}

// setPort sets flags of a link, and settings of the bridge's port that it is.
func (h *host) setPort(index int, flags uint32, settings ...*nl.RtAttr) error {
	req := h.request(unix.RTM_NEWLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), flags, flags
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	port := info.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	for _, s := range settings {
		port.AddChild(s)
	}
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return meaning(err)
}

// remove deletes a pair by its host's end. One that is gone, or has another index than the one given (0 stands for
// any), or is not ours, is no error.
func (h *host) remove(name string, index int) error {
	l, err := h.link(name)
	if err != nil {
		return ignore(err, unix.ENODEV)
	}
	if !l.ours("veth") || (index != 0 && l.Index != index) {
		return nil
	}
	req := h.request(unix.RTM_DELLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Index)
	req.AddData(msg)
	if _, err = req.Execute(unix.NETLINK_ROUTE, 0); ignore(err, unix.ENODEV) != nil {
		return fmt.Errorf("ip link del %s: %w", name, meaning(err))
	}
	return nil
}

// A veth is called by a prefix and as many bytes of a sum, in hex digits.
const (
	vethPrefix = "tweed"
	vethBytes  = 5
)

// vethName is the name of the host's end of a pod's interface. It follows from what the runtime calls the attachment,
// so DEL finds it also where the record is lost.
func vethName(container, iface string) string {
	sum := attachmentSum(container, iface)
	return vethPrefix + hex.EncodeToString(sum[:vethBytes])
}

// vethMAC is the MAC of the host's end. It is set at creation, or udev would set another one a moment later.
func vethMAC(container, iface string) backend.MAC {
	sum := attachmentSum(container, iface)
	m := backend.MAC(sum[5:11])
	m[0] = m[0]&^1 | 2
	return m
}

func attachmentSum(container, iface string) [sha256.Size]byte {
	return sha256.Sum256([]byte(container + "/" + iface))
}

// podMAC derives a pod's MAC from its address, so that a neighbour's entry for a reused address is never stale: 0a:58
// and the IPv4 address, or the low 32 bits of the IPv6 address where there is no other.
func podMAC(addrs []netip.Prefix) backend.MAC {
	m := backend.MAC{0x0a, 0x58}
	for _, p := range addrs {
		if b := p.Addr().AsSlice(); p.Addr().Is4() || m == (backend.MAC{0x0a, 0x58}) {
			copy(m[2:], b[len(b)-4:])
		}
	}
	return m
}

// ipNet is a prefix in the form of the libraries.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// meaning adds to a cryptic error number what it means here.
func meaning(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: this needs root, or CAP_NET_ADMIN and CAP_SYS_ADMIN", err)
	}
	return err
}

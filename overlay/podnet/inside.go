package podnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// openNetNS opens a network namespace other than this thread's own.
func openNetNS(path string) (*os.File, error) {
	f, err := open(path, os.O_RDONLY, 0)
	if notExist(err) {
		return nil, fail(types.ErrInvalidNetNS,
			"CNI_NETNS: there is no network namespace %s; the pod's sandbox is gone", path)
	}
	if err != nil {
		return nil, fail(types.ErrInvalidNetNS, "CNI_NETNS: %v", err)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fail(types.ErrInvalidNetNS, "CNI_NETNS: %s is not a network namespace", path)
	}
	var pod, host unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &pod), unix.Stat("/proc/thread-self/ns/net", &host)); err != nil {
		f.Close()
		return nil, fmt.Errorf("comparing %s with the host's network namespace: %w", path, err)
	}
	if pod.Ino == host.Ino && pod.Dev == host.Dev {
		f.Close()
		return nil, fail(types.ErrInvalidNetNS, "CNI_NETNS: %s is the host's own network namespace", path)
	}
	return f, nil
}

// within calls f in a network namespace. What f opens there stays there.
func within(ns *os.File, f func() error) error {
	runtime.LockOSThread()
	own, err := open("/proc/thread-self/ns/net", os.O_RDONLY, 0)
	if err == nil {
		defer own.Close()
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
	}
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering network namespace %s: %w", ns.Name(), meaning(err))
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil { // the thread stays this goroutine's, and ends with it
		return errors.Join(err, fmt.Errorf("coming back from network namespace %s: %w", ns.Name(), meaning(back)))
	}
	runtime.UnlockOSThread()
	return err
}

// An end is the pod's end of a veth, as it should be.
type end struct {
	iface    string
	addrs    []netip.Prefix
	gateways []netip.Addr
	// apart are those of addrs that do not use the pod's default route, because another interface had it first.
	apart []netip.Prefix
}

// configure brings the end up, with addresses and default routes, and says which are apart. It must be called within
// the pod's namespace.
func (e *end) configure(sysctlRoot string) error {
	pod, err := dial()
	if err != nil {
		return err
	}
	defer pod.close()
	index, err := pod.index(e.iface)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(e.addrs, func(a netip.Prefix) bool { return a.Addr().Is6() }) {
		// Some runtimes switch IPv6 off in new namespaces. And no pod is to route by what another one advertises.
		conf := filepath.Join(sysctlRoot, "net/ipv6/conf", e.iface)
		err := errors.Join(setSysctl(conf+"/disable_ipv6", "0"), setSysctl(conf+"/accept_ra", "0"))
		if err != nil {
			return fmt.Errorf("%w (sysctlRoot in the network configuration says where settings are found)", err)
		}
	}
	if err := pod.up(index); err != nil {
		return fmt.Errorf("ip link set %s up: %w", e.iface, err)
	}
	for _, a := range e.addrs {
		if err := pod.address(index, a); err != nil {
			return fmt.Errorf("ip address add %s dev %s: %w", a, e.iface, err)
		}
	}
	for _, a := range e.addrs {
		gw, ok := gatewayOf(a, e.gateways)
		if !ok {
			continue
		}
		if err := e.leadOut(pod, index, a, gw, sysctlRoot); err != nil {
			return err
		}
	}
	return pod.settle(e.iface)
}

func (h *host) up(index int) error {
	req := h.request(unix.RTM_NEWLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), unix.IFF_UP, unix.IFF_UP
	req.AddData(msg)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return meaning(err)
}

// address gives a device an address; in IPv6 without asking the others whether they have it.
func (h *host) address(index int, a netip.Prefix) error {
	req := h.request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	msg := nl.NewIfAddrmsg(family(a.Addr()))
	msg.Prefixlen, msg.Index = uint8(a.Bits()), uint32(index)
	ip := a.Addr().AsSlice()
	if a.Addr().Is6() {
		msg.Flags = unix.IFA_F_NODAD
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, ip))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, ip))
	if last, ok := broadcast(a); ok {
		req.AddData(nl.NewRtAttr(unix.IFA_BROADCAST, last.AsSlice()))
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return meaning(err)
}

// broadcast is the last address of an IPv4 subnet that has more than two (RFC 3021).
func broadcast(a netip.Prefix) (netip.Addr, bool) {
	if !a.Addr().Is4() || a.Bits() > 30 {
		return netip.Addr{}, false
	}
	_, last := podRange(a)
	return last.Next(), true
}

func (h *host) defaultRoute(index int, gw netip.Addr) error {
	req := h.request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	msg := nl.NewRtMsg()
	msg.Family = uint8(family(gw))
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, gw.AsSlice()))
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return meaning(err)
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// setSysctl gives a kernel setting a value, unless it has it, and sees that it took.
func setSysctl(path, want string) error {
	have, err := os.ReadFile(path)
	if err != nil || strings.TrimSpace(string(have)) == want {
		return err
	}
	if err := os.WriteFile(path, []byte(want), 0); err != nil {
		return err
	}
	if have, err = os.ReadFile(path); err == nil && strings.TrimSpace(string(have)) != want {
		err = fmt.Errorf("%s is %s although %s was written", path, strings.TrimSpace(string(have)), want)
	}
	return err
}

// broken names what is wrong with the end. It must be called within the pod's namespace.
func (e *end) broken(mac backend.MAC) (broken []error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return []error{fmt.Errorf("opening a netlink socket: %w", err)}
	}
	defer h.Close()
	l, err := h.LinkByName(e.iface)
	if err != nil {
		return []error{fmt.Errorf("interface %s is missing (%w)", e.iface, err)}
	}
	at := l.Attrs()
	if at.RawFlags&unix.IFF_UP == 0 {
		broken = append(broken, fmt.Errorf("interface %s is down", e.iface))
	}
	if have := at.HardwareAddr.String(); have != mac.String() {
		broken = append(broken, fmt.Errorf("interface %s has MAC %s, not %s", e.iface, have, mac))
	}
	addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return append(broken, fmt.Errorf("listing addresses: %w", err))
	}
	routes, err := h.RouteList(l, netlink.FAMILY_ALL)
	if err != nil {
		return append(broken, fmt.Errorf("listing routes: %w", err))
	}
	for _, a := range e.addrs {
		if !slices.ContainsFunc(addrs, func(have netlink.Addr) bool { return have.IPNet.String() == a.String() }) {
			broken = append(broken, fmt.Errorf("interface %s lacks address %s", e.iface, a))
		}
		gw, ok := gatewayOf(a, e.gateways)
		if ok && slices.Contains(e.apart, a) {
			if err := e.brokenApart(h, l, a, gw); err != nil {
				broken = append(broken, err)
			}
			continue
		}
		if ok && !slices.ContainsFunc(routes, func(r netlink.Route) bool { return isDefault(r, gw) }) {
			broken = append(broken, fmt.Errorf("there is no default route via %s dev %s", gw, e.iface))
		}
	}
	return broken
}

func isDefault(r netlink.Route, gw netip.Addr) bool {
	return leadsEverywhere(r) && r.Gw.Equal(gw.AsSlice())
}

// leadsEverywhere reports whether a route is one for all destinations.
func leadsEverywhere(r netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}

package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// A Pod is one attachment, in the runtime's words (CNI spec, section 2, "Parameters").
type Pod struct {
	Container string // CNI_CONTAINERID
	NetNS     string // CNI_NETNS, the path of a network namespace
	Interface string // CNI_IFNAME
	Path      string // CNI_PATH, where the plugins are that ports and bandwidth are delegated to
	Args      string // CNI_ARGS
	Namespace string // of Kubernetes; see NamespaceOf
}

// Attach gives a pod an interface on the node's bridge, with an address of each of the node's subnets and default
// routes, and has further plugins see to its ports and limits. If it fails, or ctx ends before it is done, nothing of
// it is left. It must be called in the host's network namespace. The error has a CNI code where the spec knows one: 11,
// try again later, for what passes by itself.
func Attach(ctx context.Context, c Config, p Pod) (*types100.Result, error) {
	if c.unfit != nil {
		return nil, c.unfit
	}
	wish, err := c.asked(p)
	if err != nil {
		return nil, err
	}
	info, err := readyNode(c.RunDir)
	if err != nil {
		return nil, err
	}
	wanted, err := c.delegations(p, info.PacketFilter)
	if err != nil {
		return nil, err
	}
	ns, err := openNetNS(p.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	host, err := dial()
	if err != nil {
		return nil, err
	}
	defer host.close()
	bridge, err := host.bridge(info)
	if err != nil {
		return nil, fail(types.ErrTryAgainLater, "%v", err)
	}
	if wish.mac.String() == bridge.HardwareAddr.String() {
		return nil, wish.macField.refuse(wish.mac.String(), "is the MAC of the node's bridge %s; give another", info.Bridge)
	}

	held, err := host.take(ctx, c, p, wish, info.Subnets)
	if err != nil {
		return nil, err
	}
	v := veth{
		name: held.Veth, mac: vethMAC(p.Container, p.Interface), mtu: info.MTU, bridge: bridge.Index,
		podName: p.Interface, podMAC: held.MAC, podNS: ns,
		guarded: !info.Spoofing.Allows(p.Namespace),
	}
	if err := host.create(v, held); err != nil {
		_, freeErr := held.free()
		return nil, errors.Join(err, freeErr)
	}
	inPod := &end{iface: p.Interface, addrs: held.Addrs, gateways: info.Gateways}
	var r *types100.Result
	if err = host.wire(ctx, v, held, inPod, info.Bridge, c.SysctlRoot); err == nil {
		r, err = held.delegate(ctx, wanted, p, result(v, p, inPod, c.DNS))
	}
	if err != nil {
		err = fmt.Errorf("pod %s: %w; it was taken back", p.Container, err)
		return nil, errors.Join(err, undo(host, held, p.NetNS))
	}
	held.release()
	return r, nil
}

// readyNode reads what the daemon says of a node that pods can be attached to.
func readyNode(runDir string) (NodeInfo, error) {
	info, err := ReadNodeInfo(runDir)
	if err != nil {
		return info, fail(types.ErrTryAgainLater, "%v", err)
	}
	if len(info.Subnets) == 0 {
		return info, fail(types.ErrTryAgainLater,
			"node %s has no subnet for pods yet; see what the tweed daemon logs", info.Node)
	}
	return info, nil
}

// take gives a pod an address of each subnet, and a record.
func (h *host) take(ctx context.Context, c Config, p Pod, wish asked, subnets []netip.Prefix) (*hold, error) {
	store := h.store(c.RunDir, callIn(context.Background(), c.RunDir, p.Path))
	store.wait = forVeths(ctx)
	return store.take(record{
		Network: c.Name, Container: p.Container, Interface: p.Interface, Veth: vethName(p.Container, p.Interface),
		Delegates: []json.RawMessage{}, Namespace: p.Namespace, asked: wish,
	}, subnets)
}

// forVeths waits for the kernel, which removes the veths of a namespace that has ended some time later, longer where
// many have ended at once. Nothing tells such a veth from that of a pod that lives, so an ADD to a subnet that is used
// up is refused only after that time.
func forVeths(ctx context.Context) func() bool {
	const interval, longest = 100 * time.Millisecond, 5 * time.Second
	deadline := time.Now().Add(longest)
	return func() bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(interval):
			return time.Now().Before(deadline)
		}
	}
}

// create makes the pair of devices. An interface of the pod's or the host's that is in the way is left alone.
func (h *host) create(v veth, held *hold) error {
	err := h.add(v)
	if !errors.Is(err, unix.EEXIST) {
		return ioFailure(err)
	}
	if _, err := h.link(v.name); err == nil {
		return fail(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID, CNI_IFNAME: the host has a device %s, which "+
			"is interface %s of container %s; delete that first", v.name, v.podName, held.Container)
	}
	return fail(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME: network namespace %s has an interface %s already",
		v.podNS.Name(), v.podName)
}

// wire makes a pair of devices that is there work. The error is ctx's if that has ended meanwhile.
func (h *host) wire(ctx context.Context, v veth, held *hold, inPod *end, bridge, sysctlRoot string) error {
	var err error
	if held.Index, err = h.index(v.name); err != nil {
		return err
	}
	if err := held.save(); err != nil {
		return err
	}
	// The host's end goes first: from the moment the pod's end is up, frames pass as they should.
	if err := h.open(held.Index, v.guarded); err != nil {
		return fmt.Errorf("ip link set %s up type bridge_slave hairpin on: %w", v.name, err)
	}
	if err := h.guard(v, held); err != nil {
		return err
	}
	err = within(v.podNS, func() error { return inPod.configure(sysctlRoot) })
	if held.Apart = inPod.apart; err == nil && len(held.Apart) > 0 {
		err = held.save()
	}
	if err != nil {
		return err
	}
	if err := errors.Join(h.settle(v.name), h.settle(bridge)); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("interrupted (%w)", err)
	}
	return nil
}

// undo takes back what an ADD has done. While a delegate cannot do its part, or the veth cannot be removed, the
// addresses stay taken: what is left of the one would reach whoever has the address next.
func undo(host *host, held *hold, netns string) error {
	err := held.undelegate()
	join(netns, held.Apart)
	if err = errors.Join(err, host.removeJudged(held.record)); err != nil {
		held.release()
		return err
	}
	if _, err = held.free(); err != nil {
		err = fmt.Errorf("freeing the addresses of container %s, interface %s: %w", held.Container, held.Interface, err)
	}
	return held.store.trouble(err)
}

// Detach takes a pod's interface away, with what further plugins did for it, and frees its addresses. What is gone
// already is no error. It must be called in the host's network namespace.
func Detach(c Config, p Pod) error {
	host, err := dial()
	if err != nil {
		return err
	}
	defer host.close()
	store := host.store(c.RunDir, callIn(context.Background(), c.RunDir, p.Path))
	held, err := store.find(p.Container, p.Interface)
	if err != nil {
		return store.trouble(err)
	}
	if held == nil || !held.legible() {
		store.undelegateUnrecorded(c, p)
	}
	if held == nil { // the name of the veth still tells whose it is
		return host.remove(vethName(p.Container, p.Interface), 0)
	}
	return undo(host, held, p.NetNS)
}

// Status reports whether pods can be attached: code 50 until the daemon's first pass of this boot has converged, 51
// when the bridge or the device to other nodes is missing. Anything else is no error, for the runtime takes the node
// for not ready on any, and pods that run well would be evicted.
func Status(c Config) error {
	info, err := ReadNodeInfo(c.RunDir)
	if errors.Is(err, ErrAbsent) {
		return fail(types.ErrPluginNotAvailable, "%v", err)
	}
	if err != nil {
		return nil
	}
	if !info.Converged {
		return fail(types.ErrPluginNotAvailable,
			"the tweed daemon has not finished its first pass since boot; see what it logs")
	}
	host, err := dial()
	if err != nil {
		return nil
	}
	defer host.close()
	if _, err := host.bridge(info); errors.Is(err, errNoBridge) {
		return fail(types.ErrLimitedConnectivity, "%v", err)
	}
	if info.Device == "" {
		return nil
	}
	if _, err := host.link(info.Device); errors.Is(err, unix.ENODEV) {
		return fail(types.ErrLimitedConnectivity, "device %s is missing, so other nodes' pods cannot be reached; the "+
			"tweed daemon makes it: see that it runs, and what it logs", info.Device)
	}
	return nil
}

// errNoBridge is that of a node without its bridge.
var errNoBridge = errors.New("pods cannot be attached")

// bridge looks up the node's bridge.
func (h *host) bridge(info NodeInfo) (link, error) {
	l, err := h.link(info.Bridge)
	if errors.Is(err, unix.ENODEV) {
		return l, fmt.Errorf("%w: bridge %s is missing; the tweed daemon makes it: see that it runs, and what it logs",
			errNoBridge, info.Bridge)
	}
	if err == nil && !l.ours("bridge") {
		err = fmt.Errorf("%w: %s is a %s that tweed has not made (its group is not %d); remove or rename it, and the tweed "+
			"daemon makes the bridge", errNoBridge, info.Bridge, l.kind, backend.Owner)
	}
	return l, err
}

// Check compares a pod's interface with what Attach has made, and names everything that is broken. What a later plugin
// may have changed, the MAC, is compared with the result that the runtime remembers.
func Check(c Config, p Pod) error {
	if c.unfit != nil {
		return c.unfit
	}
	if c.PrevResult == nil {
		return fail(types.ErrInvalidNetworkConfig,
			"network configuration: prevResult is missing; the runtime must give CHECK the result of the ADD")
	}
	info, err := ReadNodeInfo(c.RunDir)
	if err != nil {
		return fail(types.ErrTryAgainLater, "%v", err)
	}
	ns, err := openNetNS(p.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	host, err := dial()
	if err != nil {
		return err
	}
	defer host.close()
	store := host.store(c.RunDir, callIn(context.Background(), c.RunDir, p.Path))
	rec, err := store.read(c, p)
	if err != nil {
		return err
	}
	inPod, mac := c.remembered(&end{iface: p.Interface, addrs: rec.Addrs, gateways: info.Gateways, apart: rec.Apart}, rec.MAC)
	broken := host.broken(rec, info)
	err = within(ns, func() error {
		broken = append(broken, inPod.broken(mac)...)
		return nil
	})
	if err != nil {
		return err
	}
	broken = append(broken, store.brokenDelegates(c, p, rec)...)
	if len(broken) > 0 {
		return fmt.Errorf("pod %s: %w; delete the pod to have it attached anew", p.Container, errors.Join(broken...))
	}
	return nil
}

// read returns the record of an attachment, and names what is wrong with it.
func (s *store) read(c Config, p Pod) (record, error) {
	held, err := s.lookUp(p.Container, p.Interface, unix.LOCK_SH)
	if err != nil {
		return record{}, s.trouble(err)
	}
	if held == nil {
		return record{}, s.unrecorded(c, p)
	}
	defer held.release()
	if !held.legible() {
		return record{}, fmt.Errorf("pod %s: the record %s cannot be read", p.Container, s.pod(held.Veth))
	}
	for _, a := range held.Addrs {
		if !held.named(s.addr(a.Addr())) {
			return record{}, fmt.Errorf("pod %s: address %s is not its own in the address store (%s)", p.Container, a.Addr(),
				s.addr(a.Addr()))
		}
	}
	return held.record, nil
}

// unrecorded says that there is no record of an attachment. The error has the code of an unknown container where
// nothing is left of it that a DEL would take away.
func (s *store) unrecorded(c Config, p Pod) error {
	text := fmt.Sprintf("pod %s: the address store in %s has no record of interface %s", p.Container, s.runDir,
		p.Interface)
	alive, err := s.alive(vethName(p.Container, p.Interface), 0)
	if err != nil || alive || c.Delegates() {
		return errors.Join(errors.New(text), err)
	}
	return fail(types.ErrUnknownContainer, "%s", text)
}

// broken names what is wrong with the host's end of a pod's interface.
func (h *host) broken(rec record, info NodeInfo) (broken []error) {
	end, err := h.link(rec.Veth)
	if errors.Is(err, unix.ENODEV) {
		return []error{fmt.Errorf("its veth %s on the host is missing", rec.Veth)}
	}
	if err != nil {
		return []error{err}
	}
	bridge, err := h.bridge(info)
	if err != nil {
		return []error{err}
	}
	if end.Index != rec.Index {
		return []error{fmt.Errorf("%s on the host is not its veth, but another device of that name (%d, not %d)", rec.Veth,
			end.Index, rec.Index)}
	}
	if end.RawFlags&unix.IFF_UP == 0 {
		broken = append(broken, fmt.Errorf("its veth %s on the host is down", rec.Veth))
	}
	if end.MasterIndex != bridge.Index {
		return append(broken, fmt.Errorf("its veth %s on the host is not a port of %s", rec.Veth, info.Bridge))
	}
	if end.port[nl.IFLA_BRPORT_MODE] == 0 {
		broken = append(broken, fmt.Errorf("its bridge port %s has hairpin off", rec.Veth))
	}
	return append(broken, h.unguarded(rec, end, info.Spoofing)...)
}

// remembered is what is left of an end and its MAC after what later plugins have changed, as prevResult tells: an
// address or a default route that is not in it is none that CHECK may miss.
func (c Config) remembered(e *end, mac backend.MAC) (*end, backend.MAC) {
	r, err := readResult(c.CNIVersion, c.PrevResult)
	if err != nil {
		return e, mac
	}
	if set, ok := rememberedMAC(r, e.iface); ok {
		mac = set
	}
	left := &end{iface: e.iface, apart: e.apart}
	for _, a := range e.addrs {
		if slices.ContainsFunc(r.IPs, func(ip *types100.IPConfig) bool { return ip.Address.IP.Equal(a.Addr().AsSlice()) }) {
			left.addrs = append(left.addrs, a)
		}
	}
	for _, gw := range e.gateways {
		same := func(a netip.Prefix) bool { return a.Addr().Is4() == gw.Is4() }
		if slices.ContainsFunc(e.apart, same) || slices.ContainsFunc(r.Routes, func(r *types.Route) bool {
			ones, bits := r.Dst.Mask.Size()
			return ones == 0 && bits == gw.BitLen() && (r.GW == nil || r.GW.Equal(gw.AsSlice()))
		}) {
			left.gateways = append(left.gateways, gw)
		}
	}
	return left, mac
}

// rememberedMAC finds the MAC that a result gives for an interface in a pod.
func rememberedMAC(r *types100.Result, iface string) (backend.MAC, bool) {
	i := slices.IndexFunc(r.Interfaces, func(i *types100.Interface) bool { return i.Name == iface && i.Sandbox != "" })
	if i < 0 {
		return backend.MAC{}, false
	}
	mac, err := backend.ParseMAC(r.Interfaces[i].Mac)
	return mac, err == nil
}

// result says what was made (CNI spec, section 5, "ADD Success").
func result(v veth, p Pod, inPod *end, dns types.DNS) *types100.Result {
	r := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{
			{Name: v.name, Mac: v.mac.String(), Mtu: v.mtu},
			{Name: p.Interface, Mac: v.podMAC.String(), Mtu: v.mtu, Sandbox: p.NetNS},
		},
		DNS: dns,
	}
	for _, a := range inPod.addrs {
		ip := &types100.IPConfig{Interface: types100.Int(1), Address: *ipNet(a)}
		gw, ok := gatewayOf(a, inPod.gateways)
		if ok {
			ip.Gateway = gw.AsSlice()
		}
		if ok && !slices.Contains(inPod.apart, a) {
			r.Routes = append(r.Routes, &types.Route{Dst: *ipNet(everything(gw)), GW: gw.AsSlice()})
		}
		r.IPs = append(r.IPs, ip)
	}
	return r
}

func gatewayOf(a netip.Prefix, gateways []netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(gateways, a.Contains)
	if i < 0 {
		return netip.Addr{}, false
	}
	return gateways[i], true
}

// everything is the destination of the default route through gw.
func everything(gw netip.Addr) netip.Prefix {
	if gw.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// ioFailure gives an error that has no CNI code that of a failed input or output.
func ioFailure(err error) error {
	var coded *types.Error
	if err == nil || errors.As(err, &coded) {
		return err
	}
	return fail(types.ErrIOFailure, "%v", err)
}

// notExist reports whether there is no such file, or one of a path's directories is none.
func notExist(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

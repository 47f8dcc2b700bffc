package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// A Pod is one attachment, in the runtime's words (CNI spec, section 2, "Parameters").
type Pod struct {
	Container string // CNI_CONTAINERID
	NetNS     string // CNI_NETNS, the path of a network namespace
	Interface string // CNI_IFNAME
	Path      string // CNI_PATH, where the plugins are that ports and bandwidth are delegated to
}

// Attach gives a pod an interface on the node's bridge, with an address of each of the node's subnets and default
// routes, and has further plugins see to its ports and limits. If it fails, or ctx ends before it is done, nothing of
// it is left. It must be called in the host's network namespace. The error has a CNI code where the spec knows one: 11,
// try again later, for what passes by itself.
func Attach(ctx context.Context, c Config, p Pod) (*types100.Result, error) {
	if c.unfit != nil {
		return nil, c.unfit
	}
	info, err := ReadNodeInfo(c.RunDir)
	if err != nil {
		return nil, fail(types.ErrTryAgainLater, "%v", err)
	}
	if len(info.Subnets) == 0 {
		return nil, fail(types.ErrTryAgainLater,
			"node %s has no subnet for pods yet; see what the tweed daemon logs", info.Node)
	}
	wanted := c.delegations()
	for _, d := range wanted {
		if _, err := findPlugin(d.Type, p.Path); err != nil {
			return nil, err
		}
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

	name := vethName(p.Container, p.Interface)
	rec := record{Container: p.Container, Interface: p.Interface, Veth: name, Delegates: []json.RawMessage{}}
	held, err := host.store(c.RunDir, callIn(context.Background(), c.RunDir, p.Path)).take(rec, info.Subnets)
	if err != nil {
		return nil, ioFailure(err)
	}
	v := veth{
		name: name, mac: vethMAC(p.Container, p.Interface), mtu: info.MTU, bridge: bridge.Index,
		podName: p.Interface, podMAC: held.MAC, podNS: ns,
	}
	if err := host.create(v, held); err != nil {
		_, freeErr := held.free()
		return nil, errors.Join(err, freeErr)
	}
	inPod := end{p.Interface, held.Addrs, info.Gateways}
	r := result(v, p, inPod, c.DNS)
	if err = host.wire(ctx, v, held, inPod, info.Bridge, c.SysctlRoot); err == nil {
		r, err = held.delegate(ctx, wanted, p, r)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pod %s: %w; it was taken back", p.Container, err), undo(host, held))
	}
	held.release()
	return r, nil
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
func (h *host) wire(ctx context.Context, v veth, held *hold, inPod end, bridge, sysctlRoot string) error {
	var err error
	if held.Index, err = h.index(v.name); err != nil {
		return err
	}
	if err := held.save(); err != nil {
		return fmt.Errorf("writing to the address store: %w", err)
	}
	// The host's end goes first: from the moment the pod's end is up, frames pass as they should.
	if err := h.open(held.Index); err != nil {
		return fmt.Errorf("ip link set %s up type bridge_slave hairpin on: %w", v.name, err)
	}
	err = within(v.podNS, func() error { return inPod.configure(sysctlRoot) })
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

// undo takes back what an ADD has done so far. While a delegate cannot do its part, or the veth cannot be removed, the
// addresses stay taken: what is left of the one would reach whoever has the address next.
func undo(host *host, held *hold) error {
	err := held.undelegate()
	if err = errors.Join(err, host.remove(held.Veth, held.Index)); err != nil {
		held.release()
		return err
	}
	_, err = held.free()
	return err
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
		return fmt.Errorf("reading the address store: %w", err)
	}
	if held == nil || !held.legible() {
		store.undelegateUnrecorded(c, p)
	}
	if held == nil { // the name of the veth still tells whose it is
		return host.remove(vethName(p.Container, p.Interface), 0)
	}
	return undo(host, held)
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
		return err
	}
	defer host.close()
	if _, err := host.bridge(info); err != nil {
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

// bridge looks up the node's bridge.
func (h *host) bridge(info NodeInfo) (link, error) {
	l, err := h.link(info.Bridge)
	if errors.Is(err, unix.ENODEV) {
		return l, fmt.Errorf("bridge %s is missing; the tweed daemon makes it: see that it runs, and what it logs",
			info.Bridge)
	}
	if err == nil && !l.ours("bridge") {
		err = fmt.Errorf("%s is a %s that tweed has not made (its group is not %d); remove or rename it, and the tweed "+
			"daemon makes the bridge", info.Bridge, l.kind, backend.Owner)
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
	rec, err := store.read(p)
	if err != nil {
		return err
	}
	if mac, ok := rememberedMAC(c.PrevResult, p.Interface); ok {
		rec.MAC = mac
	}
	inPod := end{p.Interface, rec.Addrs, info.Gateways}
	broken := host.broken(rec, info)
	err = within(ns, func() error {
		broken = append(broken, inPod.broken(rec.MAC)...)
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
func (s *store) read(p Pod) (record, error) {
	held, err := s.find(p.Container, p.Interface)
	if err != nil {
		return record{}, fmt.Errorf("reading the address store: %w", err)
	}
	if held == nil {
		return record{}, fmt.Errorf("pod %s: the address store in %s has no record of interface %s", p.Container, s.runDir,
			p.Interface)
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
	if end.RawFlags&unix.IFF_UP == 0 {
		broken = append(broken, fmt.Errorf("its veth %s on the host is down", rec.Veth))
	}
	if end.MasterIndex != bridge.Index {
		return append(broken, fmt.Errorf("its veth %s on the host is not a port of %s", rec.Veth, info.Bridge))
	}
	if !end.hairpin {
		broken = append(broken, fmt.Errorf("its bridge port %s has hairpin off", rec.Veth))
	}
	return broken
}

// rememberedMAC finds the MAC that a result gives for an interface in a pod. Its place is the same in all versions.
func rememberedMAC(result json.RawMessage, iface string) (backend.MAC, bool) {
	var r struct{ Interfaces []types100.Interface }
	if json.Unmarshal(result, &r) != nil {
		return backend.MAC{}, false
	}
	i := slices.IndexFunc(r.Interfaces, func(i types100.Interface) bool { return i.Name == iface && i.Sandbox != "" })
	if i < 0 {
		return backend.MAC{}, false
	}
	mac, err := backend.ParseMAC(r.Interfaces[i].Mac)
	return mac, err == nil
}

// result says what was made (CNI spec, section 5, "ADD Success").
func result(v veth, p Pod, inPod end, dns types.DNS) *types100.Result {
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
		if gw, ok := gatewayOf(a, inPod.gateways); ok {
			ip.Gateway = gw.AsSlice()
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

package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
)

// A fakeHost is a Fake as the exam wants it.
type fakeHost struct{ *Fake }

func newFakeHost() fakeHost {
	f := NewFake()
	f.SetInterface(backend.Interface{Name: "eth0", MTU: 1500, Up: true, Default4: true, Default6: true,
		Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.11/24"), netip.MustParsePrefix("2001:db8::11/64")}})
	return fakeHost{f}
}

func (h fakeHost) deleteUplink()                { h.RemoveInterface("eth0") }
func (h fakeHost) addStranger(o backend.Object) { h.AddStranger(o) }
func (h fakeHost) addPort(name string)          { h.AddPort(name) }
func (h fakeHost) byHand(op backend.Op) {
	if err := h.ByHand(op); err != nil {
		panic(err)
	}
}

func (h fakeHost) dropForwarded() {
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		h.SetFilterHost(masq.Chain{Family: family, Table: masq.FilterTable, Name: masq.BaseForward}, masq.Host{})
	}
}

// A realHost is a Kernel in a network namespace of its own.
type realHost struct {
	*Kernel
	t  testing.TB
	ns *netnstest.NS
}

func newRealHost(t testing.TB) *realHost {
	h := &realHost{t: t, ns: netnstest.New(t)}
	for _, c := range []string{
		"ip link add eth0 mtu 1500 type veth peer name wire", "ip link set wire up", "ip link set eth0 up",
		"ip addr add 192.0.2.11/24 dev eth0", "ip addr add 2001:db8::11/64 dev eth0 nodad",
		"ip route add default via 192.0.2.1", "ip route add default via 2001:db8::1",
	} {
		h.ns.Run(t, c)
	}
	// The kernel makes an IPv6 address the host's own a moment after it has been set.
	for deadline := time.Now().Add(20 * time.Second); ; {
		if strings.HasPrefix(h.ns.Run(t, "ip route get 2001:db8::11"), "local ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("2001:db8::11 does not become an address of the host")
		}
	}
	h.open()
	h.awaitAddress()
	return h
}

// awaitAddress waits until the uplink's IPv6 address is this host's: the kernel takes it on a moment after it said so.
func (h *realHost) awaitAddress() {
	addr := netip.MustParseAddr("2001:db8::11")
	for deadline := time.Now().Add(20 * time.Second); ; {
		path, err := h.RouteTo(context.Background(), addr)
		if err == nil && path.Dev == "lo" {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s is not an address of this host: %+v, %v", addr, path, err)
		}
	}
}

// open makes the Kernel.
func (h *realHost) open() {
	var err error
	h.ns.Do(h.t, func() { h.Kernel, err = New(Options{}) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(h.Close)
}

func (h *realHost) Observe(ctx context.Context, want backend.State) (have backend.Observed, err error) {
	h.ns.Do(h.t, func() { have, err = h.Kernel.Observe(ctx, want) })
	return have, err
}

func (h *realHost) Apply(ctx context.Context, op backend.Op) (err error) {
	h.ns.Do(h.t, func() { err = h.Kernel.Apply(ctx, op) })
	return err
}

func (h *realHost) ApplyAll(ctx context.Context, ops []backend.Op) (errs []error) {
	h.ns.Do(h.t, func() { errs = h.Kernel.ApplyAll(ctx, ops) })
	return errs
}

func (h *realHost) ObserveFilter(ctx context.Context, want masq.Ruleset) (have masq.Ruleset, err error) {
	h.ns.Do(h.t, func() { have, err = h.Kernel.ObserveFilter(ctx, want) })
	return have, err
}

func (h *realHost) Interfaces(ctx context.Context) (all []backend.Interface, err error) {
	h.ns.Do(h.t, func() { all, err = h.Kernel.Interfaces(ctx) })
	return all, err
}

func (h *realHost) RouterAdvertised(ctx context.Context) (devs []string, err error) {
	h.ns.Do(h.t, func() { devs, err = h.Kernel.RouterAdvertised(ctx) })
	return devs, err
}

func (h *realHost) RouteTo(ctx context.Context, to netip.Addr) (path backend.Path, err error) {
	h.ns.Do(h.t, func() { path, err = h.Kernel.RouteTo(ctx, to) })
	return path, err
}

func (h *realHost) Watch(ctx context.Context, uplink func(string) bool, ring func()) (err error) {
	h.ns.Do(h.t, func() { err = h.Kernel.Watch(ctx, uplink, ring) })
	return err
}

func (h *realHost) deleteUplink() { h.ns.Run(h.t, "ip link del eth0") }

func (h *realHost) addStranger(o backend.Object) {
	switch o := o.(type) {
	case backend.Link:
		how := "type bridge"
		if o.Type == backend.KindVXLAN {
			how = fmt.Sprintf("type vxlan id %d dstport %d local %s", o.VXLAN.VNI, o.VXLAN.Port, o.VXLAN.Local)
		}
		h.ns.Run(h.t, fmt.Sprintf("ip link add %s %s", o.Name, how))
	case backend.Route:
		via := ""
		if o.Via.IsValid() {
			via = "via " + o.Via.String()
		}
		h.ns.Run(h.t, fmt.Sprintf("ip route add %s %s dev %s table %d", o.Dst, via, o.Dev, o.Table))
	case backend.Rule:
		h.ns.Run(h.t, fmt.Sprintf("ip rule add pref %d from %s lookup %d", o.Priority, o.From, o.Table))
	}
}

func (h *realHost) addPort(name string) {
	h.ns.Run(h.t, fmt.Sprintf("ip link add %s group 116 type veth peer name %s-in", name, name))
}

// byHand types what the operation says.
func (h *realHost) byHand(op backend.Op) { h.ns.Run(h.t, op.String()) }

func (h *realHost) dropForwarded() {
	h.ns.Run(h.t, "iptables -P FORWARD DROP")
	h.ns.Run(h.t, "ip6tables -P FORWARD DROP")
}

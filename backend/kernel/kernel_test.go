package kernel

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	bridges "tweed.dev/tweed/backend/bridge"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// A node is a host of a cluster of two.
type node struct {
	*realHost
	name   string
	leases []subnet.Lease
	uplink backend.Uplink
	config vxlan.Config
}

func newNode(t *testing.T, n, underlay int) *node {
	nd := &node{realHost: &realHost{t: t, ns: netnstest.New(t)}, name: fmt.Sprintf("n%d", n)}
	host := netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", n))
	if underlay == 6 {
		host = netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", n))
	}
	nd.config = vxlan.Config{Node: nd.name, VNI: 1, Port: 8472, Underlay: underlay}
	nd.uplink = backend.Uplink{Devs: []string{"eth0"}, Local: host, Addrs: []netip.Addr{host}, MTU: 1500}
	for _, p := range []string{fmt.Sprintf("10.244.%d.0/24", n), fmt.Sprintf("fd00:10:244:%d::/64", n)} {
		nd.leases = append(nd.leases, subnet.Lease{Node: nd.name, Subnet: netip.MustParsePrefix(p), Host: host,
			Backend: vxlan.Name, Data: nd.config.Data()})
	}
	return nd
}

// connect lays a cable from a's eth0 to b's.
func connect(t *testing.T, a, b *node) {
	a.ns.Run(t, "ip link add eth0 type veth peer name eth0 netns "+b.ns.Path())
	for n, nd := range []*node{a, b} {
		for _, c := range []string{
			"ip link set eth0 up", fmt.Sprintf("ip addr add 192.0.2.%d/24 dev eth0", n+1),
			fmt.Sprintf("ip addr add 2001:db8::%d/64 dev eth0 nodad", n+1),
		} {
			nd.ns.Run(t, c)
		}
		nd.open()
	}
}

func (n *node) desired(peers []subnet.Lease) backend.State {
	return backend.Merge(
		bridges.Config{Name: bridge, Node: n.name, MTU: 1430}.Desired([]netip.Prefix{n.leases[0].Subnet, n.leases[1].Subnet}),
		n.config.Desired(n.leases, peers, n.uplink))
}

// eventually waits for a command to succeed: the kernel takes on a new IPv6 address only a moment after it said it did.
func eventually(t *testing.T, ns *netnstest.NS, command string) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		out, err := ns.Try(t, command)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: %v\n%s", command, err, out)
			return
		}
	}
}

func TestPodAddressesReachEachOtherThroughTheTunnel(t *testing.T) {
	for _, underlay := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", underlay), func(t *testing.T) {
			a, b := newNode(t, 1, underlay), newNode(t, 2, underlay)
			connect(t, a, b)
			pass(t, a, a.desired(b.leases))
			pass(t, b, b.desired(a.leases))
			for _, ping := range []string{
				"ping -c 1 -W 1 -I 10.244.1.1 10.244.2.1", "ping -c 1 -W 1 -I fd00:10:244:1::1 fd00:10:244:2::1",
				"ping -c 1 -W 1 10.244.2.1", "ping -c 1 -W 1 fd00:10:244:2::1",
			} {
				eventually(t, a.ns, ping)
			}
			pass(t, a, a.desired(nil)) // the peer leaves
			if out, err := a.ns.Try(t, "ping -c 1 -W 1 -I 10.244.1.1 10.244.2.1"); err == nil {
				t.Errorf("a peer that left is still reached:\n%s", out)
			}
		})
	}
}

func TestPassWithNothingToDoWritesNothing(t *testing.T) { inEachForm(t, testWritesNothing) }

func testWritesNothing(t *testing.T, form masq.Form) {
	h := newRealHost(t)
	h.dropForwarded()
	pass(t, h, sample())
	filterPass(t, h, dualStack(t, form).Desired())
	for h.ns.Run(t, "ip -6 addr show tentative") != "" { // the kernel tells when it is through with its own addresses
	}
	var groups [2]*os.File
	h.ns.Do(t, func() {
		groups[0] = listenAll(t, unix.NETLINK_ROUTE)
		groups[1] = listenAll(t, unix.NETLINK_NETFILTER)
	})
	pass(t, h, sample())
	filterPass(t, h, dualStack(t, form).Desired())
	h.open() // a restart
	pass(t, h, sample())
	filterPass(t, h, dualStack(t, form).Desired())
	for _, f := range groups {
		buf := make([]byte, 1<<16)
		n, _, err := syscall.Recvfrom(int(f.Fd()), buf, syscall.MSG_DONTWAIT)
		if err == nil {
			t.Errorf("the kernel told of a change: % x", buf[:n])
		}
	}
}

func listenAll(t *testing.T, protocol int) *os.File {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 0xffffffff})
	}
	if err != nil {
		t.Errorf("listening to netlink: %v", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	t.Cleanup(func() { f.Close() })
	return f
}

// A device that took the place of ours between Observe and Apply is not ours to delete or to change.
func TestDeviceReplacedByAStrangerIsNotDeleted(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	h.ns.Run(t, "ip link del tweed0")
	h.ns.Run(t, "ip link add tweed0 type bridge")
	for _, op := range []backend.Op{
		{Do: backend.Delete, What: sampleBridge(), Was: sampleBridge()},
		{Do: backend.Change, What: sampleBridge(), Was: backend.Link{Name: bridge, Type: backend.KindBridge}},
	} {
		if err := h.Apply(t.Context(), op); err == nil || !strings.Contains(err.Error(), "not ours") {
			t.Errorf("%s: %v", op, err)
		}
	}
	h.ns.Run(t, "ip link show tweed0")
}

// A neighbour, FDB or address operation after somebody re-created the device must find the new one.
func TestDeviceMadeAnewByHandIsFoundByTheNextPass(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	h.ns.Run(t, "ip link del tweed.1")
	h.ns.Run(t, "ip link add tweed.1 group 116 mtu 1450 type vxlan id 1 dstport 8472 local 192.0.2.11 dev eth0")
	pass(t, h, sample())
}

func TestStrangersRouteWithSeveralNexthopsIsTold(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip route add 10.244.7.0/24 nexthop via 192.0.2.1 dev eth0 nexthop via 192.0.2.2 dev eth0")
	h.ns.Run(t, "ip -6 route add fd00:10:244:7::/64 nexthop via 2001:db8::1 dev eth0 nexthop via 2001:db8::2 dev eth0")
	h.ns.Run(t, "ip route add blackhole 10.245.7.0/24 metric 50")
	have, err := h.Observe(t.Context(), sample())
	if err != nil {
		t.Fatal(err)
	}
	var whats []string
	for _, s := range have.Strangers {
		whats = append(whats, s.What)
	}
	if all := strings.Join(whats, "\n"); len(whats) != 3 || !strings.Contains(all, "blackhole 10.245.7.0/24 metric 50") {
		t.Errorf("strangers:\n%s", all)
	}
}

// Routes with our protocol that no State can describe are ours all the same, and go.
func TestOddRoutesWithOurProtocolAreReplaced(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip route add blackhole 10.244.7.0/24 proto 116")
	h.ns.Run(t, "ip -6 route add unreachable fd00:10:244:7::/64 proto 116")
	h.ns.Run(t, "ip route add 10.99.0.0/16 proto 116 nexthop via 192.0.2.1 dev eth0 nexthop via 192.0.2.2 dev eth0")
	h.ns.Run(t, "ip route add 10.98.0.0/16 dev eth0 proto 116 table 77")
	pass(t, h, sample())
	if out := h.ns.Run(t, "ip route show table all"); strings.Contains(out, "10.99.") || strings.Contains(out, "10.98.") {
		t.Errorf("left:\n%s", out)
	}
}

func TestFDBEntryWithAnotherPortByHandIsRepaired(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	h.ns.Run(t, "bridge fdb replace 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.17 port 4789 self permanent")
	if ops, _ := plan(t, h, sample()); len(ops) != 1 {
		t.Errorf("to do: %v", ops)
	}
	pass(t, h, sample())
}

func TestUnderlayTooSmallForTheMTUIsNamed(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	want, was := tunnel(), tunnel()
	want.MTU = 1451
	err := h.Apply(t.Context(), backend.Op{Do: backend.Change, What: want, Was: was})
	if err == nil || !strings.Contains(err.Error(), "1451") || !strings.Contains(err.Error(), "eth0") {
		t.Error(err)
	}
}

func TestUDPPortHeldByAnotherDeviceIsNamed(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip link add other type vxlan dstport 8472 external")
	h.ns.Run(t, "ip link set other up")
	err := h.Apply(t.Context(), add(tunnel()))
	if err == nil || !strings.Contains(err.Error(), "8472") || !strings.Contains(err.Error(), "Backend.Port") {
		t.Error(err)
	}
}

func TestLocalAddressMovesWithoutLosingEntries(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	h.ns.Run(t, "ip link add eth1 type veth peer name wire1")
	h.ns.Run(t, "ip link set eth1 up")
	h.ns.Run(t, "ip addr add 198.51.100.11/24 dev eth1")
	want := sample()
	l := tunnel()
	l.VXLAN.Local, l.VXLAN.Dev, l.MTU = netip.MustParseAddr("198.51.100.11"), "eth1", 1440
	put(want, l)
	if ops, _ := plan(t, h, want); len(ops) != 1 || ops[0].Do != backend.Change {
		t.Errorf("to do: %v", ops)
	}
	pass(t, h, want)
}

func TestSysctlsThatCannotBeWritten(t *testing.T) {
	h := newRealHost(t)
	dir := t.TempDir()
	for _, c := range []string{"mount --bind /proc/sys " + dir, "mount -o remount,bind,ro " + dir} {
		h.ns.Run(t, c)
	}
	t.Cleanup(func() { h.ns.Run(t, "umount "+dir) })
	h.root = dir
	err := h.Apply(t.Context(), backend.Op{Do: backend.Change, What: sysctl("net/ipv4/ip_forward", "1")})
	if err == nil || !strings.Contains(err.Error(), "--sysctl-root") || !strings.Contains(err.Error(), dir) {
		t.Errorf("read-only: %v", err)
	}
	if err := h.Apply(t.Context(), add(sysctl("net/ipv6/conf/nosuch/accept_ra", "0"))); err == nil {
		t.Error("wrote a sysctl of a device that is not there")
	}

	deaf := t.TempDir()
	if err := os.Symlink("/dev/null", filepath.Join(deaf, "deaf")); err != nil {
		t.Fatal(err)
	}
	h.root = deaf
	if err := h.Apply(t.Context(), add(sysctl("deaf", "1"))); err == nil || !strings.Contains(err.Error(), "still reads") {
		t.Errorf("a value that did not stick: %v", err)
	}
}

func TestWithoutPermissionItSaysWhatItNeeds(t *testing.T) {
	ns := netnstest.New(t)
	var err error
	ns.Do(t, func() { // the thread ends with it, and its lack of rights too
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err = unix.Capset(&header, &none[0]); err == nil {
			_, err = New(Options{})
		}
	})
	if err == nil || !strings.Contains(err.Error(), "needs root or CAP_NET_ADMIN") {
		t.Error(err)
	}
}

func TestApplyAfterTheEndIsRefused(t *testing.T) {
	h := newRealHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Apply(ctx, add(tunnel())); err == nil {
		t.Error("applied after the end")
	}
	if _, err := h.Observe(ctx, sample()); err == nil {
		t.Error("observed after the end")
	}
}

func TestDeviceWithAdvertisedRoutesIsTold(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip -6 route add 2001:db8:1::/48 via fe80::1 dev eth0 proto ra")
	told := func() []string {
		devs, err := h.RouterAdvertised(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return devs
	}
	h.ns.Run(t, "sysctl -w net/ipv6/conf/eth0/accept_ra=1")
	if got := told(); !slices.Equal(got, []string{"eth0"}) {
		t.Errorf("accept_ra=1: %v", got)
	}
	h.ns.Run(t, "sysctl -w net/ipv6/conf/eth0/accept_ra=2")
	if got := told(); len(got) > 0 {
		t.Errorf("accept_ra=2: %v", got)
	}
}

func TestDefaultRouteOverSeveralUplinks(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip link add eth1 type veth peer name wire1")
	h.ns.Run(t, "ip link set eth1 up")
	h.ns.Run(t, "ip addr add 198.51.100.11/24 dev eth1")
	h.ns.Run(t, "ip route replace default nexthop via 192.0.2.1 nexthop via 198.51.100.1")
	h.ns.Run(t, "ip -6 route add default via fe80::1 dev eth1 metric 2000")
	all, err := h.Interfaces(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if want := i.Name == "eth0" || i.Name == "eth1"; i.Default4 != want {
			t.Errorf("IPv4's default route leaves by %s: %v", i.Name, i.Default4)
		}
		if want := i.Name == "eth0"; i.Default6 != want {
			t.Errorf("IPv6's default route leaves by %s: %v", i.Name, i.Default6)
		}
	}
}

// Whatever the kernel sends, or cuts off, reading it does not panic.
func FuzzParsers(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(make([]byte, 16), 8, 0, 3, 0, 'x', 0, 0, 0))
	f.Add(append(make([]byte, 12), 5, 0, 1, 0, 10))
	f.Add(append([]byte{unix.AF_INET, 24, 0, 0, 254}, 0, 0, 0, 0, 0, 0, 0, 12, 0, 9, 0, 255, 0, 0, 0, 1, 0, 0, 0))
	jump := newRule(masq.Chain{Family: masq.IPv4}, []nftExpr{verdict(unix.NFT_JUMP, "translate")}, 0, 0)
	f.Add([]byte(jump.body))
	f.Fuzz(func(_ *testing.T, b []byte) {
		parseLink(b)
		parseAddr(b)
		parseNeigh(b)
		parseRoute(b)
		parseRule(b)
		parseHops(b)
		commentOf(b)
		r := parseNFTRule(b)
		r.end()
		r.jumps()
		textOf(r.exprs)
		r.still()
		parseNFTChain(b)
		_, _ = parseSaved(bytes.NewReader(b), masq.IPv4)
		for _, family := range families() {
			_, _ = parseLegacy(layoutOf(family), b[:min(len(b), sizeofIptInfo)], b[min(len(b), sizeofIptInfo):])
		}
		new(filterEar).heard(syscall.NetlinkMessage{
			Header: syscall.NlMsghdr{Type: nftType(unix.NFT_MSG_NEWRULE)}, Data: b})
		for typ := range uint16(200) {
			w := &watcher{kernel: &Kernel{}, uplink: func(string) bool { return true }, links: map[int]link{},
				addrs: map[addrAt]uint32{}, closed: map[int]bool{}, forwarding: map[[2]int]uint32{}}
			w.heard(syscall.NetlinkMessage{Header: syscall.NlMsghdr{Type: typ}, Data: b})
		}
	})
}

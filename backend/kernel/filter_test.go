package kernel

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

type netlinkMessage = syscall.NetlinkMessage

// runBatch gives commands to a program's batch mode.
func runBatch(t testing.TB, ns *netnstest.NS, program, commands string) {
	t.Helper()
	var out []byte
	var err error
	ns.Do(t, func() {
		words := append(strings.Fields(program), "-batch", "-")
		cmd := exec.Command(words[0], words[1:]...)
		cmd.Stdin = strings.NewReader(commands)
		out, err = cmd.CombinedOutput()
	})
	if err != nil {
		t.Fatalf("%s -batch: %v\n%s", program, err, out)
	}
}

func dualStack(t testing.TB, form masq.Form) masq.Config {
	t.Helper()
	network, err := subnet.NewNetwork(subnet.Range{Prefix: netip.MustParsePrefix("10.244.0.0/16")},
		subnet.Range{Prefix: netip.MustParsePrefix("fd00:10:244::/48")})
	if err != nil {
		t.Fatal(err)
	}
	own := []netip.Prefix{netip.MustParsePrefix("10.244.3.0/24"), netip.MustParsePrefix("fd00:10:244:3::/64")}
	return masq.Config{Form: form, Network: network, Subnets: own, Port: 8472}
}

func dualStackFilter(t testing.TB) masq.Ruleset { return dualStack(t, masq.IPTables).Desired() }

// inEachForm runs a test with the packet filter in each form.
func inEachForm(t *testing.T, test func(t *testing.T, form masq.Form)) {
	for _, form := range []masq.Form{masq.IPTables, masq.NFTables} {
		t.Run(string(form), func(t *testing.T) { test(t, form) })
	}
}

// outside hangs a namespace on the host's uplink, with 192.0.2.1 and 2001:db8::1.
func outside(t *testing.T, h *realHost) *netnstest.NS {
	world := netnstest.New(t)
	h.ns.Run(t, "ip link set wire netns "+world.Path())
	h.ns.Run(t, "sysctl -w net/ipv6/conf/all/forwarding=1")
	for _, c := range []string{
		"ip link set wire up", "ip addr add 192.0.2.1/24 dev wire", "ip addr add 2001:db8::1/64 dev wire nodad",
		"ip route add 10.244.3.0/24 via 192.0.2.11", "ip route add fd00:10:244:3::/64 via 2001:db8::11",
	} {
		world.Run(t, c)
	}
	return world
}

// A hop is a UDP packet from one namespace to an address in another, and back.
type hop struct {
	what     string
	from, to *netnstest.NS
	addr     string // where to
	source   string // what the sender binds to, if anything
	as       string // the source address that the receiver is to see
}

// seenAs returns the source that a hop's packet has when it arrives. The answer has to arrive as well.
func (h hop) seenAs(t *testing.T) netip.AddrPort {
	t.Helper()
	target := netip.MustParseAddr(h.addr)
	server, client := bound(t, h.to, netip.AddrPortFrom(target, 5000)), bound(t, h.from, h.sender(target))
	defer server.Close()
	defer client.Close()
	buf := make([]byte, 100)
	var source netip.AddrPort
	var err error
	for range 20 { // addresses and neighbours of a new namespace take a moment
		if _, err = client.WriteToUDPAddrPort([]byte("who am I"), netip.AddrPortFrom(target, 5000)); err != nil {
			continue
		}
		wait(server, client)
		if _, source, err = server.ReadFromUDPAddrPort(buf); err != nil {
			continue
		}
		if _, err = server.WriteToUDPAddrPort([]byte(source.String()), source); err != nil {
			continue
		}
		if _, _, err = client.ReadFromUDPAddrPort(buf); err == nil {
			return source
		}
	}
	t.Errorf("%s: %s is seen as %s: %v", h.what, h.addr, source, err)
	return source
}

func (h hop) sender(target netip.Addr) netip.AddrPort {
	addr := netip.IPv4Unspecified()
	if target.Is6() {
		addr = netip.IPv6Unspecified()
	}
	if h.source != "" {
		addr = netip.MustParseAddr(h.source)
	}
	return netip.AddrPortFrom(addr, 0)
}

func (h hop) check(t *testing.T) {
	t.Helper()
	if got := h.seenAs(t).Addr(); got.String() != h.as {
		t.Errorf("%s: %s is seen as %s, want %s", h.what, h.addr, got, h.as)
	}
}

// bound opens a UDP socket in a namespace.
func bound(t testing.TB, ns *netnstest.NS, at netip.AddrPort) (c *net.UDPConn) {
	t.Helper()
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	var err error
	for range 20 { // an address that is new may still be tried out
		ns.Do(t, func() { c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(at)) })
		if err == nil {
			return c
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal(err)
	return nil
}

func wait(sockets ...*net.UDPConn) {
	for _, c := range sockets {
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	}
}

// inBoth runs commands of iptables for both families.
func inBoth(t *testing.T, h *realHost, rules ...string) {
	t.Helper()
	for _, r := range rules {
		h.ns.Run(t, "iptables "+r)
		h.ns.Run(t, "ip6tables "+r)
	}
}

// dockers are the rules that Docker begins with, and its policy.
var dockers = []string{
	"-P FORWARD DROP", "-N DOCKER-USER", "-N DOCKER-FORWARD", "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-FORWARD",
	"-A DOCKER-FORWARD -i docker0 -j ACCEPT",
}

// Pods reach each other and the world on a host that forwards nothing by itself.
func TestForwardingIsDropped(t *testing.T) {
	for what, drop := range map[string]func(*testing.T, *realHost){
		"iptables": func(t *testing.T, h *realHost) { inBoth(t, h, "-P FORWARD DROP") },
		"nft": func(t *testing.T, h *realHost) {
			for _, family := range []string{"ip", "ip6"} {
				shell(t, h.ns, "nft add table "+family+" filter; nft add chain "+family+
					" filter FORWARD '{ type filter hook forward priority 0 ; policy drop ; }'")
			}
		},
		"docker":       func(t *testing.T, h *realHost) { inBoth(t, h, append(dockers, "-A DOCKER-USER -j RETURN")...) },
		"docker, user": func(t *testing.T, h *realHost) { inBoth(t, h, append(dockers, "-A DOCKER-USER -j DROP")...) },
	} {
		t.Run(what, func(t *testing.T) {
			inEachForm(t, func(t *testing.T, form masq.Form) { reachesThroughDrop(t, form, drop) })
		})
	}
}

func reachesThroughDrop(t *testing.T, form masq.Form, drop func(*testing.T, *realHost)) {
	h := newRealHost(t)
	world := outside(t, h)
	drop(t, h)
	pass(t, h, sample())
	a, b := addPod(t, h, 10), addPod(t, h, 11)
	eventually(t, a, "ping -c 1 -W 1 10.244.3.1") // the bridge's port forwards
	if out, err := a.Try(t, "ping -c 1 -W 1 192.0.2.1"); err == nil {
		t.Fatalf("the world is reached without a filter of ours: the test proves nothing\n%s", out)
	}
	filterPass(t, h, dualStack(t, form).Desired())

	for _, hop := range []hop{
		{"pod to pod", a, b, "10.244.3.11", "", "10.244.3.10"},
		{"pod to pod", a, b, "fd00:10:244:3::11", "", "fd00:10:244:3::10"},
		{"pod to world", a, world, "192.0.2.1", "", "192.0.2.11"},
		{"pod to world", a, world, "2001:db8::1", "", "2001:db8::11"},
		{"world to pod", world, b, "10.244.3.11", "", "192.0.2.1"},
		{"world to pod", world, b, "fd00:10:244:3::11", "", "2001:db8::1"},
		{"host to pod", h.ns, a, "10.244.3.10", "", "10.244.3.1"},
		{"host to pod", h.ns, a, "fd00:10:244:3::10", "2001:db8::11", "2001:db8::11"},
		{"pod to host", a, h.ns, "192.0.2.11", "", "10.244.3.10"},
		{"pod to host", a, h.ns, "2001:db8::11", "", "fd00:10:244:3::10"},
	} {
		hop.check(t)
	}
}

// A pod on another node answers by its own node's way out, where nobody waits for the answer.
func TestOutsideToPodOnAnotherNodeComesBackThroughTheTunnel(t *testing.T) {
	inEachForm(t, testComesBackThroughTheTunnel)
}

func testComesBackThroughTheTunnel(t *testing.T, form masq.Form) {
	a, b := newNode(t, 1, 4), newNode(t, 2, 4)
	connect(t, a, b)
	pass(t, a, a.desired(b.leases))
	pass(t, b, b.desired(a.leases))
	world := netnstest.New(t)
	a.ns.Run(t, "ip link add eth1 type veth peer name eth0 netns "+world.Path())
	for _, c := range []string{
		"ip link set eth1 up", "ip addr add 203.0.113.1/24 dev eth1", "ip addr add 2001:db8:9::1/64 dev eth1 nodad",
	} {
		a.ns.Run(t, c)
	}
	for _, c := range []string{
		"ip link set eth0 up", "ip addr add 203.0.113.9/24 dev eth0", "ip addr add 2001:db8:9::9/64 dev eth0 nodad",
		"ip route add default via 203.0.113.1", "ip route add default via 2001:db8:9::1",
	} {
		world.Run(t, c)
	}
	c := dualStack(t, form)
	c.Subnets = []netip.Prefix{a.leases[0].Subnet, a.leases[1].Subnet}
	filterPass(t, a, c.Desired())
	for _, hop := range []hop{
		{"world to pod elsewhere", world, b.ns, "10.244.2.1", "", "10.244.1.0"},
		{"world to pod elsewhere", world, b.ns, "fd00:10:244:2::1", "", "fd00:10:244:1::2"},
		{"host to pod elsewhere", a.ns, b.ns, "10.244.2.1", "203.0.113.1", "10.244.1.0"},
		{"host to pod elsewhere", a.ns, b.ns, "fd00:10:244:2::1", "2001:db8:9::1", "fd00:10:244:1::2"},
		{"pod to pod elsewhere", a.ns, b.ns, "10.244.2.1", "10.244.1.1", "10.244.1.1"},
		{"pod to pod elsewhere", a.ns, b.ns, "fd00:10:244:2::1", "fd00:10:244:1::1", "fd00:10:244:1::1"},
	} {
		hop.check(t)
	}
}

// A service on the world's side that kube-proxy marked is kube-proxy's to masquerade.
func TestPacketsOfKubeProxyAreLeftToIt(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		world := outside(t, h)
		pass(t, h, sample())
		a := addPod(t, h, 10)
		filterPass(t, h, dualStack(t, form).Desired())
		inBoth(t, h, "-t mangle -A PREROUTING -j MARK --set-mark 0x4000/0x4000")
		hop{"marked, and nobody takes it up", a, world, "192.0.2.1", "", "10.244.3.10"}.check(t)
		hop{"marked, and nobody takes it up", a, world, "2001:db8::1", "", "fd00:10:244:3::10"}.check(t)
		for _, c := range []string{
			"iptables -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j SNAT --to-source 192.0.2.99",
			"ip6tables -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j SNAT --to-source 2001:db8::99",
			"ip addr add 192.0.2.99/32 dev eth0", "ip addr add 2001:db8::99/128 dev eth0 nodad",
		} {
			h.ns.Run(t, c)
		}
		hop{"marked", a, world, "192.0.2.1", "", "192.0.2.99"}.check(t)
		hop{"marked", a, world, "2001:db8::1", "", "2001:db8::99"}.check(t)
	})
}

func TestPodsKeepTheirAddressesWhereTheyAreKnown(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		world := outside(t, h)
		world.Run(t, "ip addr add 198.51.100.1/32 dev lo")
		world.Run(t, "ip addr add 2001:db8:1::1/128 dev lo")
		pass(t, h, sample())
		a := addPod(t, h, 10)
		c := dualStack(t, form)
		c.NonMasquerade = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:1::/52")}
		filterPass(t, h, c.Desired())
		for _, hop := range []hop{
			{"known", a, world, "198.51.100.1", "", "10.244.3.10"},
			{"known", a, world, "2001:db8:1::1", "", "fd00:10:244:3::10"},
			{"not known", a, world, "192.0.2.1", "", "192.0.2.11"},
			{"not known", a, world, "2001:db8::1", "", "2001:db8::11"},
		} {
			hop.check(t)
		}
	})
}

// Replies to a flow from the tunnel's port would be taken for encapsulated packets.
func TestNoFlowIsMovedToTheTunnelsPort(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		world := outside(t, h)
		pass(t, h, sample())
		a := addPod(t, h, 10)
		c := dualStack(t, form)
		c.Port = 33279 // with half of the ports above it, no run of luck is as long as this
		filterPass(t, h, c.Desired())
		for range 40 {
			for _, to := range []string{"192.0.2.1", "2001:db8::1"} {
				if from := (hop{what: "pod to world", from: a, to: world, addr: to}).seenAs(t); from.Port() <= c.Port {
					t.Fatalf("to %s from %s", to, from)
				}
			}
		}
	})
}

// leaveBy sends what c sends to groups out of a device.
func leaveBy(t *testing.T, ns *netnstest.NS, c *net.UDPConn, dev string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	ns.Do(t, func() {
		var out *net.Interface
		if out, failed = net.InterfaceByName(dev); failed != nil {
			return
		}
		failed = raw.Control(func(fd uintptr) {
			if c.LocalAddr().(*net.UDPAddr).IP.To4() != nil {
				mreq := &unix.IPMreqn{Ifindex: int32(out.Index)}
				err = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF, mreq)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, out.Index)
			}
		})
	})
	if err := errors.Join(err, failed); err != nil {
		t.Fatal(err)
	}
}

// Whoever has joined a group knows its senders by their own addresses, and groups have no way back.
func TestMulticastKeepsItsSource(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		world := outside(t, h)
		pass(t, h, sample())
		filterPass(t, h, dualStack(t, form).Desired())
		for group, source := range map[string]string{"239.1.2.3": "10.244.3.1", "ff05::123": "fd00:10:244:3::1"} {
			to := netip.AddrPortFrom(netip.MustParseAddr(group), 5000)
			var server *net.UDPConn
			var err error
			world.Do(t, func() {
				var wire *net.Interface
				if wire, err = net.InterfaceByName("wire"); err == nil {
					server, err = net.ListenMulticastUDP("udp", wire, net.UDPAddrFromAddrPort(to))
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			client := bound(t, h.ns, netip.AddrPortFrom(netip.MustParseAddr(source), 0))
			defer client.Close()
			leaveBy(t, h.ns, client, "eth0")
			if _, err := client.WriteToUDPAddrPort([]byte("all of you"), to); err != nil {
				t.Fatal(err)
			}
			wait(server)
			_, from, err := server.ReadFromUDPAddrPort(make([]byte, 100))
			if err != nil || from.Addr().Unmap().String() != source {
				t.Errorf("to %s from %s, %v; want from %s", group, from, err, source)
			}
		}
	})
}

func TestRejectOfEverythingIsOvertaken(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		h := newRealHost(t)
		world := outside(t, h)
		pass(t, h, sample())
		a := addPod(t, h, 10)
		want := dualStack(t, form).Desired()
		out := hop{"pod to world", a, world, "192.0.2.1", "", "192.0.2.11"}
		h.ns.Run(t, "iptables -A FORWARD -p tcp --dport 1 -j ACCEPT")
		h.ns.Run(t, "iptables -A FORWARD -m comment --comment firewall -j REJECT --reject-with icmp-host-prohibited")
		filterPass(t, h, want)
		out.check(t)

		// One that comes later gets in front: the jump is there, but nothing reaches it.
		h.ns.Run(t, "iptables -I FORWARD 1 -j DROP")
		filterPass(t, h, want)
		out.check(t)

		filterPass(t, h, masq.Ruleset{})
		if out := h.ns.Run(t, "iptables -S"); strings.Contains(out, "TWEED") || strings.Contains(out, "tweed") {
			t.Errorf("left:\n%s", out)
		}
	})
}

func TestRulesChangedByHandAreRepaired(t *testing.T) {
	h := newRealHost(t)
	want := dualStackFilter(t)
	filterPass(t, h, want)
	right := h.ns.Run(t, "iptables -t nat -S") + h.ns.Run(t, "ip6tables -S")
	for _, c := range []string{
		"iptables -t nat -D TWEED-POSTRTG 2",
		"iptables -t nat -I TWEED-POSTRTG 1 -s 192.0.2.0/24 -m comment --comment by\"hand -j ACCEPT",
		"iptables -t nat -F TWEED-POSTRTG",
		"iptables -t nat -F POSTROUTING",
		"ip6tables -F",
	} {
		h.ns.Run(t, c)
		have, err := h.ObserveFilter(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		if len(masq.Diff(want, have)) == 0 {
			t.Errorf("%s: not seen", c)
		}
		filterPass(t, h, want)
		if now := h.ns.Run(t, "iptables -t nat -S") + h.ns.Run(t, "ip6tables -S"); now != right {
			t.Errorf("after %s:\n%s\nwant:\n%s", c, now, right)
		}
	}
}

// fakeIptables puts programs in front of all that is called iptables that do what script says; $real is the real one's
// path.
func fakeIptables(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			for _, use := range []string{"", "-save", "-restore"} {
				real, err := exec.LookPath(name + variant + use)
				if err != nil {
					t.Fatal(err)
				}
				text := "#!/bin/sh\nreal=" + real + "\n" + script + "\n"
				if err := os.WriteFile(filepath.Join(dir, name+variant+use), []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestAtRestNoProcessIsStarted(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		log := filepath.Join(t.TempDir(), "log")
		fakeIptables(t, "echo $real $* >> "+log+"\nexec $real \"$@\"")
		h := newRealHost(t)
		r := watch(t, h, func(string) bool { return false })
		filterPass(t, h, dualStack(t, form).Desired())
		r.await(t, "our own writes")
		r.quiet()
		filterPass(t, h, dualStack(t, form).Desired()) // the one more pass
		before, err := os.ReadFile(log)
		if form == masq.NFTables {
			if !errors.Is(err, os.ErrNotExist) {
				t.Errorf("started, %v:\n%s", err, before)
			}
		} else if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			filterPass(t, h, dualStack(t, form).Desired())
		}
		if after, _ := os.ReadFile(log); !bytes.Equal(before, after) {
			t.Errorf("started at rest:\n%s", after[len(before):])
		}
		if r.quiet() {
			t.Error("reading rings")
		}
	})
}

// Another version of iptables may print the rules in other words; then they must not be written again and again.
func TestIptablesThatPrintsRulesInOtherWords(t *testing.T) {
	fakeIptables(t, `case "$real $*" in *-save*|*-S*) out=$($real "$@") || exit
  echo "$out" | sed 's/--comment tweed/--comment "tweed"/' ;;
*) exec $real "$@" ;; esac`)
	h := newRealHost(t)
	want := dualStackFilter(t)
	filterPass(t, h, want)
	filterPass(t, h, want)
}

func TestMissingIptablesIsNamed(t *testing.T) {
	h := newRealHost(t)
	t.Setenv("PATH", t.TempDir())
	_, err := h.ObserveFilter(t.Context(), dualStackFilter(t))
	if err == nil || !strings.Contains(err.Error(), "package iptables") {
		t.Error(err)
	}
	if have, err := h.ObserveFilter(t.Context(), masq.Ruleset{}); err != nil || len(have.Chains) > 0 {
		t.Errorf("cleaning up without iptables: %v, %v", have, err)
	}
}

// callIptables makes one form of iptables the one that the host calls iptables.
func callIptables(t *testing.T, form string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		real, err := exec.LookPath(name + "-" + form)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(real, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestLegacyIptables(t *testing.T) {
	callIptables(t, "legacy")
	h := newRealHost(t)
	filterPass(t, h, dualStackFilter(t))
	if rules := h.ns.Run(t, "iptables-legacy -S"); !strings.Contains(rules, "TWEED-") {
		t.Errorf("the older form has no chain of ours:\n%s", rules)
	}
	filterPass(t, h, masq.Ruleset{})
}

// Rules in the other iptables than the kubelet's would come before or after kube-proxy's by chance, and nobody would
// see them beside its.
func TestKubeletsIptablesIsUsed(t *testing.T) {
	for form, hosts := range map[string]string{"nft": "legacy", "legacy": "nft"} {
		t.Run(form, func(t *testing.T) {
			callIptables(t, hosts)
			h := newRealHost(t)
			for _, command := range []string{"iptables-" + form, "ip6tables-" + form} {
				h.ns.Run(t, command+" -t mangle -N KUBE-IPTABLES-HINT")
			}
			filterPass(t, h, dualStackFilter(t))
			for _, command := range []string{"iptables", "ip6tables"} {
				if rules := h.ns.Run(t, command+"-"+form+" -S"); !strings.Contains(rules, "TWEED-") {
					t.Errorf("%s-%s, which the kubelet uses, has no chain of ours:\n%s", command, form, rules)
				}
				if rules := h.ns.Run(t, command+"-"+hosts+" -S"); strings.Contains(rules, "TWEED-") {
					t.Errorf("%s-%s, which it does not use, has chains of ours:\n%s", command, hosts, rules)
				}
			}
		})
	}
}

func TestLookingForTheKubeletsHintMakesNoTable(t *testing.T) {
	callIptables(t, "nft")
	h := newRealHost(t)
	filterPass(t, h, dualStackFilter(t))
	if tables := h.ns.Run(t, "cat /proc/thread-self/net/ip_tables_names"); tables != "" {
		t.Errorf("tables of the older iptables: %s", tables)
	}
}

// A rule that moved since it was counted must not go instead of another.
func TestRuleIsNotDeletedByAStaleNumber(t *testing.T) {
	h := newRealHost(t)
	filterPass(t, h, dualStackFilter(t))
	chain := masq.Chain{Family: masq.IPv4, Table: masq.NatTable, Name: masq.Postrouting}
	stale := masq.Entry{Chain: chain, At: 1, Rule: masq.Rule{Unknown: "-s 192.0.2.1/32 -j DROP"}}
	for _, at := range []int{1, 99} {
		stale.At = at
		if err := h.Apply(t.Context(), backend.Op{Do: backend.Delete, What: stale, Was: stale}); err == nil {
			t.Errorf("deleted rule %d in place of another", at)
		}
	}
}

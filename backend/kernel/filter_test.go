package kernel

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

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
	for _, c := range []string{
		"ip link set wire up", "ip addr add 192.0.2.1/24 dev wire", "ip addr add 2001:db8::1/64 dev wire nodad",
		"ip route add 10.244.3.0/24 via 192.0.2.11", "ip route add fd00:10:244:3::/64 via 2001:db8::11",
	} {
		world.Run(t, c)
	}
	return world
}

// seenAs returns the source address that a UDP packet from one namespace has when it gets to an address in another.
func seenAs(t *testing.T, from, to *netnstest.NS, addr string) netip.Addr {
	t.Helper()
	family, sa := syscall.AF_INET6, syscall.Sockaddr(&syscall.SockaddrInet6{Port: 5000})
	target := netip.MustParseAddr(addr)
	send := syscall.Sockaddr(&syscall.SockaddrInet6{Port: 5000, Addr: target.As16()})
	if target.Is4() {
		family, sa = syscall.AF_INET, &syscall.SockaddrInet4{Port: 5000}
		send = &syscall.SockaddrInet4{Port: 5000, Addr: target.As4()}
	}
	var server int
	var err error
	to.Do(t, func() {
		if server, err = syscall.Socket(family, syscall.SOCK_DGRAM, 0); err == nil {
			err = syscall.Bind(server, sa)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(server)
	wait := syscall.Timeval{Sec: 1}
	if err := syscall.SetsockoptTimeval(server, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &wait); err != nil {
		t.Fatal(err)
	}
	var source syscall.Sockaddr
	for range 20 { // addresses and neighbours of a new namespace take a moment
		from.Do(t, func() {
			var fd int
			if fd, err = syscall.Socket(family, syscall.SOCK_DGRAM, 0); err == nil {
				defer syscall.Close(fd)
				err = syscall.Sendto(fd, []byte("who am I"), 0, send)
			}
		})
		if err == nil {
			_, source, err = syscall.Recvfrom(server, make([]byte, 100), 0)
		}
		if err == nil {
			break
		}
	}
	if err != nil {
		t.Errorf("nothing arrived at %s: %v", addr, err)
		return netip.Addr{}
	}
	if v4, ok := source.(*syscall.SockaddrInet4); ok {
		return netip.AddrFrom4(v4.Addr)
	}
	return netip.AddrFrom16(source.(*syscall.SockaddrInet6).Addr)
}

// Pods reach each other and the world on a host that forwards nothing by itself.
func TestForwardPolicyDrop(t *testing.T) {
	h := newRealHost(t)
	world := outside(t, h)
	for _, c := range []string{
		"iptables -P FORWARD DROP", "ip6tables -P FORWARD DROP", "sysctl -w net/ipv6/conf/all/forwarding=1",
	} {
		h.ns.Run(t, c)
	}
	pass(t, h, sample())
	a, b := addPod(t, h, 10), addPod(t, h, 11)
	eventually(t, a, "ping -c 1 -W 1 10.244.3.1") // the bridge's port forwards
	if out, err := a.Try(t, "ping -c 1 -W 1 192.0.2.1"); err == nil {
		t.Fatalf("the world is reached without a filter of ours: the test proves nothing\n%s", out)
	}
	filterPass(t, h, dualStackFilter(t))

	for _, hop := range []struct {
		what     string
		from, to *netnstest.NS
		addr     string
		as       string
	}{
		{"pod to pod", a, b, "10.244.3.11", "10.244.3.10"},
		{"pod to pod", a, b, "fd00:10:244:3::11", "fd00:10:244:3::10"},
		{"pod to world", a, world, "192.0.2.1", "192.0.2.11"},
		{"pod to world", a, world, "2001:db8::1", "2001:db8::11"},
		{"world to pod", world, b, "10.244.3.11", "192.0.2.1"},
		{"world to pod", world, b, "fd00:10:244:3::11", "2001:db8::1"},
		{"host to pod", h.ns, a, "10.244.3.10", "10.244.3.1"},
		{"pod to host", a, h.ns, "192.0.2.11", "10.244.3.10"},
	} {
		if got := seenAs(t, hop.from, hop.to, hop.addr); got.String() != hop.as {
			t.Errorf("%s: %s is seen as %s, want %s", hop.what, hop.addr, got, hop.as)
		}
	}
}

// A pod on another node answers by its own node's way out, where nobody waits for the answer.
func TestOutsideToPodOnAnotherNodeComesBackThroughTheTunnel(t *testing.T) {
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
	network, err := subnet.NewNetwork(subnet.Range{Prefix: netip.MustParsePrefix("10.244.0.0/16")},
		subnet.Range{Prefix: netip.MustParsePrefix("fd00:10:244::/48")})
	if err != nil {
		t.Fatal(err)
	}
	own := []netip.Prefix{a.leases[0].Subnet, a.leases[1].Subnet}
	filterPass(t, a, masq.Config{Network: network, Subnets: own, Port: 8472}.Desired())
	for addr, want := range map[string]string{"10.244.2.1": "10.244.1.0", "fd00:10:244:2::1": "fd00:10:244:1::2"} {
		if got := seenAs(t, world, b.ns, addr); got.String() != want {
			t.Errorf("%s is seen as %s, want the node's own %s", addr, got, want)
		}
	}
}

// A service on the world's side that kube-proxy marked is kube-proxy's to masquerade.
func TestPacketsOfKubeProxyAreLeftToIt(t *testing.T) {
	h := newRealHost(t)
	world := outside(t, h)
	pass(t, h, sample())
	a := addPod(t, h, 10)
	filterPass(t, h, dualStackFilter(t))
	for _, c := range []string{
		"iptables -t mangle -A PREROUTING -s 10.244.3.10 -j MARK --set-mark 0x4000/0x4000",
		"iptables -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j SNAT --to-source 192.0.2.99",
		"ip addr add 192.0.2.99/32 dev eth0",
	} {
		h.ns.Run(t, c)
	}
	if got := seenAs(t, a, world, "192.0.2.1"); got.String() != "192.0.2.99" {
		t.Errorf("seen as %s, want kube-proxy's 192.0.2.99", got)
	}
}

func TestRejectOfEverythingIsOvertaken(t *testing.T) {
	h := newRealHost(t)
	world := outside(t, h)
	pass(t, h, sample())
	a := addPod(t, h, 10)
	h.ns.Run(t, "iptables -A FORWARD -p tcp --dport 1 -j ACCEPT")
	h.ns.Run(t, "iptables -A FORWARD -m comment --comment firewall -j REJECT --reject-with icmp-host-prohibited")
	filterPass(t, h, dualStackFilter(t))
	seenAs(t, a, world, "192.0.2.1")

	// One that comes later gets in front: the jump is there, but nothing reaches it.
	h.ns.Run(t, "iptables -I FORWARD 1 -j DROP")
	h.filter.changes.Add(1)
	filterPass(t, h, dualStackFilter(t))
	seenAs(t, a, world, "192.0.2.1")

	filterPass(t, h, masq.Ruleset{})
	if out := h.ns.Run(t, "iptables -S"); strings.Contains(out, "TWEED") {
		t.Errorf("left:\n%s", out)
	}
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
		h.filter.changes.Add(1)
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

// fakeIptables puts programs in front of iptables and ip6tables that do what script says; $0 is the real one's path.
func fakeIptables(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		real, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		text := "#!/bin/sh\nreal=" + real + "\n" + script + "\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestAtRestNoProcessIsStarted(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	fakeIptables(t, "echo $* >> "+log+"\nexec $real \"$@\"")
	h := newRealHost(t)
	r := watch(t, h, func(string) bool { return false })
	filterPass(t, h, dualStackFilter(t))
	r.await(t, "our own writes")
	r.quiet()
	filterPass(t, h, dualStackFilter(t)) // the one more pass
	before, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		filterPass(t, h, dualStackFilter(t))
	}
	if after, _ := os.ReadFile(log); !bytes.Equal(before, after) {
		t.Errorf("started at rest:\n%s", after[len(before):])
	}
	if r.quiet() {
		t.Error("reading rings")
	}
}

// Another version of iptables may print the rules in other words; then they must not be written again and again.
func TestIptablesThatPrintsRulesInOtherWords(t *testing.T) {
	fakeIptables(t, `case "$*" in *-S*) out=$($real "$@") || exit
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
	if !h.filter.legacy {
		t.Error("not known to be of the older form")
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

package podnet

import (
	"encoding/json"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// further is another interface of a pod.
func (n *node) further(container string, pod *netnstest.NS, iface string) *attachment {
	a := n.wishing(container, pod, nil)
	a.rt = &libcni.RuntimeConf{ContainerID: container, NetNS: pod.Path(), IfName: iface}
	return a
}

// addrsOf are the addresses that a result gives.
func addrsOf(r *types100.Result) (addrs []string) {
	for _, ip := range r.IPs {
		addrs = append(addrs, ip.Address.IP.String())
	}
	return addrs
}

// routing is what decides in a pod where packets go.
func routing(t *testing.T, pod *netnstest.NS) string {
	t.Helper()
	return pod.Run(t, "ip -4 route show default") + pod.Run(t, "ip -6 route show default") +
		pod.Run(t, "ip -4 rule") + pod.Run(t, "ip -6 rule")
}

func TestSecondInterfaceTakesTheFirstOnesTraffic(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.filter()
	outside := n.outside()
	n.Run(t, "sysctl -q -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.tweed0.rp_filter=1")
	pod, other := netnstest.New(t), netnstest.New(t)
	pod.Run(t, "sysctl -q -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1")
	n.mustAdd("other", other)
	first := n.further("one", pod, "eth0")
	addrs := map[string][]string{"eth0": addrsOf(first.mustAdd())}
	before := routing(t, pod)
	second := n.further("one", pod, "net1")
	r := second.mustAdd()
	addrs["net1"] = addrsOf(r)
	if len(r.Routes) != 0 || len(r.IPs) != 2 || r.IPs[0].Gateway.String() != "10.244.3.1" {
		t.Errorf("result: %v", r)
	}
	answer(t, pod)
	for iface, have := range addrs {
		for _, addr := range have {
			for who, from := range map[string]*netnstest.NS{"node": n.NS, "pod": other, "outside": outside} {
				if who == "outside" {
					from.Run(t, "ip route replace "+addr+" via "+sameFamily(addr, "192.0.2.1", "2001:db8::1"))
				}
				wantThrough(t, n, iface, who+" to "+addr, func() error {
					_, err := ask(t, from, "tcp", net.JoinHostPort(addr, "80"))
					return err
				})
			}
			wantThrough(t, n, iface, "out from "+addr, func() error {
				_, err := pod.Try(t, "ping -c4 -i0.01 -W5 -I "+addr+" "+sameFamily(addr, "192.0.2.2", "2001:db8::2"))
				return err
			})
		}
	}
	for _, a := range []*attachment{first, second} {
		if err := a.check(); err != nil {
			t.Errorf("CHECK of %s: %v", a.rt.IfName, err)
		}
	}
	if err := second.del(); err != nil {
		t.Error(err)
	}
	if after := routing(t, pod); after != before {
		t.Errorf("routing was\n%s is\n%s", before, after)
	}
	reach(t, pod, "192.0.2.2")
	if err := first.del(); err != nil {
		t.Error(err)
	}
}

// sameFamily is the one of the two addresses that is of the family of addr.
func sameFamily(addr, v4, v6 string) string {
	if strings.Contains(addr, ".") {
		return v4
	}
	return v6
}

func TestInterfaceAnswersForAnother(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	pod.Run(t, "sysctl -q -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0") // or it would not
	for iface, addr := range map[string]string{"eth0": "10.244.3.2", "net1": "10.244.3.3"} {
		a := n.further("one", pod, iface)
		a.rt.Args = [][2]string{{"IP", addr}}
		a.mustAdd()
	}
	wantMAC(t, n, pod, "eth0", "10.244.3.2")
	wantMAC(t, n, pod, "net1", "10.244.3.3")
}

// wantMAC sees that who asks for an IPv4 address is answered by the interface that has it.
func wantMAC(t *testing.T, n *node, pod *netnstest.NS, iface, addr string) {
	t.Helper()
	mac := strings.Fields(pod.Run(t, "ip -brief link show "+iface))[2]
	for _, command := range []string{"ip neigh flush to " + addr, "ping -c1 -W5 " + addr} {
		n.Run(t, command)
	}
	if have := n.Run(t, "ip neigh show to "+addr); !strings.Contains(have, mac) {
		t.Errorf("%s of %s (%s): the node believes %s", addr, iface, mac, have)
	}
}

// wantThrough sees that what f does goes in and out by one interface of the container one alone.
func wantThrough(t *testing.T, n *node, iface, what string, f func() error) {
	t.Helper()
	const calls, few = 10, 20 // the kernel tells groups this and that at all of them
	before := map[string][2]int{}
	for _, i := range []string{"eth0", "net1"} {
		before[i] = packets(t, n, i)
	}
	for range calls {
		if err := f(); err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
	}
	for i, was := range before {
		now := packets(t, n, i)
		for d, direction := range []string{"to", "from"} {
			if moved := now[d] - was[d]; i == iface && moved < 4*calls || i != iface && moved > few {
				t.Errorf("%s: %d packets %s the pod by %s, it should be all by %s", what, moved, direction, i, iface)
			}
		}
	}
}

// packets counts what has gone to and come from an interface of the container one.
func packets(t *testing.T, n *node, iface string) [2]int {
	t.Helper()
	var links []struct {
		Stats64 struct{ TX, RX struct{ Packets int } }
	}
	out := n.Run(t, "ip -statistics -json link show "+vethName("one", iface))
	if err := json.Unmarshal([]byte(out), &links); err != nil || len(links) != 1 {
		t.Fatal(err, out)
	}
	return [2]int{links[0].Stats64.TX.Packets, links[0].Stats64.RX.Packets}
}

func TestPodHasADefaultRouteOfAnotherNetwork(t *testing.T) {
	for name, tt := range map[string]struct {
		commands []string
		routes   int    // of the result
		apart    string // in the record
	}{
		"of both families": {[]string{"ip route add default dev other", "ip -6 route add default dev other metric 9"},
			0, `"apart":\["10.244.3.2/24","fd00:10:244:3::3/64"\]`},
		"of IPv4 alone":    {[]string{"ip route add default dev other metric 9"}, 1, `"apart":\["10.244.3.2/24"\]`},
		"to nowhere":       {[]string{"ip route add unreachable default metric 4000"}, 2, `\],"delegates"`},
		"in another table": {[]string{"ip route add default dev other table 7"}, 2, `"addresses":\[[^]]*\],"delegates"`},
	} {
		n := newNode(t, subnet4, subnet6)
		pod := netnstest.New(t)
		for _, command := range append([]string{"ip link add other type bridge", "ip link set other up"}, tt.commands...) {
			pod.Run(t, command)
		}
		before := pod.Run(t, "ip -4 route show default") + pod.Run(t, "ip -6 route show default")
		a := n.wishing("one", pod, nil)
		if r := a.mustAdd(); len(r.Routes) != tt.routes {
			t.Errorf("%s: routes: %v", name, r.Routes)
		}
		after := pod.Run(t, "ip -4 route show default") + pod.Run(t, "ip -6 route show default")
		for line := range strings.Lines(before) {
			if !strings.Contains(after, line) {
				t.Errorf("%s: gone: %s", name, line)
			}
		}
		record := n.Run(t, "cat "+filepath.Join(n.runDir, "pods", vethName("one", "eth0")))
		if !regexp.MustCompile(tt.apart).MatchString(record) {
			t.Errorf("%s: record: %s", name, record)
		}
		reach(t, n.NS, "10.244.3.2")
		reach(t, n.NS, "fd00:10:244:3::3")
		if err := a.check(); err != nil {
			t.Errorf("%s: CHECK: %v", name, err)
		}
		if tt.routes == 0 {
			wantBrokenApart(t, a, pod)
		}
		if err := a.del(); err != nil {
			t.Errorf("%s: DEL: %v", name, err)
		}
		if rules := pod.Run(t, "ip rule") + pod.Run(t, "ip -6 rule"); strings.Contains(rules, "116") {
			t.Errorf("%s: after DEL: %s", name, rules)
		}
		n.wantNothing("DEL")
	}
}

// wantBrokenApart breaks what an address that is apart needs and sees that CHECK finds it.
func wantBrokenApart(t *testing.T, a *attachment, pod *netnstest.NS) {
	t.Helper()
	out := pod.Run(t, "ip -6 rule")
	table := regexp.MustCompile(`lookup (116\d\d)`).FindStringSubmatch(out)
	if table == nil {
		t.Fatalf("no rule: %s", out)
	}
	for command, says := range map[string]string{
		"ip route flush table " + table[1]: "no default route via 10.244.3.1 dev eth0 in table " + table[1],
		"ip -6 rule del table " + table[1]: "no rule from fd00:10:244:3::3 lookup " + table[1],
	} {
		pod.Run(t, command)
		if err := a.check(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("after %s: CHECK: %v", command, err)
		}
	}
}

func TestNextInterfaceOfAPodCannotBeMade(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	n.further("one", pod, "eth0").mustAdd()
	before := routing(t, pod)
	a := n.further("one", pod, "net1")
	a.rt.CapabilityArgs = both()
	n.usePlugins(fakes(t, map[string]string{"portmap": "[ $CNI_COMMAND = DEL ] || exit 3"}), pluginDir(t))
	if _, err := a.add(); err == nil {
		t.Fatal("no error")
	}
	if after := routing(t, pod); after != before {
		t.Errorf("routing was\n%s is\n%s", before, after)
	}
	if left := names(t, filepath.Join(n.runDir, "addrs")); len(left) != 2 {
		t.Errorf("addresses: %v", left)
	}
}

func TestInterfaceHasALongName(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	for _, name := range []string{"fifteen-letters", "net.1", "ünïcödé-n1"} {
		a := n.further("one", pod, name)
		r := a.mustAdd()
		if r.Interfaces[1].Name != name {
			t.Errorf("result: %v", r.Interfaces[1])
		}
		if err := a.check(); err != nil {
			t.Errorf("CHECK of %s: %v", name, err)
		}
	}
	for _, ip := range []netip.Addr{netip.MustParseAddr("10.244.3.2"), netip.MustParseAddr("10.244.3.4")} {
		reach(t, n.NS, ip.String())
	}
	for name, says := range map[string]string{
		"sixteen-letters-": "less than 16 characters",
		"ünïcödé-nämé":     "less than 16 characters", // 16 bytes
		"..":               "interface name is . or ..",
	} {
		if _, err := n.further("two", netnstest.New(t), name).add(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"all", "default", "lo"} {
		_, err := n.further("two", netnstest.New(t), name).add()
		wantCode(t, name, err, 4, "CNI_IFNAME", name)
	}
	if left := names(t, filepath.Join(n.runDir, "pods")); len(left) != 3 {
		t.Errorf("records: %v", left)
	}
}

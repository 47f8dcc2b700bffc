package podnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

func TestPodsCannotReachOneAnother(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	one, two := netnstest.New(t), netnstest.New(t)
	first, second := n.mustAdd("one", one), n.mustAdd("two", two)
	for _, target := range []string{"10.244.3.1", "fd00:10:244:3::1"} {
		reach(t, one, target)
	}
	for _, ip := range second.IPs {
		reach(t, one, ip.Address.IP.String())
	}
	for _, ip := range first.IPs {
		reach(t, n.NS, ip.Address.IP.String())
	}
	if err := n.check("one", one.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

// reach pings until there is an answer. The kernel has one table of IPv6 neighbours for all namespaces, and while it is
// full nothing new can be reached.
func reach(t *testing.T, from *netnstest.NS, addr string) {
	t.Helper()
	await(t, "an answer from "+addr, func() bool {
		_, err := from.Try(t, "ping -c1 -W1 "+addr)
		return err == nil
	})
}

func TestFirstPacketIsLost(t *testing.T) {
	n := newNode(t, subnet4)
	var all sync.WaitGroup
	for i := range 30 {
		pod := netnstest.New(t)
		all.Go(func() {
			if _, err := n.add(fmt.Sprint("c", i), pod.Path()); err != nil {
				t.Error(err)
			}
			out, _ := pod.Try(t, "ping -c1 -W5 10.244.3.1")
			if !regexp.MustCompile(`time=[0-9]{0,3}(\.[0-9]+)? ms`).MatchString(out) { // ARP asks again after 1000 ms
				t.Errorf("pod %d: %s", i, out)
			}
		})
	}
	all.Wait()
}

func TestPodIsNotWiredAsItsResultSays(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	r := n.mustAdd("one", pod)
	veth := vethName("one", "eth0")
	if len(r.Interfaces) != 2 || len(r.IPs) != 2 || len(r.Routes) != 2 {
		t.Fatalf("result: %+v", r)
	}
	if i := r.Interfaces[1]; i.Name != "eth0" || i.Mac != "0a:58:0a:f4:03:02" || i.Sandbox != pod.Path() || i.Mtu != 1430 {
		t.Errorf("pod's interface: %v", i)
	}
	if i := r.Interfaces[0]; i.Name != veth || i.Sandbox != "" {
		t.Errorf("host's interface: %v", i)
	}
	if got := fmt.Sprint(r.IPs[0].Address.String(), r.IPs[0].Gateway, r.IPs[1].Address.String(), r.IPs[1].Gateway); got !=
		"10.244.3.2/2410.244.3.1fd00:10:244:3::3/64fd00:10:244:3::1" {
		t.Errorf("addresses: %s", got)
	}
	for _, tt := range []struct{ in, want string }{
		{pod.Run(t, "ip -details link show eth0"), `mtu 1430 .*state UP .*link/ether 0a:58:0a:f4:03:02`},
		{pod.Run(t, "ip -4 address show eth0"), `inet 10\.244\.3\.2/24 brd 10\.244\.3\.255`},
		{pod.Run(t, "ip -6 address show eth0 scope global"), `inet6 fd00:10:244:3::3/64 scope global nodad`},
		{pod.Run(t, "ip -4 route"), `default via 10\.244\.3\.1 dev eth0`},
		{pod.Run(t, "ip -6 route"), `default via fd00:10:244:3::1 dev eth0`},
		{pod.Run(t, "cat /proc/sys/net/ipv6/conf/eth0/accept_ra"), `^0`},
		{n.Run(t, "ip -details link show "+veth), `mtu 1430 .*master tweed0 .*state UP .*group tweed|group 116`},
		{n.Run(t, "ip -details link show "+veth), `link/ether ` + r.Interfaces[0].Mac},
		{n.Run(t, "bridge -details link show dev "+veth), `hairpin on .*learning off flood off .*locked on`},
		{n.Run(t, "bridge fdb show dev "+veth), `0a:58:0a:f4:03:02 sticky master tweed0 static`},
		{n.Run(t, "nft list set bridge tweed ipv6"), veth + `" \. 0a:58:0a:f4:03:02 \. fd00:10:244:3::3`},
	} {
		if !regexp.MustCompile(`(?s)` + tt.want).MatchString(tt.in) {
			t.Errorf("%s\ndoes not match %s", tt.in, tt.want)
		}
	}
	text, err := os.ReadFile(filepath.Join(n.runDir, "addrs", "fd00:10:244:3::3"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"network":"tweed","container":"one","interface":"eth0","veth":"` + veth + `","ifindex":` +
		ifindex(t, n, veth) + `,"mac":"0a:58:0a:f4:03:02","addresses":["10.244.3.2/24","fd00:10:244:3::3/64"],"delegates":[]}`
	if strings.TrimSpace(string(text)) != want {
		t.Errorf("record:\n%s\nwant\n%s", text, want)
	}
}

func ifindex(t *testing.T, n *node, dev string) string {
	t.Helper()
	var links []struct{ Ifindex int }
	if err := json.Unmarshal([]byte(n.Run(t, "ip -json link show "+dev)), &links); err != nil || len(links) != 1 {
		t.Fatal(err, links)
	}
	return strconv.Itoa(links[0].Ifindex)
}

func TestNodeHasOnlyIPv6(t *testing.T) {
	n := newNode(t, subnet6)
	one, two := netnstest.New(t), netnstest.New(t)
	r := n.mustAdd("one", one)
	n.mustAdd("two", two)
	if len(r.IPs) != 1 || r.Interfaces[1].Mac != "0a:58:00:00:00:03" {
		t.Errorf("result: %+v %v", r, r.Interfaces[1])
	}
	reach(t, one, "fd00:10:244:3::1")
	reach(t, one, "fd00:10:244:3::4")
	if err := n.check("one", one.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

func TestRuntimeHasSwitchedIPv6Off(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	pod.Run(t, "sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
	n.mustAdd("one", pod)
	reach(t, pod, "fd00:10:244:3::1")
}

func TestRuntimeSpeaksAnOlderVersion(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		pod := netnstest.New(t)
		rt := runtimeConf("c"+version, pod.Path())
		list := n.conflist(version, `"dns": {"nameservers": ["10.96.0.10"]}`)
		n.Do(t, func() {
			r, err := n.cni.AddNetworkList(context.Background(), list, rt)
			if err != nil {
				t.Errorf("%s: ADD: %v", version, err)
				return
			}
			var text bytes.Buffer
			if err := r.PrintTo(&text); err != nil || r.Version() != version {
				t.Errorf("%s: result: %v %v", version, r, err)
			}
			for _, want := range []string{"10.244.3.1", "fd00:10:244:3::1", "10.96.0.10", "eth0"} {
				if !strings.Contains(text.String(), want) {
					t.Errorf("%s: %s lacks %s", version, &text, want)
				}
			}
			if err := n.cni.DelNetworkList(context.Background(), list, rt); err != nil {
				t.Errorf("%s: DEL: %v", version, err)
			}
		})
	}
	n.wantNothing("DEL")
	for _, version := range []string{"0.1.0", "0.2.0", "2.0.0"} {
		err := n.call("ADD", fmt.Sprintf(`{"cniVersion": %q, "name": "tweed", "type": "tweed-cni"}`, version))
		wantCode(t, version, err, 1)
	}
}

func TestAddCannotBeDone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*node, *netnstest.NS) (netns string)
		code  uint
		says  []string
	}{
		{"interface name is taken", func(_ *node, pod *netnstest.NS) string {
			pod.Run(t, "ip link add eth0 type bridge")
			return pod.Path()
		}, 4, []string{"CNI_IFNAME", "has an interface eth0 already"}},
		{"veth name is a stranger's", func(n *node, pod *netnstest.NS) string {
			n.Run(t, "ip link add "+vethName("one", "eth0")+" type bridge")
			return pod.Path()
		}, 4, []string{vethName("one", "eth0")}},
		{"namespace does not exist", func(*node, *netnstest.NS) string { return "/run/netns/none" },
			8, []string{"CNI_NETNS", "/run/netns/none"}},
		{"namespace below a file", func(*node, *netnstest.NS) string { return "/etc/hostname/none" },
			8, []string{"CNI_NETNS", "/etc/hostname/none"}},
		{"namespace is a file", func(*node, *netnstest.NS) string { return "/etc/hostname" },
			8, []string{"/etc/hostname is not a network namespace"}},
		{"namespace is of another kind", func(*node, *netnstest.NS) string { return "/proc/self/ns/mnt" },
			8, []string{"is not a network namespace"}},
		{"namespace is the host's", func(n *node, _ *netnstest.NS) string { return n.Path() },
			8, []string{"the host's own"}},
		{"bridge is missing", func(n *node, pod *netnstest.NS) string {
			n.Run(t, "ip link del tweed0")
			return pod.Path()
		}, 11, []string{"tweed0 is missing"}},
		{"bridge is a stranger's", func(n *node, pod *netnstest.NS) string {
			n.Run(t, "ip link set tweed0 group 0")
			return pod.Path()
		}, 11, []string{"tweed0", "group is not 116"}},
		{"daemon has not run", func(n *node, pod *netnstest.NS) string {
			if err := os.Remove(nodeInfoPath(n.runDir)); err != nil {
				t.Fatal(err)
			}
			return pod.Path()
		}, 11, []string{"the tweed daemon has not run on this node since boot"}},
		{"node has no subnet", func(n *node, pod *netnstest.NS) string {
			n.info.Subnets = nil
			n.publish(n.info)
			return pod.Path()
		}, 11, []string{"n1 has no subnet"}},
		{"MTU is refused", func(n *node, pod *netnstest.NS) string {
			n.info.MTU = 40
			n.publish(n.info)
			return pod.Path()
		}, 5, []string{"ip link add", "invalid argument"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			pod := netnstest.New(t)
			netns := tt.spoil(n, pod)
			before := links(t, n.NS) + links(t, pod)
			_, err := n.add("one", netns)
			wantCode(t, "ADD", err, tt.code, tt.says...)
			n.wantNothing("the failed ADD")
			if after := links(t, n.NS) + links(t, pod); after != before {
				t.Errorf("links: were\n%s are\n%s", before, after)
			}
		})
	}
}

// links tells what devices a namespace has, apart from states that follow from others.
func links(t *testing.T, ns *netnstest.NS) string {
	t.Helper()
	return regexp.MustCompile(` +(UP|DOWN|UNKNOWN)? *|<.*>`).ReplaceAllString(ns.Run(t, "ip -brief link"), " ")
}

func TestSysctlRootIsWrong(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	_, err := n.add("one", pod.Path(), `"sysctlRoot": "/run/none"`)
	wantCode(t, "ADD", err, 999, "/run/none/net/ipv6/conf/eth0/accept_ra", "sysctlRoot")
	n.wantNothing("the failed ADD")
}

func TestSysctlDoesNotTake(t *testing.T) {
	path := filepath.Join(t.TempDir(), "setting")
	if err := os.WriteFile(path, []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := setSysctl(path, "0"); err != nil {
		t.Errorf("one that takes: %v", err)
	}
	if text, err := os.ReadFile(path); string(text) != "0" {
		t.Errorf("it reads %q, %v", text, err)
	}
	if err := setSysctl("/dev/null", "0"); err == nil || !strings.Contains(err.Error(), "although 0 was written") {
		t.Errorf("one that does not: %v", err)
	}
}

func TestAddIsCalledTwice(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	one, other := netnstest.New(t), netnstest.New(t)
	n.mustAdd("one", one)
	for _, netns := range []*netnstest.NS{one, other} {
		_, err := n.add("one", netns.Path())
		wantCode(t, "second ADD", err, 4, "container one already has interface eth0")
	}
	if err := os.RemoveAll(filepath.Join(n.runDir, "pods")); err != nil {
		t.Fatal(err)
	}
	_, err := n.add("one", other.Path())
	wantCode(t, "second ADD without a record", err, 4, "delete that first")
	reach(t, one, "10.244.3.1")
}

func TestPodIsLostWithoutDelAndComesAgain(t *testing.T) {
	n := newNode(t, subnet4)
	n.mustAdd("one", netnstest.New(t))
	n.Run(t, "ip link del "+vethName("one", "eth0"))
	pod := netnstest.New(t)
	r := n.mustAdd("one", pod)
	if got := r.IPs[0].Address.IP.String(); got != "10.244.3.3" {
		t.Errorf("address: %s", got)
	}
	if got := names(t, filepath.Join(n.runDir, "addrs")); len(got) != 1 {
		t.Errorf("taken: %v", got)
	}
}

func TestDelMeetsLessThanAddLeft(t *testing.T) {
	for name, spoil := range map[string]func(n *node, netns string){
		"nothing":       func(*node, string) {},
		"no namespace":  func(n *node, netns string) { n.Run(t, "ip netns del "+filepath.Base(netns)) },
		"no veth":       func(n *node, _ string) { n.Run(t, "ip link del "+vethName("one", "eth0")) },
		"no bridge":     func(n *node, _ string) { n.Run(t, "ip link del tweed0") },
		"no node.json":  func(n *node, _ string) { os.Remove(nodeInfoPath(n.runDir)) },
		"no store":      func(n *node, _ string) { os.RemoveAll(n.runDir) },
		"broken record": func(n *node, _ string) { _ = os.WriteFile(n.runDir+"/pods/"+vethName("one", "eth0"), nil, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			n.Run(t, "ip netns add one")
			t.Cleanup(func() { _, _ = n.Try(t, "ip netns del one") })
			if _, err := n.add("one", "/run/netns/one"); err != nil {
				t.Fatal(err)
			}
			spoil(n, "/run/netns/one")
			for _, which := range []string{"first", "second"} {
				if err := n.del("one", "/run/netns/one", `"later": "key"`); err != nil {
					t.Errorf("%s DEL: %v", which, err)
				}
			}
			n.wantNothing("DEL")
		})
	}
}

func TestDelIsForAnother(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	n.mustAdd("one", pod)
	n.Run(t, "ip link add "+vethName("two", "eth0")+" type veth peer name x") // not ours
	for _, c := range []string{"two", "on", "onee"} {
		if err := n.del(c, pod.Path()); err != nil {
			t.Errorf("DEL of %s: %v", c, err)
		}
	}
	if err := n.del("one", ""); err != nil {
		t.Errorf("DEL without CNI_NETNS: %v", err)
	}
	if !strings.Contains(strings.Join(n.ports(), " "), vethName("two", "eth0")) {
		t.Error("a stranger's veth is gone")
	}
}

// TestFiftyPodsComeWhileFiftyGo has as many at once in each of ten rounds.
func TestFiftyPodsComeWhileFiftyGo(t *testing.T) {
	t.Parallel()
	const pods, rounds = 50, 10
	n := newNode(t, "10.244.3.0/25", "fd00:10:244:3::/121") // for 125
	var spaces [2][]*netnstest.NS
	for i := range 2 * pods {
		spaces[i%2] = append(spaces[i%2], netnstest.New(t))
	}
	var holders sync.Map // of addresses, until their DEL begins
	come := func(round, pod int) {
		r, err := n.add(fmt.Sprint(round, "-", pod), spaces[round%2][pod].Path())
		if err != nil {
			t.Errorf("round %d, ADD of pod %d: %v", round, pod, err)
			return
		}
		for _, ip := range r.IPs {
			if other, taken := holders.LoadOrStore(ip.Address.IP.String(), fmt.Sprint(round, "-", pod)); taken {
				t.Errorf("round %d: %s is pod %d's and %v's", round, ip.Address.IP, pod, other)
			}
		}
	}
	leave := func(round, pod int) {
		holders.Range(func(a, holder any) bool {
			if holder == fmt.Sprint(round, "-", pod) {
				holders.Delete(a)
			}
			return true
		})
		if err := n.del(fmt.Sprint(round, "-", pod), spaces[round%2][pod].Path()); err != nil {
			t.Errorf("round %d, DEL of pod %d: %v", round, pod, err)
		}
	}
	for round := range rounds + 1 {
		var all sync.WaitGroup
		for pod := range pods {
			if round < rounds {
				all.Go(func() { come(round, pod) })
			}
			if round > 0 {
				all.Go(func() { leave(round-1, pod) })
			}
		}
		all.Wait()
		want := 2 * pods
		if round == rounds {
			want = 0
		}
		taken := names(t, filepath.Join(n.runDir, "addrs"))
		for _, a := range taken {
			if _, ok := holders.Load(a); !ok {
				t.Errorf("round %d: %s is lost: taken, and nobody's", round, a)
			}
		}
		if len(taken) != want {
			t.Errorf("round %d: %d addresses are taken, want %d", round, len(taken), want)
		}
	}
	n.wantNothing("DEL of all")
}

func TestSubnetIsUsedUp(t *testing.T) {
	t.Parallel() // it waits
	n := newNode(t, "10.244.3.0/30")
	pod := netnstest.New(t)
	n.Run(t, "ip netns add usedup")
	t.Cleanup(func() { _, _ = n.Try(t, "ip netns del usedup") })
	if _, err := n.add("one", "/run/netns/usedup"); err != nil {
		t.Fatal(err)
	}
	_, err := n.add("two", pod.Path())
	wantCode(t, "ADD", err, 11, "10.244.3.0/30 is used up", "all 1 addresses", "SubnetLen")
	if err := n.status(); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	n.Run(t, "ip netns del usedup") // the node has lost power, as it were: there is no DEL
	await(t, "the veth's end", func() bool { return len(n.ports()) == 0 })
	if got := n.mustAdd("two", pod).IPs[0].Address.IP.String(); got != "10.244.3.2" {
		t.Errorf("address: %s", got)
	}
}

func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// signalled starts an ADD and sends it a signal after a while. It returns what it printed and its error.
func (n *node) signalled(container, netns string, sig syscall.Signal, after time.Duration) (string, error) {
	text := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "tweed", "type": "tweed-cni", "runDir": %q}`, n.runDir)
	cmd := n.command("ADD", container, netns, text)
	var out bytes.Buffer
	cmd.Stdout = &out
	var err error
	n.Do(n.t, func() { err = cmd.Start() })
	if err != nil {
		n.t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { _ = cmd.Process.Signal(sig) })
	err = cmd.Wait()
	timer.Stop()
	return out.String(), err
}

func TestAddIsKilled(t *testing.T) {
	n := newNode(t, "10.244.3.0/24", subnet6)
	unfinished := 0
	for i := range 60 {
		name := fmt.Sprint("killed", i)
		n.Run(t, "ip netns add "+name)
		_, err := n.signalled(name, "/run/netns/"+name, syscall.SIGKILL, rand.N(10*time.Millisecond))
		if err != nil {
			unfinished++
		}
		if i%2 == 0 { // the runtime cleans up at once; else the sweep must
			if err := n.del(name, "/run/netns/"+name); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(n.runDir, "pods", vethName(name, "eth0"))); err == nil {
				t.Errorf("%s is still there after DEL", name)
			}
		}
		n.Run(t, "ip netns del "+name)
	}
	if unfinished == 0 {
		t.Error("no ADD was killed in time")
	}
	await(t, "the veths' end", func() bool { return len(n.ports()) == 0 })
	n.Do(t, func() {
		if _, err := Sweep(t.Context(), n.runDir, ""); err != nil {
			t.Error(err)
		}
	})
	n.wantNothing("the sweep")
}

func TestAddIsTerminated(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	for i := range 40 {
		name := fmt.Sprint("c", i)
		pod := netnstest.New(t)
		out, err := n.signalled(name, pod.Path(), syscall.SIGTERM, 2*time.Millisecond+rand.N(6*time.Millisecond))
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit) && exit.ExitCode() < 0:
			// It had not come to its handler yet, so it had done nothing either.
		case err != nil && !strings.Contains(out, "interrupted"):
			t.Errorf("failed by itself: %s", out)
		case err == nil:
			if err := n.checkAgainst(name, pod.Path(), out); err != nil {
				t.Errorf("finished, but: %v", err)
			}
			if err := n.del(name, pod.Path()); err != nil {
				t.Error(err)
			}
		}
		n.wantNothing("SIGTERM")
	}
}

// checkAgainst calls CHECK with a result that libcni has not seen.
func (n *node) checkAgainst(container, netns, result string, env ...string) error {
	var prev struct{ CNIVersion string }
	if err := json.Unmarshal([]byte(result), &prev); err != nil {
		n.t.Fatal(err)
	}
	text := fmt.Sprintf(`{"cniVersion": %q, "name": "tweed", "type": "tweed-cni", "runDir": %q, "prevResult": %s}`,
		prev.CNIVersion, n.runDir, result)
	return n.call("CHECK", text, append(env, "CNI_CONTAINERID="+container, "CNI_NETNS="+netns)...)
}

func TestAddIsInterruptedBetweenSteps(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	conf, err := ParseConfig(fmt.Appendf(nil, `{"runDir": %q}`, n.runDir))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	n.Do(t, func() { _, err = Attach(ctx, conf, Pod{Container: "one", NetNS: pod.Path(), Interface: "eth0"}) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("ADD: %v", err)
	}
	n.wantNothing("the interruption")
}

func TestCheckFindsWhatIsBroken(t *testing.T) {
	veth := vethName("one", "eth0")
	for _, tt := range []struct{ where, command, want string }{
		{"pod", "ip link set eth0 down", "interface eth0 is down"},
		{"pod", "ip link set eth0 name other", "interface eth0 is missing"},
		{"pod", "ip link set eth0 address 0a:58:00:00:00:01", "has MAC 0a:58:00:00:00:01, not 0a:58:0a:f4:03:02"},
		{"pod", "ip address del 10.244.3.2/24 dev eth0", "interface eth0 lacks address 10.244.3.2/24"},
		{"pod", "ip address del fd00:10:244:3::3/64 dev eth0", "interface eth0 lacks address fd00:10:244:3::3/64"},
		{"pod", "ip -6 address change fd00:10:244:3::3/128 dev eth0", ""},
		{"pod", "ip address replace 10.244.3.2/32 dev eth0", ""}, // beside the one
		{"pod", "ip route del default", "no default route via 10.244.3.1"},
		{"pod", "ip -6 route del default", "no default route via fd00:10:244:3::1"},
		{"node", "ip link set " + veth + " down", veth + " on the host is down"},
		{"node", "ip link set " + veth + " nomaster", veth + " on the host is not a port of tweed0"},
		{"node", "ip link del tweed0", "bridge tweed0 is missing"},
		{"node", "ip link del " + veth, veth + " on the host is missing"},
		{"node", "bridge link set dev " + veth + " hairpin off", "hairpin off"},
		{"node", "ip link set " + veth + " type bridge_slave locked off", "is not locked"},
		{"node", "ip link set " + veth + " type bridge_slave learning on", "learns addresses"},
		{"node", "ip link set " + veth + " type bridge_slave flood on", "is flooded"},
		{"node", "bridge fdb del 0a:58:0a:f4:03:02 dev " + veth + " master", "does not know for good"},
		{"node", "bridge fdb replace 0a:58:0a:f4:03:02 dev " + veth + " master static", "does not know for good"},
		{"node", "nft delete table bridge tweed", "does not judge"},
		{"node", "nft flush set bridge tweed ipv6", "does not judge"},
		{"run", "rm addrs/10.244.3.2", "10.244.3.2 is not its own"},
		{"run", "cp addrs/10.244.3.2 addrs/new", ""},
		{"run", "rm -r pods", "no record of interface eth0"},
		{"run", "truncate -s0 addrs/10.244.3.2", "cannot be read"},
		{"run", "rm node.json", "has not run on this node"},
	} {
		t.Run(tt.command, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			pod := netnstest.New(t)
			n.mustAdd("one", pod)
			switch tt.where {
			case "pod":
				pod.Run(t, tt.command)
			case "node":
				n.Run(t, tt.command)
			case "run":
				cmd := exec.Command("sh", "-c", tt.command)
				cmd.Dir = n.runDir
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			err := n.check("one", pod.Path())
			if tt.want == "" {
				if err != nil {
					t.Errorf("CHECK: %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("CHECK: %v, want %q", err, tt.want)
			}
		})
	}
}

func TestCheckOfAPodThatNobodyKnows(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	n.mustAdd("one", pod)
	result := `{"cniVersion": "1.1.0"}`
	err := n.checkAgainst("two", pod.Path(), result)
	wantCode(t, "CHECK", err, 3, "no record of interface eth0")
	lose(t, n, "one") // and its veth is there
	wantCode(t, "CHECK where a DEL is needed", n.checkAgainst("one", pod.Path(), result), 999, "no record")
}

func TestCheckFindsAnotherVeth(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	n.mustAdd("one", pod)
	veth := vethName("one", "eth0")
	n.Run(t, "ip link del "+veth)
	n.Run(t, "ip link add "+veth+" group 116 master tweed0 up type veth peer name eth0 netns "+pod.Path())
	err := n.check("one", pod.Path())
	if err == nil || !strings.Contains(err.Error(), veth+" on the host is not its veth") {
		t.Errorf("CHECK: %v", err)
	}
}

// TestCheckAfterALaterPluginHasChangedRoutes is of a plugin that says so in the result that the runtime remembers.
func TestCheckAfterALaterPluginHasChangedRoutes(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	r := n.mustAdd("one", pod)
	for _, command := range []string{"ip route del default", "ip route add 192.0.2.0/24 via 10.244.3.1",
		"ip -6 address del fd00:10:244:3::3/64 dev eth0", "ip -6 route flush default"} {
		pod.Run(t, command)
	}
	if err := n.check("one", pod.Path()); err == nil {
		t.Error("CHECK: no error while the result says otherwise")
	}
	r.Routes[0].Dst = *ipNet(netip.MustParsePrefix("192.0.2.0/24"))
	r.Routes, r.IPs = r.Routes[:1], r.IPs[:1]
	for _, version := range []string{"1.1.0", "0.4.0"} {
		text, err := resultIn(version, r)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.checkAgainst("one", pod.Path(), string(text)); err != nil {
			t.Errorf("%s: CHECK: %v", version, err)
		}
	}
}

func TestCheckAfterALaterPluginHasSetTheMAC(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	r := n.mustAdd("one", pod)
	pod.Run(t, "ip link set eth0 address 0a:58:00:00:00:01")
	r.Interfaces[1].Mac = "0a:58:00:00:00:01"
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.checkAgainst("one", pod.Path(), string(text)); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

func TestNodeIsNotReady(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	want := func(what string, code uint, says string) {
		t.Helper()
		if err := n.status(); code == 0 && err != nil {
			t.Errorf("%s: %v", what, err)
		} else if code != 0 {
			wantCode(t, what, err, code, says)
		}
	}
	want("all is well", 0, "")
	info := n.info
	info.Converged = false
	n.publish(info)
	want("first pass not finished", 50, "first pass")
	info = n.info
	info.BootID = "another"
	n.publish(info)
	want("another boot", 50, "since boot")
	if err := os.Remove(nodeInfoPath(n.runDir)); err != nil {
		t.Fatal(err)
	}
	want("daemon never ran", 50, "since boot")
	n.publish(n.info)
	n.Run(t, "ip link del tweed.1")
	want("no device", 51, "tweed.1")
	info = n.info
	info.Device = ""
	n.publish(info)
	want("no device is needed", 0, "")
	n.publish(n.info)
	n.Run(t, "ip link add tweed.1 type bridge")
	want("device again", 0, "")
	n.Run(t, "ip link del tweed0")
	want("no bridge", 51, "tweed0")
	if err := os.WriteFile(nodeInfoPath(n.runDir), []byte(`{"version": 99}`), 0o644); err != nil {
		t.Fatal(err)
	}
	want("daemon of another release", 0, "")
}

func TestConfigurationIsWrong(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	const head = `"cniVersion": "1.0.0", "type": "tweed-cni", `
	for _, tt := range []struct {
		stdin string
		code  uint
		says  []string
	}{
		{`{` + head + `"name": "tweed", "bridge": "cni0"}`, 7, []string{"bridge", `"cni0"`, "runDir"}},
		{`{` + head + `"name": "tweed", "runDir": 7}`, 7, []string{"runDir is 7"}},
		{`{` + head + `"name": "tweed", "runDir": "run/tweed"}`, 7, []string{`runDir is "run/tweed"`, "absolute"}},
		{`{` + head + `"name": "tweed", "sysctlRoot": ""}`, 7, []string{"sysctlRoot"}},
		{`{` + head + `"name": "tweed", "dns": []}`, 7, []string{"dns is []"}},
		{`{` + head + `"name": "tweed", "ipam": {"type": "host-local"}}`, 2, []string{"ipam", "host-local"}},
		{`{` + head + `"name": "tweed", "ipMasq": false}`, 2, []string{"ipMasq is false"}},
		{`{` + head + `"runDir": "/run/tweed"}`, 7, []string{"name is missing"}},
		{`{"type": "tweed-cni", "name": "tweed"}`, 1, []string{`cniVersion is ""`, "0.3.0, 0.3.1"}},
		{`{"cniVersion": "1.2.0", "type": "tweed-cni", "name": "tweed"}`, 1, []string{`cniVersion is "1.2.0"`}},
		{`{` + head + `"name": "tw eed"}`, 7, []string{"tw eed"}},
		{`{` + head, 6, nil},
		{``, 6, nil},
		{`[]`, 6, nil},
	} {
		wantCode(t, tt.stdin, n.call("ADD", tt.stdin, "CNI_NETNS="+pod.Path()), tt.code, tt.says...)
	}
	good := `{` + head + `"name": "tweed", "runDir": "` + n.runDir + `", "ipam": {}, "ipMasq": true, "args": {},
		"capabilities": {}, "runtimeConfig": {}, "cni.dev/x": 1, "disableCheck": true}`
	if err := n.call("ADD", good, "CNI_NETNS="+pod.Path()); err != nil {
		t.Errorf("with the spec's own keys: %v", err)
	}
	wantCode(t, "CHECK without prevResult", n.call("CHECK", good, "CNI_NETNS="+pod.Path()), 7, "prevResult is missing")
	if err := n.call("DEL", good); err != nil {
		t.Error(err)
	}
	n.wantNothing("bad configurations")
}

func TestEnvironmentIsWrong(t *testing.T) {
	n := newNode(t, subnet4)
	good := `{"cniVersion": "1.1.0", "name": "tweed", "type": "tweed-cni", "runDir": "` + n.runDir + `"}`
	for env, says := range map[string]string{
		"CNI_IFNAME=sixteen-letters-": "too long",
		"CNI_IFNAME=..":               "directory",
		"CNI_IFNAME=a/b":              "must not contain",
		"CNI_IFNAME=a b":              "must not contain",
		"CNI_IFNAME=":                 "CNI_IFNAME",
		"CNI_CONTAINERID=":            "CNI_CONTAINERID",
		"CNI_CONTAINERID=../x":        `CNI_CONTAINERID is "../x"`,
		"CNI_NETNS=":                  "CNI_NETNS",
		"CNI_PATH=":                   "CNI_PATH",
		"CNI_COMMAND=FLY":             "FLY",
	} {
		wantCode(t, env, n.call("ADD", good, env), 4, says)
	}
	for verb, version := range map[string]string{"CHECK": "0.3.1", "STATUS": "1.0.0", "GC": "1.0.0"} {
		older := strings.Replace(good, "1.1.0", version, 1)
		wantCode(t, verb, n.call(verb, older, "CNI_NETNS="+netnstest.New(t).Path()), 1, verb, version)
	}
	n.wantNothing("bad environments")
}

func TestPluginIsRunByHand(t *testing.T) {
	n := newNode(t)
	for _, tt := range []struct {
		args, env []string
		want      string
		code      int
	}{
		{nil, nil, "CNI protocol versions supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0", 0},
		{[]string{"--version"}, nil, "tweed-cni unreleased", 0},
		{[]string{"--help"}, nil, "Its only argument is --version", 2},
		{nil, []string{"CNI_COMMAND=VERSION"},
			`{"cniVersion":"1.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}`, 0},
	} {
		cmd := n.command("", "", "", "")
		cmd.Args = append(cmd.Args, tt.args...)
		cmd.Env = append([]string{"PATH="}, tt.env...)
		out, _ := cmd.CombinedOutput()
		if !strings.Contains(string(out), tt.want) || cmd.ProcessState.ExitCode() != tt.code {
			t.Errorf("%v: %d %s", tt.args, cmd.ProcessState.ExitCode(), out)
		}
	}
}

func TestVersionIsAskedInAnother(t *testing.T) {
	n := newNode(t)
	for stdin, want := range map[string]string{
		`{"cniVersion": "0.4.0"}`:                 "0.4.0",
		`{"cniVersion": "1.0.0", "name": "pods"}`: "1.0.0",
		`{"cniVersion": "0.1.0"}`:                 "1.1.0",
		`{"cniVersion": 1}`:                       "1.1.0",
		`{`:                                       "1.1.0",
		"":                                        "1.1.0",
	} {
		out, err := n.command("VERSION", "", "", stdin).CombinedOutput()
		if want = `{"cniVersion":"` + want + `","supportedVersions":["0.3.0",`; err != nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("%s: %v %s, not %s...", stdin, err, out, want)
		}
	}
}

func TestPodsOfAFormerSubnetLive(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	n.mustAdd("one", pod)
	n.info.Subnets, n.info.Gateways = prefixes("10.244.9.0/24"), []netip.Addr{netip.MustParseAddr("10.244.9.1")}
	n.publish(n.info)
	if used, err := FormerSubnets(n.runDir, n.info.Subnets); err != nil || fmt.Sprint(used) != "["+subnet4+"]" {
		t.Errorf("former: %v, %v", used, err)
	}
	if err := n.check("one", pod.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := n.del("one", pod.Path()); err != nil {
		t.Error(err)
	}
	n.wantNothing("DEL")
}

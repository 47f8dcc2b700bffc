package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// A host is a machine of its own: a network namespace.
type host struct {
	*netnstest.NS
	t *testing.T
}

func newHost(t *testing.T) host { return host{netnstest.New(t), t} }

// types runs commands, one a line.
func (h host) types(commands string) {
	h.t.Helper()
	for line := range strings.Lines(commands) {
		if line = strings.TrimSpace(line); line != "" {
			h.Run(h.t, line)
		}
	}
}

// await repeats a command until it succeeds.
func (h host) await(command string) {
	h.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		out, err := h.Try(h.t, command)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: still %v after 30 s\n%s", command, err, out)
		}
	}
}

func (h host) shows(command, want string) {
	h.t.Helper()
	if out := h.Run(h.t, command); !strings.Contains(out, want) {
		h.t.Errorf("%s: want %q in\n%s", command, want, out)
	}
}

// cable lays one from dev of a to dev of b. Neither is up.
func cable(a host, devA string, b host, devB string) {
	a.t.Helper()
	a.Run(a.t, fmt.Sprintf("ip link add %s type veth peer name %s netns %s", devA, devB, b.Path()))
}

// A running daemon, of node n<n>.
type running struct {
	host
	n    int
	dir  string   // of its files
	args []string // of commands that are to see what the daemon does
	env  []string // beside ours
	cmd  *exec.Cmd
	log  *logged
	stop func()

	program string // tweed, or one like it
}

// daemon runs tweed on a host as node n<n> of those that share the directory of leases, until the test ends, and waits
// until it is ready. The node has 10.244.<n>.0/24 and fd00:10:244:<n>::/64.
func daemon(h host, leases string, n int, conf string, flags ...string) *running {
	return daemonOf(h, nil, "tweed", leases, n, conf, flags...)
}

// daemonOf is daemon for a program that is like tweed, with more in its environment.
func daemonOf(h host, env []string, program, leases string, n int, conf string, flags ...string) *running {
	h.t.Helper()
	d := newRunning(h, env, program, leases, n, conf, flags...)
	d.start()
	return d
}

// newRunning is a daemon that has not been started yet.
func newRunning(h host, env []string, program, leases string, n int, conf string, flags ...string) *running {
	h.t.Helper()
	d := &running{host: h, n: n, dir: h.t.TempDir(), env: env, program: program, log: &logged{}}
	d.configure(conf)
	lease := fmt.Sprintf(
		`{"node":"n%d","since":"2026-01-02T03:04:0%dZ","subnets":"10.244.%d.0/24,fd00:10:244:%d::/64"}`, n, n, n, n)
	if err := os.WriteFile(filepath.Join(leases, fmt.Sprintf("n%d.json", n)), []byte(lease), 0o644); err != nil {
		h.t.Fatal(err)
	}
	d.args = append([]string{"--leases", leases, "--node-name", fmt.Sprintf("n%d", n),
		"--net-conf", filepath.Join(d.dir, "net-conf.json"), "--run-dir", filepath.Join(d.dir, "run")}, flags...)
	return d
}

// configure writes the node's net-conf.json, at once for every reader.
func (d *running) configure(conf string) {
	d.t.Helper()
	path := filepath.Join(d.dir, "net-conf.json")
	err := os.WriteFile(path+".new", []byte(conf), 0o644)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// tweed is a command of ours on the node.
func (d *running) tweed(command string, args ...string) *exec.Cmd {
	return d.command("tweed", append([]string{command}, args...)...)
}

func (d *running) command(program string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + d.Path(), "--", program}, args...)...)
}

// settles waits until a pass would do nothing.
func (d *running) settles() {
	d.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		out, err := d.tweed("plan", d.args...).CombinedOutput()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("on n%d, after 30 s there still is to do: %v\n%s", d.n, err, out)
		}
	}
}

// start runs the daemon until stop is called, and waits until it is ready.
func (d *running) start() {
	d.t.Helper()
	d.launch()
	d.await("curl -sf http://127.0.0.1:9479/readyz")
}

// launch is start without waiting.
func (d *running) launch() {
	d.t.Helper()
	cmd := d.command(d.program, append([]string{"run", "--cni-conf-dir", filepath.Join(d.dir, "cni")}, d.args...)...)
	cmd.Env = append(os.Environ(), d.env...)
	d.cmd = cmd
	cmd.Stdout, cmd.Stderr = d.log, d.log
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil || d.t.Failed() {
			d.t.Errorf("the daemon of n%d ends with %v:\n%s", d.n, err, d.log)
		}
	})
	d.t.Cleanup(func() { d.stop() })
}

// end ends the daemon in one way or another.
func (d *running) end(how syscall.Signal) {
	_ = d.cmd.Process.Signal(how)
	_ = d.cmd.Wait()
	d.stop = func() {}
}

// A logged is what a process that runs has written so far.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// pod attaches a pod to a node by hand: 10.244.<n>.5 and fd00:10:244:<n>::5.
func pod(node host, n int) host {
	node.t.Helper()
	p := newHost(node.t)
	cable(node, "pod", p, "eth0")
	node.types(`
		ip link set pod master tweed0
		ip link set pod up`)
	p.types(fmt.Sprintf(`
		ip link set eth0 up
		ip addr add 10.244.%d.5/24 dev eth0
		ip addr add fd00:10:244:%d::5/64 dev eth0 nodad
		ip route add default via 10.244.%d.1
		ip route add default via fd00:10:244:%d::1`, n, n, n, n))
	return p
}

// reach has two pods, of n1 and n2, each call the other.
func reach(one, two host) {
	one.t.Helper()
	for _, f := range []string{"10.244.%d.5", "fd00:10:244:%d::5"} {
		two.await("ping -c 1 -W 1 " + fmt.Sprintf(f, 1))
		one.await("ping -c 1 -W 1 " + fmt.Sprintf(f, 2))
	}
}

// An underlay is the addresses of one family that a test uses.
type underlay struct {
	family string
	node   string // of a node, by its number
	cable  string // of an end of a cable, by its number
	mask   string
	one    string // mask of a node's
	flag   string // for new addresses
	mtu    string // of a device on the narrower cable
}

func underlays() []underlay {
	return []underlay{
		{"ipv4", "203.0.113.%d", "192.0.2.%d", "/31", "/32", "", "mtu 1350 "},
		{"ipv6", "2001:db8::%d", "2001:db8:1::%d", "/127", "/128", "nodad", "mtu 1330 "},
	}
}

// join gives two hosts an address on lo each, and two cables to each other without any default route.
func (u underlay) join(hosts ...host) {
	cable(hosts[0], "eth0", hosts[1], "eth0")
	cable(hosts[0], "eth1", hosts[1], "eth1")
	for n, h := range hosts {
		h.types(`
			ip link set eth0 up
			ip link set eth1 mtu 1400 up
			ip addr add ` + u.of(n+1) + " dev lo " + u.flag)
		for i, dev := range []string{"eth0", "eth1"} {
			h.Run(h.t, fmt.Sprintf("ip addr add "+u.cable+"%s dev %s %s", 2*i+n, u.mask, dev, u.flag))
		}
		u.lead(h, n+1, u.of(n+1), u.of(2-n))
	}
}

// lead has packets from one address to another leave node n by both cables.
func (u underlay) lead(h host, n int, from, to string) {
	way := []string{"ip route add " + to + " src " + from}
	for i, dev := range []string{"eth0", "eth1"} {
		way = append(way, fmt.Sprintf("nexthop via "+u.cable+" dev %s", 2*i+2-n, dev))
	}
	h.Run(h.t, strings.Join(way, " "))
}

// of is the address of node n.
func (u underlay) of(n int) string { return fmt.Sprintf(u.node, n) }

func (u underlay) conf() string {
	return fmt.Sprintf(`{
		"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Underlay": %q}`, u.family)
}

// With the address on lo, either of two cables is enough.
func TestNodeLosesOneOfTwoUplinks(t *testing.T) {
	for _, u := range underlays() {
		t.Run(u.family, func(t *testing.T) {
			one, two, leases := newHost(t), newHost(t), t.TempDir()
			u.join(one, two)
			daemon(one, leases, 1, u.conf(), "--iface", "lo")
			daemon(two, leases, 2, u.conf(), "--iface-can-reach", u.of(1))
			for n, h := range []host{one, two} {
				h.shows("ip -d link show tweed.1", "vxlan id 1 local "+u.of(n+1)+" srcport") // without a device
				h.shows("ip link show tweed.1", u.mtu)
			}
			pod1, pod2 := pod(one, 1), pod(two, 2)
			reach(pod1, pod2)
			cut := func(dev string) {
				one.Run(t, "ip link set "+dev+" down")
				two.Run(t, "ip link set "+dev+" down")
			}
			cut("eth0")
			reach(pod1, pod2)
			cut("eth1")
			if out, err := pod1.Try(t, "ping -c 1 -W 1 10.244.2.5"); err == nil {
				t.Errorf("the packets go by neither cable:\n%s", out)
			}
		})
	}
}

// The address is on lo, and n1 gets another there: no event of an uplink tells of that.
func TestAddressOnLoMovesToAnother(t *testing.T) {
	t.Parallel()
	for _, u := range underlays() {
		t.Run(u.family, func(t *testing.T) {
			t.Parallel()
			one, two, leases := newHost(t), newHost(t), t.TempDir()
			u.join(one, two)
			daemon(one, leases, 1, u.conf(), "--iface", "lo")
			daemon(two, leases, 2, u.conf(), "--iface", "lo")
			pod1, pod2 := pod(one, 1), pod(two, 2)
			reach(pod1, pod2)
			device := one.index("tweed.1")
			start := time.Now()
			u.lead(two, 2, u.of(2), u.of(11))
			one.types(`
				ip addr add ` + u.of(11) + ` dev lo ` + u.flag + `
				ip route del ` + u.of(2) + `
				ip addr del ` + u.of(1) + u.one + ` dev lo`)
			u.lead(one, 1, u.of(11), u.of(2))
			one.awaitShows("ip -d link show tweed.1", "vxlan id 1 local "+u.of(11)+" srcport")
			two.awaitShows("bridge fdb show dev tweed.1", "dst "+u.of(11)+" ")
			if took := time.Since(start); took > soon() {
				t.Errorf("it is followed after %v, want %v at most", took, soon())
			}
			reach(pod1, pod2)
			if got := one.index("tweed.1"); got != device {
				t.Errorf("the device is another, %s instead of %s", got, device)
			}
		})
	}
}

// Node n1 is in a private network behind a router, which has one address outside and passes what comes for the tunnel
// on to n1. Node n2 has no route to n1's own address.
func TestNodeIsBehindNAT(t *testing.T) {
	for _, c := range []struct{ family, iptables, forward, inside, outside, mask, to, flag string }{
		{"ipv4", "iptables", "net.ipv4.ip_forward", "10.99.0.%d", "192.0.2.%d", "/24", "%s", ""},
		{"ipv6", "ip6tables", "net.ipv6.conf.all.forwarding", "fd99::%d", "2001:db8::%d", "/64", "[%s]", "nodad"},
	} {
		t.Run(c.family, func(t *testing.T) {
			one, router, two, leases := newHost(t), newHost(t), newHost(t), t.TempDir()
			cable(one, "eth0", router, "inside")
			cable(two, "eth0", router, "outside")
			inside := func(n int) string { return fmt.Sprintf(c.inside, n) }
			outside := func(n int) string { return fmt.Sprintf(c.outside, n) }
			for _, end := range []struct {
				h         host
				dev, addr string
			}{
				{one, "eth0", inside(2)}, {router, "inside", inside(1)},
				{two, "eth0", outside(2)}, {router, "outside", outside(1)},
			} {
				end.h.Run(t, "ip link set "+end.dev+" up")
				end.h.Run(t, fmt.Sprintf("ip addr add %s%s dev %s %s", end.addr, c.mask, end.dev, c.flag))
			}
			one.Run(t, "ip route add default via "+inside(1))
			router.types(fmt.Sprintf(`
				sysctl -w %s=1
				%[2]s -t nat -A POSTROUTING -o outside -j MASQUERADE
				%[2]s -t nat -A PREROUTING -i outside -p udp --dport 8472 -j DNAT --to-destination `+c.to,
				c.forward, c.iptables, inside(2)))

			u := underlay{family: c.family}
			daemon(one, leases, 1, u.conf(), "--public-ip", outside(1))
			daemon(two, leases, 2, u.conf())
			one.shows("ip -d link show tweed.1", "local "+inside(2)+" dev eth0")
			reach(pod(one, 1), pod(two, 2))
			two.shows("bridge fdb show dev tweed.1", "dst "+outside(1)+" ")
		})
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/overlay"
)

// What odd-tweed reads from its environment.
const (
	deafVar     = "ODD_TWEED_DEAF"     // not empty: the kernel tells it of nothing
	intervalVar = "ODD_TWEED_INTERVAL" // the time between passes for which no bell rings
)

// oddTweed is the daemon with what no flag can set.
func oddTweed() {
	var o options
	flags := pflag.NewFlagSet("odd-tweed", pflag.ExitOnError)
	o.addTo(flags)
	cniConfDir := flags.String("cni-conf-dir", "", "")
	metricsAddress := flags.String("metrics-address", "", "")
	err := flags.Parse(os.Args[2:])
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	if err == nil {
		err = o.runOddly(ctx, log, *cniConfDir, *metricsAddress)
	}
	if err != nil {
		log.Error("ends", "err", err)
		os.Exit(1)
	}
}

func (o *options) runOddly(ctx context.Context, log *slog.Logger, cniConfDir, metricsAddress string) error {
	p, done, err := o.planner(log, readWrite)
	if err != nil {
		return err
	}
	defer done()
	if os.Getenv(deafVar) != "" {
		p.Kernel = deaf{p.Kernel}
	}
	r := overlay.NewReconciler(p, overlay.CNIConf{Dir: cniConfDir, RunDir: o.runDir}, version, log)
	r.MetricsAddress = metricsAddress
	if r.Interval, err = time.ParseDuration(os.Getenv(intervalVar)); err != nil {
		return err
	}
	return r.Run(ctx)
}

// A deaf kernel tells of nothing.
type deaf struct{ overlay.Kernel }

func (deaf) Watch(ctx context.Context, _ func(string) bool, _ func()) error { <-ctx.Done(); return nil }

// soon is within what time drift has to be repaired: a second, and four more for a machine that has much else to do.
const soon = 5 * time.Second

// How many repairs there are where nobody can say.
const (
	some  = -1 // at least one
	maybe = -2 // or none
)

// A fault is what somebody does by hand on n1.
type fault struct {
	does string         // a shell's
	want map[string]int // the repairs, by kind
	// silent is set where the kernel tells nobody.
	silent bool
}

func faults() []fault {
	mac := vxlan.MAC("n2")
	link6 := mac.LinkLocal()
	f := func(does string, args ...any) string { return fmt.Sprintf(does, args...) }
	return []fault{
		{does: "ip route del 10.244.2.0/24", want: map[string]int{"route": 1}},
		{does: "ip -6 route del fd00:10:244:2::/64", want: map[string]int{"route": 1}},
		{does: "ip route replace 10.244.2.0/24 via 10.244.2.9 dev tweed.1 onlink proto 116",
			want: map[string]int{"route": 1}},
		{does: "ip -6 route replace fd00:10:244:2::/64 via fe80::99 dev tweed.1 proto 116",
			want: map[string]int{"route": 1}},
		{does: "ip route replace 10.244.2.0/24 via 192.0.2.99 dev eth0 proto 116",
			want: map[string]int{"route": 1}},
		{does: "ip route replace blackhole 10.244.2.0/24 proto 116", want: map[string]int{"route": 1}},
		{does: "ip route add 10.99.0.0/24 dev eth0 proto 116", want: map[string]int{"route": 1}},
		{does: "ip route del 10.244.1.0/24", want: map[string]int{"route": 1}},
		{does: "ip -6 route del fd00:10:244:1::/64", want: map[string]int{"route": 1}},
		{does: "ip route flush proto 116", want: map[string]int{"route": some}},
		{does: "ip rule add pref 100 from 10.99.0.0/24 lookup main proto 116", want: map[string]int{"rule": 1}},

		{does: "ip neigh del 10.244.2.0 dev tweed.1", want: map[string]int{"neighbour": 1}},
		{does: f("ip neigh del %v dev tweed.1", link6), want: map[string]int{"neighbour": 1}},
		{does: "ip neigh replace 10.244.2.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
			want: map[string]int{"neighbour": 1}},
		{does: "ip neigh add 10.244.9.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
			want: map[string]int{"neighbour": 1}},
		{does: f("bridge fdb del %v dev tweed.1", mac), want: map[string]int{"fdb": 1}},
		{does: f("bridge fdb replace %v dev tweed.1 dst 192.0.2.99 self permanent", mac),
			want: map[string]int{"fdb": 1}},
		{does: "bridge fdb add 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.7 self permanent", want: map[string]int{"fdb": 1}},

		// With the last IPv4 address of a device, its routes and neighbours go.
		{does: "ip addr del 10.244.1.0/32 dev tweed.1",
			want: map[string]int{"address": 1, "neighbour": 1, "route": 1}},
		{does: "ip addr del fd00:10:244:1::2/128 dev tweed.1", want: map[string]int{"address": 1}},
		{does: "ip addr del 10.244.1.1/24 dev tweed0", want: map[string]int{"address": 1, "route": 1}},
		{does: "ip addr del fd00:10:244:1::1/64 dev tweed0", want: map[string]int{"address": 1}},
		{does: "ip addr add 10.244.1.77/24 dev tweed0 noprefixroute", want: map[string]int{"address": 1}},
		{does: "ip addr add 10.244.1.77/32 dev tweed.1", want: map[string]int{"address": 1}},

		{does: "ip link set tweed.1 mtu 1400", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 mtu 1300", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 address 0e:00:00:00:00:55", want: map[string]int{"link": 1, "neighbour": 2}},
		{does: "ip link set tweed0 address 0e:00:00:00:00:55", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 type vxlan id 1 learning", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 type vxlan id 1 local 192.0.2.99", want: map[string]int{"link": 1}},
		{does: "ethtool -K tweed.1 tx off", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 type bridge mcast_snooping 1", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 type bridge nf_call_iptables 0", want: map[string]int{"link": 1}},
		{does: "ip link set tweed0 type bridge nf_call_ip6tables 0", want: map[string]int{"link": 1}},
		{does: "ip link set tweed.1 down",
			want: map[string]int{"link": 1, "address": 1, "neighbour": 2, "route": 2}},
		{does: "ip link set tweed0 down", want: map[string]int{"link": 1, "address": 1, "route": 2}},
		{does: "ip link set tweed.1 down; ip link set tweed.1 up",
			want: map[string]int{"link": maybe, "address": 1, "neighbour": 2, "route": 2}},
		{does: "ip link del tweed.1",
			want: map[string]int{"link": 1, "address": 2, "neighbour": 2, "fdb": 1, "route": 2, "sysctl": 1}},
		// The pod's veth is a port of it.
		{does: "ip link del tweed0", want: map[string]int{"link": 1, "address": 2, "route": 2, "sysctl": 2, "port": 1}},
		{does: "ip link set pod nomaster", want: map[string]int{"port": 1}, silent: true},
		{does: "ip link set pod type bridge_slave hairpin off", want: map[string]int{"port": 1}, silent: true},
		{does: "ip link set pod down", want: map[string]int{"port": 1}, silent: true},
		// It is still ours by its group, and no device of ours has that name.
		{does: "ip link set tweed.1 name renamed",
			want: map[string]int{"link": 2, "address": 2, "neighbour": 2, "fdb": 1, "route": 2, "sysctl": 1}},

		{does: "sysctl -w net.ipv4.ip_forward=0", want: map[string]int{"sysctl": 1}},
		{does: "sysctl -w net.ipv6.conf.all.forwarding=0", want: map[string]int{"sysctl": 1}},
		{does: "sysctl -w net.ipv6.conf.tweed/1.accept_ra=1", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv6.conf.tweed0.accept_ra=1", want: map[string]int{"sysctl": 1}, silent: true},
		{does: "sysctl -w net.ipv6.conf.tweed0.accept_dad=1", want: map[string]int{"sysctl": 1}, silent: true},
	}
}

// allAtOnce is what nobody survives.
func allAtOnce(form string) fault {
	filter := "nft flush ruleset"
	if form == "nftables" {
		filter = "nft delete table ip tweed; nft delete table ip6 tweed; nft flush chain ip filter FORWARD"
	}
	return fault{
		does: `
			sysctl -w net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0
			ip route flush proto 116; ip -6 route flush proto 116
			ip link set tweed.1 down; ip link set tweed0 down
			ip link set tweed0 type bridge mcast_snooping 1 nf_call_iptables 0 nf_call_ip6tables 0
			ip addr flush dev tweed.1; ip addr flush dev tweed0
			ip link del tweed.1; ip link del tweed0; ` + filter,
		want: map[string]int{"link": some, "address": some, "neighbour": some, "fdb": some, "route": some,
			"sysctl": some, "filter": some, "port": some},
	}
}

// filterFaults are those of one form of packet filter.
func filterFaults(form string) []fault {
	one, many := map[string]int{"filter": 1}, map[string]int{"filter": some}
	if form == "iptables" {
		return []fault{
			{does: "iptables -t nat -D POSTROUTING 1", want: one},
			{does: "ip6tables -D FORWARD 1", want: one},
			{does: "ip6tables -D TWEED-FWD 1", want: one},
			{does: "iptables -I TWEED-FWD -j DROP", want: one},
			{does: "iptables -t nat -F TWEED-POSTRTG", want: many},
			{does: "iptables -F", want: many},
			{does: "iptables -t nat -F POSTROUTING; iptables -t nat -F TWEED-POSTRTG; iptables -t nat -X TWEED-POSTRTG",
				want: many},
			{does: "nft delete table ip filter", want: many},
		}
	}
	return []fault{
		{does: "nft insert rule ip tweed translate accept", want: one},
		{does: "nft flush chain ip6 tweed translate", want: many},
		{does: "nft flush chain ip tweed postrouting", want: many},
		{does: "nft flush table ip tweed", want: many},
		{does: "nft delete table ip tweed", want: many},
		{does: "nft delete table ip tweed; nft delete table ip6 tweed", want: many},
		{does: "nft flush chain ip filter FORWARD", want: many},
	}
}

// A victim is n1 of two nodes, whose pods talk to each other all the time.
type victim struct {
	*metered
	two    host // the other node
	daemon *running
	talk   *talk
	before string         // the dump of n1 when all was well
	moved  map[string]int // what the counters of drift have to be
	form   string
}

// newVictim makes both nodes. n1's daemon has that environment.
func newVictim(t *testing.T, form string, env ...string) *victim {
	t.Helper()
	one, two, leases := newHost(t), newHost(t), t.TempDir()
	plugIn(one, two)
	for _, h := range []host{one, two} {
		h.types(`
			iptables -P FORWARD DROP
			ip6tables -P FORWARD DROP`)
	}
	conf := fmt.Sprintf(`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",
		"PacketFilter": %q}`, form)
	v := &victim{metered: &metered{host: one, leases: leases}, two: two, form: form}
	run := t.TempDir()
	v.daemon = daemonOf(one, env, "odd-tweed", leases, 1, conf, "--metrics-address", ":9480", "--run-dir", run)
	daemon(two, leases, 2, conf)
	v.talk = newTalk(t, pod(one, 1), pod(two, 2))
	v.record(run)
	reach(v.talk.one, v.talk.two)
	v.quiet()
	v.before, v.moved = v.dump(), v.drift()
	return v
}

// plugIn lays the cable between n1 and n2.
func plugIn(one, two host) {
	one.t.Helper()
	cable(one, "eth0", two, "eth0")
	for n, h := range []host{one, two} {
		h.types(fmt.Sprintf(`
			ip addr add 192.0.2.1%d/24 dev eth0
			ip link set eth0 up`, n+1))
	}
}

// record has n1's pod be one that the plugin has attached.
func (v *victim) record(runDir string) {
	v.t.Helper()
	v.types(`
		ip link set pod group 116
		ip link set pod type bridge_slave hairpin on`)
	text := `{"container": "c", "interface": "eth0", "veth": "pod", "ifindex": 0}`
	err := errors.Join(os.MkdirAll(filepath.Join(runDir, "pods"), 0o755),
		os.WriteFile(filepath.Join(runDir, "pods", "pod"), []byte(text), 0o644))
	if err != nil {
		v.t.Fatal(err)
	}
}

var (
	changing = regexp.MustCompile(`(?m)^\d+: |@\S+|\w+_timer +[\d.]+|\[\d+:\d+\]|packets \d+ bytes \d+| state \w+|` +
		`,?NO-CARRIER,?|,?LOWER_UP,?| +$`)
)

// dump writes down all that is ours on n1, as others see it.
func (v *victim) dump() string {
	v.t.Helper()
	out := v.shell(`
		for dev in tweed.1 tweed0; do
			ip -d -o link show $dev; ip -o addr show scope global dev $dev; ethtool -k $dev | grep tx-checksumming
			sysctl net/ipv6/conf/$dev/accept_ra net/ipv6/conf/$dev/accept_dad
		done
		ip route show table all proto 116; ip -6 route show table all proto 116
		ip -d -o link show pod
		ip rule; ip -6 rule
		ip neigh show nud permanent dev tweed.1; ip -6 neigh show nud permanent dev tweed.1
		bridge fdb show dev tweed.1
		sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding`)
	filter := `
		for table in nat filter; do iptables-save -t $table; ip6tables-save -t $table; done | grep -i tweed`
	if v.form == "nftables" {
		filter = `
		nft list table ip tweed; nft list table ip6 tweed
		(iptables-save -t filter; ip6tables-save -t filter) | grep tweed | sort`
	}
	return changing.ReplaceAllString(out+v.shell(filter), "")
}

// shell runs a script on a host. What fails in it does not matter.
func (h host) shell(script string) string {
	h.t.Helper()
	out, _ := exec.Command("nsenter", "--net="+h.Path(), "--", "sh", "-c", script).CombinedOutput()
	return string(out)
}

// suffers does what a fault says, and waits for the repair.
func (v *victim) suffers(f fault) {
	v.t.Helper()
	what := strings.Join(strings.Fields(f.does), " ")
	start := time.Now()
	v.shell(f.does)
	now := ""
	for now = v.dump(); now != v.before; now = v.dump() {
		if time.Since(start) > soon {
			v.t.Errorf("%s: after %v it is\n%s\nand was\n%s", what, soon, now, v.before)
			return
		}
	}
	repaired := time.Since(start)
	back, gap := v.talk.goesOn(start)
	v.t.Logf("%4d ms, %4d ms of silence: %s", repaired.Milliseconds(), gap.Milliseconds(), what)
	if !back {
		v.t.Errorf("%s: all is repaired, and pods do not reach each other", what)
	}
	v.counted(what, f.want)
}

// counted waits until the counters of drift have moved as they should, and takes what has moved besides for an error.
func (v *victim) counted(what string, want map[string]int) {
	v.t.Helper()
	var moved map[string]int
	for start := time.Now(); time.Since(start) < soon; {
		moved = map[string]int{}
		for kind, n := range v.drift() {
			if d := n - v.moved[kind]; d > 0 && want[kind] == some || want[kind] == maybe {
				moved[kind] = want[kind]
			} else if d != 0 {
				moved[kind] = d
			}
		}
		if maps.Equal(moved, want) {
			if slices.Min(slices.Collect(maps.Values(want))) < 0 {
				v.quiet()
			}
			v.moved = v.drift()
			return
		}
	}
	v.t.Errorf("%s: counters moved by %v, want %v", what, moved, want)
	v.quiet()
	v.moved = v.drift()
}

// A talk is a call from one pod to another, in both families, that never ends.
type talk struct {
	one, two host
	mu       sync.Mutex
	sent     [2]map[uint32]time.Time
	answered [2]time.Time // when the last answered call was made
	longest  [2]time.Duration
}

// newTalk begins one, which ends with the test.
func newTalk(t *testing.T, one, two host) *talk {
	t.Helper()
	k := &talk{one: one, two: two}
	for i, addr := range podAddrs(2) {
		to := netip.AddrPortFrom(netip.MustParseAddr(addr), 7)
		var answers, calls *net.UDPConn
		var err error
		two.Do(t, func() { answers, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(to)) })
		if err != nil {
			t.Fatal(err)
		}
		one.Do(t, func() { calls, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(podAddrs(1)[i])}) })
		if err != nil {
			t.Fatal(err)
		}
		k.sent[i] = map[uint32]time.Time{}
		k.answered[i] = time.Now()
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() { echo(answers) })
		wg.Go(func() { k.call(i, calls, to, stop) })
		wg.Go(func() { k.listen(i, calls) })
		t.Cleanup(func() {
			close(stop)
			answers.Close()
			calls.Close()
			wg.Wait()
		})
	}
	return k
}

func echo(c *net.UDPConn) {
	b := make([]byte, 64)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		_, _ = c.WriteToUDPAddrPort(b[:n], from)
	}
}

// call calls a hundred times a second.
func (k *talk) call(i int, c *net.UDPConn, to netip.AddrPort, stop chan struct{}) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := uint32(0); ; n++ {
		k.mu.Lock()
		k.sent[i][n] = time.Now()
		k.mu.Unlock()
		_, _ = c.WriteToUDPAddrPort([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, to)
		select {
		case <-tick.C:
		case <-stop:
			return
		}
	}
}

func (k *talk) listen(i int, c *net.UDPConn) {
	b := make([]byte, 64)
	for {
		n, _, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if n != 4 {
			continue
		}
		seq := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
		k.mu.Lock()
		if at, ok := k.sent[i][seq]; ok && at.After(k.answered[i]) {
			k.longest[i] = max(k.longest[i], at.Sub(k.answered[i]))
			k.answered[i] = at
		}
		delete(k.sent[i], seq)
		k.mu.Unlock()
	}
}

// goesOn waits until calls that are made from now on are answered in both families, and returns the longest time since
// the last call of it for which none was.
func (k *talk) goesOn(since time.Time) (back bool, gap time.Duration) {
	start := time.Now()
	for time.Since(start) < soon {
		k.mu.Lock()
		back = k.answered[0].After(start) && k.answered[1].After(start)
		gap = max(k.longest[0], k.longest[1])
		if back {
			clear(k.longest[:])
		}
		k.mu.Unlock()
		if back {
			return true, gap
		}
		time.Sleep(time.Millisecond)
	}
	return false, time.Since(since)
}

// Each object of ours is deleted and changed by hand, while the slow timer does not come round: the kernel tells of it.
func TestDriftThatTheKernelTellsOf(t *testing.T) {
	t.Parallel()
	for _, form := range []string{"iptables", "nftables"} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			v := newVictim(t, form, intervalVar+"=1h")
			for _, f := range append(slices.Concat(filterFaults(form), faults()), allAtOnce(form)) {
				if !f.silent {
					v.suffers(f)
				}
			}
		})
	}
}

// The same with the kernel's words withheld: the slow timer finds it, faster than it would be in a real daemon.
func TestDriftThatNobodyTellsOf(t *testing.T) {
	t.Parallel()
	const form = "nftables" // what is read by iptables is not read anew for half a minute
	v := newVictim(t, form, intervalVar+"=250ms", deafVar+"=1")
	for _, f := range append(slices.Concat(filterFaults(form), faults()), allAtOnce(form)) {
		v.suffers(f)
	}
}

// metric reads one value of n1's metrics.
func (v *victim) metric(name string) int {
	v.t.Helper()
	for line := range strings.Lines(v.Run(v.t, "curl -sf http://127.0.0.1:9480/metrics")) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				v.t.Fatal(err)
			}
			return int(n)
		}
	}
	v.t.Fatalf("there is no metric %s", name)
	return 0
}

// effort is what n1's daemon has done since it started.
type effort struct {
	at            time.Time
	passes, lines int
	cpu           time.Duration // with that of the processes it has started
}

func (v *victim) effort() effort {
	v.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", v.daemon.cmd.Process.Pid))
	if err != nil {
		v.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	ticks := 0
	for _, f := range strings.Fields(rest)[11:15] { // utime, stime, cutime, cstime (proc_pid_stat(5))
		n, err := strconv.Atoi(f)
		if err != nil {
			v.t.Fatal(err)
		}
		ticks += n
	}
	const hz = 100
	return effort{
		at: time.Now(), passes: v.metric("tweed_pass_duration_seconds_count"),
		lines: strings.Count(v.daemon.log.String(), "\n"), cpu: time.Duration(ticks) * time.Second / hz,
	}
}

// bounded checks what n1's daemon has done since before.
func (v *victim) bounded(what string, before effort) {
	v.t.Helper()
	now := v.effort()
	took := now.at.Sub(before.at)
	passes, lines, cpu := now.passes-before.passes, now.lines-before.lines, now.cpu-before.cpu
	v.t.Logf("%s: in %v %d passes, %v of processor time, %d lines in the log", what, took.Round(time.Millisecond), passes,
		cpu, lines)
	if most := int(took.Seconds()*5) + 2; passes > most {
		v.t.Errorf("%s: %d passes in %v", what, passes, took)
	}
	if cpu > took*6/10 {
		v.t.Errorf("%s: %v of processor time in %v", what, cpu, took)
	}
	if lines > 50 {
		v.t.Errorf("%s: %d lines in the log", what, lines)
	}
}

// forEver has a script run again and again while f does something else.
func (v *victim) forEver(script string, f func()) {
	v.t.Helper()
	cmd := exec.Command("nsenter", "--net="+v.Path(), "--", "sh", "-c", "while :; do "+script+"; done")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		v.t.Fatal(err)
	}
	defer func() {
		_ = syscall.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
	}()
	f()
}

// named waits until n1 says that there is a fight over what a command does.
func (v *victim) named(command string) {
	v.t.Helper()
	for start := time.Now(); !strings.Contains(v.report(), "something on this node undoes what `"+command); {
		if time.Since(start) > 3*soon {
			v.t.Fatalf("no fight is named: %s", v.report())
		}
	}
	if v.metric(`tweed_problems{kind="fight"}`) == 0 {
		v.t.Error("no fight is counted")
	}
}

// stillRepairs has something else be deleted, and waits until it is back.
func (v *victim) stillRepairs() {
	v.t.Helper()
	const entry = "fd00:10:244:2::/64"
	v.Run(v.t, "ip -6 route del "+entry)
	for start := time.Now(); !strings.Contains(v.Run(v.t, "ip -6 route show "+entry), "tweed.1"); {
		if time.Since(start) > soon {
			v.t.Errorf("in a storm, another route is not back after %v", soon)
			return
		}
	}
}

// A node with a thousand peers loses the routes to all of them at once; then a script takes away the same route for ever, and another
// one the packet filter.
func TestStormOfDeletions(t *testing.T) {
	t.Parallel()
	const peers = 1000
	v := newVictim(t, "iptables", intervalVar+"=1h")
	var batch strings.Builder
	for n := range peers {
		prefix := fmt.Sprintf("fd00:10:244:%x::/64", 256+n)
		text := fmt.Sprintf(`{"node":"p%d","since":"2026-01-02T03:04:06Z","subnets":"%s","host":"192.0.3.%d",
			"backend":"vxlan","backend-data":{"vni":1,"port":8472,"mac":"0e:00:00:00:%02x:%02x"}}`,
			n, prefix, n%250+1, n/256, n%256)
		if err := os.WriteFile(filepath.Join(v.leases, fmt.Sprintf("p%d.json", n)), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&batch, "route del %s\n", prefix)
	}
	for start := time.Now(); v.metric("tweed_peers_programmed") != peers+1; {
		if time.Since(start) > 30*time.Second {
			t.Fatalf("%d peers after 30 s", v.metric("tweed_peers_programmed"))
		}
	}
	v.quiet()
	v.before, v.moved = v.dump(), v.drift()

	file := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(batch.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	before := v.effort()
	v.suffers(fault{does: "ip -6 -batch " + file, want: map[string]int{"route": peers}})
	v.bounded("a thousand deletions", before)

	before = v.effort()
	v.forEver("ip route del 10.244.2.0/24 2>/dev/null", func() {
		v.named("ip route add 10.244.2.0/24 ")
		v.stillRepairs()
		v.bounded("a route", before)
	})
	before = v.effort()
	v.forEver("iptables -w -t nat -F TWEED-POSTRTG", func() {
		v.named("iptables -t nat -I TWEED-POSTRTG")
		v.stillRepairs()
		v.bounded("the packet filter", before)
	})
	v.quiet()
	if now := v.dump(); now != v.before {
		t.Errorf("after the storms it is\n%s\nand was\n%s", now, v.before)
	}
}

// restored waits until n1 is as it was, and its pod's calls are answered.
func (v *victim) restored(what string) {
	v.t.Helper()
	start, now := time.Now(), ""
	for now = v.dump(); now != v.before; now = v.dump() {
		if time.Since(start) > soon {
			v.t.Errorf("%s: after %v it is\n%s\nand was\n%s", what, soon, now, v.before)
			return
		}
	}
	took := time.Since(start)
	if back, _ := v.talk.goesOn(start); !back {
		v.t.Errorf("%s: all is repaired, and pods do not reach each other", what)
	}
	v.t.Logf("%s: all is back after %v, and pods talk after %v", what, took.Round(time.Millisecond),
		time.Since(start).Round(time.Millisecond))
}

// The device below the tunnel goes down, loses its address, and is taken out altogether. Each time it comes back later.
func TestUnderlayGoesAndComesBack(t *testing.T) {
	t.Parallel()
	v := newVictim(t, "nftables", intervalVar+"=1h")
	for _, c := range []struct{ gone, back string }{
		{"ip link set eth0 down", "ip link set eth0 up"},
		{"ip addr del 192.0.2.11/24 dev eth0", "ip addr add 192.0.2.11/24 dev eth0"},
		{"ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"},
	} {
		v.Run(t, c.gone)
		v.pass()
		v.Run(t, c.back)
		v.restored(c.gone)
	}
	v.Run(t, "ip link del eth0")
	v.pass()
	if out, err := v.Try(t, "ip link show tweed.1"); err == nil {
		t.Errorf("the tunnel outlives what is below it: %s", out)
	}
	plugIn(v.host, v.two)
	v.restored("ip link del eth0")
}

// What somebody has taken our mark off is not ours any more: it is named, left alone, and taken back with its mark.
func TestDeviceIsTakenFromUs(t *testing.T) {
	t.Parallel()
	v := newVictim(t, "nftables", intervalVar+"=1h")
	v.Run(t, "ip link set tweed.1 group 7")
	v.awaitShows("curl -s http://127.0.0.1:9479/report", "a device called tweed.1 is there and is not ours")
	v.shows("ip link show tweed.1", "group 7")
	v.Run(t, "ip link set tweed.1 group 116")
	v.restored("ip link set tweed.1 group 7")
}

package main

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// goals is set by make bench, on a machine that has nothing else to do.
var goals = flag.Bool("goals", false, "hold repairs and changes to a second, and not to five")

// soon is within what time drift has to be repaired and a change followed: a second, and four more for a machine that
// has much else to do.
func soon() time.Duration {
	if *goals {
		return time.Second
	}
	return 5 * time.Second
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
	within time.Duration // after what time a repair is too late
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
	v := &victim{metered: &metered{host: one, leases: leases}, two: two, form: form, within: soon()}
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

// podVeth is the host's end of n1's pod, named as the plugin would.
const podVeth = "tweed0123456789"

// record has n1's pod be one that the plugin has attached, and lets the daemon see to the rest.
func (v *victim) record(runDir string) {
	v.t.Helper()
	v.types(fmt.Sprintf(`
		ip link set pod down
		ip link set pod name %s group 116 up`, podVeth))
	text := fmt.Sprintf(`{"container": "c", "interface": "eth0", "veth": %q, "ifindex": 0, "mac": %q,
		"addresses": ["10.244.1.5/24", "fd00:10:244:1::5/64"]}`, podVeth, v.podMAC())
	err := errors.Join(os.MkdirAll(filepath.Join(runDir, "pods"), 0o755),
		os.WriteFile(filepath.Join(runDir, "pods", podVeth), []byte(text), 0o644))
	if err != nil {
		v.t.Fatal(err)
	}
	v.types("nft add element bridge tweed ports { nobody }") // which is taken away, and all else done with it
	v.awaitShows("bridge fdb show dev "+podVeth, "sticky")
	v.awaitShows("nft list set bridge tweed ipv6", "fd00:10:244:1::5")
}

func (v *victim) podMAC() string {
	fields := strings.Fields(v.talk.one.Run(v.t, "ip -o -br link show dev eth0"))
	return fields[len(fields)-2]
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
			ip -d -o link show $dev; ip -o addr show scope global dev $dev | sort; ethtool -k $dev | grep tx-checksumming
			sysctl net/ipv6/conf/$dev/accept_ra net/ipv6/conf/$dev/accept_dad
			sysctl net/ipv6/conf/$dev/ndisc_notify net/ipv4/conf/$dev/arp_notify net/ipv4/conf/$dev/src_valid_mark
		done
		ip route show table all proto 116; ip -6 route show table all proto 116
		ip -d -o link show ` + podVeth + `; bridge fdb show dev ` + podVeth + ` | grep master
		nft -s list table bridge tweed | tr , '\n' | sed 's/[{} \t]//g; s/elements=//' | sort
		ip rule; ip -6 rule
		ip neigh show nud permanent dev tweed.1; ip -6 neigh show nud permanent dev tweed.1
		bridge fdb show dev tweed.1
		sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding`)
	// A chain that is made again stands in another place, and that is as good.
	filter := `
		for iptables in iptables ip6tables; do
			for table in raw mangle nat filter; do
				$iptables-save -t $table | grep -i tweed | grep -v '^-A TWEED' | sort
				for chain in $($iptables-save -t $table | grep -o '^:TWEED[A-Z-]*' | tr -d : | sort); do
					$iptables -t $table -S $chain
				done
			done
		done
		for set in $(ipset list -n | sort); do ipset save $set | sort; done`
	if v.form == "nftables" {
		filter = `
		for family in ip ip6; do
			for kind in chain set; do
				for name in $(nft list table $family tweed | awk '$1 == "'$kind'" { print $2 }' | sort); do
					nft -s list $kind $family tweed $name
				done
			done
		done
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
	repaired, ok := v.repaired(what, start)
	if !ok {
		return
	}
	back, gap := v.talk.goesOn(start)
	v.t.Logf("%4d ms, %4d ms of silence: %s", repaired.Milliseconds(), gap.Milliseconds(), what)
	if !back {
		v.t.Errorf("%s: all is repaired, and pods do not reach each other", what)
	}
	v.counted(what, f.want)
}

// repaired waits until n1 is as it was, and returns how long after start that was seen.
func (v *victim) repaired(what string, start time.Time) (took time.Duration, ok bool) {
	v.t.Helper()
	for {
		looked := time.Since(start) // it may be a second until all is written down
		now := v.dump()
		switch {
		case now != v.before && looked <= v.within:
		case now != v.before:
			v.t.Errorf("%s: after %v it is\n%s\nand was\n%s", what, looked, now, v.before)
			return looked, false
		default:
			if looked > v.within {
				v.t.Errorf("%s: repaired after %v, want %v at most", what, looked, v.within)
			}
			return time.Since(start), true
		}
	}
}

// counted waits until the counters of drift have moved as they should, and takes what has moved besides for an error.
func (v *victim) counted(what string, want map[string]int) {
	v.t.Helper()
	var moved map[string]int
	for start := time.Now(); time.Since(start) < v.within; {
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
	for time.Since(start) < soon() {
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

// restored waits until n1 is as it was, and its pod's calls are answered.
func (v *victim) restored(what string) {
	v.t.Helper()
	start := time.Now()
	took, ok := v.repaired(what, start)
	if !ok {
		return
	}
	if back, _ := v.talk.goesOn(start); !back {
		v.t.Errorf("%s: all is repaired, and pods do not reach each other", what)
	}
	v.t.Logf("%s: all is back after %v, and pods talk after %v", what, took.Round(time.Millisecond),
		time.Since(start).Round(time.Millisecond))
}

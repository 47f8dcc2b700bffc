package kernel

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// inEachVariant runs a test on a host whose iptables is of one variant, and then of the other.
func inEachVariant(t *testing.T, test func(t *testing.T, v masq.Variant)) {
	for _, v := range variants() {
		t.Run(string(v), func(t *testing.T) { test(t, v) })
	}
}

// An execLog tells which of iptables' programs were started, by whoever finds them in PATH.
type execLog struct{ path string }

// logIptables has a variant of iptables in PATH, and each start of it logged; then it does what script says.
func logIptables(t *testing.T, v masq.Variant, script string) execLog {
	t.Helper()
	callIptables(t, string(v))
	log := execLog{filepath.Join(t.TempDir(), "log")}
	fakeIptables(t, "echo $real $* >> "+log.path+"\n"+script+"\nexec $real \"$@\"")
	return log
}

// starts returns what was started since the last call.
func (l execLog) starts(t *testing.T) string {
	t.Helper()
	out, err := os.ReadFile(l.path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// kubeProxy writes its own chains anew as kube-proxy does, another number of them each time.
func kubeProxy(t *testing.T, h *realHost, v masq.Variant, round int) {
	t.Helper()
	var text strings.Builder
	text.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	for n := range 1 + round%5 {
		fmt.Fprintf(&text, ":KUBE-SVC-%d - [0:0]\n", n)
		fmt.Fprintf(&text, "-A KUBE-SERVICES -d 10.96.%d.%d/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-%d\n", round, n, n)
	}
	text.WriteString("COMMIT\n")
	shell(t, h.ns, fmt.Sprintf("/usr/sbin/iptables-%s-restore --noflush <<X\n%sX", v, text.String()))
}

// What others do in their own chains, and what is counted in ours, is not looked at twice.
func TestKubeProxyHasIptablesStarted(t *testing.T) {
	inEachVariant(t, func(t *testing.T, v masq.Variant) {
		log := logIptables(t, v, "")
		h := newRealHost(t)
		world := outside(t, h)
		pass(t, h, sample())
		addPod(t, h, 10)
		kubeProxy(t, h, v, 0)
		shell(t, h.ns, fmt.Sprintf("/usr/sbin/iptables-%s -t nat -I POSTROUTING -j KUBE-SERVICES", v))
		want := dualStackFilter(t)
		filterPass(t, h, want)
		r := watch(t, h, func(string) bool { return false })
		r.quiet()
		log.starts(t)
		for round := range 20 {
			begun := time.Now()
			kubeProxy(t, h, v, round)
			world.Run(t, "ping -c 1 -W 5 10.244.3.10")
			forget(h)
			if ops := filterOps(t, h, want); len(ops) > 0 {
				t.Fatalf("to be done: %v", ops)
			}
			time.Sleep(time.Until(begun.Add(100 * time.Millisecond))) // ten times a second
		}
		if started := log.starts(t); started != "" {
			t.Errorf("started:\n%s", started)
		}
		if r.quiet() {
			t.Error("rang for chains of others")
		}
		shell(t, h.ns, fmt.Sprintf("/usr/sbin/iptables-%s -F TWEED-FWD", v))
		if v == masq.NFT {
			r.await(t, "a chain of ours emptied")
		}
		forget(h)
		filterPass(t, h, want)
		if log.starts(t) == "" {
			t.Error("nothing is ever started: the test proves nothing")
		}
	})
}

// A daemon that starts anew reads what is there, once for each family, and asks nothing else.
func TestRestartReadsIptablesMoreThanOnce(t *testing.T) {
	inEachVariant(t, func(t *testing.T, v masq.Variant) {
		h := newRealHost(t)
		inBothOf(t, h, v, "-t mangle -N KUBE-IPTABLES-HINT")
		filterPass(t, h, dualStackFilter(t))
		log := logIptables(t, v, "")
		h.open()
		for range 3 {
			if ops := filterOps(t, h, dualStackFilter(t)); len(ops) > 0 {
				t.Fatalf("to be done: %v", ops)
			}
		}
		want := fmt.Sprintf("/usr/sbin/iptables-%[1]s-save\n/usr/sbin/ip6tables-%[1]s-save\n", v)
		if started := log.starts(t); started != want {
			t.Errorf("started:\n%s\nwant:\n%s", started, want)
		}
	})
}

// inBothOf runs a command of one variant of iptables for both families.
func inBothOf(t *testing.T, h *realHost, v masq.Variant, rest string) {
	t.Helper()
	h.ns.Run(t, masq.IPv4.Command()+"-"+string(v)+" "+rest)
	h.ns.Run(t, masq.IPv6.Command()+"-"+string(v)+" "+rest)
}

// Of the older iptables the kernel gives no names of chains, only places; what is done to any chain of ours, or that we
// jump from, is seen all the same.
func TestChangeThatMovesNothingInTheOlderIptablesIsOverlooked(t *testing.T) {
	callIptables(t, "legacy")
	h := newRealHost(t)
	want := dualStackFilter(t)
	inBothOf(t, h, masq.Legacy, "-N OTHER")
	inBothOf(t, h, masq.Legacy, "-A OTHER -j ACCEPT")
	inBothOf(t, h, masq.Legacy, "-A FORWARD -p udp -j OTHER")
	filterPass(t, h, want)
	before := glimpses(t, h)
	for _, quiet := range []string{
		"-N LATER", "-I OTHER -p tcp -j DROP", "-A OTHER -j LATER", "-P FORWARD DROP", "-t nat -N ELSE",
		"-t nat -A ELSE -j ACCEPT", "-A OUTPUT -j TWEED-FWD", "-Z",
	} {
		inBothOf(t, h, masq.Legacy, quiet)
		if now := glimpses(t, h); now != before {
			t.Errorf("iptables %s is taken for a change of ours: %q, before %q", quiet, now[0].text, before[0].text)
		}
	}
	for _, loud := range []string{
		"-R TWEED-FWD 1 -j DROP", "-D TWEED-FWD 2", "-I FORWARD 1 -j OTHER", "-R FORWARD 1 -j LATER", "-R FORWARD 1 -g LATER",
		"-t nat -A TWEED-POSTRTG -j ACCEPT", "-t nat -F POSTROUTING", "-t nat -A POSTROUTING -j ELSE", "-N DOCKER-USER",
		"-A DOCKER-USER -j RETURN",
	} {
		inBothOf(t, h, masq.Legacy, loud)
		now := glimpses(t, h)
		if now == before && loud != "-N DOCKER-USER" { // an empty chain of others changes nothing
			t.Errorf("iptables %s is not seen", loud)
		}
		before = now
	}
}

func glimpses(t *testing.T, h *realHost) (both [2]glimpse) {
	t.Helper()
	var err [2]error
	h.ns.Do(t, func() {
		for i, family := range families() {
			both[i], err[i] = legacyGlimpse(family)
		}
	})
	if err != ([2]error{}) {
		t.Fatal(err)
	}
	return both
}

// A program that hangs keeps a pass only for as long as it can be patient; what it reads in the end is taken.
func TestIptablesThatHangsIsWaitedFor(t *testing.T) {
	hold := filepath.Join(t.TempDir(), "hold")
	log := logIptables(t, masq.NFT, "while [ -e "+hold+" ]; do sleep 0.01; done")
	h := newRealHost(t)
	want := dualStackFilter(t)
	filterPass(t, h, want)
	h.ns.Run(t, "nft flush chain ip filter TWEED-FWD")
	log.starts(t)
	if err := os.WriteFile(hold, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		begun := time.Now()
		_, err := h.ObserveFilter(t.Context(), want)
		if err == nil || !strings.Contains(err.Error(), "iptables-nft-save has not ended") {
			t.Errorf("while it hangs: %v", err)
		}
		if took := time.Since(begun); took > 5*patience {
			t.Errorf("a pass waits %v for it", took)
		}
	}
	if started := log.starts(t); strings.Count(started, "\n") != 1 {
		t.Errorf("started while the first hangs:\n%s", started)
	}
	if err := os.Remove(hold); err != nil {
		t.Fatal(err)
	}
	filterPass(t, h, want)
}

// A pass has many changes to make, and waits for the lock once.
func TestLockOfIptablesIsWaitedForByEachChange(t *testing.T) {
	callIptables(t, "legacy")
	h := newRealHost(t)
	want := dualStackFilter(t)
	ops := filterOps(t, h, want)
	lock, err := os.OpenFile("/run/xtables.lock", os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	for _, atOnce := range []int{1, len(ops)} {
		filterOps(t, h, want) // another pass
		begun := time.Now()
		for some := range slices.Chunk(ops, atOnce) {
			for i, err := range h.ApplyAll(t.Context(), some) {
				if err == nil || !strings.Contains(err.Error(), "another program holds") {
					t.Errorf("%s: %v", some[i], err)
				}
			}
		}
		if took := time.Since(begun); took > 5*lockWait*time.Second {
			t.Errorf("%d changes, %d at once, wait %v for the lock", len(ops), atOnce, took)
		}
	}
	lock.Close()
	filterPass(t, h, want)
}

// A table that iptables cannot print must not be taken for an empty one.
func TestTableThatIptablesCannotPrintIsNamed(t *testing.T) {
	h := newRealHost(t)
	filterPass(t, h, dualStackFilter(t))
	shell(t, h.ns, "nft add rule ip nat TWEED-POSTRTG meta mark set ct mark map '{ 1 : 2 }'")
	_, err := h.ObserveFilter(t.Context(), dualStackFilter(t))
	if err == nil || !strings.Contains(err.Error(), "nft list table ip nat") {
		t.Error(err)
	}
}

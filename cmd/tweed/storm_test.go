package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
		if time.Since(start) > 3*soon() {
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
		if time.Since(start) > soon() {
			v.t.Errorf("in a storm, another route is not back after %v", soon())
			return
		}
	}
}

// A node with a thousand peers loses the routes to all of them at once; then a script takes away the same route for ever,
// and another one the packet filter.
func TestStormOfDeletions(t *testing.T) {
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
		for time.Since(before.at) < 3*time.Second { // or there are too few passes to tell their pace
			v.stillRepairs()
		}
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

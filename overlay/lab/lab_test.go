package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// helper makes this test binary a process that uses the lab, for tests about such processes.
const helper = "TWEED_LAB_TEST_HELPER"

// The tests run where /run is an empty tmpfs of their own (netnstest), so no two meet, and nothing outlives them there.
const (
	testDir = "/run/lt"
	binDir  = "/run/bin"
	marker  = "/run/lab-test"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(helper); what != "" {
		os.Exit(help(what, os.Args[1:]))
	}
	netnstest.Main(m)
}

func help(what string, args []string) int {
	os.Unsetenv(helper)
	l := testLab(os.Stdout)
	var err error
	switch what {
	case "exec":
		err = l.Exec(args[0], args[1:])
	case "up":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		defer stop()
		err = l.Up(ctx, Options{Nodes: 2, Pods: 1, Underlay: "ipv4"})
	}
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, err)
	var failed *CommandError
	if errors.As(err, &failed) {
		return failed.Status
	}
	return 1
}

func testLab(out io.Writer) *Lab {
	l := New(filepath.Join(binDir, "tweed"), out)
	l.Prefix, l.Dir = "lt", testDir
	return l
}

// newLab is a lab that is removed at the end of the test, with a check that nothing is left.
func newLab(t testing.TB) *Lab {
	t.Helper()
	build(t)
	before := look(t)
	l := testLab(writer{t})
	t.Cleanup(func() {
		l.afterStep = nil
		if _, err := l.Down(context.Background()); err != nil && !errors.Is(err, ErrNone) {
			t.Errorf("taking the lab down: %v", err)
		}
		checkLeft(t, before)
	})
	return l
}

type writer struct{ t testing.TB }

func (w writer) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// build builds the programs once. They go with this process's /run.
func build(t testing.TB) {
	t.Helper()
	if err := buildOnce(); err != nil {
		t.Fatal(err)
	}
}

var buildOnce = sync.OnceValue(func() error {
	cmd := exec.Command("go", "build", "-o", binDir+"/", "tweed.dev/tweed/cmd/tweed", "tweed.dev/tweed/cmd/tweed-cni")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building tweed: %w\n%s", err, out)
	}
	return os.WriteFile(marker, nil, 0o600)
})

// A scene is all that a lab could leave behind.
type scene struct {
	files, mounts, links []string
	processes            map[int]string
}

func look(t testing.TB) scene {
	t.Helper()
	s := scene{processes: make(map[int]string)}
	s.files = append(entries(t, "/run"), entries(t, "/etc")...)
	s.files = append(s.files, entries(t, netnsDir)...)
	s.links = entries(t, "/sys/class/net")
	// Not /proc/self: the process is shown as its first thread is, and a test may have moved that one elsewhere.
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	s.mounts = strings.Split(strings.TrimSpace(string(mounts)), "\n")
	// A process whose /run is that of these tests descends from them.
	own, err := fileID(marker)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range entries(t, "/proc") {
		pid, err := strconv.Atoi(filepath.Base(name))
		if err != nil || pid == os.Getpid() {
			continue
		}
		id, err := fileID(fmt.Sprintf("/proc/%d/root%s", pid, marker))
		if err != nil || id != own {
			continue
		}
		if command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil {
			s.processes[pid] = strings.ReplaceAll(string(command), "\x00", " ")
		}
	}
	return s
}

func entries(t testing.TB, dir string) []string {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	paths := make([]string, len(found))
	for i, e := range found {
		paths[i] = filepath.Join(dir, e.Name())
	}
	return paths
}

func checkLeft(t testing.TB, before scene) {
	t.Helper()
	after := look(t)
	for _, c := range []struct {
		what          string
		before, after []string
	}{
		{"files", before.files, after.files},
		{"mounts", before.mounts, after.mounts},
		{"links", before.links, after.links},
	} {
		for _, gone := range without(c.before, c.after) {
			t.Errorf("one of the %s is gone: %s", c.what, gone)
		}
		for _, left := range without(c.after, c.before) {
			t.Errorf("one of the %s is left: %s", c.what, left)
		}
	}
	for pid, command := range after.processes {
		if _, ok := before.processes[pid]; !ok {
			t.Errorf("process %d is left: %s", pid, command)
		}
	}
}

func without(all, some []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(some, s) })
}

var errAbort = errors.New("aborted by the test")

// abortAfter ends the build after a step, as though the program had been killed there: nothing is cleaned up.
func abortAfter(l *Lab, last string) {
	l.afterStep = func(step string) error {
		if step == last {
			return errAbort
		}
		return nil
	}
}

// upTo builds a lab up to a step.
func upTo(t testing.TB, l *Lab, last string, o Options) {
	t.Helper()
	abortAfter(l, last)
	if err := l.Up(t.Context(), o); !errors.Is(err, errAbort) {
		t.Fatalf("building up to step %q: %v", last, err)
	}
}

var twoNodes = Options{Nodes: 2, Pods: 1, Underlay: "ipv4"}

func TestShapeOutOfBounds(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{Nodes: 0, Pods: 2, Underlay: "ipv4"}, "--nodes 0: expected 1 to 200"},
		{Options{Nodes: 201, Pods: 2, Underlay: "ipv4"}, "--nodes 201: expected 1 to 200"},
		{Options{Nodes: 3, Pods: -1, Underlay: "ipv4"}, "--pods -1: expected 0 to 100"},
		{Options{Nodes: 3, Pods: 101, Underlay: "ipv4"}, "--pods 101: expected 0 to 100"},
		{Options{Nodes: 200, Pods: 2, Underlay: "ipv4"},
			"would need 1500 entries in the kernel's neighbour table, which holds 1024"},
		{Options{Nodes: 3, Pods: 2, Underlay: "ipv5"}, `--underlay "ipv5": expected ipv4 or ipv6`},
	} {
		l := newLab(t)
		if err := l.Up(t.Context(), c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.o, err, c.want)
		}
	}
}

func TestPluginNotBuilt(t *testing.T) {
	l := newLab(t)
	l.Tweed = "/run/elsewhere/tweed"
	err := l.Up(t.Context(), twoNodes)
	if err == nil || !strings.Contains(err.Error(), "run `make build`") {
		t.Errorf("got %v", err)
	}
}

func TestNothingToRemove(t *testing.T) {
	l := newLab(t)
	if _, err := l.Down(t.Context()); !errors.Is(err, ErrNone) {
		t.Errorf("got %v, want ErrNone", err)
	}
	if _, err := l.Status(t.Context()); !errors.Is(err, ErrNone) {
		t.Errorf("got %v, want ErrNone", err)
	}
	if err := l.Restart(t.Context(), "n1"); !errors.Is(err, ErrNone) {
		t.Errorf("got %v, want ErrNone", err)
	}
	if err := l.Exec("n1", []string{"true"}); !errors.Is(err, ErrNone) {
		t.Errorf("got %v, want ErrNone", err)
	}
}

func TestBuildEndsAfterAnyStep(t *testing.T) {
	for _, last := range []string{"sw", "n1", "n2", "n1 daemon", "n2 daemon", "n1/pod1", "n2/pod1"} {
		t.Run(last, func(t *testing.T) {
			l := newLab(t)
			before := look(t)
			upTo(t, l, last, twoNodes)
			l.afterStep = nil
			err := l.Up(t.Context(), twoNodes)
			if err == nil || !strings.Contains(err.Error(), "never completed is still there; `tweed lab down`") {
				t.Errorf("building over it: %v", err)
			}
			status, err := l.Status(t.Context())
			if err != nil || status.Healthy() {
				t.Errorf("status %+v, %v; want one that is not healthy", status, err)
			}
			removed, err := l.Down(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Log(removed)
			checkLeft(t, before)
		})
	}
}

func TestInterruptedBuildRemovesWhatItBuilt(t *testing.T) {
	for _, last := range []string{"sw", "n2", "n1 daemon", "n1/pod1"} {
		t.Run(last, func(t *testing.T) {
			l := newLab(t)
			before := look(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			l.afterStep = func(step string) error {
				if step == last {
					cancel()
				}
				return nil
			}
			if err := l.Up(ctx, twoNodes); err == nil || !strings.Contains(err.Error(), "interrupted; removed again") {
				t.Errorf("got %v", err)
			}
			checkLeft(t, before)
		})
	}
}

// startHelper starts this test binary as a process that uses the lab.
func startHelper(t testing.TB, what string, args ...string) (*exec.Cmd, *bytes.Buffer, io.ReadCloser) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helper+"="+what)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // and have been waited for
	})
	return cmd, &stderr, stdout
}

// awaitText reads until text has appeared.
func awaitText(t testing.TB, r io.Reader, text string) {
	t.Helper()
	var seen []byte
	buf := make([]byte, 4096)
	for !strings.Contains(string(seen), text) {
		n, err := r.Read(buf)
		seen = append(seen, buf[:n]...)
		if err != nil {
			t.Fatalf("%q never appeared: %v\n%s", text, err, seen)
		}
	}
}

func TestBuilderKilled(t *testing.T) {
	for _, text := range []string{"underlay:", "n1: eth0", "n2: eth0", "the daemon is ready", "/pod1: eth0"} {
		t.Run(text, func(t *testing.T) {
			l := newLab(t)
			before := look(t)
			cmd, _, out := startHelper(t, "up")
			awaitText(t, out, text)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			removed, err := l.Down(t.Context()) // at once: the killed process may still be about to end
			if err != nil {
				t.Fatal(err)
			}
			t.Log(removed)
			_ = cmd.Wait() // it was killed
			checkLeft(t, before)
		})
	}
}

func TestDownWhileBuilding(t *testing.T) {
	l := newLab(t)
	cmd, _, out := startHelper(t, "up")
	awaitText(t, out, "n1: eth0")
	if err := l.Up(t.Context(), twoNodes); err == nil ||
		!strings.Contains(err.Error(), fmt.Sprintf("process %d is building", cmd.Process.Pid)) {
		t.Errorf("building beside it: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*pollEvery)
	defer cancel()
	if err := syscall.Kill(cmd.Process.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Down(ctx); err == nil ||
		!strings.Contains(err.Error(), fmt.Sprintf("process %d is still building", cmd.Process.Pid)) {
		t.Errorf("removing it meanwhile: %v", err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGCONT} {
		if err := syscall.Kill(cmd.Process.Pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Down(t.Context()); err != nil && !errors.Is(err, ErrNone) {
		t.Errorf("removing it while it removes itself: %v", err)
	}
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // it was interrupted
}

func TestDirectoryOfTheLabIsGone(t *testing.T) {
	l := newLab(t)
	upTo(t, l, "n2", twoNodes)
	if err := os.RemoveAll(l.Dir); err != nil {
		t.Fatal(err)
	}
	if err := l.Up(t.Context(), twoNodes); err == nil || !strings.Contains(err.Error(), "lt-n1, lt-n2, lt-sw") {
		t.Errorf("building over it: %v", err)
	}
	removed, err := l.Down(t.Context())
	if want := (Removed{Namespaces: 3}); removed != want || err != nil {
		t.Errorf("removed %+v, %v; want %+v", removed, err, want)
	}
	forget(t) // what only the directory remembered
}

// forget takes away /run/netns, empty by now.
func forget(t testing.TB) {
	t.Helper()
	if err := errors.Join(unix.Unmount(netnsDir, 0), os.Remove(netnsDir)); err != nil {
		t.Error(err)
	}
}

func TestOthersUseNamedNamespacesToo(t *testing.T) {
	l := newLab(t)
	upTo(t, l, "n1", twoNodes)
	l.afterStep = nil
	for _, command := range []string{"netns add other", "netns add ltother"} {
		if err := l.ip(t.Context(), "", command); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		for _, command := range []string{"netns del other", "netns del ltother"} {
			if err := l.ip(context.Background(), "", command); err != nil {
				t.Error(err)
			}
		}
		forget(t)
	}()
	if _, err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, netnsDir); len(got) != 2 {
		t.Errorf("left in %s: %v; want the two others'", netnsDir, got)
	}
}

// run runs a command through Exec and returns what it printed and its status; a signal counts as 128 and its number.
func run(t testing.TB, target string, command ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd, errs, out := startHelper(t, "exec", append([]string{target}, command...)...)
	text, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // how it ended is asked for below
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return string(text), errs.String(), 128 + int(ws.Signal())
	}
	return string(text), errs.String(), ws.ExitStatus()
}

func TestCommandsOnNodes(t *testing.T) {
	l := newLab(t)
	upTo(t, l, "n2", twoNodes)
	t.Run("status", func(t *testing.T) {
		for command, want := range map[string]int{"true": 0, "exit 7": 7, "kill -TERM $$": 128 + 15} {
			if _, stderr, got := run(t, "n1", "sh", "-c", command); got != want {
				t.Errorf("%s: status %d, want %d; %s", command, got, want, stderr)
			}
		}
	})
	t.Run("command that is not there", func(t *testing.T) {
		if _, stderr, got := run(t, "n1", "no-such-command"); got != 127 || !strings.Contains(stderr, "no-such-command") {
			t.Errorf("status %d, %s; want 127", got, stderr)
		}
		if _, stderr, got := run(t, "n1", "/etc/passwd"); got != 126 || !strings.Contains(stderr, "/etc/passwd") {
			t.Errorf("status %d, %s; want 126", got, stderr)
		}
		if _, stderr, got := run(t, "n1"); got != 1 || !strings.Contains(stderr, "no command to run") {
			t.Errorf("status %d, %s; want 1", got, stderr)
		}
	})
	t.Run("node that is not there", func(t *testing.T) {
		for target, want := range map[string]string{
			"n3":      `no node "n3"; this lab has n1, n2`,
			"n1/pod2": `no pod "pod2" on n1; it has pod1`,
			"n1/pod1": "network namespace, lt-n1-pod1, is missing", // not made yet
		} {
			if _, stderr, got := run(t, target, "true"); got != 1 || !strings.Contains(stderr, want) {
				t.Errorf("%s: status %d, %s; want %q", target, got, stderr, want)
			}
		}
	})
	t.Run("network", func(t *testing.T) {
		for _, addr := range append(nodeAddrs(2), nodeAddrs(1)[0]) {
			if out, stderr, got := run(t, "n1", "ping", "-c1", "-W5", addr.String()); got != 0 {
				t.Errorf("ping %v from n1: %s%s", addr, out, stderr)
			}
		}
		if out, _, _ := run(t, "n2", "ls", "/sys/class/net"); out != "eth0\nlo\n" {
			t.Errorf("/sys/class/net on n2: %q", out)
		}
		for _, dst := range []string{"198.51.100.1", "2001:db8:1::1"} {
			if out, _, _ := run(t, "n2", "ip", "route", "get", dst); !strings.Contains(out, "dev eth0 src") {
				t.Errorf("no way out to %s: %q", dst, out)
			}
		}
	})
	t.Run("files", func(t *testing.T) {
		out, stderr, _ := run(t, "n2", "cat", "/etc/tweed/flags")
		if want := "node-name = n2\nleases = /run/lt/leases\n"; out != want {
			t.Errorf("/etc/tweed/flags is %q, want %q; %s", out, want, stderr)
		}
		for _, file := range []string{"/run/tweed/x", "/etc/cni/net.d/x", "/etc/tweed/x"} {
			if _, stderr, got := run(t, "n1", "cp", "/etc/passwd", file); got != 0 {
				t.Error(stderr)
			}
			if _, stderr, got := run(t, "n1", "cmp", "/etc/passwd", file); got != 0 {
				t.Errorf("%s did not last: %s", file, stderr)
			}
			if _, _, got := run(t, "n2", "test", "-e", file); got == 0 {
				t.Errorf("n2 has %s of n1", file)
			}
			if exists(file) {
				t.Errorf("%s reached the host", file)
			}
		}
		if _, stderr, got := run(t, "n1", "touch", "/run/x", "/etc/x"); got != 0 || exists("/run/x") || exists("/etc/x") {
			t.Errorf("a file beside the node's own reached the host, or was refused: %s", stderr)
		}
		if _, _, got := run(t, "n1", "test", "-e", marker); got != 0 {
			t.Errorf("%s of the host is not seen", marker)
		}
	})
}

func TestPodMadeWhileItsNodeRuns(t *testing.T) {
	l := newLab(t)
	upTo(t, l, "n1", twoNodes)
	l.afterStep = nil
	// The wait ends when the pod's namespace has come to the node's view of the mounts.
	_, _, out := startHelper(t, "exec", "n1", "sh", "-c",
		"echo waiting; until ip -n lt-n1-pod1 link show lo; do sleep 0.1; done 2>/dev/null")
	awaitText(t, out, "waiting")
	if err := l.ip(t.Context(), "", "netns add lt-n1-pod1"); err != nil {
		t.Fatal(err)
	}
	awaitText(t, out, "LOOPBACK")
}

func TestProcessWithTheDaemonsOldPid(t *testing.T) {
	l := newLab(t)
	upTo(t, l, "n1", twoNodes)
	l.afterStep = nil
	cmd, _, _ := startHelper(t, "exec", "n1", "sleep", "1000")
	p, ok := findProcess(cmd.Process.Pid)
	if !ok {
		t.Fatal("the process is not there")
	}
	pidFile := l.path("n1", "tweed.pid")
	write := func(p process) {
		t.Helper()
		if err := writeFile(pidFile, fmt.Sprintf("%d %s\n", p.pid, p.start)); err != nil {
			t.Fatal(err)
		}
	}
	write(process{p.pid, p.start + "0"})
	if _, ok := l.daemon("n1"); ok {
		t.Error("a process that started at another time was taken for the daemon")
	}
	self, _ := findProcess(os.Getpid())
	write(self)
	if _, ok := l.daemon("n1"); ok {
		t.Error("a process outside of the node was taken for the daemon")
	}
	if err := (process{p.pid, p.start + "0"}).signal(t.Context(), unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if _, ok := findProcess(p.pid); !ok {
		t.Fatal("a process with a daemon's old pid was killed")
	}
	deadline := time.Now().Add(10 * time.Second)
	for write(p); ; {
		if got, ok := l.daemon("n1"); ok && got == p { // once it has entered the node
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the daemon was not found")
		}
	}
	if err := p.signal(t.Context(), unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if _, ok := l.daemon("n1"); ok {
		t.Error("a process that has ended was taken for the daemon")
	}
}

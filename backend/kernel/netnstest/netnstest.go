// Package netnstest gives kernel tests network namespaces of their own.
//
// Nothing that it makes has a name on the host, so nothing is left behind, however a test ends.
package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	inside  = "TWEED_NETNSTEST_INSIDE"
	settled = "settled" // its value once mounts are in place
)

// Main runs a package's tests in a process with network, mount and process namespaces of its own, where /run is empty
// and /sys shows that network namespace. So a goroutine that strays from its test's namespace cannot reach the host's,
// and no process that a test started lives on after it, even if that was killed. Call it from TestMain. It needs root.
func Main(m *testing.M) { os.Exit(Run(m.Run)) }

// Run is Main for a TestMain that has more to do. It returns the status to exit with; tests is the m.Run of TestMain,
// and is called only inside.
func Run(tests func() int) int {
	switch os.Getenv(inside) {
	case "":
	case settled: // a worker of go test -fuzz, started in here
		return tests()
	default:
		if err := errors.Join(settle(), os.Setenv(inside, settled)); err != nil {
			fmt.Fprintln(os.Stderr, "netnstest:", err)
			return 1
		}
		return tests()
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "netnstest: kernel tests make network namespaces and need root; run them as root")
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig follows the thread that started the child
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() > 0 {
			return cmd.ProcessState.ExitCode()
		}
		fmt.Fprintln(os.Stderr, "netnstest:", err)
		return 1
	}
	return 0
}

func settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	for _, m := range []struct{ fs, at, options string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"tmpfs", "/run", "mode=755"},
	} {
		if err := unix.Mount(m.fs, m.at, m.fs, 0, m.options); err != nil {
			return fmt.Errorf("mounting %s: %w", m.at, err)
		}
	}
	return nil
}

// A NS is a network namespace that lives until its test ends.
type NS struct{ f *os.File }

// New makes an empty network namespace with lo up.
func New(t testing.TB) *NS {
	t.Helper()
	ns := &NS{}
	var err error
	onThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		ns.f, err = os.Open("/proc/thread-self/ns/net")
	})
	if err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	t.Cleanup(func() { ns.f.Close() })
	ns.Run(t, "ip link set lo up")
	return ns
}

// Path opens the namespace for as long as this process has it.
func (ns *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.f.Fd()) }

// Do calls f on a thread inside the namespace. Sockets that f opens stay in the namespace; goroutines that f starts run
// outside of it.
func (ns *NS) Do(t testing.TB, f func()) {
	t.Helper()
	var err error
	onThread(func() {
		if err = unix.Setns(int(ns.f.Fd()), unix.CLONE_NEWNET); err == nil {
			f()
		}
	})
	if err != nil {
		t.Fatalf("entering a network namespace: %v", err)
	}
}

// Run runs a command, split at white space, inside the namespace and returns what it printed. The test ends if the
// command fails.
func (ns *NS) Run(t testing.TB, command string) string {
	t.Helper()
	out, err := ns.Try(t, command)
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}

// Try is Run for a command that may fail.
func (ns *NS) Try(t testing.TB, command string) (string, error) {
	t.Helper()
	args := strings.Fields(command)
	var out []byte
	var err error
	ns.Do(t, func() { out, err = exec.Command(args[0], args[1:]...).CombinedOutput() })
	return string(out), err
}

// onThread calls f on a thread of its own, which ends with f. A t.Fatal in f ends only f, so f must not call it.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread is not fit for other goroutines any more
		f()
	}()
	<-done
}

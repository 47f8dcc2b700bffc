package cluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A NetNS is a network namespace held by a file that it is mounted on.
type NetNS struct{ Path string }

// NewNetNS makes a network namespace with lo up.
func NewNetNS(t testing.TB, path string) NetNS {
	t.Helper()
	ns := NetNS{Path: path}
	if err := makeNetNS(path); err != nil {
		t.Fatalf("making network namespace %s: %v", path, err)
	}
	ns.Run(t, "ip link set lo up")
	return ns
}

func makeNetNS(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	var err error
	onThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
	})
	return err
}

// Remove lets the namespace go; with nobody in it, the kernel takes it down.
func (ns NetNS) Remove() error {
	if err := unix.Unmount(ns.Path, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("letting go of %s: %w", ns.Path, err)
	}
	return os.Remove(ns.Path)
}

// Do calls f on a thread inside the namespace. Sockets that f opens and processes that it starts stay there; goroutines
// that it starts run outside.
func (ns NetNS) Do(f func() error) error {
	file, err := os.Open(ns.Path)
	if err != nil {
		return err
	}
	defer file.Close()
	onThread(func() {
		if err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err == nil {
			err = f()
		}
	})
	return err
}

// Dial is net.Dialer's DialContext from inside the namespace, for addresses, not names.
func (ns NetNS) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := ns.Do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Run runs a command, split at white space, inside the namespace and returns what it printed.
func (ns NetNS) Run(t testing.TB, command string) string {
	t.Helper()
	out, err := ns.Try(command)
	if err != nil {
		t.Fatalf("%s: %s: %v\n%s", filepath.Base(ns.Path), command, err, out)
	}
	return out
}

// Try is Run for a command that may fail.
func (ns NetNS) Try(command string) (string, error) {
	args := strings.Fields(command)
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
		return err
	})
	return string(out), err
}

// onThread calls f on a thread of its own, which ends with f.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread is not fit for anything else
		f()
	}()
	<-done
}

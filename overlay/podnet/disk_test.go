package podnet

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// on mounts a file system in memory for the run directory of a node.
func on(t *testing.T, n *node, options string) {
	t.Helper()
	if err := os.MkdirAll(n.runDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", n.runDir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(n.runDir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	n.publish(n.info)
}

func remount(t *testing.T, n *node, flags uintptr, options string) {
	t.Helper()
	if err := unix.Mount("", n.runDir, "", unix.MS_REMOUNT|flags, options); err != nil {
		t.Fatal(err)
	}
}

// TestDiskIsFull has room for a file more each time, so that it is full at each step of an ADD in turn.
func TestDiskIsFull(t *testing.T) {
	t.Parallel()
	for what, options := range map[string]func(room int) string{
		"files": func(room int) string { return fmt.Sprintf("size=1m,nr_inodes=%d", 2+room) }, // the root and node.json
		"bytes": func(room int) string { return fmt.Sprintf("size=%dk,nr_inodes=99", 4*(1+room)) },
	} {
		t.Run(what, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			on(t, n, options(0))
			pod := netnstest.New(t)
			refused := 0
			for room := 0; ; room++ {
				remount(t, n, 0, options(room))
				_, err := n.add("one", pod.Path())
				if err == nil {
					break
				}
				refused++
				wantCode(t, fmt.Sprintf("with room for %d", room), err, 5, "address store", "no space left on device",
					"make room on the file system of "+n.runDir)
				n.wantNothing("an ADD on a full disk")
				if err := n.status(); err != nil {
					t.Errorf("STATUS: %v", err)
				}
				if room > 20 {
					t.Fatal("there is never enough")
				}
			}
			if refused < 2 {
				t.Errorf("it was full only %d times", refused)
			}
			if err := n.check("one", pod.Path()); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			n.fill()
			if err := n.del("one", pod.Path()); err != nil {
				t.Errorf("DEL: %v", err)
			}
			n.wantNothing("DEL")
		})
	}
}

// fill leaves no room where the run directory is.
func (n *node) fill() {
	n.t.Helper()
	text := make([]byte, 4096)
	for i := range 1000 {
		if os.WriteFile(filepath.Join(n.runDir, fmt.Sprint("fill", i)), text, 0o600) != nil {
			return
		}
	}
	n.t.Fatal("the disk does not get full")
}

func TestDiskIsReadOnly(t *testing.T) {
	t.Parallel()
	n := newNode(t, subnet4, subnet6)
	on(t, n, "size=1m")
	one, two := netnstest.New(t), netnstest.New(t)
	n.mustAdd("one", one)
	n.mustAdd("dead", two)
	n.Run(t, "ip link del "+vethName("dead", "eth0"))
	remount(t, n, unix.MS_RDONLY, "")
	const hint = "mounted for writing"
	_, err := n.add("two", two.Path())
	wantCode(t, "ADD", err, 5, "read-only file system", n.runDir, hint)
	wantCode(t, "DEL", n.del("one", one.Path()), 5, "read-only file system", n.runDir, hint)
	wantCode(t, "GC", n.gc(valid(t)), 5, "read-only file system", n.runDir, hint)
	if err := n.status(); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	if err := n.check("one", one.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := n.sweep(""); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("sweep: %v", err)
	}
	reach(t, one, "10.244.3.1")
	remount(t, n, 0, "")
	if err := n.check("one", one.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err := n.del("one", one.Path()); err != nil {
		t.Errorf("DEL: %v", err)
	}
	if err := n.sweep(""); err != nil {
		t.Error(err)
	}
	n.wantNothing("DEL")
}

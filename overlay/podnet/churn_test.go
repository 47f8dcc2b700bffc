package podnet

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// TestNodeLosesPodsWithoutBeingTold destroys 300 namespaces without a DEL, more than the subnet has addresses, while
// pods keep being added and others live on. Most go at once, when the last address has been handed out: the kernel
// takes its time to clean up after them, and the next pod comes meanwhile.
func TestNodeLosesPodsWithoutBeingTold(t *testing.T) {
	t.Parallel()
	n := newNode(t, subnet4) // for 253 pods
	const living, lost = 20, 300
	addrs := map[string]string{}
	spaces := map[string]*netnstest.NS{}
	for i := range living {
		c := fmt.Sprint("living", i)
		spaces[c] = netnstest.New(t)
		addrs[c] = n.mustAdd(c, spaces[c]).IPs[0].Address.String()
	}
	var doomed []*os.File
	destroy := func() {
		for _, ns := range doomed {
			ns.Close()
		}
		doomed = nil
	}
	defer destroy()
	for i := range lost {
		ns := newDoomed(t)
		doomed = append(doomed, ns)
		r, err := n.add(fmt.Sprint("lost", i), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()))
		if err != nil {
			t.Fatalf("pod %d: %v", i, err)
		}
		for c, a := range addrs {
			if a == r.IPs[0].Address.String() {
				t.Fatalf("pod %d has %s, as has %s", i, a, c)
			}
		}
		if i >= 253-living-1 {
			destroy()
		}
	}
	await(t, "the veths' end", func() bool { return strings.Count(strings.Join(n.ports(), " "), "@") == living })
	if err := n.sweep(""); err != nil {
		t.Error(err)
	}
	if got := names(t, filepath.Join(n.runDir, "addrs")); len(got) != living {
		t.Errorf("%d addresses are taken, want %d", len(got), living)
	}
	for c := range addrs {
		if err := n.check(c, spaces[c].Path()); err != nil {
			t.Errorf("CHECK: %v", err)
		}
	}
}

// newDoomed makes a network namespace that ends when its file is closed.
func newDoomed(t *testing.T) (ns *os.File) {
	t.Helper()
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	return ns
}

// sweepVariable has this program sweep a run directory and end; see TestMain.
const sweepVariable = "TWEED_TEST_SWEEP"

// TestDaemonSeesNoneOfThePodsNamespaces sweeps from a container: with mounts and processes of its own, and only the
// node's network.
func TestDaemonSeesNoneOfThePodsNamespaces(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.Run(t, "ip netns add unseen")
	t.Cleanup(func() { _, _ = n.Try(t, "ip netns del unseen") })
	if _, err := n.add("named", "/run/netns/unseen"); err != nil {
		t.Fatal(err)
	}
	pod := netnstest.New(t)
	n.mustAdd("nameless", pod)
	n.mustAdd("dead", netnstest.New(t))
	n.Run(t, "ip link del "+vethName("dead", "eth0"))
	before := names(t, filepath.Join(n.runDir, "addrs"))
	t.Setenv(sweepVariable, n.runDir)
	out := n.Run(t, "unshare --mount --pid --ipc --uts --cgroup --fork --mount-proc "+must(os.Executable()))
	n.wantPods("the sweep", "named", "nameless")
	if out != "freed 2, error <nil>, sees 0 namespaces\n" {
		t.Errorf("the sweep: %s", out)
	}
	after := names(t, filepath.Join(n.runDir, "addrs"))
	if len(before) != 6 || len(after) != 4 {
		t.Errorf("taken: %v, then %v", before, after)
	}
	for _, container := range []string{"named", "nameless"} {
		netns := map[string]string{"named": "/run/netns/unseen", "nameless": pod.Path()}[container]
		if err := n.check(container, netns); err != nil {
			t.Errorf("CHECK: %v", err)
		}
	}
}

// sweepAsContainer does that, and tells how many pods' namespaces there are to be seen.
func sweepAsContainer() int {
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		fmt.Println(err)
		return 1
	}
	seen := map[string]bool{}
	named := must(filepath.Glob("/run/netns/*"))
	for _, file := range append(must(filepath.Glob("/proc/[0-9]*/task/*/ns/net")), named...) {
		if ns, err := os.Readlink(file); err == nil {
			seen[ns] = true
		}
	}
	delete(seen, must(os.Readlink("/proc/thread-self/ns/net")))
	freed, err := Sweep(context.Background(), os.Getenv(sweepVariable), "")
	fmt.Printf("freed %d, error %v, sees %d namespaces\n", len(freed), err, len(seen))
	return 0
}

// Package jail starts a program where it belongs: on a node of the cluster, or in a container on it.
//
// It is done by starting the test program itself again, which puts on its namespaces, mounts and capabilities and then
// becomes the program wanted.
package jail

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/e2e/mounts"
)

const variable = "TWEED_E2E_JAIL"

// A Plan says where a program runs, and which.
type Plan struct {
	// NetNS is the path of its network namespace.
	NetNS string
	// Binds are directories and files that it sees elsewhere than where they are.
	Binds []Bind
	// Container gives it a root file system, processes and devices of its own, the root read-only like an image, /proc/sys
	// read-only, and no capability but NET_ADMIN and NET_RAW. Without it, the program sees the machine's files.
	Container bool
	// Argv is the program's path, as it sees it, and its arguments.
	Argv []string
}

// A Bind shows the file or directory From at To, in a container read-only unless Writable.
type Bind struct {
	From, To string
	Writable bool
}

// Command prepares a program to start by the plan. Its streams are the caller's to set, and it ends with the caller.
func Command(p Plan) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), p.Env())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if p.Container {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID
	}
	return cmd
}

// Env is the assignment that makes this program, started again, carry out the plan.
func (p Plan) Env() string {
	b, err := json.Marshal(p)
	if err != nil {
		panic(err) // strings and booleans only
	}
	return variable + "=" + string(b)
}

// Enter carries out the plan that this process was started with, if any: then it does not return.
func Enter() {
	plan := os.Getenv(variable)
	if plan == "" {
		return
	}
	err := enter(plan)
	fmt.Fprintln(os.Stderr, "jail:", err)
	os.Exit(125)
}

func enter(plan string) error {
	runtime.LockOSThread() // namespaces and capabilities are the thread's, and become the program's
	var p Plan
	if err := json.Unmarshal([]byte(plan), &p); err != nil {
		return err
	}
	if err := joinNet(p.NetNS); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("a mount namespace: %w", err)
	}
	if p.Container {
		if err := containerRoot(p.Binds); err != nil {
			return err
		}
		if err := netOnly(); err != nil {
			return err
		}
	} else if err := nodeRoot(p.Binds); err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", p.Argv[0], unix.Exec(p.Argv[0], p.Argv, environment()))
}

func environment() []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, variable+"=") {
			env = append(env, e)
		}
	}
	return env
}

func joinNet(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering %s: %w", path, err)
	}
	return nil
}

func nodeRoot(binds []Bind) error {
	if err := mounts.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return err
	}
	for _, b := range binds {
		if err := mounts.Mount(b.From, b.To, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	return nil
}

// image is what of the machine the container's root consists of: programs, libraries and how Debian finds iptables.
func image() []string {
	return []string{
		"/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/protocols",
	}
}

// containerRoot builds a root as a runtime would for an unprivileged container with the host's network, and the host's
// /proc/sys/net mounted beside.
func containerRoot(binds []Bind) error {
	const root = "/run/jail" // each container mounts its own there, seen by it alone
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := mounts.Mount("tmpfs", root, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	var steps []Bind
	for _, path := range image() {
		if _, err := os.Lstat(path); err == nil { // not every architecture has /lib64
			steps = append(steps, Bind{From: path, To: path})
		}
	}
	for _, name := range []string{"null", "zero", "random", "urandom"} {
		steps = append(steps, Bind{From: "/dev/" + name, To: "/dev/" + name, Writable: true})
	}
	steps = append(steps, Bind{From: "/proc/sys/net", To: "/host/proc/sys/net", Writable: true})
	if err := fresh(root); err != nil {
		return err
	}
	for _, b := range append(steps, binds...) {
		if err := show(root, b); err != nil {
			return err
		}
	}
	if err := mounts.ReadOnly(root+"/proc/sys", root+"/proc/sys"); err != nil {
		return err
	}
	if err := mounts.Mount("", root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	return mounts.ChangeRoot(root)
}

func fresh(root string) error {
	for _, m := range []struct {
		kind, at string
		flags    uintptr
	}{
		{"proc", "/proc", 0}, {"sysfs", "/sys", unix.MS_RDONLY}, {"tmpfs", "/run", 0},
	} {
		if err := os.MkdirAll(root+m.at, 0o755); err != nil {
			return err
		}
		if err := mounts.Mount(m.kind, root+m.at, m.kind, m.flags, ""); err != nil {
			return err
		}
	}
	return nil
}

// show binds one file, directory or, like /bin on Debian, symbolic link into the root.
func show(root string, b Bind) error {
	to := filepath.Join(root, b.To)
	info, err := os.Lstat(b.From)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		target, err := os.Readlink(b.From)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case info.IsDir():
		err = os.MkdirAll(to, 0o755)
	default:
		err = os.WriteFile(to, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if b.Writable {
		return mounts.Mount(b.From, to, "", unix.MS_BIND, "")
	}
	return mounts.ReadOnly(b.From, to)
}

// netOnly leaves the capabilities that the daemon asks for in its manifest, and takes away all others for good.
func netOnly() error {
	const keep = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if keep&(1<<c) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("dropping capability %d: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: keep, Permitted: keep}}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("setting capabilities: %w", err)
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

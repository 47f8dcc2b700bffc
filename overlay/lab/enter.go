package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

const netnsDir = "/run/netns" // where iproute2 keeps named network namespaces

// onThread calls f on an OS thread of its own, which ends with f. What f does to its thread's namespaces holds for the
// sockets that it opens and the processes that it starts, and for nothing else.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is not fit for other goroutines any more
		done <- f()
	}()
	return <-done
}

// inNetns calls f on a thread inside a network namespace.
func inNetns(name string, f func() error) error {
	return onThread(func() error {
		if err := setNetns(name); err != nil {
			return err
		}
		return f()
	})
}

// onNode calls f on a thread that sees what a process on the node sees.
func (l *Lab) onNode(node string, f func() error) error {
	return onThread(func() error {
		if err := l.enterNode(node); err != nil {
			return err
		}
		return f()
	})
}

// setNetns moves the calling thread into a network namespace.
func setNetns(name string) error {
	f, err := os.Open(filepath.Join(netnsDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("its network namespace, %s, is missing; `tweed lab down` and `tweed lab up` build the lab anew",
			name)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering network namespace %s: %w", name, err)
	}
	return nil
}

// enterPod moves the calling thread into a pod: its network namespace, and the /sys that belongs to it.
func (l *Lab) enterPod(node, pod string) error {
	if err := setNetns(l.netns(node, pod)); err != nil {
		return err
	}
	return privateMounts()
}

// enterNode moves the calling thread onto a node.
//
// The mounts are made anew for every process and vanish with it: no mount needs to be remembered or undone. /etc and
// /run are covered by a tmpfs in which everything but the node's own directories is the host's, because what is to be
// mounted on need not exist on the host, and must not be made there.
func (l *Lab) enterNode(node string) error {
	if err := setNetns(l.netns(node)); err != nil {
		return err
	}
	if err := privateMounts(); err != nil {
		return err
	}
	// Opened before /run is covered. The lock of iptables-legacy is the node's own, like its tables.
	own, err := unix.Open(l.path(node), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", l.path(node), err)
	}
	defer unix.Close(own)
	if err := cover("/etc", "cni", "tweed"); err != nil {
		return err
	}
	if err := cover("/run", "tweed", "xtables.lock"); err != nil {
		return err
	}
	if err := os.Mkdir("/etc/cni", 0o755); err != nil {
		return err
	}
	for from, to := range map[string]string{"etc": "/etc/tweed", "cni": "/etc/cni/net.d", "run": "/run/tweed"} {
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
		if err := bind(inDir(own, from), to); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/run/xtables.lock", nil, 0o600); err != nil {
		return err
	}
	return bind(inDir(own, "xtables.lock"), "/run/xtables.lock")
}

// privateMounts gives the calling thread a mount namespace whose mounts do not reach the host, and a /sys that shows
// its network namespace. The host's later mounts still reach it: pods' namespaces among them.
func privateMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keeping mounts from the host: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /sys: %w", err)
	}
	return nil
}

// cover puts a tmpfs over dir in which all entries of dir are bound but those named.
func cover(dir string, without ...string) error {
	under, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer unix.Close(under)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("covering %s: %w", dir, err)
	}
	for _, e := range entries {
		if slices.Contains(without, e.Name()) {
			continue
		}
		err := stand(e, inDir(under, e.Name()), filepath.Join(dir, e.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // the host may remove a file at any time
			return err
		}
	}
	return nil
}

// stand makes to what e is, at from.
func stand(e fs.DirEntry, from, to string) error {
	switch {
	case e.Type()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case e.IsDir():
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
	default:
		if err := os.WriteFile(to, nil, 0o600); err != nil {
			return err
		}
	}
	if err := bind(from, to); err != nil {
		os.Remove(to)
		return err
	}
	return nil
}

func bind(from, to string) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mounting on %s: %w", to, err)
	}
	return nil
}

// inDir is a path to an entry of an open directory that holds whatever is mounted over the directory's own path.
func inDir(dir int, name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", dir, name) }

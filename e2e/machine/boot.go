package machine

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/e2e/mounts"
	"tweed.dev/tweed/e2e/world"
)

// stage is set once the root is in place.
const stage = "TWEED_E2E_BOOTED"

// boot is the life of a machine's first process: it enters its cgroup, builds its root, and becomes the supervisor.
func boot(plan string) error {
	var spec Spec
	if err := json.Unmarshal([]byte(plan), &spec); err != nil {
		return err
	}
	if os.Getenv(stage) != "" {
		return supervise(spec.Units)
	}
	controllers, err := world.Controllers()
	if err != nil {
		return err
	}
	if err := world.JoinCgroup(spec.Name); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("a cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(spec.Name)); err != nil {
		return err
	}
	root, err := assemble(spec, controllers)
	if err != nil {
		return err
	}
	if err := mounts.ChangeRoot(root); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("sharing mounts, as kubelet and containerd need it: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), stage+"=1")) // all threads then are where this one is
}

// assemble builds the root: this computer's files, with what the machine changes laid over them on its disk.
func assemble(spec Spec, controllers []world.Controller) (root string, err error) {
	disk := filepath.Join(spec.Dir, "disk-root")
	root = filepath.Join(spec.Dir, "root")
	first := false
	if _, err := os.Stat(disk + "/upper"); err != nil {
		first = true
	}
	for _, dir := range []string{disk + "/upper", disk + "/work", root} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
	}
	err = mounts.Mount("overlay", root, "overlay", 0, "lowerdir=/,upperdir="+disk+"/upper,workdir="+disk+"/work")
	if err != nil {
		return "", err
	}
	if first {
		for _, path := range spec.Absent {
			if err := os.RemoveAll(root + path); err != nil {
				return "", err
			}
		}
	}
	if err := furnish(spec, root, controllers); err != nil {
		return "", err
	}
	return root, spec.write(root)
}

// furnish mounts what the machine has beside its root.
func furnish(spec Spec, root string, controllers []world.Controller) error {
	for _, at := range []string{"/run", "/tmp", "/root", "/home"} {
		if err := mounts.Mount("tmpfs", root+at, "tmpfs", 0, "mode=755"); err != nil {
			return err
		}
	}
	if err := mounts.Mount("proc", root+"/proc", "proc", 0, ""); err != nil {
		return err
	}
	if err := mounts.Mount("sysfs", root+"/sys", "sysfs", 0, ""); err != nil {
		return err
	}
	if err := world.MountControllers(root, controllers); err != nil {
		return err
	}
	if err := mounts.Mount("/dev", root+"/dev", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := mounts.Mount("tmpfs", root+"/dev/shm", "tmpfs", 0, ""); err != nil {
		return err
	}
	for name, at := range disks {
		if at == "" {
			continue
		}
		if err := os.MkdirAll(root+at, 0o755); err != nil {
			return err
		}
		if err := mounts.Mount(filepath.Join(spec.Dir, "disk-"+name), root+at, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, at := range slices.Sorted(maps.Keys(spec.Shared)) {
		if err := share(spec.Shared[at], root+at); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(root+"/var/log/e2e", 0o755); err != nil {
		return err
	}
	if err := mounts.Mount(filepath.Join(spec.Dir, "log"), root+"/var/log/e2e", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return fakeSysctls(root)
}

// share shows a file or directory of this computer on the machine.
func share(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	dir := to
	if !info.IsDir() {
		dir = filepath.Dir(to)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if !info.IsDir() {
		if err := os.WriteFile(to, nil, 0o644); err != nil {
			return err
		}
	}
	return mounts.ReadOnly(from, to)
}

// fakeSysctls lets a kubelet set what belongs to the whole computer without changing it.
func fakeSysctls(root string) error {
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		fake := filepath.Join(root, "/run/e2e-sysctl", name)
		if err := os.MkdirAll(filepath.Dir(fake), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(fake, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := mounts.Mount(fake, root+"/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

func (s Spec) write(root string) error {
	for path, text := range s.Files {
		if err := os.MkdirAll(filepath.Dir(root+path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(root+path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	for path, mode := range map[string]os.FileMode{"/etc/hosts": 0o644, "/etc/hostname": 0o644, "/etc/resolv.conf": 0o644} {
		if _, ok := s.Files[path]; ok {
			if err := os.Chmod(root+path, mode); err != nil {
				return err
			}
		}
	}
	return os.Chmod(root+"/tmp", 0o1777)
}

package world

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/e2e/mounts"
)

// CgroupRoot is where the controllers of cgroup version 1 are mounted in a run, each in a directory of its name.
const CgroupRoot = "/sys/fs/cgroup"

// Both name the cgroup of a run: the first in the run itself, the second in its janitor.
const (
	cgroupVariable  = "TWEED_E2E_CGROUP"
	janitorVariable = "TWEED_E2E_JANITOR"
)

// A Controller is a hierarchy of cgroups (cgroups(7), version 1) and this process's place in it.
type Controller struct {
	Name string // "memory", "cpu,cpuacct", "name=systemd"
	Path string // from the hierarchy's root, as this process sees it
}

// Dir is where the directory of the process's own cgroup is.
func (c Controller) Dir() string {
	return filepath.Join(CgroupRoot, strings.TrimPrefix(c.Name, "name="), c.Path)
}

// Controllers lists those that this process is in.
func Controllers() ([]Controller, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var all []Controller
	for line := range strings.Lines(strings.TrimSpace(string(b))) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 && parts[1] != "" { // that without a name is version 2
			all = append(all, Controller{parts[1], parts[2]})
		}
	}
	if len(all) == 0 {
		return nil, errors.New("there are no controllers of cgroup version 1, which the machines of these tests need: " +
			"start the kernel with systemd.unified_cgroup_hierarchy=0, or run the tests in a virtual machine that was")
	}
	return all, nil
}

// MountControllers mounts each controller below CgroupRoot, in a file system of this mount namespace's own.
func MountControllers(root string, all []Controller) error {
	if err := mounts.Mount("tmpfs", root+CgroupRoot, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, c := range all {
		at := filepath.Join(root+CgroupRoot, strings.TrimPrefix(c.Name, "name="))
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		options := c.Name
		if strings.HasPrefix(c.Name, "name=") {
			options = "none," + c.Name
		}
		if err := mounts.Mount("cgroup", at, "cgroup", 0, options); err != nil {
			return err
		}
	}
	return nil
}

// JoinCgroup makes a cgroup of that name below this process's own in every hierarchy, and moves the process there.
func JoinCgroup(name string) error {
	all, err := Controllers()
	if err != nil {
		return err
	}
	for _, c := range all {
		dir := filepath.Join(c.Dir(), name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if c.Name == "cpuset" {
			if err := inheritCPUs(dir); err != nil {
				return err
			}
		}
		if err := os.WriteFile(dir+"/cgroup.procs", []byte("0"), 0o644); err != nil {
			return fmt.Errorf("entering a cgroup: %w", err)
		}
	}
	return nil
}

// inheritCPUs lets processes into a new cpuset, and into those that are made below it.
func inheritCPUs(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return os.WriteFile(dir+"/cgroup.clone_children", []byte("1"), 0o644)
}

// RemoveCgroup removes what JoinCgroup has made and all below it, once its last process has gone.
func RemoveCgroup(name string) error {
	all, err := Controllers()
	if err != nil {
		return err
	}
	for _, c := range all {
		if err := removeCgroupDir(filepath.Join(c.Dir(), name)); err != nil {
			return err
		}
	}
	return nil
}

func removeCgroupDir(dir string) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var dirs []string
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			if rmErr := unix.Rmdir(dirs[i]); rmErr != nil {
				err = fmt.Errorf("removing cgroup %s: %w", dirs[i], rmErr)
			}
		}
		if len(dirs) == 0 && err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// A janitor is a process that outlives a run, however that ends, by as long as it takes to remove its cgroups: they are
// the one thing that the kernel does not take away with a run's last process.
type janitor struct {
	cmd   *exec.Cmd
	alive io.Closer
}

func startJanitor(cgroup string) (*janitor, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), janitorVariable+"="+cgroup)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNS}
	alive, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the janitor: %w", err)
	}
	return &janitor{cmd, alive}, nil
}

// finish has the cgroups removed.
func (j *janitor) finish() error {
	if err := j.alive.Close(); err != nil {
		return err
	}
	if err := j.cmd.Wait(); err != nil {
		return fmt.Errorf("the janitor: %w", err)
	}
	return nil
}

// sweep is the janitor's life.
func sweep(cgroup string) error {
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil { // ends with the process at the other end
		return err
	}
	all, err := Controllers()
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := MountControllers("", all); err != nil {
		return err
	}
	return RemoveCgroup(cgroup)
}

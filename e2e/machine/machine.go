// Package machine boots machines: namespaces with a disk, a root file system and services of their own.
//
// A machine's first process is the test program itself, started again. It puts the root together, starts the services
// and keeps them running. When it is killed, the kernel ends all that ran on the machine, as a power cut does.
package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/e2e/mounts"
	"tweed.dev/tweed/e2e/world"
)

// variable holds the plan of a machine that boots.
const variable = "TWEED_E2E_MACHINE"

// A Spec says what a machine is.
type Spec struct {
	Name string
	// Dir is where it keeps its disk and its logs, as the test sees them.
	Dir string
	// Files are written at each boot, by their path on the machine.
	Files map[string]string
	// Absent are files and directories of this computer that the machine's disk begins without.
	Absent []string
	// Shared are files and directories of this computer that the machine sees read-only, by their path on it.
	Shared map[string]string
	// Units are its services.
	Units []Unit
}

// A Unit is a program that runs on a machine.
type Unit struct {
	Name string
	Argv []string
	// After is a file that has to be there before it starts; "" starts it at once.
	After string
	// Once is for a program that runs to its end. Others are started again when they end.
	Once bool
}

// Done is the file that marks a unit with Once as done, for others to start after it.
func Done(unit string) string { return "/run/e2e-done/" + unit }

// A Machine is switched on or off.
type Machine struct {
	Spec

	init *exec.Cmd // nil when it is off
}

// disks are what survives a reboot: each a file system of its own, since a kubelet measures them.
var disks = map[string]string{"root": "", "containerd": "/var/lib/containerd", "kubelet": "/var/lib/kubelet"}

// New makes a machine that is switched off.
func New(spec Spec) (*Machine, error) {
	m := &Machine{Spec: spec}
	for name := range disks {
		dir := m.disk(name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := mounts.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return nil, err
		}
	}
	return m, os.MkdirAll(m.Logs(), 0o755)
}

func (m *Machine) disk(name string) string { return filepath.Join(m.Dir, "disk-"+name) }

// OnDisk is where the test finds a file that the machine has written to its root, on or off.
func (m *Machine) OnDisk(path string) string { return filepath.Join(m.disk("root"), "upper", path) }

// Logs is the directory with a log of each unit.
func (m *Machine) Logs() string { return filepath.Join(m.Dir, "log") }

// Boot switches the machine on. It must be called in the network namespace that the machine is to have.
func (m *Machine) Boot() error {
	if m.init != nil {
		return fmt.Errorf("machine %s is on already", m.Name)
	}
	plan, err := json.Marshal(m.Spec)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(m.Logs(), "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{variable + "=" + string(plan), "PATH=" + os.Getenv("PATH"), "HOME=/root"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("booting %s: %w", m.Name, err)
	}
	m.init = cmd
	return nil
}

// PowerCut ends everything that runs on the machine at once.
func (m *Machine) PowerCut() error {
	if m.init == nil {
		return nil
	}
	if err := m.init.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	err := m.init.Wait()
	m.init = nil
	var killed *exec.ExitError
	if err != nil && !errors.As(err, &killed) {
		return err
	}
	return world.RemoveCgroup(m.Name)
}

// Remove takes a machine away that is on or off, its disk included.
func (m *Machine) Remove() error {
	errs := []error{m.PowerCut()}
	for name := range disks {
		if err := unix.Unmount(m.disk(name), unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("taking out disk %s of %s: %w", name, m.Name, err))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(m.Dir))...)
}

// PID is the machine's first process, as the test sees it.
func (m *Machine) PID() string { return fmt.Sprint(m.init.Process.Pid) }

// Path is where the test finds a file of the machine that runs.
func (m *Machine) Path(path string) string {
	return filepath.Join("/proc", m.PID(), "root", path)
}

// Command prepares a program to run on the machine as its administrator would start it.
func (m *Machine) Command(argv ...string) *exec.Cmd {
	enter := []string{"--target", m.PID(), "--all", "--"}
	return exec.Command("nsenter", append(enter, argv...)...)
}

// Run runs a program on the machine and returns what it printed.
func (m *Machine) Run(argv ...string) (string, error) {
	if m.init == nil {
		return "", fmt.Errorf("machine %s is off", m.Name)
	}
	out, err := m.Command(argv...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s on %s: %w\n%s", strings.Join(argv, " "), m.Name, err, out)
	}
	return string(out), err
}

// IsDone says that a unit with Once has not run to its end in this boot; nil when it has.
func (m *Machine) IsDone(unit string) error {
	_, err := os.Stat(m.Path(Done(unit)))
	return err
}

// Enter is called first thing in main. In a machine's first process it does not return.
func Enter() {
	plan := os.Getenv(variable)
	if plan == "" {
		return
	}
	runtime.LockOSThread() // namespaces are the thread's
	fmt.Fprintln(os.Stderr, "machine:", boot(plan))
	os.Exit(1)
}

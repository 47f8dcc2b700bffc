// Package world gives a run of the tests a machine of its own to leave traces on.
package world

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/e2e/mounts"
)

// Dir is where a run keeps its files. It is memory that only the run sees.
const Dir = "/run/e2e"

// temp is the run's TMPDIR.
const temp = Dir + "/tmp"

// mark is in the environment of every process of a run.
const mark = "TWEED_E2E_WORLD"

// Enter is called first thing in main. It does not return in a process that a run has for cleaning up behind it.
func Enter() {
	cgroup := os.Getenv(janitorVariable)
	if cgroup == "" {
		return
	}
	if err := sweep(cgroup); err != nil {
		os.Exit(fail("%v", err))
	}
	os.Exit(0)
}

// Inside reports whether this process is the run itself.
func Inside() bool { return os.Getenv(mark) != "" }

// Run starts this program again in process, mount and network namespaces of its own, where it is PID 1 and Inside is
// true, and waits for it. However it ends, killed included, the kernel then ends every process that it started, and
// with the last of them go the namespaces, links, mounts and files. Nothing has to be undone, and Run checks that.
// It returns the exit status. env is added to the environment.
func Run(env ...string) int {
	if os.Geteuid() != 0 {
		return fail("these tests make network namespaces and need root; run them as root")
	}
	name := fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
	id, cgroup := mark+"="+name, "tweed-e2e-"+name
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(append(os.Environ(), env...), id, cgroupVariable+"="+cgroup)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true,
	}
	runtime.LockOSThread() // Pdeathsig follows the thread that started the child
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	janitor, err := startJanitor(cgroup)
	if err != nil {
		return fail("%v", err)
	}
	if err := cmd.Start(); err != nil {
		return fail("starting the run: %v", err)
	}
	go func() {
		for range stop {
			cmd.Process.Kill()
		}
	}()
	err = cmd.Wait()
	left, lerr := Processes(id)
	swept := janitor.finish()
	switch {
	case swept != nil:
		return fail("removing what the run left: %v", swept)
	case lerr != nil:
		return fail("looking for what the run left: %v", lerr)
	case len(left) > 0:
		return fail("the run left processes behind: %s", strings.Join(left, "; "))
	case err == nil:
		return 0
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	return fail("the run ended by itself: %v", err)
}

// Environ is this process's environment without what makes it the run itself, for starting another run.
func Environ() []string {
	return slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, mark+"=") || strings.HasPrefix(e, cgroupVariable+"=")
	})
}

// Settle makes the world ready. Call it first thing inside.
func Settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	for _, m := range []struct{ kind, at, options string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"tmpfs", "/run", "mode=755"},
	} {
		if err := mounts.Mount(m.kind, m.at, m.kind, 0, m.options); err != nil {
			return err
		}
	}
	controllers, err := Controllers()
	if err != nil {
		return err
	}
	if err := MountControllers("", controllers); err != nil {
		return err
	}
	if err := JoinCgroup(os.Getenv(cgroupVariable)); err != nil {
		return err
	}
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return err
	}
	return os.Setenv("TMPDIR", temp)
}

// Leftovers names everything that is in the world but was not at its start: processes, network namespaces, links,
// mounts and files.
func Leftovers() ([]string, error) {
	left, err := Processes("")
	if err != nil {
		return nil, err
	}
	spaces, err := filepath.Glob("/run/netns/*")
	if err != nil {
		return nil, err
	}
	links, err := filepath.Glob("/sys/class/net/*")
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(Dir + "/*")
	if err != nil {
		return nil, err
	}
	for _, path := range slices.Concat(spaces, links, files) {
		if path != "/sys/class/net/lo" && path != temp {
			left = append(left, path)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[4]; strings.HasPrefix(at, Dir+"/") || strings.Contains(line, " - nsfs ") {
			left = append(left, "mount "+at)
		}
	}
	return left, nil
}

// Processes names the living processes, but this one, whose environment holds the given assignment; "" names all.
func Processes(assignment string) ([]string, error) {
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range environs {
		dir := filepath.Dir(path)
		b, err := os.ReadFile(path)
		if err != nil || filepath.Base(dir) == fmt.Sprint(os.Getpid()) {
			continue // it is gone by now
		}
		command, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(command) == 0 { // a zombie's is empty
			continue
		}
		if assignment == "" || strings.Contains("\x00"+string(b), "\x00"+assignment+"\x00") {
			words := strings.TrimSpace(strings.ReplaceAll(string(command), "\x00", " "))
			found = append(found, filepath.Base(dir)+" "+words)
		}
	}
	return found, nil
}

func fail(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, "e2e: "+format+"\n", args...)
	return 1
}

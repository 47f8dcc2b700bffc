package podnet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A trace is a run of the plugin of which each system call was seen.
type trace struct {
	calls  []string // those that change something, in order
	killed bool
	status syscall.WaitStatus
	stdout string
}

// traced runs the plugin, and kills it when it is about to make the call of that number that changes something. The
// first one has number 1.
func (n *node) traced(verb, container, netns, stdin string, at int, env ...string) trace {
	n.t.Helper()
	dir := n.t.TempDir()
	in, out := filepath.Join(dir, "stdin"), filepath.Join(dir, "stdout")
	if err := os.WriteFile(in, []byte(stdin), 0o600); err != nil {
		n.t.Fatal(err)
	}
	cmd := n.command(verb, container, netns, "")
	var tr trace
	var err error
	n.Do(n.t, func() { err = tr.run(cmd.Path, append(env, cmd.Env...), in, out, at) }) // all on one thread, as ptrace asks
	if err != nil {
		n.t.Fatalf("tracing %s: %v", verb, err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		n.t.Fatal(err)
	}
	tr.stdout = string(text)
	return tr
}

func (tr *trace) run(path string, env []string, in, out string, at int) error {
	stdin, err := os.Open(in)
	if err != nil {
		return err
	}
	defer stdin.Close()
	stdout, err := os.Create(out)
	if err != nil {
		return err
	}
	defer stdout.Close()
	p, err := os.StartProcess(path, []string{path}, &os.ProcAttr{
		Env: env, Files: []*os.File{stdin, stdout, os.Stderr},
		// A process group of its own tells its threads from other children of this process.
		Sys: &syscall.SysProcAttr{Ptrace: true, Setpgid: true},
	})
	if err != nil {
		return err
	}
	defer func() { _ = p.Release() }()
	if _, err := unix.Wait4(p.Pid, nil, unix.WALL, nil); err != nil { // it stops when it is executed
		return err
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := errors.Join(unix.PtraceSetOptions(p.Pid, options), unix.PtraceSyscall(p.Pid, 0)); err != nil {
		return err
	}
	return tr.follow(p.Pid, at)
}

// follow sees a process through to its end.
func (tr *trace) follow(pid, at int) error {
	for {
		var ws unix.WaitStatus
		thread, err := unix.Wait4(-pid, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return nil
		case err != nil:
			return err
		case !ws.Stopped():
			if thread == pid {
				tr.status = syscall.WaitStatus(ws)
			}
			continue
		}
		sig := 0
		switch stop := ws.StopSignal(); stop {
		case unix.SIGTRAP | 0x80: // entering or leaving a call
			call, err := entered(thread)
			if err != nil {
				return err
			}
			if call != "" {
				tr.calls = append(tr.calls, call)
			}
			if call != "" && len(tr.calls) == at {
				tr.killed = true
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					return err
				}
				continue
			}
		case unix.SIGTRAP, unix.SIGSTOP: // a thread was started, or is new
		default:
			sig = int(stop)
		}
		if err := unix.PtraceSyscall(thread, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
}

// entered names the call that a stopped thread is about to make, if that changes something.
func entered(thread int) (string, error) {
	const getSyscallInfo, entry = 0x420e, 1 // PTRACE_GET_SYSCALL_INFO, PTRACE_SYSCALL_INFO_ENTRY: linux/ptrace.h
	var info struct {
		op     uint8
		_      [3]uint8
		arch   uint32
		ip, sp uint64
		nr     uint64
		args   [6]uint64
		_      [2]uint64
	}
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(thread), unsafe.Sizeof(info),
		uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 && errno != unix.ESRCH {
		return "", fmt.Errorf("PTRACE_GET_SYSCALL_INFO: %w", errno)
	}
	if errno != 0 || info.op != entry {
		return "", nil
	}
	switch info.nr {
	case unix.SYS_OPENAT:
		if info.args[2]&unix.O_CREAT == 0 {
			return "", nil
		}
	case unix.SYS_CLONE:
		if info.args[0]&unix.CLONE_VFORK == 0 { // a thread
			return "", nil
		}
	case unix.SYS_WRITE:
		if info.args[0] == 2 {
			return "", nil
		}
	}
	return changes()[info.nr], nil
}

// changes are the calls that change something that outlives the process.
func changes() map[uint64]string {
	return map[uint64]string{
		unix.SYS_OPENAT: "openat", unix.SYS_MKDIRAT: "mkdirat", unix.SYS_LINKAT: "linkat", unix.SYS_UNLINKAT: "unlinkat",
		unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2", unix.SYS_SYMLINKAT: "symlinkat",
		unix.SYS_WRITE: "write", unix.SYS_PWRITE64: "pwrite64", unix.SYS_FTRUNCATE: "ftruncate",
		unix.SYS_FALLOCATE: "fallocate", unix.SYS_FCHMOD: "fchmod", unix.SYS_FCHMODAT: "fchmodat",
		unix.SYS_FLOCK: "flock", unix.SYS_SENDTO: "sendto", unix.SYS_SENDMSG: "sendmsg", unix.SYS_IOCTL: "ioctl",
		unix.SYS_CLONE: "clone", unix.SYS_CLONE3: "clone3",
	}
}

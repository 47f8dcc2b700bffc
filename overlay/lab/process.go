package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A process is told from a later one with the same pid by the time at which it started.
type process struct {
	pid   int
	start string // in clock ticks since boot, field 22 of /proc/PID/stat (proc_pid_stat(5))
}

// findProcess reads a process's start time. A zombie counts as ended.
func findProcess(pid int) (process, bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, false
	}
	// The second field is the name in parentheses, which may itself hold any of them.
	_, rest, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "Z" {
		return process{}, false
	}
	return process{pid: pid, start: fields[19]}, true
}

// inNamespace reports whether a process runs in the named network namespace.
func (p process) inNamespace(netns string) bool {
	own, err := fileID(fmt.Sprintf("/proc/%d/ns/net", p.pid))
	if err != nil {
		return false
	}
	ns, err := fileID(filepath.Join(netnsDir, netns))
	return err == nil && own == ns
}

// signal sends sig and waits until the process has ended.
func (p process) signal(ctx context.Context, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", p.pid, err)
	}
	defer unix.Close(fd)
	// Looked at again now that the pid cannot pass to another process unnoticed.
	if now, ok := findProcess(p.pid); !ok || now != p {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling process %d: %w", p.pid, err)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((100 * time.Millisecond).Milliseconds()))
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for process %d: %w", p.pid, err)
		}
	}
}

// A fileIdentity says whether two paths lead to one file; for a namespace, to one namespace.
type fileIdentity struct{ dev, ino uint64 }

func fileID(path string) (fileIdentity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fileIdentity{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return fileIdentity{st.Dev, st.Ino}, nil
}

// processesIn lists the processes in any of the named network namespaces, this one left out.
func processesIn(netns []string) ([]process, error) {
	ids := make(map[fileIdentity]bool)
	for _, name := range netns {
		if id, err := fileID(filepath.Join(netnsDir, name)); err == nil {
			ids[id] = true
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		id, err := fileID(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil || !ids[id] {
			continue
		}
		if p, ok := findProcess(pid); ok {
			found = append(found, p)
		}
	}
	return found, nil
}

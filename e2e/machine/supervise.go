package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pause is the time between two looks at what has ended and at what can start.
const pause = 50 * time.Millisecond

// supervise is the machine's init: it starts the units, starts those again that end, and lets go of orphans that have
// ended. It does not return.
func supervise(units []Unit) error {
	running := map[int]Unit{}
	waiting := units
	for ; ; time.Sleep(pause) {
		waiting = start(waiting, running)
		for {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if err != nil || pid <= 0 {
				break
			}
			u, ours := running[pid]
			delete(running, pid)
			switch {
			case !ours: // an orphan
			case u.Once && status.Exited() && status.ExitStatus() == 0:
				if err := mark(Done(u.Name)); err != nil {
					return err
				}
			default:
				say("%s ended with %v, status %d; starting it again", u.Name, status.Signal(), status.ExitStatus())
				waiting = append(waiting, u)
			}
		}
	}
}

// start starts the units that can be, and returns the others.
func start(units []Unit, running map[int]Unit) (waiting []Unit) {
	for _, u := range units {
		if u.After != "" {
			if _, err := os.Stat(u.After); err != nil {
				waiting = append(waiting, u)
				continue
			}
		}
		pid, err := u.start()
		if err != nil {
			say("starting %s: %v", u.Name, err)
			waiting = append(waiting, u)
			continue
		}
		running[pid] = u
	}
	return waiting
}

func (u Unit) start() (pid int, err error) {
	log, err := os.OpenFile("/var/log/e2e/"+u.Name+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	return syscall.ForkExec(u.Argv[0], u.Argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
		Files: []uintptr{uintptr(syscall.Stdin), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

func mark(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o644)
}

func say(format string, args ...any) {
	fmt.Fprintln(os.Stderr, time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

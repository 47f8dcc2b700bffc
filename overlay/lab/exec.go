package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// A CommandError says that a command could not be started. Status is what a shell would give for it: 127 where there
// is no such command, 126 where it is there and cannot be run.
type CommandError struct {
	Status int
	err    error
}

func (e *CommandError) Error() string { return e.err.Error() }
func (e *CommandError) Unwrap() error { return e.err }

// Exec puts this process on a node ("n1") or into a pod ("n1/pod1") and replaces it by the command, so that the
// command's input, output, signals and status are its own. It returns only if that fails.
func (l *Lab) Exec(target string, command []string) error {
	if len(command) == 0 {
		return fmt.Errorf("no command to run; for example: tweed lab exec %s -- ip address", target)
	}
	if err := needRoot(); err != nil {
		return err
	}
	r, err := l.readRecord()
	if err != nil {
		return err
	}
	enter, err := l.door(r.Options, target)
	if err != nil {
		return err
	}
	return onThread(func() error {
		if err := enter(); err != nil {
			return err
		}
		return replace(command)
	})
}

// door finds what moves a thread to where target is.
func (l *Lab) door(o Options, target string) (enter func() error, err error) {
	node, pod, inPod := strings.Cut(target, "/")
	if inPod {
		return func() error { return l.enterPod(node, pod) }, o.checkPod(node, pod)
	}
	return func() error {
		// On a node, tweed is the one that the node runs.
		if err := os.Setenv("PATH", filepath.Dir(l.Tweed)+":"+os.Getenv("PATH")); err != nil {
			return err
		}
		return l.enterNode(node)
	}, o.checkNode(node)
}

// replace makes the calling thread, with the namespaces that it is in, the whole process.
func replace(command []string) error {
	path, err := exec.LookPath(command[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		status := 127
		if errors.Is(err, fs.ErrPermission) {
			status = 126
		}
		return &CommandError{status, err}
	}
	err = syscall.Exec(path, command, os.Environ())
	return &CommandError{126, fmt.Errorf("%s: %w", path, err)}
}

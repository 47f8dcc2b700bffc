package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// A Process is a program that runs until it is stopped, and its log.
type Process struct {
	Name, Log string

	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// start starts cmd from inside ns, "" meaning wherever cmd itself leads to. Its output is added to the file log.
func start(ns NetNS, name, log string, cmd *exec.Cmd) (*Process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	run := cmd.Start
	if ns.Path != "" {
		run = func() error { return ns.Do(cmd.Start) }
	}
	if err := run(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &Process{Name: name, Log: log, cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		cmd.Wait()
	}()
	return p, nil
}

// Running reports whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Stop sends a signal and waits for the end. It returns the exit status, -1 for death by a signal.
func (p *Process) Stop(t testing.TB, s syscall.Signal) int {
	t.Helper()
	if p.Running() {
		if err := p.cmd.Process.Signal(s); err != nil && p.Running() {
			t.Fatalf("sending %v to %s: %v", s, p.Name, err)
		}
	}
	Await(t, p.Name+" to end after "+s.String(), func() error {
		if p.Running() {
			return fmt.Errorf("it still runs as pid %d", p.cmd.Process.Pid)
		}
		return nil
	})
	return p.cmd.ProcessState.ExitCode()
}

// Tail returns the last n lines of the log.
func (p *Process) Tail(n int) string {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

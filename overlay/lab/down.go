package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockTimeout = 30 * time.Second
	killTimeout = 10 * time.Second
)

// Removed counts what was taken away.
type Removed struct {
	Processes  int
	Pods       int
	Namespaces int    // network namespaces, those of the pods included
	Dir        string // the lab's directory; empty if there was none
}

func (r Removed) String() string {
	text := fmt.Sprintf("%d processes, %d pods, %d network namespaces", r.Processes, r.Pods, r.Namespaces)
	if r.Dir != "" {
		text += ", the directory " + r.Dir
	}
	return text
}

// Down removes whatever there is of a lab, complete or not. The error is ErrNone where there is nothing.
func (l *Lab) Down(ctx context.Context) (Removed, error) {
	l.start()
	if err := needRoot(); err != nil {
		return Removed{}, err
	}
	err := l.awaitLock(ctx)
	if errors.Is(err, fs.ErrNotExist) && len(l.namespaces()) == 0 {
		return Removed{}, ErrNone
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Removed{}, err
	}
	defer l.unlock()
	return l.remove()
}

// awaitLock waits for a build that is under way, which may just be ending, or being interrupted.
func (l *Lab) awaitLock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for said := false; ; {
		err := l.tryLock()
		if !errors.Is(err, errLocked) {
			return err
		}
		r, _ := l.readRecord()
		if !said {
			l.say("waiting for process %d, which is building or removing the lab", r.Builder)
			said = true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("process %d is still building or removing the lab; stop it, then run `tweed lab down` again",
				r.Builder)
		}
	}
}

// remove does not end early when the user has lost patience: what it needs is bounded.
func (l *Lab) remove() (Removed, error) {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	all := l.namespaces()
	var removed Removed
	var err error
	if removed.Processes, err = killIn(ctx, all); err != nil {
		return removed, err
	}
	if err := l.removeNamespaces(all); err != nil {
		return removed, err
	}
	removed.Namespaces = len(all)
	for _, name := range all {
		if strings.Contains(strings.TrimPrefix(name, l.Prefix+"-"), "-") {
			removed.Pods++
		}
	}
	r, err := l.readRecord()
	if err == nil {
		err = removeNetnsDir(r)
	} else {
		err = nil // without a record, nothing was made yet that only it tells of
	}
	if exists(l.Dir) {
		removed.Dir = l.Dir
		err = errors.Join(err, os.RemoveAll(l.Dir))
	}
	return removed, err
}

// killIn ends the processes in the namespaces, and those that they start meanwhile, and counts them.
func killIn(ctx context.Context, netns []string) (int, error) {
	for count := 0; ; {
		found, err := processesIn(netns)
		if err != nil || len(found) == 0 {
			return count, err
		}
		for _, p := range found {
			if err := p.signal(ctx, unix.SIGKILL); err != nil {
				return count, fmt.Errorf("ending process %d of the lab: %w; run `tweed lab down` again", p.pid, err)
			}
			count++
		}
	}
}

func (l *Lab) removeNamespaces(names []string) error {
	if len(names) == 0 {
		return nil
	}
	commands := make([]string, len(names))
	for i, name := range names {
		commands[i] = "netns del " + name
	}
	return l.ip(context.Background(), "", commands...)
}

// removeNetnsDir takes back what `ip netns add` made of /run/netns, unless others have come to use it.
func removeNetnsDir(r record) error {
	if entries, err := os.ReadDir(netnsDir); err != nil || len(entries) > 0 {
		return nil
	}
	if r.MountedNetnsDir {
		if err := unix.Unmount(netnsDir, 0); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmounting %s: %w", netnsDir, err)
		}
	}
	if !r.MadeNetnsDir {
		return nil
	}
	if err := os.Remove(netnsDir); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// namespaces lists the lab's network namespaces by name.
func (l *Lab) namespaces() []string {
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), l.Prefix+"-") {
			names = append(names, e.Name())
		}
	}
	return names
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func (l *Lab) start() { l.began = time.Now() }

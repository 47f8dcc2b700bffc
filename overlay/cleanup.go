package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/overlay/podnet"
)

// Remains is this host's network for whoever takes all that is ours away: what that is nobody has to say.
type Remains interface {
	// ObserveAll reads what the kernel holds of ours, whoever wanted it, and with the veths of pods.
	ObserveAll(ctx context.Context) (backend.State, error)
	// ObserveAllFilters reads what any packet filter holds of ours. What could be read is returned also with an error.
	ObserveAllFilters(ctx context.Context) (masq.Ruleset, error)
	// Apply makes one change.
	Apply(ctx context.Context, op backend.Op) error
}

// Record is what a node has published, for a Cleanup to take back.
type Record interface {
	// Published returns the command that takes it back; "" where there is nothing.
	Published(ctx context.Context) (command string, err error)
	// Withdraw takes it back.
	Withdraw(ctx context.Context) error
}

// A Cleanup takes away what daemon and plugin have put on this node: a pass with nothing wanted, and then files.
// Settings of the kernel stay: they have no owner.
type Cleanup struct {
	Remains   Remains
	CNI       CNIConf // its RunDir is emptied too
	PluginDir string  // that holds the plugin
	// Record may be nil: then what is published stays.
	Record Record
	// Force goes on although pods are attached, and cuts them off.
	Force bool
	// DryRun changes nothing.
	DryRun bool
	// Say is called with each thing that was done, or would be, as the command a person would type.
	Say func(command string)

	done   int
	failed []error
	gone   map[string]bool // files that were removed, or would be
	forced bool            // pods were attached
	// madeLock and madeDir are set where lock and run directory were not there before.
	madeLock, madeDir bool
}

// pluginName is the file of the plugin.
const pluginName = "tweed-cni"

// rounds is how often a Cleanup looks at the kernel. What hangs on something else may go only with a later one.
const rounds = 3

// Run cleans up, and tells how many things it removed. Where nothing is to be removed that is none, and no error. What
// cannot be removed is named in the error, one line each, and keeps nothing else from being removed.
func (c *Cleanup) Run(ctx context.Context) (done int, err error) {
	c.done, c.failed, c.gone = 0, nil, map[string]bool{}
	unlock, err := c.lock()
	if err != nil {
		return 0, err
	}
	defer unlock()
	if err := c.refuse(ctx); err != nil {
		return 0, err
	}
	// From here on no pod can be attached any more.
	conflist := filepath.Join(c.CNI.Dir, ConflistName)
	c.remove(conflist, conflist+".tmp", filepath.Join(c.CNI.RunDir, "node.json"))
	if err := c.refuse(ctx); err != nil {
		return c.done, errors.Join(append(c.failed, err)...)
	}
	for _, step := range []func(context.Context){c.kernel, c.store, c.files, c.withdraw} {
		if err := ctx.Err(); err != nil {
			return c.done, errors.Join(append(c.failed, err)...)
		}
		step(ctx)
	}
	return c.done, errors.Join(c.failed...)
}

// lock keeps daemons away. Where there is no run directory, no daemon runs that uses it.
func (c *Cleanup) lock() (unlock func(), err error) {
	path := lockPath(c.CNI.RunDir)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) && c.DryRun {
		return func() {}, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		_, err = os.Lstat(c.CNI.RunDir)
		c.madeLock, c.madeDir = true, errors.Is(err, fs.ErrNotExist)
		f, err = openLock(c.CNI.RunDir)
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return func() { c.unmake(); f.Close() }, nil
	}
	defer f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("a daemon runs on this node (%s %s) and would put back what is removed; end it first: in a "+
			"cluster, delete the DaemonSet tweed", holder(f), path)
	}
	return nil, fmt.Errorf("locking %s: %w", path, err)
}

// unmake removes what lock has made, where that is still there.
func (c *Cleanup) unmake() {
	if c.madeLock {
		os.Remove(lockPath(c.CNI.RunDir))
	}
	if c.madeDir {
		os.Remove(c.CNI.RunDir)
	}
}

// holder tells who has the lock of a file, as far as that can be seen from here (/proc/locks, proc(5)).
func holder(f *os.File) string {
	const unseen = "a process that cannot be seen from here holds"
	info, err := f.Stat()
	if err != nil {
		return unseen
	}
	locks, err := os.ReadFile("/proc/locks")
	st, ok := info.Sys().(*syscall.Stat_t)
	if err != nil || !ok {
		return unseen
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(locks)) {
		// 1: FLOCK  ADVISORY  WRITE 4711 00:1a:1234 0 EOF
		if words := strings.Fields(line); len(words) > 5 && words[1] == "FLOCK" && words[5] == file {
			return "process " + words[4] + " holds"
		}
	}
	return unseen
}

// refuse says that pods are attached, unless they are to be cut off.
func (c *Cleanup) refuse(ctx context.Context) error {
	have, err := c.Remains.ObserveAll(ctx)
	if err != nil {
		return fmt.Errorf("reading the kernel's network state: %w", err)
	}
	pods := veths(have)
	c.forced = c.forced || len(pods) > 0
	if len(pods) == 0 || c.Force {
		return nil
	}
	const few = 5
	names := strings.Join(pods[:min(few, len(pods))], ", ")
	if len(pods) > few {
		names += ", ..."
	}
	return fmt.Errorf("pods are attached to this node (%d, by %s): drain it first "+
		"(kubectl drain NODE --ignore-daemonsets), or cut them off with --force; their DEL will then need the plugin %s, "+
		"which stays where it is",
		len(pods), names, pluginName)
}

func veths(have backend.State) (names []string) {
	for name, l := range have.Links {
		if l.Type == backend.KindVeth {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// kernel makes passes with nothing wanted, until one finds nothing or gets nowhere.
func (c *Cleanup) kernel(ctx context.Context) {
	for round := 1; ; round++ {
		ops, err := c.plan(ctx)
		var failed []error
		if err != nil {
			failed = append(failed, err)
		}
		before := c.done
		for _, op := range ops {
			if round > rounds {
				failed = append(failed, fmt.Errorf("%s: somebody makes it anew each time it is removed", op))
			} else if err := c.do(op.String(), func() error { return c.Remains.Apply(ctx, op) }); err != nil {
				failed = append(failed, err)
			}
		}
		if c.DryRun || c.done == before {
			c.failed = append(c.failed, failed...)
			return
		}
	}
}

// plan works out what takes all away that there is. The packet filter goes last, so that no packet is sent on that it
// would have kept, or untranslated.
func (c *Cleanup) plan(ctx context.Context) ([]backend.Op, error) {
	var errs []error
	have, err := c.Remains.ObserveAll(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("reading the kernel's network state: %w", err))
	}
	ops, _ := backend.Diff(backend.State{}, backend.Observed{State: have})
	rules, err := c.Remains.ObserveAllFilters(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("reading the packet filter: %w", err))
	}
	return append(ops, masq.Diff(masq.Ruleset{}, rules)...), errors.Join(errs...)
}

// store has further plugins take back what they did for pods, and empties the address store. Where one fails the store
// stays for another try, unless the pods are to be given up.
func (c *Cleanup) store(ctx context.Context) {
	if !c.DryRun {
		freed, err := podnet.Clear(ctx, c.CNI.RunDir, podnet.DelegatePath+":"+c.PluginDir)
		if len(freed) > 0 {
			c.Say(fmt.Sprintf("# freed the addresses %v", freed))
		}
		c.note(err)
		if err != nil && !c.Force {
			return
		}
	}
	files, _, err := podnet.Files(c.CNI.RunDir)
	c.note(err)
	c.remove(files...)
}

// files removes the rest, the lock last. The plugin stays for pods that were cut off.
func (c *Cleanup) files(context.Context) {
	if !c.forced {
		c.remove(filepath.Join(c.PluginDir, pluginName))
	}
	c.unmake() // which is not worth a word
	c.remove(lockPath(c.CNI.RunDir))
	c.runDir()
}

// runDir removes the run directory, unless it is there because it is mounted here, or holds what is not ours.
func (c *Cleanup) runDir() {
	dir := c.CNI.RunDir
	ours, others, err := podnet.Files(dir)
	if len(others) > 0 {
		c.Say("# left, because it is not tweed's: " + strings.Join(others, " "))
	}
	_, absent := os.Lstat(dir)
	if err != nil || absent != nil || isMounted(dir) || len(others) > 0 || len(ours) > 0 && !c.DryRun {
		return
	}
	c.note(c.do("rmdir "+dir, func() error { return os.Remove(dir) }))
}

// isMounted reports whether a directory is where something is mounted, as in a container.
func isMounted(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// note keeps what could not be done.
func (c *Cleanup) note(err error) {
	if err != nil {
		c.failed = append(c.failed, err)
	}
}

// remove removes those files and directories that are there.
func (c *Cleanup) remove(paths ...string) {
	for _, path := range paths {
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) || c.gone[path] {
			continue
		}
		command := "rm " + path
		if err == nil && info.IsDir() {
			command = "rm -r " + path
		}
		if err == nil {
			err = c.do(command, func() error { return os.RemoveAll(path) })
			c.gone[path] = err == nil
		}
		c.note(err)
	}
}

// withdraw takes back what this node has published.
func (c *Cleanup) withdraw(ctx context.Context) {
	if c.Record == nil {
		return
	}
	command, err := c.Record.Published(ctx)
	if err == nil && command != "" {
		err = c.do(command, func() error { return c.Record.Withdraw(ctx) })
	}
	c.note(err)
}

// do does one thing, unless nothing is to be done, and says so.
func (c *Cleanup) do(command string, act func() error) error {
	if !c.DryRun {
		if err := act(); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	c.done++
	c.Say(command)
	return nil
}

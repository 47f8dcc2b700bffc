// Package lab builds a small cluster out of network namespaces on one machine.
//
// A node is a network namespace with an uplink, eth0, on an underlay bridge that has a namespace of its own. Every
// process put on a node gets a mount namespace as well, with the node's /run/tweed, /etc/cni/net.d and /etc/tweed in
// it. The daemon and the CNI plugin are the real ones. Nothing is made in the host's network namespace, and outside of
// /run/netns all that there is of a lab lies in one directory, so that it can be taken down whatever happened to it.
package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The most that a lab is built with. The underlay's IPv4 network and the pod network would allow some more of either.
const (
	MaxNodes = 200
	MaxPods  = 100
)

// Options is the shape of a lab.
type Options struct {
	Nodes    int    `json:"nodes"`    // 1 to MaxNodes
	Pods     int    `json:"pods"`     // on each node, 0 to MaxPods
	Underlay string `json:"underlay"` // what carries the tunnel: "ipv4" or "ipv6"
}

func (o Options) check() error {
	if o.Nodes < 1 || o.Nodes > MaxNodes {
		return fmt.Errorf("--nodes %d: expected 1 to %d; the underlay is one /24", o.Nodes, MaxNodes)
	}
	if o.Pods < 0 || o.Pods > MaxPods {
		return fmt.Errorf("--pods %d: expected 0 to %d on each node", o.Pods, MaxPods)
	}
	if o.Underlay != "ipv4" && o.Underlay != "ipv6" {
		return fmt.Errorf("--underlay %q: expected ipv4 or ipv6", o.Underlay)
	}
	return nil
}

// A Lab is a place for one lab; New makes one. Two do not meet that differ in Dir and in Prefix, as long
// as neither Prefix begins with the other.
type Lab struct {
	Prefix string    // of the names of its network namespaces
	Dir    string    // where everything about it is kept
	Tweed  string    // path of the tweed program
	Out    io.Writer // progress, one line a step

	readyTimeout time.Duration // for a daemon to get ready
	began        time.Time
	mu           sync.Mutex // one line of progress at a time
	// afterStep is for tests that end a build in the middle.
	afterStep func(step string) error
	// lock is Dir, flocked while a lab is being built or removed.
	lock *os.File
}

// New is the one lab of this machine, with tweed as the program that its nodes run.
func New(tweed string, out io.Writer) *Lab {
	return &Lab{Prefix: "tweed-lab", Dir: "/run/tweed-lab", Tweed: tweed, Out: out, readyTimeout: 30 * time.Second}
}

// ErrNone says that there is no lab.
var ErrNone = errors.New("there is no lab on this machine; `tweed lab up` builds one")

// A record is what is remembered of a lab, in lab.json.
type record struct {
	Options
	Builder int `json:"builder"` // process that runs or ran `up`
	// Complete is set once every pod has reached every other.
	Complete bool `json:"complete"`
	// MadeNetnsDir and MountedNetnsDir say that `ip netns add` had to make /run/netns, or to mount it on itself.
	MadeNetnsDir    bool `json:"madeNetnsDir"`
	MountedNetnsDir bool `json:"mountedNetnsDir"`
}

func (l *Lab) readRecord() (record, error) {
	var r record
	b, err := os.ReadFile(l.path("lab.json"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(l.Dir); err == nil {
			return r, fmt.Errorf("%s holds no complete lab; `tweed lab down` removes it", l.Dir)
		}
		return r, ErrNone
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w; `tweed lab down` removes the lab", l.path("lab.json"), err)
	}
	return r, nil
}

func (l *Lab) writeRecord(r record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.path("lab.json"), string(b)+"\n")
}

// writeFile writes by rename, so that no reader ever sees half a file.
func writeFile(path, content string) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func (l *Lab) path(elem ...string) string { return filepath.Join(append([]string{l.Dir}, elem...)...) }

// netns is the name of a namespace: netns("sw"), netns("n1"), netns("n1", "pod1").
func (l *Lab) netns(elem ...string) string { return l.Prefix + "-" + strings.Join(elem, "-") }

func nodeName(i int) string { return "n" + strconv.Itoa(i) }
func podName(i int) string  { return "pod" + strconv.Itoa(i) }

func names(n int, name func(int) string) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = name(i + 1)
	}
	return all
}

func (o Options) nodeNames() []string { return names(o.Nodes, nodeName) }
func (o Options) podNames() []string  { return names(o.Pods, podName) }

func (o Options) checkNode(node string) error {
	if !slices.Contains(o.nodeNames(), node) {
		return fmt.Errorf("there is no node %q; this lab has %s", node, list(o.nodeNames()))
	}
	return nil
}

func (o Options) checkPod(node, pod string) error {
	if err := o.checkNode(node); err != nil {
		return err
	}
	if !slices.Contains(o.podNames(), pod) {
		return fmt.Errorf("there is no pod %q on %s; it has %s", pod, node, list(o.podNames()))
	}
	return nil
}

func list(names []string) string {
	switch n := len(names); {
	case n == 0:
		return "none"
	case n > 10:
		return names[0] + " to " + names[n-1]
	}
	return strings.Join(names, ", ")
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("a lab is made of network namespaces, which needs root; run the command as root")
	}
	return nil
}

// say prints a line of progress.
func (l *Lab) say(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(l.Out, "%6.1fs  %s\n", time.Since(l.began).Seconds(), fmt.Sprintf(format, args...))
}

// step ends one step of the build.
func (l *Lab) step(name string) error {
	if l.afterStep != nil {
		return l.afterStep(name)
	}
	return nil
}

// tryLock locks the lab's directory. The programs that build the lab inherit the lock, so that it is free only when
// none of them is left either. The error is errLocked where somebody else has it, fs.ErrNotExist where there is no lab.
func (l *Lab) tryLock() error {
	f, err := os.Open(l.Dir)
	if err != nil {
		return err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = stillThere(f)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("locking %s: %w", l.Dir, err)
	}
	l.lock = f
	return nil
}

const errLocked = unix.EWOULDBLOCK

// stillThere is errLocked when f has been removed and another made in its place.
func stillThere(f *os.File) error {
	locked, err := f.Stat()
	if err != nil {
		return err
	}
	now, err := os.Stat(f.Name())
	if err == nil && !os.SameFile(locked, now) {
		err = errLocked
	}
	return err
}

func (l *Lab) unlock() {
	if l.lock != nil {
		l.lock.Close()
		l.lock = nil
	}
}

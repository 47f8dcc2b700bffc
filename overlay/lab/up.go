package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"

	"golang.org/x/sync/errgroup"
)

// Up builds a lab and returns once every pod has reached every other. When ctx ends before that, what was built is
// removed again. When a step fails, it is left as it is for a look at it.
func (l *Lab) Up(ctx context.Context, o Options) error {
	l.start()
	if err := o.check(); err != nil {
		return err
	}
	plugin, err := l.preflight(o)
	if err != nil {
		return err
	}
	r, err := l.claim(o)
	if err != nil {
		return err
	}
	defer l.unlock()
	err = l.build(ctx, r, plugin)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		l.say("interrupted; removing what was built")
		removed, err := l.remove()
		if err != nil {
			return err
		}
		return fmt.Errorf("interrupted; removed again: %v", removed)
	}
	return fmt.Errorf("%w\nthe lab is left as it is for a look at it; `tweed lab down` removes it", err)
}

// preflight looks for what a lab needs, before anything is made, and finds the CNI plugin.
func (l *Lab) preflight(o Options) (plugin string, err error) {
	if err := needRoot(); err != nil {
		return "", err
	}
	if _, err := ipProgram(); err != nil {
		return "", err
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("this kernel runs without IPv6, and a lab's pods have both families; " +
			"remove ipv6.disable=1 from the kernel's command line, or load the module ipv6")
	}
	if err := checkNeighbours(o); err != nil {
		return "", err
	}
	return l.findPlugin()
}

// claim makes the lab's directory, which says that there is a lab, and locks it.
func (l *Lab) claim(o Options) (record, error) {
	if left := l.namespaces(); len(left) > 0 && !exists(l.Dir) {
		return record{}, fmt.Errorf("network namespaces of an earlier lab are still there (%s); "+
			"`tweed lab down` removes them", list(left))
	}
	err := os.Mkdir(l.Dir, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return record{}, l.occupied()
	}
	if err != nil {
		return record{}, err
	}
	if err := l.tryLock(); err != nil {
		return record{}, err
	}
	r := record{
		Options:         o,
		Builder:         os.Getpid(),
		MadeNetnsDir:    !exists(netnsDir),
		MountedNetnsDir: !isMount(netnsDir),
	}
	return r, l.writeRecord(r)
}

// occupied says what stands where a lab was to be built.
func (l *Lab) occupied() error {
	r, err := l.readRecord()
	if err != nil {
		return err
	}
	if err := l.tryLock(); err != nil {
		return fmt.Errorf("process %d is building or removing a lab right now; wait for it, or stop it", r.Builder)
	}
	l.unlock()
	if !r.Complete {
		return errors.New("a lab that was never completed is still there; `tweed lab down` removes it")
	}
	return fmt.Errorf("a lab of %d nodes stands already; `tweed lab status` shows it, `tweed lab down` removes it",
		r.Nodes)
}

func (l *Lab) build(ctx context.Context, r record, plugin string) error {
	if err := l.buildNodes(ctx, r.Options); err != nil {
		return err
	}
	if err := l.buildDaemons(ctx, r.Options); err != nil {
		return err
	}
	if err := l.buildPods(ctx, r.Options, plugin); err != nil {
		return err
	}
	l.say("connecting every pod with every other by TCP")
	p, err := l.prove(ctx, r.Options)
	if err = errors.Join(err, ctx.Err(), p.err()); err != nil {
		return err
	}
	l.say("%d of %d paths work, each with the pod's own source address", p.paths, p.paths)
	r.Complete = true
	if err := l.writeRecord(r); err != nil {
		return err
	}
	return l.epilogue(ctx, r.Options)
}

func (l *Lab) buildNodes(ctx context.Context, o Options) error {
	if err := os.Mkdir(l.path("leases"), 0o755); err != nil {
		return err
	}
	if err := l.makeSwitch(ctx); err != nil {
		return err
	}
	l.say("underlay: a bridge in network namespace %s", l.netns("sw"))
	if err := l.step("sw"); err != nil {
		return err
	}
	for i, node := range o.nodeNames() {
		if err := l.makeNodeDir(node, o.Underlay); err != nil {
			return err
		}
		if err := l.makeNode(ctx, i+1); err != nil {
			return err
		}
		l.say("%s: eth0 has %s", node, strings.ReplaceAll(join(nodeAddrs(i+1)), ",", " and "))
		if err := l.step(node); err != nil {
			return err
		}
	}
	if o.Nodes <= mostLearned {
		return nil
	}
	return each(ctx, o.nodeNames(), func(ctx context.Context, node string) error { return l.introduce(ctx, node, o) })
}

func (l *Lab) buildDaemons(ctx context.Context, o Options) error {
	return each(ctx, o.nodeNames(), func(ctx context.Context, node string) error {
		if err := l.startDaemon(ctx, node); err != nil {
			return err
		}
		p, _ := l.daemon(node)
		l.say("%s: the daemon is ready, pid %d", node, p.pid)
		return l.step(node + " daemon")
	})
}

func (l *Lab) buildPods(ctx context.Context, o Options, plugin string) error {
	return each(ctx, o.nodeNames(), func(ctx context.Context, node string) error {
		for _, pod := range o.podNames() {
			if err := l.addPod(ctx, plugin, node, pod); err != nil {
				return err
			}
			addrs, err := l.podAddrs(node, pod)
			if err != nil {
				return fmt.Errorf("%s/%s: %w", node, pod, err)
			}
			l.say("%s/%s: eth0 has %s", node, pod, strings.ReplaceAll(join(addrs), ",", " and "))
			if err := l.step(node + "/" + pod); err != nil {
				return err
			}
		}
		return nil
	})
}

// each calls f for some nodes at a time, all of them in the end, and returns the first error after all have returned.
func each(ctx context.Context, nodes []string, f func(ctx context.Context, node string) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4 * runtime.GOMAXPROCS(0))
	for _, node := range nodes {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return f(ctx, node)
		})
	}
	return g.Wait()
}

// epilogue prints the leases as a node sees them, and how to go on.
func (l *Lab) epilogue(ctx context.Context, o Options) error {
	var table bytes.Buffer
	cmd := exec.CommandContext(ctx, l.Tweed, "subnet", "status", "--leases", l.path("leases"))
	cmd.Stdout, cmd.Stderr = &table, &table
	err := l.onNode(nodeName(1), cmd.Run)
	fmt.Fprintf(l.Out, "\n%s\n", table.String())
	if err != nil {
		return fmt.Errorf("`tweed subnet status` on %s: %w", nodeName(1), err)
	}
	l.howToGoOn(o)
	return nil
}

func (l *Lab) howToGoOn(o Options) {
	table := tabwriter.NewWriter(l.Out, 0, 0, 3, ' ', 0)
	tweed := l.typed()
	fmt.Fprintln(table, "How to go on:")
	fmt.Fprintf(table, "  %s lab exec n1 -- ip route\ta command on a node\n", tweed)
	fmt.Fprintf(table, "  %s lab exec n1 -- tweed plan\twhat the daemon would change there\n", tweed)
	if o.Pods > 0 {
		fmt.Fprintf(table, "  %s lab exec n1/pod1 -- ip address\ta command in a pod\n", tweed)
	}
	fmt.Fprintf(table, "  %s lab status\tnodes, pods and their addresses\n", tweed)
	fmt.Fprintf(table, "  %s lab restart n1\tstop and start a node's daemon\n", tweed)
	fmt.Fprintf(table, "  %s lab down\tremove everything\n", tweed)
	table.Flush()
}

// typed is what a person types for the tweed program: its name if it is found by that, else a path, if possible from
// the current directory.
func (l *Lab) typed() string {
	if found, err := exec.LookPath("tweed"); err == nil {
		if a, err := fileID(found); err == nil {
			if b, err := fileID(l.Tweed); err == nil && a == b {
				return "tweed"
			}
		}
	}
	dir, err := os.Getwd()
	if err != nil {
		return l.Tweed
	}
	near, err := filepath.Rel(dir, l.Tweed)
	if err != nil || !filepath.IsLocal(near) || !strings.Contains(near, "/") {
		return l.Tweed
	}
	return near
}

package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/overlay/podnet"
)

// Run is the daemon: it keeps the node's kernel in step until ctx ends, and then leaves the data path as it is. One
// daemon runs per run directory; a second waits for the first to end.
func (r *Reconciler) Run(ctx context.Context) error {
	unlock, err := lock(ctx, r.planner.RunDir, r.log)
	if err != nil || unlock == nil {
		return err
	}
	defer unlock()
	if err := r.forget(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.planner.Leases.Run(ctx, r.ringForLeases) })
	g.Go(func() error { return r.planner.Kernel.Watch(ctx, r.isUplink, r.Ring) })
	if r.planner.NetConf != "" {
		g.Go(func() error { return follow(ctx, r.planner.NetConf, r.Ring, r.log) })
	}
	g.Go(func() error { return r.Passes(ctx) })
	g.Go(func() error { return r.Publish(ctx) })
	if r.Announcer != nil {
		g.Go(func() error { return r.Declare(ctx) })
		g.Go(func() error { return r.TellEvents(ctx) })
	}
	g.Go(func() error { return r.Sweep(ctx) })
	g.Go(func() error { return r.Serve(ctx) })
	if r.MetricsAddress != "" {
		g.Go(func() error { return r.ServeMetrics(ctx) })
	}
	return g.Wait()
}

// Sweep frees, now and then, the addresses of pods that went without a word (a reboot of the runtime, a lost DEL).
func (r *Reconciler) Sweep(ctx context.Context) error {
	for {
		freed, err := podnet.Sweep(ctx, r.planner.RunDir, podnet.DelegatePath)
		if err != nil {
			r.log.Warn("sweeping pod addresses", "err", err)
		}
		if len(freed) > 0 {
			r.log.Info("freed addresses of pods that are gone", "addresses", freed)
			r.Ring() // for what nftables knows of them
		}
		if !sleep(ctx, slow) {
			return nil
		}
	}
}

// lock takes the run directory for this process. It waits while another daemon has it, and says so; unlock is nil when
// ctx ended first.
func lock(ctx context.Context, runDir string, log *slog.Logger) (unlock func(), err error) {
	for {
		f, err := openLock(runDir)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			log.Warn("another tweed daemon runs on this node; waiting for it to end", "lock", f.Name())
			locked := make(chan error, 1)
			go func() { locked <- ignoringInterrupts(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX) }) }()
			select {
			case <-ctx.Done():
				return nil, nil // the process ends, and with it the waiting
			case err = <-locked:
			}
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		if isInPlace(f) {
			return func() { f.Close() }, nil
		}
		f.Close() // a cleanup has removed it meanwhile
	}
}

// openLock opens the file whose flock says that somebody is at work on this node's network.
func openLock(runDir string) (*os.File, error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, fmt.Errorf("making the run directory: %w; --run-dir names another", err)
	}
	f, err := os.OpenFile(lockPath(runDir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the daemon's lock: %w; --run-dir names another directory", err)
	}
	return f, nil
}

func lockPath(runDir string) string { return filepath.Join(runDir, podnet.LockName) }

// isInPlace reports whether a file still has the name that it was opened by.
func isInPlace(f *os.File) bool {
	here, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(f.Name())
	return err == nil && os.SameFile(here, there)
}

// ignoringInterrupts calls f until it ends with anything but EINTR.
func ignoringInterrupts(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A lock is held for a few file operations. Whoever holds it much longer than that hangs.
const (
	lockRetry   = 5 * time.Millisecond
	lockTimeout = 10 * time.Second
)

// locked calls f while nobody else writes in dir.
func locked(ctx context.Context, dir string, f func() error) error {
	path := filepath.Join(dir, lockName)
	l, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("opening the lock of the leases: %w", err)
	}
	defer l.Close() // unlocks
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	retry := time.NewTicker(lockRetry)
	defer retry.Stop()
	for {
		err := unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking %s: %w", path, err)
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return fmt.Errorf("another process holds %s; find it with fuser -v %s: %w", path, path, ctx.Err())
		}
	}
}

package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// writing is how long a file is left alone once it has begun to change: who writes it in place empties it first.
const writing = 100 * time.Millisecond

// follow calls ring, until ctx ends, after each change of what the file at path holds, and at the start, when none can
// be missed any more. A file that cannot be watched is told once; passes look at it all the same, only later.
func follow(ctx context.Context, path string, ring func(), log *slog.Logger) error {
	wait, told := retry, ""
	for {
		err := followFile(ctx, path, func() { wait = retry; ring() })
		if ctx.Err() != nil {
			return nil
		}
		if why := err.Error(); why != told {
			log.Info("changes of net-conf.json are found by looking, not at once", "why", why)
			told = why
		}
		if !sleep(ctx, wait) {
			return nil
		}
		wait = min(2*wait, slow)
	}
}

// followFile watches the directory, not the file: editors put another file in its place, and the kubelet another link
// in that of the one which leads to it. Whatever else happens in the directory rings no bell.
func followFile(ctx context.Context, path string, ring func()) error {
	dir := filepath.Dir(path)
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching %s: %w; see fs.inotify.max_user_instances in sysctl", dir, err)
	}
	defer w.Close()
	if err := w.Add(dir); err != nil {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	seen, _ := os.ReadFile(path) // a file that cannot be read is the passes' to name
	ring()
	var due <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-w.Events:
			if e.Name == dir && e.Has(fsnotify.Remove|fsnotify.Rename) {
				return fmt.Errorf("watching %s: it has gone", dir)
			}
		case err := <-w.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("watching %s: %w", dir, err)
			}
		case <-due:
			due = nil
			if now, _ := os.ReadFile(path); !bytes.Equal(now, seen) || (now == nil) != (seen == nil) {
				seen = now
				ring()
			}
			continue
		}
		if due == nil {
			due = time.After(writing)
		}
	}
}

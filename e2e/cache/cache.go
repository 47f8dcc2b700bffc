// Package cache keeps what takes long to make in the user's cache directory, for all checkouts.
package cache

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Unused is how long something is kept that no run has asked for.
const Unused = 30 * 24 * time.Hour

// Dir is the directory of that name in the cache. It is there then.
func Dir(name string) (string, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(user, "tweed-e2e", name)
	return dir, os.MkdirAll(dir, 0o755)
}

// Once returns the path of a file in the user's cache directory that stands for name and key. If it is not there, write
// writes it. Files under that name that nobody has asked for during life are removed.
func Once(name, key string, life time.Duration, write func(out string) error) (string, error) {
	dir, err := Dir("images")
	if err != nil {
		return "", err
	}
	unlock, err := Lock(filepath.Join(dir, name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	path, now := filepath.Join(dir, name+"-"+key+".tar"), time.Now()
	missing := os.Chtimes(path, now, now)
	if err := Drop(filepath.Join(dir, name+"-*"), life); err != nil || missing == nil {
		return path, err
	}
	if err := write(path + ".new"); err != nil {
		os.Remove(path + ".new")
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

// Drop removes files that are older than life, and those that a build did not finish.
func Drop(pattern string, life time.Duration) error {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		unfinished := strings.Contains(filepath.Base(path), ".new")
		if unfinished || time.Since(info.ModTime()) > life {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// Lock waits until nobody else holds the lock of that file.
func Lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// A Sum is what the key of a cached file is made from.
type Sum struct{ hash.Hash }

// NewSum begins with nothing.
func NewSum() Sum { return Sum{sha256.New()} }

// GoSum begins with what go env says.
func GoSum(dir string, variables ...string) (Sum, error) {
	s := NewSum()
	env, err := Go(dir, append([]string{"env"}, variables...)...)
	fmt.Fprintln(s, env)
	return s, err
}

// AddFile adds a file's name and content.
func (s Sum) AddFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(s, f)
	fmt.Fprintln(s, filepath.Base(path), n)
	return err
}

// AddJSON adds a value.
func (s Sum) AddJSON(v any) error { return json.NewEncoder(s).Encode(v) }

// Key is short enough for a file name.
func (s Sum) Key() string { return hex.EncodeToString(s.Sum(nil)[:6]) }

// Go runs the go command and returns what it printed.
func Go(dir string, args ...string) (string, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Stderr = new(strings.Builder)
	b, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s in %s: %w\n%s", strings.Join(args, " "), dir, err, cmd.Stderr)
	}
	return strings.TrimSpace(string(b)), nil
}

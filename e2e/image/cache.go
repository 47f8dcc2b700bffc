package image

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

// unused is how long something is kept that no run has asked for.
const unused = 30 * 24 * time.Hour

// once returns the path of a file in the user's cache directory that stands for name and key. If it is not there, write
// writes it. Files under that name that nobody has asked for during life are removed.
func once(name, key string, life time.Duration, write func(out string) error) (string, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(user, "tweed-e2e", "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(dir, name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	path, now := filepath.Join(dir, name+"-"+key+".tar"), time.Now()
	missing := os.Chtimes(path, now, now)
	if err := drop(filepath.Join(dir, name+"-*"), life); err != nil || missing == nil {
		return path, err
	}
	if err := write(path + ".new"); err != nil {
		os.Remove(path + ".new")
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

// drop removes files that are older than life, and those that a build did not finish.
func drop(pattern string, life time.Duration) error {
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

func lock(path string) (unlock func(), err error) {
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

// A sum is what the key of a cached file is made from.
type sum struct{ hash.Hash }

func newSum() sum { return sum{sha256.New()} }

// goSum begins with what go env says.
func goSum(dir string, variables ...string) (sum, error) {
	s := newSum()
	env, err := goOutput(dir, append([]string{"env"}, variables...)...)
	fmt.Fprintln(s, env)
	return s, err
}

func (s sum) addFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(s, f)
	fmt.Fprintln(s, filepath.Base(path), n)
	return err
}

func (s sum) addJSON(v any) error { return json.NewEncoder(s).Encode(v) }

func (s sum) key() string { return hex.EncodeToString(s.Sum(nil)[:6]) }

func goOutput(dir string, args ...string) (string, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Stderr = new(strings.Builder)
	b, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s in %s: %w\n%s", strings.Join(args, " "), dir, err, cmd.Stderr)
	}
	return strings.TrimSpace(string(b)), nil
}

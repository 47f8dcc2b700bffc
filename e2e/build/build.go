// Package build makes the programs that a run needs, each once.
package build

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Programs holds the paths of what was built.
type Programs struct {
	Etcd, APIServer string
	Tweed, TweedCNI string
}

// unused is how long a build of Kubernetes that no run has asked for is kept.
const unused = 30 * 24 * time.Hour

// All builds everything: tweed below moduleDir, the directory of the e2e module, Kubernetes and etcd in the user's cache
// directory, for all checkouts. They are linked again only when the Go version or go.sum changed: Go's own build cache
// keeps what is compiled, which takes seven minutes, but not what is linked, which takes one.
func All(moduleDir string, progress func(format string, args ...any)) (Programs, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return Programs{}, err
	}
	bin, cache := filepath.Join(moduleDir, ".bin"), filepath.Join(user, "tweed-e2e")
	key, err := cacheKey(moduleDir)
	if err != nil {
		return Programs{}, err
	}
	for _, dir := range []string{bin, filepath.Join(cache, key)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return Programs{}, err
		}
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return Programs{}, err
	}
	defer unlock()
	p := Programs{
		Etcd:      filepath.Join(cache, key, "etcd"),
		APIServer: filepath.Join(cache, key, "kube-apiserver"),
		Tweed:     filepath.Join(bin, "tweed"),
		TweedCNI:  filepath.Join(bin, "tweed-cni"),
	}
	if err := dropUnused(cache, key); err != nil {
		return Programs{}, err
	}
	version, err := goOutput(moduleDir, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return Programs{}, err
	}
	if err := once(p.Etcd, moduleDir, "go.etcd.io/etcd/server/v3", "-s -w", progress); err != nil {
		return Programs{}, err
	}
	if err := once(p.APIServer, moduleDir, "k8s.io/kubernetes/cmd/kube-apiserver", stamps(version), progress); err != nil {
		return Programs{}, err
	}
	ours := filepath.Dir(moduleDir)
	progress("building tweed and tweed-cni")
	if err := goBuild(p.Tweed, ours, "./cmd/tweed", ""); err != nil {
		return Programs{}, err
	}
	if err := goBuild(p.TweedCNI, ours, "./cmd/tweed-cni", ""); err != nil {
		return Programs{}, err
	}
	return p, nil
}

// stamps gives kube-apiserver its version, which go build alone leaves at v0.0.0-master and clients do not believe.
func stamps(version string) string {
	parts := strings.Split(strings.TrimPrefix(version, "v"), ".")
	const in = "-X k8s.io/component-base/version."
	return "-s -w " + in + "gitVersion=" + version + " " + in + "gitMajor=" + parts[0] + " " + in + "gitMinor=" + parts[1]
}

func once(out, dir, pkg, ldflags string, progress func(string, ...any)) error {
	if _, err := os.Stat(out); err == nil {
		return nil
	}
	progress("building %s (minutes the first time, then never again)", filepath.Base(out))
	return goBuild(out, dir, pkg, ldflags)
}

// goBuild writes out by rename: a program that is there is whole, and one that runs from an older build goes on.
func goBuild(out, dir, pkg, ldflags string) error {
	cmd := exec.Command("go", "build", "-ldflags", ldflags, "-o", out+".new", pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s in %s: %w\n%s", pkg, dir, err, b)
	}
	return os.Rename(out+".new", out)
}

func cacheKey(moduleDir string) (string, error) {
	sums, err := os.ReadFile(filepath.Join(moduleDir, "go.sum"))
	if err != nil {
		return "", err
	}
	toolchain, err := goOutput(moduleDir, "env", "GOVERSION", "GOARCH")
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(sums, toolchain...))
	return "k8s-" + hex.EncodeToString(sum[:6]), nil
}

// dropUnused removes old builds from the cache, and marks this one as used.
func dropUnused(cache, key string) error {
	now := time.Now()
	if err := os.Chtimes(filepath.Join(cache, key), now, now); err != nil {
		return err
	}
	dirs, err := filepath.Glob(filepath.Join(cache, "k8s-*"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		info, err := os.Stat(d)
		if err != nil {
			return err
		}
		if now.Sub(info.ModTime()) < unused {
			continue
		}
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	return nil
}

func goOutput(dir string, args ...string) (string, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	b, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s in %s: %w", strings.Join(args, " "), dir, err)
	}
	return strings.TrimSpace(string(b)), nil
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

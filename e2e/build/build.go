// Package build makes the programs that a run needs, each once.
package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"tweed.dev/tweed/e2e/cache"
	"tweed.dev/tweed/e2e/image"
)

// Programs holds the paths of what was built.
type Programs struct {
	Etcd string
	// Kubernetes is a directory with its programs by their own names.
	Kubernetes string
	// Suite holds Kubernetes' own tests, and Ginkgo runs them side by side.
	Suite, Ginkgo   string
	Tweed, TweedCNI string
	// Image is an archive of tweed's image, and TestImages one of what else hosts run in containers.
	Image, TestImages string
}

// Version is that of tweed's image in a run; manifests/tweed.yaml names it.
const Version = "v0.1.0"

// Kube returns the path of one of Kubernetes' programs.
func (p Programs) Kube(name string) string { return filepath.Join(p.Kubernetes, name) }

// kubeNames are those that the program in ../kubernetes goes by.
var kubeNames = []string{
	"kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet",
}

// All builds everything: tweed below moduleDir, the directory of the e2e module, Kubernetes and etcd in the user's cache
// directory, for all checkouts. They are linked again only when the Go version or go.sum changed: Go's own build cache
// keeps what is compiled, which takes twenty minutes, but not what is linked, which takes one.
func All(moduleDir string, progress func(format string, args ...any)) (Programs, error) {
	dir, unlock, err := kubernetesDir(moduleDir)
	if err != nil {
		return Programs{}, err
	}
	defer unlock()
	bin := filepath.Join(moduleDir, ".bin")
	at := func(name string) string { return filepath.Join(dir, name) }
	p := Programs{
		Etcd: at("etcd"), Kubernetes: at("kubernetes"), Suite: at("e2e.test"), Ginkgo: at("ginkgo"),
		Tweed: filepath.Join(bin, "tweed"), TweedCNI: filepath.Join(bin, "tweed-cni"),
	}
	version, err := cache.Go(moduleDir, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return Programs{}, err
	}
	for _, d := range []string{bin, p.Kubernetes} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return Programs{}, err
		}
	}
	const small = "-s -w"
	for _, g := range []goal{
		{p.Etcd, moduleDir, []string{"build", "-ldflags", small}, "go.etcd.io/etcd/server/v3"},
		{p.Kube("kubernetes"), moduleDir, []string{"build", "-ldflags", stamps(version)}, "./kubernetes"},
		{p.Ginkgo, moduleDir, []string{"build", "-ldflags", small}, "github.com/onsi/ginkgo/v2/ginkgo"},
		{p.Suite, moduleDir, []string{"test", "-c", "-ldflags", stamps(version)}, "k8s.io/kubernetes/test/e2e"},
	} {
		if err := g.once(progress); err != nil {
			return Programs{}, err
		}
	}
	for _, name := range kubeNames {
		if err := os.Symlink("kubernetes", p.Kube(name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return Programs{}, err
		}
	}
	ours := filepath.Dir(moduleDir)
	progress("building tweed and tweed-cni")
	for _, g := range []goal{
		{p.Tweed, ours, []string{"build", "-trimpath"}, "./cmd/tweed"},
		{p.TweedCNI, ours, []string{"build", "-trimpath"}, "./cmd/tweed-cni"},
	} {
		if err := g.build(); err != nil {
			return Programs{}, err
		}
	}
	if p.TestImages, err = image.TestImages(context.Background(), moduleDir, p.Suite, progress); err != nil {
		return Programs{}, err
	}
	p.Image, err = image.Build(context.Background(), ours, Version, progress)
	return p, err
}

// stamps gives Kubernetes its version, which go build alone leaves at v0.0.0-master and clients do not believe.
func stamps(version string) string {
	parts := strings.Split(strings.TrimPrefix(version, "v"), ".")
	const in = "-X k8s.io/component-base/version."
	return "-s -w " + in + "gitVersion=" + version + " " + in + "gitMajor=" + parts[0] + " " + in + "gitMinor=" + parts[1]
}

// A goal is a program to be built: by which go command, in which directory, from which package.
type goal struct {
	out, dir string
	command  []string
	pkg      string
}

func (g goal) once(progress func(string, ...any)) error {
	if _, err := os.Stat(g.out); err == nil {
		return nil
	}
	progress("building %s (minutes the first time, then never again)", filepath.Base(g.out))
	return g.build()
}

// build writes by rename: a program that is there is whole, and one that runs from an older build goes on.
func (g goal) build() error {
	cmd := exec.Command("go", append(g.command, "-o", g.out+".new", g.pkg)...)
	cmd.Dir = g.dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s in %s: %w\n%s", strings.Join(cmd.Args, " "), g.dir, err, b)
	}
	return os.Rename(g.out+".new", g.out)
}

// kubernetesDir is where the programs for this go.sum and this Go are kept. Nobody else writes there until unlock.
func kubernetesDir(moduleDir string) (dir string, unlock func(), err error) {
	sum, err := cache.GoSum(moduleDir, "GOVERSION", "GOARCH")
	if err == nil {
		err = sum.AddFile(filepath.Join(moduleDir, "go.sum"))
	}
	if err != nil {
		return "", nil, err
	}
	if dir, err = cache.Dir("k8s-" + sum.Key()); err != nil {
		return "", nil, err
	}
	if unlock, err = cache.Lock(filepath.Join(filepath.Dir(dir), "lock")); err != nil {
		return "", nil, err
	}
	now := time.Now()
	if err = os.Chtimes(dir, now, now); err == nil {
		err = cache.Drop(filepath.Join(filepath.Dir(dir), "k8s-*"), cache.Unused)
	}
	if err != nil {
		unlock()
		return "", nil, err
	}
	return dir, unlock, nil
}

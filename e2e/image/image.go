// Package image makes the images that a cluster runs, on this machine alone: tweed's by its Dockerfile, and those that
// the tests' pods are made of. No registry is asked for anything.
package image

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"tweed.dev/tweed/e2e/cache"
)

// Name is what tweed's image is called, before the colon.
const Name = "tweed.dev/tweed"

// ourLife is how long an image of tweed is kept that no run has asked for: there is one for each change of the code.
const ourLife = 24 * time.Hour

//go:embed build.sh
var buildScript string

// Build makes the image of the checkout at source by its Dockerfile, with buildah, and returns the path of a
// docker-archive that names it Name:version. What was made of the same files before is not made again. The base images
// are Debian's packages from the machine's own sources, and for the stage that compiles the machine's own Go beside
// them.
func Build(ctx context.Context, source, version string, progress func(format string, args ...any)) (string, error) {
	base, err := buildBase(ctx, progress)
	if err != nil {
		return "", err
	}
	key, err := sourceKey(source, base, version)
	if err != nil {
		return "", err
	}
	return cache.Once("tweed", key, ourLife, func(out string) error {
		progress("building the image %s:%s", Name, version)
		return build(ctx, source, base, version, out)
	})
}

// BuildAgain is Build into a file of the caller's, whether or not the image has been made before.
func BuildAgain(ctx context.Context, source, version, out string) error {
	base, err := buildBase(ctx, func(string, ...any) {})
	if err != nil {
		return err
	}
	return build(ctx, source, base, version, out)
}

// buildBase is what Debian's image holds in the registry, with iptables and nft in it: the build then asks nobody.
func buildBase(ctx context.Context, progress func(string, ...any)) (string, error) {
	root := debian{Variant: "minbase", Packages: []string{"ca-certificates", "iptables", "nftables"}}
	settings := settings{Env: []string{
		"PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"GOPATH=/go", "GOPROXY=off", "GOTOOLCHAIN=local",
	}}
	key, err := root.key(settings)
	if err != nil {
		return "", err
	}
	return cache.Once("base", key, cache.Unused, func(out string) error {
		progress("building the base image from Debian's packages (a minute the first time)")
		return beside(out, func(dir string) error {
			files := filepath.Join(dir, "root.tar")
			if err := root.write(ctx, files); err != nil {
				return err
			}
			base := picture{Names: []string{"localhost/base:e2e"}, Layers: []string{files}, Config: settings}
			return writeArchive(out, []picture{base})
		})
	})
}

func build(ctx context.Context, source, base, version, out string) error {
	if _, err := cache.Go(source, "mod", "download"); err != nil { // the build itself gets no network
		return err
	}
	dirs, err := cache.Go(source, "env", "GOROOT", "GOMODCACHE", "GOCACHE")
	if err != nil {
		return err
	}
	env := []string{
		"SOURCE=" + source, "BASE=docker-archive:" + base, "IMAGE=" + Name + ":" + version, "VERSION=" + version,
		"ARCH=" + runtime.GOARCH,
	}
	for i, dir := range strings.Split(dirs, "\n") {
		env = append(env, []string{"GO_ROOT", "GO_MODULES", "GO_CACHE"}[i]+"="+dir)
	}
	if err := os.Remove(out); err != nil && !os.IsNotExist(err) { // buildah does not add to an archive
		return err
	}
	return isolated(ctx, buildScript, "buildah", out, env...)
}

// sourceKey stands for all that the image is made from.
func sourceKey(source, base, version string) (string, error) {
	sum, err := cache.GoSum(source, "GOVERSION", "GOARCH")
	if err != nil {
		return "", err
	}
	fmt.Fprintln(sum, filepath.Base(base), version, buildScript)
	context, err := contextPaths(source)
	if err != nil {
		return "", err
	}
	for _, path := range append(context, "Dockerfile", ".dockerignore") {
		err := filepath.WalkDir(filepath.Join(source, path), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || strings.HasSuffix(path, "_test.go") {
				return err
			}
			return sum.AddFile(path)
		})
		if err != nil {
			return "", err
		}
	}
	return sum.Key(), nil
}

// contextPaths lists what .dockerignore lets through.
func contextPaths(source string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(source, ".dockerignore"))
	if err != nil {
		return nil, err
	}
	var paths []string
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		if path, ok := strings.CutPrefix(lines.Text(), "!"); ok {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

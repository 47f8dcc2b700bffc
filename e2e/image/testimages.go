package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"tweed.dev/tweed/e2e/cache"
)

// The tests' own pods call each image that TestImages makes localhost/NAME:e2e.
const (
	Pause   = "localhost/pause:e2e" // what a container runtime begins every pod with
	coreDNS = "localhost/coredns:e2e"
)

// upstreamFolder is where upstream's suite expects images that are made for it.
const upstreamFolder = "/e2e-test-images/"

// A recipe is an image of the tests: what it consists of, and how it starts.
type recipe struct {
	Name   string // the last part of its names
	Layers []string
	Config settings
}

func recipes() []recipe {
	starts := func(entrypoint ...string) settings { return settings{Env: []string{path}, Entrypoint: entrypoint} }
	offers := func(command ...string) settings { return settings{Env: []string{path}, Cmd: command} }
	agnhost := starts("/agnhost")
	agnhost.Cmd = []string{"pause"}
	return []recipe{
		{"agnhost", []string{"debian", "coredns", "agnhost"}, agnhost},
		{"glibc-dns-testing", []string{"debian", "coredns"}, offers("bash")},
		{"nginx", []string{"debian"}, offers("nginx", "-g", "daemon off;")},
		{"busybox", []string{"busybox"}, offers("sh")},
		{"pause", []string{"pause"}, starts("/pause")},
		{"regression-issue-74839", []string{"regression-issue-74839"}, starts("/regression-issue-74839")},
		{"coredns", []string{"coredns"}, starts("/coredns")},
	}
}

const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// testRoot holds what specs of upstream's suite call in agnhost, and nginx.
func testRoot() debian {
	return debian{
		Variant: "essential",
		Packages: []string{
			"bind9-dnsutils", "curl", "iperf", "iproute2", "netcat-openbsd", "nginx-light", "procps", "util-linux", "wget",
		},
		Without: []string{
			"usr/bin/perl*", "usr/lib/*/perl*", "usr/share/perl*", "usr/lib/*/libperl*", "usr/lib/*/gconv", "var/lib/dpkg",
			"var/cache/debconf",
		},
	}
}

// TestImages makes the images of the tests' pods, and returns the path of one docker-archive of them all. moduleDir is
// the directory of the e2e module, and suite upstream's test program, which says by what names it asks for its images.
func TestImages(
	ctx context.Context, moduleDir, suite string, progress func(format string, args ...any),
) (string, error) {
	root, err := buildTestRoot(ctx, progress)
	if err != nil {
		return "", err
	}
	names, err := upstreamNames(ctx, suite)
	if err != nil {
		return "", err
	}
	key, err := testsKey(moduleDir, root, names)
	if err != nil {
		return "", err
	}
	return cache.Once("tests", key, cache.Unused, func(out string) error {
		progress("building the images of the tests' pods (minutes the first time)")
		return beside(out, func(dir string) error {
			k := kitchen{moduleDir: moduleDir, dir: dir, layers: map[string]string{"debian": root}}
			return k.serve(ctx, out, names)
		})
	})
}

func buildTestRoot(ctx context.Context, progress func(string, ...any)) (string, error) {
	root := testRoot()
	key, err := root.key()
	if err != nil {
		return "", err
	}
	return cache.Once("testroot", key, cache.Unused, func(out string) error {
		progress("building the root of the tests' pods from Debian's packages (a minute the first time)")
		return root.write(ctx, out)
	})
}

// upstreamNames are the names under which the suite asks for each of the recipes. It has some in several versions; it
// gets ours for all of them.
func upstreamNames(ctx context.Context, suite string) (map[string][]string, error) {
	list, err := exec.CommandContext(ctx, suite, "--list-images").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list-images: %w", suite, err)
	}
	names := map[string][]string{}
	for _, image := range strings.Fields(string(list)) {
		name, _, _ := strings.Cut(image[strings.LastIndexByte(image, '/')+1:], ":")
		if name == "pause" || strings.Contains(image, upstreamFolder) {
			names[name] = append(names[name], image)
		}
	}
	for _, r := range recipes() {
		ours := "localhost/" + r.Name + ":e2e"
		if len(names[r.Name]) == 0 && ours != coreDNS {
			return nil, fmt.Errorf("%s --list-images names no %s: the recipe for it is out of date", suite, r.Name)
		}
		names[r.Name] = append(names[r.Name], ours)
		slices.Sort(names[r.Name])
	}
	return names, nil
}

// testsKey stands for all that the images are made from.
func testsKey(moduleDir, root string, names map[string][]string) (string, error) {
	sum, err := cache.GoSum(moduleDir, "GOVERSION", "GOARCH")
	if err != nil {
		return "", err
	}
	files := []string{
		filepath.Join(moduleDir, "go.sum"), filepath.Join(moduleDir, "coredns/go.sum"),
		filepath.Join(moduleDir, "coredns/main.go"), busybox,
	}
	for _, path := range files {
		if err := sum.AddFile(path); err != nil {
			return "", err
		}
	}
	if err := sum.AddJSON([]any{filepath.Base(root), recipes(), names}); err != nil {
		return "", err
	}
	return sum.Key(), nil
}

// busybox is the program of Debian's package busybox-static.
const busybox = "/bin/busybox"

// A kitchen makes layers as recipes ask for them.
type kitchen struct {
	moduleDir, dir string
	layers         map[string]string // paths by name
}

func (k kitchen) serve(ctx context.Context, out string, names map[string][]string) error {
	var pictures []picture
	for _, r := range recipes() {
		p := picture{Names: names[r.Name], Config: r.Config}
		for _, name := range r.Layers {
			layer, err := k.layer(ctx, name)
			if err != nil {
				return fmt.Errorf("layer %s of the tests' images: %w", name, err)
			}
			p.Layers = append(p.Layers, layer)
		}
		pictures = append(pictures, p)
	}
	return writeArchive(out, pictures)
}

// layer makes the layer of that name, once.
func (k kitchen) layer(ctx context.Context, name string) (string, error) {
	if path := k.layers[name]; path != "" {
		return path, nil
	}
	program := filepath.Join(k.dir, name)
	var entries []entry
	var err error
	switch name {
	case "agnhost":
		entries, err = k.agnhost(ctx, program)
	case "busybox":
		entries, err = busyboxEntries(ctx)
	case "pause":
		err = k.compilePause(ctx, program)
	case "coredns":
		err = goBuild(ctx, filepath.Join(k.moduleDir, "coredns"), ".", program)
	default:
		err = goBuild(ctx, k.moduleDir, "k8s.io/kubernetes/test/images/"+name, program)
	}
	if err != nil {
		return "", err
	}
	if entries == nil {
		entries = []entry{{Name: name, Mode: 0o755, Copy: program}}
	}
	k.layers[name] = program + ".tar"
	return k.layers[name], writeLayer(k.layers[name], entries)
}

func (k kitchen) agnhost(ctx context.Context, program string) ([]entry, error) {
	source := "k8s.io/kubernetes/test/images/agnhost"
	if err := goBuild(ctx, k.moduleDir, source, program); err != nil {
		return nil, err
	}
	dir, err := cache.Go(k.moduleDir, "list", "-f", "{{.Dir}}", source)
	if err != nil {
		return nil, err
	}
	return []entry{
		{Name: "agnhost", Mode: 0o755, Copy: program},
		{Name: "agnhost-2", Link: "agnhost"},
		{Name: "localhost.crt", Mode: 0o644, Copy: filepath.Join(dir, "porter/localhost.crt")},
		{Name: "localhost.key", Mode: 0o644, Copy: filepath.Join(dir, "porter/localhost.key")},
		{Name: "uploads", Mode: 0o777},
	}, nil
}

func busyboxEntries(ctx context.Context) ([]entry, error) {
	applets, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s of Debian's package busybox-static: %w", busybox, err)
	}
	entries := []entry{
		{Name: "bin", Mode: 0o755}, {Name: "bin/busybox", Mode: 0o755, Copy: busybox}, {Name: "tmp", Mode: 0o1777},
	}
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" {
			entries = append(entries, entry{Name: "bin/" + name, Link: "busybox"})
		}
	}
	return entries, nil
}

// compilePause follows Kubernetes' build/pause/Makefile.
func (k kitchen) compilePause(ctx context.Context, program string) error {
	dir, err := cache.Go(k.moduleDir, "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	source := filepath.Join(dir, "build/pause/linux/pause.c")
	cmd := exec.CommandContext(ctx, "gcc", "-Os", "-static", "-s", "-DVERSION=e2e", "-o", program, source)
	if err := run(cmd); err != nil {
		return fmt.Errorf("compiling %s with Debian's packages gcc and libc6-dev: %w", source, err)
	}
	return nil
}

func goBuild(ctx context.Context, dir, pkg, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "TMPDIR="+filepath.Dir(out))
	if err := run(cmd); err != nil {
		return fmt.Errorf("building %s in %s: %w", pkg, dir, err)
	}
	return nil
}

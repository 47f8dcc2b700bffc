package e2e

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"tweed.dev/tweed/e2e/build"
	"tweed.dev/tweed/e2e/image"
)

func TestImage(t *testing.T) {
	path := programs(t).Image
	files, config := unpackImage(t, path)

	t.Run("SaysWhatItIs", func(t *testing.T) {
		if !slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/tweed"}) {
			t.Errorf("entry point %q", config.Config.Entrypoint)
		}
		want := map[string]string{
			"org.opencontainers.image.title":       "tweed",
			"org.opencontainers.image.description": "A pod network for Kubernetes",
			"org.opencontainers.image.url":         "https://tweed.dev",
			"org.opencontainers.image.licenses":    "Apache-2.0",
			"org.opencontainers.image.version":     build.Version,
		}
		if !maps.Equal(config.Config.Labels, want) {
			t.Errorf("labels %v, want %v", config.Config.Labels, want)
		}
		if out := runInImage(t, files, "/usr/bin/tweed", "version"); !strings.HasPrefix(out, "tweed "+build.Version+" ") {
			t.Errorf("tweed version says %s", out)
		}
	})
	t.Run("HoldsWhatIsNeededAndNoMore", func(t *testing.T) { whatImageHolds(t, files) })
	t.Run("IptablesWorksInBothModes", func(t *testing.T) { iptablesOfImage(t, files) })
	t.Run("NftWorks", func(t *testing.T) { runInImage(t, files, "/usr/sbin/nft", "--json", "list", "ruleset") })
	t.Run("IsTheSameWhenBuiltElsewhere", func(t *testing.T) { imageBuiltElsewhere(t, path) })
	t.Run("ProgramsCompileForArm64", programsForArm64)
}

type imageConfig struct {
	Config struct {
		Entrypoint []string
		Labels     map[string]string
	} `json:"config"`
}

// unpackImage returns the directory of an image's files, as a container would see them.
func unpackImage(t *testing.T, path string) (files string, config imageConfig) {
	t.Helper()
	archive, files := t.TempDir(), t.TempDir()
	command(t, "tar", "-xf", path, "-C", archive)
	var images []struct {
		Config           string
		RepoTags, Layers []string
	}
	parse(t, filepath.Join(archive, "manifest.json"), &images)
	if len(images) != 1 || !slices.Equal(images[0].RepoTags, []string{image.Name + ":" + build.Version}) {
		t.Fatalf("%s holds %+v", path, images)
	}
	parse(t, filepath.Join(archive, images[0].Config), &config)
	for _, layer := range images[0].Layers {
		command(t, "tar", "-xf", filepath.Join(archive, layer), "-C", files)
	}
	return files, config
}

// whatImageHolds lists what may be in the image: no shell, no package manager, nothing that nobody calls.
func whatImageHolds(t *testing.T, files string) {
	expected := []*regexp.Regexp{}
	for _, pattern := range []string{
		`etc/protocols`, `lib`, `lib64`, `usr/bin/tweed`, `usr/lib/tweed/cni/(tweed-cni|bandwidth|loopback|portmap)`,
		`usr/sbin/nft`, `usr/sbin/xtables-(nft|legacy)-multi`, `usr/sbin/ip6?tables(|-nft|-legacy)(|-save|-restore)`,
		`usr/lib(64)?/([a-z0-9_-]+/)?ld-linux[a-z0-9_-]*\.so\.[0-9]+`,
		`usr/lib/[a-z0-9_-]+/lib(c|ip4tc|ip6tc|m|mnl|netfilter_conntrack|nfnetlink|nftnl|xtables)\.so\.[0-9]+`,
		`usr/lib/[a-z0-9_-]+/lib(bsd|edit|gmp|jansson|md|nftables|tinfo)\.so\.[0-9]+`, // nft's
		`usr/lib/[a-z0-9_-]+/xtables/lib(xt|ipt|ip6t)_\w+\.so`,
	} {
		expected = append(expected, regexp.MustCompile("^"+pattern+"$"))
	}
	seen := map[*regexp.Regexp]bool{}
	var total int64
	err := filepath.WalkDir(files, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		total += info.Size()
		if info.ModTime().Unix() != 0 {
			t.Errorf("%s is of %v", path, info.ModTime())
		}
		name := strings.TrimPrefix(path, files+"/")
		i := slices.IndexFunc(expected, func(p *regexp.Regexp) bool { return p.MatchString(name) })
		if i < 0 {
			t.Errorf("the image holds %s, which nothing needs", name)
			return nil
		}
		seen[expected[i]] = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range expected {
		if !seen[p] && p.String() != "^lib64$" { // not every architecture has it
			t.Errorf("the image lacks %s", p)
		}
	}
	t.Logf("the image's files: %.1f MB", float64(total)/1e6)
}

// iptablesOfImage has each iptables write rules like ours, with nothing to help but what the image holds.
func iptablesOfImage(t *testing.T, files string) {
	if err := os.MkdirAll(filepath.Join(files, "run"), 0o755); err != nil { // where the lock file is mounted
		t.Fatal(err)
	}
	rule := strings.Fields("-m comment --comment tweed -m mark ! --mark 0x4000/0x4000 -m addrtype ! --dst-type LOCAL " +
		"-p udp -m multiport --dports 8472 -j MASQUERADE --random-fully")
	for _, name := range []string{"iptables", "ip6tables"} {
		for suffix, mode := range map[string]string{"": "nf_tables", "-nft": "nf_tables", "-legacy": "legacy"} {
			program := "/usr/sbin/" + name + suffix
			if out := runInImage(t, files, program, "--version"); !strings.Contains(out, "("+mode+")") {
				t.Errorf("%s --version says %s, want %s", program, out, mode)
			}
			runInImage(t, files, append([]string{program, "-t", "nat", "-A", "POSTROUTING"}, rule...)...)
		}
	}
}

// runInImage runs a program of the image where there is nothing but the image, and in a new network namespace.
func runInImage(t *testing.T, files string, argv ...string) string {
	t.Helper()
	cmd := &exec.Cmd{
		Path: argv[0], Args: argv, Dir: "/", Env: []string{},
		SysProcAttr: &syscall.SysProcAttr{Chroot: files, Cloneflags: syscall.CLONE_NEWNET},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s in the image: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// imageBuiltElsewhere builds the image from a copy of the source, at another path and with other times.
func imageBuiltElsewhere(t *testing.T, path string) {
	source, out := filepath.Join(t.TempDir(), "copy"), filepath.Join(t.TempDir(), "image.tar")
	if err := os.Mkdir(source, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"Dockerfile", ".dockerignore", "go.mod", "go.sum", "backend", "cmd", "overlay", "subnet",
	} {
		command(t, "cp", "-r", filepath.Join("..", name), source)
	}
	if err := image.BuildAgain(t.Context(), source, build.Version, out); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Errorf("the same source, copied elsewhere, gave another image than %s", path)
	}
}

// programsForArm64 builds what the Dockerfile builds, as for an image of the other architecture.
func programsForArm64(t *testing.T) {
	out := t.TempDir() + "/"
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out,
		"./cmd/tweed", "./cmd/tweed-cni", "tool")
	cmd.Dir, cmd.Env = "..", append(os.Environ(), "CGO_ENABLED=0", "GOARCH=arm64")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	for _, name := range []string{"tweed", "tweed-cni", "bandwidth", "loopback", "portmap"} {
		f, err := elf.Open(out + name)
		if err != nil {
			t.Error(err)
			continue
		}
		if f.Machine != elf.EM_AARCH64 {
			t.Errorf("%s is for %v", name, f.Machine)
		}
		f.Close()
	}
}

func command(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
}

func parse(t *testing.T, path string, into any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

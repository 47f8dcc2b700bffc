package overlay

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// followed is a net-conf.json that is followed until the test ends, in a directory of its own.
func followed(t *testing.T, dir string) (rang chan struct{}, log *bytes.Buffer) {
	t.Helper()
	rang, log = make(chan struct{}, 100), &bytes.Buffer{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- follow(ctx, filepath.Join(dir, "net-conf.json"), func() { rang <- struct{}{} },
			slog.New(slog.NewTextHandler(log, nil)))
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("following ends with %v", err)
		}
	})
	return rang, log
}

func awaitRing(t *testing.T, rang chan struct{}, why string) {
	t.Helper()
	select {
	case <-rang:
	case <-time.After(5 * time.Second):
		t.Fatalf("no ring for %s", why)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// configMap writes the files of a ConfigMap's volume as the kubelet does: in a new directory, to which a link is then
// swapped.
func configMap(t *testing.T, dir, version, text string) {
	t.Helper()
	must(t, os.Mkdir(filepath.Join(dir, version), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, version, "net-conf.json"), []byte(text), 0o600))
	must(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
	must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
}

func TestNetConfChangesAndNoBellRings(t *testing.T) {
	write := func(name, text string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
		}
	}
	for name, c := range map[string]struct {
		before, change func(t *testing.T, dir string)
	}{
		"in place": {write("net-conf.json", "1"), write("net-conf.json", "2")},
		"another in its place": {write("net-conf.json", "1"), func(t *testing.T, dir string) {
			write(".swp", "2")(t, dir)
			must(t, os.Rename(filepath.Join(dir, ".swp"), filepath.Join(dir, "net-conf.json")))
		}},
		"gone": {write("net-conf.json", "1"), func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "net-conf.json")))
		}},
		"there at last": {func(*testing.T, string) {}, write("net-conf.json", "")},
		"a ConfigMap": {func(t *testing.T, dir string) {
			configMap(t, dir, "..1", "1")
			must(t, os.Symlink("..data/net-conf.json", filepath.Join(dir, "net-conf.json")))
		}, func(t *testing.T, dir string) { configMap(t, dir, "..2", "2") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c.before(t, dir)
			rang, _ := followed(t, dir)
			awaitRing(t, rang, "the start")
			write("other", "whatever")(t, dir)
			time.Sleep(3 * writing) // it has been looked at: nothing says so
			if len(rang) > 0 {
				t.Error("it rings for another file")
			}
			c.change(t, dir)
			awaitRing(t, rang, "the change")
		})
	}
}

// A directory that goes, or is replaced as a whole, is watched again once it is there.
func TestDirectoryOfNetConfGoes(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "tweed")
	must(t, os.Mkdir(dir, 0o755))
	rang, log := followed(t, dir)
	awaitRing(t, rang, "the start")
	must(t, os.Remove(dir))
	must(t, os.Mkdir(dir, 0o755))
	awaitRing(t, rang, "the new directory")
	must(t, os.WriteFile(filepath.Join(dir, "net-conf.json"), nil, 0o600))
	awaitRing(t, rang, "the file in it")
	if got := strings.Count(log.String(), "found by looking"); got != 1 {
		t.Errorf("told %d times:\n%s", got, log)
	}
}

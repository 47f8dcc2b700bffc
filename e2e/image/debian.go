package image

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"strings"

	"tweed.dev/tweed/e2e/cache"
)

//go:embed debian.sh
var debianScript string

// debian is a root file system of packages from the machine's own sources.
type debian struct {
	Variant  string // mmdebstrap(1)
	Packages []string
	Without  []string // patterns of what nothing in it needs, relative to its root
}

func (d debian) key(more ...any) (string, error) {
	sources, err := aptSources()
	if err != nil {
		return "", err
	}
	sum := cache.NewSum()
	fmt.Fprintln(sum, debianScript)
	if err := sum.AddJSON(append(more, d)); err != nil {
		return "", err
	}
	if err := sum.AddFile(sources); err != nil {
		return "", err
	}
	return sum.Key(), nil
}

func (d debian) write(ctx context.Context, out string) error {
	sources, err := aptSources()
	if err != nil {
		return err
	}
	suite, err := suite()
	if err != nil {
		return err
	}
	return isolated(ctx, debianScript, "mmdebstrap", out, "SUITE="+suite, "SOURCES="+sources, "VARIANT="+d.Variant,
		"PACKAGES="+strings.Join(d.Packages, ","), "WITHOUT="+strings.Join(d.Without, " "))
}

// aptSources is the file that names the distribution's own packages, among others that this machine may have besides.
func aptSources() (string, error) {
	candidates := []string{
		"/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list.d/ubuntu.sources", "/etc/apt/sources.list",
	}
	for _, path := range candidates {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("none of %s is here: images of the tests are made on Debian, from its packages",
		strings.Join(candidates, ", "))
}

func suite() (string, error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(release)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return name, nil
		}
	}
	return "", errors.New("/etc/os-release has no VERSION_CODENAME")
}

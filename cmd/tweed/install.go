package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Where the image keeps the plugins, and where container runtimes look for them on most nodes.
const (
	imagePlugins = "/usr/lib/tweed/cni"
	hostPlugins  = "/opt/cni/bin"
	// defaultConfDir is where they look for what to call.
	defaultConfDir = "/etc/cni/net.d"
)

// ourPlugin is replaced by each version of tweed.
const ourPlugin = "tweed-cni"

// upstreamPlugins belong to whoever installed them: they are put only where there are none.
var upstreamPlugins = []string{"portmap", "bandwidth", "loopback"}

func installCommand() *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugins where the container runtime finds them",
		Long: `Put the CNI plugins where the container runtime finds them. tweed-cni is replaced at once, so that
a pod that is just being attached meets the old one or the new one, and none in between. portmap,
bandwidth and loopback are left alone where they are there already.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i := installer{from: from, to: to, say: func(name, what string) {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", filepath.Join(to, name), what)
			}}
			return i.run()
		},
	}
	cmd.Flags().StringVar(&from, "from", imagePlugins, "directory that holds the plugins; the image's")
	cmd.Flags().StringVar(&to, "to", hostPlugins, "directory in which the container runtime looks for plugins")
	return cmd
}

type installer struct {
	from, to string
	say      func(name, what string)
}

func (i installer) run() error {
	if err := os.MkdirAll(i.to, 0o755); err != nil {
		return explainInstall(err)
	}
	if err := i.ours(); err != nil {
		return explainInstall(err)
	}
	for _, name := range upstreamPlugins {
		if err := i.upstream(name); err != nil {
			return explainInstall(err)
		}
	}
	return nil
}

func (i installer) ours() error {
	text, err := i.read(ourPlugin)
	if err != nil {
		return err
	}
	to := filepath.Join(i.to, ourPlugin)
	have, err := os.ReadFile(to)
	if err == nil && bytes.Equal(have, text) && isExecutable(to) {
		i.say(ourPlugin, "is this version already")
		return nil
	}
	what := "replaced"
	if errors.Is(err, fs.ErrNotExist) {
		what = "installed"
	}
	if err := i.put(ourPlugin, text, os.Rename); err != nil {
		return err
	}
	i.say(ourPlugin, what)
	return nil
}

func (i installer) upstream(name string) error {
	if _, err := os.Lstat(filepath.Join(i.to, name)); err == nil {
		i.say(name, "is there, left alone")
		return nil
	}
	text, err := i.read(name)
	if err != nil {
		return err
	}
	err = i.put(name, text, os.Link) // which does not replace what somebody else has put there meanwhile
	if errors.Is(err, fs.ErrExist) {
		i.say(name, "is there, left alone")
		return nil
	}
	if err == nil {
		i.say(name, "installed")
	}
	return err
}

func (i installer) read(name string) ([]byte, error) {
	path := filepath.Join(i.from, name)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w; --from names the directory that holds the plugins", err)
	}
	if len(text) == 0 {
		return nil, fmt.Errorf("%s is empty; the image is damaged", path)
	}
	return text, nil
}

// put writes a plugin beside its place, and has move bring it there.
func (i installer) put(name string, text []byte, move func(from, to string) error) error {
	f, err := os.CreateTemp(i.to, "."+name+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(text); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(0o755), f.Sync(), f.Close()); err != nil {
		return err
	}
	return move(f.Name(), filepath.Join(i.to, name))
}

func isExecutable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().Perm() == 0o755
}

// explainInstall says what to do about an error, which names its path.
func explainInstall(err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.EROFS):
		hint = "; the file system is read-only: have the container runtime look for plugins in a directory that can be " +
			"written (bin_dir of containerd, plugin_dirs of CRI-O), and mount that one here"
	case errors.Is(err, fs.ErrPermission):
		hint = "; it has to be run as root, with a security context that lets it write to the host's directory"
	case errors.Is(err, unix.ENOSPC):
		hint = "; the file system is full: make room"
	case errors.Is(err, unix.ENOTDIR):
		hint = "; --to names a directory"
	}
	return fmt.Errorf("installing CNI plugins: %w%s", err, hint)
}

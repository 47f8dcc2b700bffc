package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// flagsFile gives flags their defaults on this node, so that commands need none there: a line "name = value" each.
const flagsFile = "/etc/tweed/flags"

// either lists the flags that say where leases come from, and those that choose the uplink. One of them on the command
// line overrules all of its kind in the file.
var either = [][]string{{"kubeconfig", "leases", "single-node"}, {"iface", "iface-regex", "iface-can-reach"}}

// flagDefaults sets those flags of cmd that the file names and the command line does not.
func flagDefaults(cmd *cobra.Command, path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the defaults of flags: %w", err)
	}
	defer f.Close()

	given := func(name string) bool { fl := cmd.Flags().Lookup(name); return fl != nil && fl.Changed }
	overruled := map[string]bool{}
	for _, kind := range either {
		for _, name := range kind {
			overruled[name] = slices.ContainsFunc(kind, given)
		}
	}
	scan := bufio.NewScanner(f)
	for n := 1; scan.Scan(); n++ {
		line := strings.TrimSpace(scan.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok || !known(cmd.Root(), name) {
			return fmt.Errorf("%s:%d: %q is not `name = value` with the name of a flag of tweed; see tweed run --help",
				path, n, line)
		}
		if cmd.Flags().Lookup(name) == nil || given(name) || overruled[name] {
			continue
		}
		if err := cmd.Flags().Set(name, value); err != nil {
			return fmt.Errorf("%s:%d: %w", path, n, err)
		}
	}
	return scan.Err()
}

// known reports whether any command has the flag.
func known(cmd *cobra.Command, name string) bool {
	found := false
	cmd.Flags().VisitAll(func(f *pflag.Flag) { found = found || f.Name == name })
	return found || slices.ContainsFunc(cmd.Commands(), func(c *cobra.Command) bool { return known(c, name) })
}

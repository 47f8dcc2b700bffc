// Command manifests writes what is made from base: tweed.yaml for kubectl apply, and the template of the Helm chart. It
// is a module of its own, so that neither kustomize nor Helm becomes a dependency of the daemon.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := write("."); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

// write puts the files that are made from dir/base in their places in dir.
func write(dir string) error {
	files, err := generate(dir)
	if err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// generate returns the files that are made from dir/base, by their names in dir.
func generate(dir string) (map[string]string, error) {
	objects, err := build(filepath.Join(dir, "base"))
	if err != nil {
		return nil, err
	}
	manifest, err := manifestOf(objects)
	if err != nil {
		return nil, err
	}
	template, err := templateOf(objects) // last: it makes holes in the objects
	if err != nil {
		return nil, err
	}
	return map[string]string{"tweed.yaml": manifest, "chart/templates/tweed.yaml": template}, nil
}

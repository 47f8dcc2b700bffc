// Command manifests writes what is made from base: tweed.yaml for kubectl apply, and the template of the Helm chart;
// and cleanup.yaml, which takes tweed off all nodes, from cleanup. It is a module of its own, so that neither kustomize
// nor Helm becomes a dependency of the daemon.
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

// write puts the files that generate makes in their places in dir.
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

// generate returns the files that are made from dir/base and dir/cleanup, by their names in dir.
func generate(dir string) (map[string]string, error) {
	objects, err := build(filepath.Join(dir, "base"))
	if err != nil {
		return nil, err
	}
	manifest, err := manifestOf(manifestHeader, objects)
	if err != nil {
		return nil, err
	}
	leaving, err := build(filepath.Join(dir, "cleanup"))
	if err != nil {
		return nil, err
	}
	cleanup, err := manifestOf(cleanupHeader, leaving)
	if err != nil {
		return nil, err
	}
	template, err := templateOf(objects) // last: it makes holes in the objects
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"tweed.yaml": manifest, "cleanup.yaml": cleanup, "chart/templates/tweed.yaml": template,
	}, nil
}

package main

import (
	"fmt"
	"strings"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	kyaml "sigs.k8s.io/kustomize/kyaml/yaml"
)

const manifestHeader = `# tweed, for "kubectl apply -f". Made from manifests/base by "make manifests": change it there.
# docs/install.md says what a cluster needs, and how to go on.
`

const cleanupHeader = `# Takes what tweed has left off every node, when tweed.yaml is deleted and the nodes are drained: docs/install.md,
# "Uninstalling". Made from manifests/cleanup by "make manifests": change it there.
`

// build runs kustomize on a directory. Objects come in the order of its list of resources, with the comments of their
// files.
func build(dir string) ([]*kyaml.RNode, error) {
	objects, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, fmt.Errorf("building %s: %w", dir, err)
	}
	return objects.ToRNodeSlice(), nil
}

func manifestOf(header string, objects []*kyaml.RNode) (string, error) {
	text, err := textOf(objects)
	return header + text, err
}

func textOf(objects []*kyaml.RNode) (string, error) {
	var b strings.Builder
	for _, o := range objects {
		keepLines(o.YNode())
		text, err := o.String()
		if err != nil {
			return "", fmt.Errorf("writing %s %s: %w", o.GetKind(), o.GetName(), err)
		}
		b.WriteString("---\n" + text)
	}
	return b.String(), nil
}

// keepLines writes folded text with lines of its own as it is: written folded, it would be read with further lines.
func keepLines(n *kyaml.Node) {
	if n.Style == kyaml.FoldedStyle && strings.Contains(n.Value, "\n") {
		n.Style = kyaml.LiteralStyle
	}
	for _, child := range n.Content {
		keepLines(child)
	}
}

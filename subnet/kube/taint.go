package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// StartupTaint keeps pods off a Node from its registration until its network is up; whoever registers Nodes may set it,
// with any effect (kubelet --register-with-taints).
const StartupTaint = prefix + "not-ready"

func startupTaints(n *corev1.Node) (places []int) {
	for i, t := range n.Spec.Taints {
		if t.Key == StartupTaint {
			places = append(places, i)
		}
	}
	return places
}

// Admit takes the startup taint off the Node, in one PATCH and only if it is there. A Node that does not exist has none.
func (s *Source) Admit(ctx context.Context) error {
	if v, err := s.self.current(); err != nil || len(v.startup) == 0 {
		return nil
	}
	return s.write(ctx, "remove the taint "+StartupTaint+" from", "nodes", s.untaint)
}

// untaint removes the taint by its places: a patch that carried the other taints would lose what this version of the API
// does not know of them.
func (s *Source) untaint(ctx context.Context, v version) (version, error) {
	if len(v.startup) == 0 {
		return v, nil
	}
	type op struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value,omitempty"`
	}
	ops := []op{{"test", "/metadata/uid", v.uid}, {"test", "/metadata/resourceVersion", v.resource}}
	for _, i := range slices.Backward(v.startup) { // from the end, so that places stay right
		path := fmt.Sprintf("/spec/taints/%d", i)
		ops = append(ops, op{"test", path + "/key", StartupTaint}, op{Op: "remove", Path: path})
	}
	body, err := json.Marshal(ops)
	if err != nil {
		return v, err
	}
	n := &corev1.Node{}
	err = s.core.Patch(types.JSONPatchType).Resource("nodes").Name(s.node).
		VersionedParams(s.patchOptions(), s.params).Body(body).Do(ctx).Into(n)
	if err != nil {
		return v, err
	}
	s.log.Info("startup taint removed", "node", s.node, "taint", StartupTaint)
	return versionOf(n), nil
}

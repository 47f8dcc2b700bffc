package kube

import (
	"context"
	"encoding/json"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// daemons lists the annotations that daemons write. All others are an operator's.
var daemons = [...]string{Subnets, Host, Backend, BackendData, Network, Claim}

// withdrawals is how often Withdraw reads a Node that others keep changing.
const withdrawals = 5

// Published asks the API server once which of the daemon's annotations a Node has. A Node that does not exist has none.
func Published(ctx context.Context, cfg *rest.Config, node string) ([]string, error) {
	s, err := New(cfg, Options{Node: node, ReadOnly: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.quiet(ctx), s.patience)
	defer cancel()
	v, err := s.read(ctx)
	return v.published(), err
}

// Withdraw takes the daemon's annotations away from a Node, in one PATCH that names the uid and resourceVersion it was
// made for, and none where there is nothing to take away. Annotations of operators stay, and the condition
// NetworkUnavailable. The daemon must have ended, or it would write them again.
func Withdraw(ctx context.Context, cfg *rest.Config, node string) error {
	s, err := New(cfg, Options{Node: node, ReadOnly: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.quiet(ctx), s.patience)
	defer cancel()
	for range withdrawals {
		var v version
		if v, err = s.read(ctx); err != nil || len(v.published()) == 0 {
			return err
		}
		if err = s.withdraw(ctx, v); !isStale(err) && !apierrors.IsNotFound(err) {
			break
		}
	}
	if err != nil {
		return s.explainWrite("withdraw what is published of", "nodes", err)
	}
	return nil
}

// withdraw takes away what the Node publishes at version v.
func (s *Source) withdraw(ctx context.Context, v version) error {
	gone := map[string]any{}
	for _, key := range v.published() {
		gone[key] = nil
	}
	metadata := v.precondition()
	metadata["annotations"] = gone
	body, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return err
	}
	_, err = s.meta.Patch(ctx, s.node, types.MergePatchType, body, *s.patchOptions())
	return err
}

// read asks for the Node; the version is the zero one where there is none.
func (s *Source) read(ctx context.Context) (version, error) {
	n := &corev1.Node{}
	err := s.core.Get().Resource("nodes").Name(s.node).Do(ctx).Into(n)
	if apierrors.IsNotFound(err) {
		return version{}, nil
	}
	if err != nil {
		return version{}, explain("get", "nodes", s.server, err)
	}
	return versionOf(n), nil
}

// published lists the daemon's annotations that are there.
func (v version) published() (keys []string) {
	for _, key := range daemons {
		if _, there := v.annotations[key]; there {
			keys = append(keys, key)
		}
	}
	return keys
}

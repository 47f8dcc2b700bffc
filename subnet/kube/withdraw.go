package kube

import (
	"context"
	"log/slog"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
)

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
	v, err := s.latest(ctx)
	return v.daemons(), err
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
		if v, err = s.latest(ctx); err != nil || len(v.daemons()) == 0 {
			return err
		}
		gone := map[string]any{}
		for _, key := range v.daemons() {
			gone[key] = nil
		}
		if _, err = s.patchAnnotations(ctx, v, gone); !isStale(err) && !apierrors.IsNotFound(err) {
			break
		}
	}
	if err != nil {
		return s.explainWrite("withdraw what is published of", "nodes", err)
	}
	return nil
}

// latest is the Node's version as the server has it; the zero one where there is no Node.
func (s *Source) latest(ctx context.Context) (version, error) {
	n, err := s.read(ctx)
	switch {
	case apierrors.IsNotFound(err):
		return version{}, nil
	case err != nil:
		return version{}, explain("get", "nodes", s.server, err)
	}
	return versionOf(n), nil
}

// daemons lists the daemon's annotations that are there.
func (v version) daemons() (keys []string) {
	for _, key := range append(lasting(), Claim) {
		if _, there := v.annotations[key]; there {
			keys = append(keys, key)
		}
	}
	return keys
}

package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tweed.dev/tweed/subnet"
)

const publishTimeout = 10 * time.Second

// Publish writes this node's leases to its Node, in one PATCH and only if something differs from what is there; with no
// leases it takes them away. Annotations that are not the daemon's stay as they are.
func (s *Source) Publish(ctx context.Context, leases []subnet.Lease) error {
	for _, l := range leases {
		if !l.Host.IsValid() {
			return fmt.Errorf("cannot publish %s of node %s: it has no address for the tunnel yet", l.Subnet, s.node)
		}
	}
	have, err := s.self.current()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.quiet(ctx), publishTimeout)
	defer cancel()
	want := Format(leases)
	err = s.patch(ctx, have, want)
	if !isStale(err) {
		return s.explainPublish(err)
	}
	n := &corev1.Node{}
	if err := s.core.Get().Resource("nodes").Name(s.node).Do(ctx).Into(n); err != nil {
		return s.explainPublish(err)
	}
	return s.explainPublish(s.patch(ctx, versionOf(&n.ObjectMeta), want))
}

// isStale reports whether the object that a PATCH was made for is not the one that the server has: 409 for an older
// version of it, 422 for another one of its name, since a uid cannot be changed.
func isStale(err error) bool { return apierrors.IsConflict(err) || apierrors.IsInvalid(err) }

// patch writes want to the Node at version v, unless it is there already.
func (s *Source) patch(ctx context.Context, v version, want map[string]string) error {
	diff := difference(v.annotations, want)
	if len(diff) == 0 {
		return nil
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": v.uid, "resourceVersion": v.resource, "annotations": diff,
	}})
	if err != nil {
		return err
	}
	m, err := s.meta.Patch(ctx, s.node, types.MergePatchType, body, metav1.PatchOptions{FieldManager: "tweed"})
	if err != nil {
		return err
	}
	s.self.wrote(versionOf(&m.ObjectMeta))
	return nil
}

// difference is the part of a JSON merge patch (RFC 7396) that makes want of have: nil takes an annotation away.
func difference(have, want map[string]string) map[string]any {
	diff := map[string]any{}
	for _, key := range []string{Subnets, Host, Backend, BackendData} {
		now, is := have[key]
		then, shall := want[key]
		switch {
		case is && !shall:
			diff[key] = nil
		case shall && (!is || now != then):
			diff[key] = then
		}
	}
	return diff
}

func (s *Source) explainPublish(err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return s.missing()
	case apierrors.IsConflict(err):
		return fmt.Errorf("cannot publish the lease of node %s: others keep changing the Node; "+
			"it is tried again with the next pass: %w", s.node, err)
	case apierrors.IsInvalid(err):
		return fmt.Errorf("cannot publish the lease of node %s: the API server at %s refuses it, "+
			"perhaps by an admission policy: %w", s.node, s.server, err)
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("no answer in %v", publishTimeout)
	}
	return fmt.Errorf("cannot publish the lease of node %s: %w", s.node, explain("patch", s.server, err))
}

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
)

// manager is how the API server records whose a field is.
const manager = "tweed"

// writeTimeout bounds one write with all that belongs to it. A server that takes half a minute for an answer is slow, not
// away: with less patience no write to it would ever be known to be done.
const writeTimeout = 45 * time.Second

// A change makes one PATCH of a Node at that version, unless it is as wanted already, and returns the version after it.
type change func(context.Context, version) (version, error)

// write changes this node's Node as change says, and once more where the Node was not any more what it was made for.
// what says what is done, for people; resource is that of RBAC.
func (s *Source) write(ctx context.Context, what, resource string, change change) error {
	have, err := s.self.current()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.quiet(ctx), s.patience)
	defer cancel()
	after, err := change(ctx, have)
	if isStale(err) {
		var n *corev1.Node
		if n, err = s.read(ctx); err == nil {
			have, _ = s.self.current() // another write may have been answered meanwhile
			after, err = change(ctx, versionOf(n))
		}
	}
	if err != nil {
		return s.explainWrite(what, resource, err)
	}
	s.self.wrote(have, after)
	return nil
}

// isStale reports whether the object that a PATCH was made for is not the one that the server has: 409 for an older
// version of it, 422 for another one of its name, since a uid cannot be changed, or for a test in it that fails.
func isStale(err error) bool { return apierrors.IsConflict(err) || apierrors.IsInvalid(err) }

func (s *Source) explainWrite(what, resource string, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return s.missing()
	case apierrors.IsConflict(err):
		return fmt.Errorf("cannot %s node %s: others keep changing the Node; it is tried again with the next pass: %w",
			what, s.node, err)
	case apierrors.IsInvalid(err):
		return fmt.Errorf("cannot %s node %s: the API server at %s refuses it, perhaps by an admission policy: %w",
			what, s.node, s.server, err)
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("no answer in %v", s.patience)
	}
	return fmt.Errorf("cannot %s node %s: %w", what, s.node, explain("patch", resource, s.server, err))
}

// read asks the server for this node's Node as it is now.
func (s *Source) read(ctx context.Context) (*corev1.Node, error) {
	n := &corev1.Node{}
	return n, s.core.Get().Resource("nodes").Name(s.node).Do(ctx).Into(n)
}

// patchAnnotations changes some annotations of this node's Node, if it is at version v; nil takes one away.
func (s *Source) patchAnnotations(
	ctx context.Context, v version, changes map[string]any,
) (*metav1.PartialObjectMetadata, error) {
	metadata := v.precondition()
	metadata["annotations"] = changes
	body, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return nil, err
	}
	return s.meta.Patch(ctx, s.node, types.MergePatchType, body, *s.patchOptions())
}

// precondition names the very object, and the version of it, that a PATCH is made for.
func (v version) precondition() map[string]any {
	return map[string]any{"uid": v.uid, "resourceVersion": v.resource}
}

func (s *Source) patchOptions() *metav1.PatchOptions {
	return &metav1.PatchOptions{FieldManager: manager}
}

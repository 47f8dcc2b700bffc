package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
)

// Limits of an Event, in bytes. The first is what the API server demands of newer ones, the second leaves room in a name
// of 253.
const (
	mostNote = 1024
	mostName = 230
)

// Tell writes a warning about this node's Node. The same text is the same Event: told again, only its time moves. It does
// nothing while the Node does not exist.
func (s *Source) Tell(ctx context.Context, reason, message string) error {
	if _, err := s.self.current(); err != nil {
		return nil
	}
	return tell(s.quiet(ctx), s.core, s.params, s.server, newEvent(s.node, reason, message))
}

// TellOnce is Source.Tell for a daemon that cannot run, and has not looked whether there is such a Node.
func TellOnce(ctx context.Context, cfg *rest.Config, node, reason, message string) error {
	cfg, err := reach(cfg)
	if err != nil {
		return err
	}
	core, params, err := nodeClient(cfg)
	if err != nil {
		return err
	}
	return tell(klog.NewContext(ctx, logr.Discard()), core, params, cfg.Host, newEvent(node, reason, message))
}

func tell(
	ctx context.Context, core *rest.RESTClient, params runtime.ParameterCodec, server string, e *corev1.Event,
) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	err := core.Post().Resource("events").Namespace(e.Namespace).
		VersionedParams(&metav1.CreateOptions{FieldManager: manager}, params).Body(e).Do(ctx).Error()
	if apierrors.IsAlreadyExists(err) {
		return again(ctx, core, params, server, e)
	}
	if err != nil {
		return explain("create", "events", server, err)
	}
	return nil
}

func again(
	ctx context.Context, core *rest.RESTClient, params runtime.ParameterCodec, server string, e *corev1.Event,
) error {
	body, err := json.Marshal(map[string]any{"lastTimestamp": e.LastTimestamp})
	if err != nil {
		return err
	}
	err = core.Patch(types.MergePatchType).Resource("events").Namespace(e.Namespace).Name(e.Name).
		VersionedParams(&metav1.PatchOptions{FieldManager: manager}, params).Body(body).Do(ctx).Error()
	if err != nil {
		return explain("patch", "events", server, err)
	}
	return nil
}

// newEvent makes an Event in the form that kubelets use for Nodes: namespace default, and the Node's name for its uid,
// which `kubectl describe node` looks for beside the true one.
func newEvent(node, reason, message string) *corev1.Event {
	message = cut(message, mostNote)
	sum := sha256.Sum256([]byte(reason + "\n" + message))
	now := metav1.Now()
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      fmt.Sprintf("%s.%x", strings.TrimRight(cut(node, mostName), ".-"), sum[:8]),
			Namespace: metav1.NamespaceDefault,
		},
		InvolvedObject:      corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: node, UID: types.UID(node)},
		Reason:              reason,
		Message:             message,
		Source:              corev1.EventSource{Component: manager, Host: node},
		FirstTimestamp:      now,
		LastTimestamp:       now,
		Count:               1,
		Type:                corev1.EventTypeWarning,
		ReportingController: manager,
		ReportingInstance:   node,
	}
}

// cut shortens a text to so many bytes, between characters.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "")
}

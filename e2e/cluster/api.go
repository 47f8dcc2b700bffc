package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// account is the namespace and the name of the daemon's service account.
const account = "tweed"

// base holds what the manifest is made from.
const base = "../manifests/base/"

// prepareAPI applies what the manifest says of the daemons' identity, and waits until the API server goes by it.
func (c *Cluster) prepareAPI(t testing.TB) {
	t.Helper()
	// Just after its start, the API server may refuse what its own informers have not seen.
	Await(t, "the daemons' identity to be applied", func() error {
		_, err := c.TryKubectl("apply", "-f", base+"namespace.yaml", "-f", base+"identity.yaml", "-f", base+"policy.yaml")
		return err
	})
	nobody := c.AsUser(t, "tweed:node:nobody", "system:masters")
	Await(t, "the policy tweed-own-node to be in force", func() error {
		_, err := nobody.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "nobody"}},
			metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil {
			return errors.New("nobody's daemon may create a Node")
		}
		if !strings.Contains(err.Error(), "tweed-own-node") {
			return err
		}
		return nil
	})
}

// CreateNode registers a Node as a kubelet and a controller manager would. It has no machine.
func (c *Cluster) CreateNode(t testing.TB, name string, addrs []netip.Addr, podCIDRs []string,
	annotations map[string]string) {
	t.Helper()
	if err := c.createNode(t.Context(), name, addrs, podCIDRs, annotations); err != nil {
		t.Fatalf("creating Node %s: %v", name, err)
	}
}

func (c *Cluster) createNode(ctx context.Context, name string, addrs []netip.Addr, podCIDRs []string,
	annotations map[string]string) error {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}
	if len(podCIDRs) > 0 {
		node.Spec.PodCIDR, node.Spec.PodCIDRs = podCIDRs[0], podCIDRs
	}
	for _, a := range addrs {
		node.Status.Addresses = append(node.Status.Addresses,
			corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	_, err := c.API.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	return err
}

// DeleteNode deletes a Node object.
func (c *Cluster) DeleteNode(t testing.TB, name string) {
	t.Helper()
	if err := c.API.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatalf("deleting Node %s: %v", name, err)
	}
}

// PatchNode applies a JSON merge patch to a Node object.
func (c *Cluster) PatchNode(t testing.TB, name, patch string) {
	t.Helper()
	_, err := c.API.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil {
		t.Fatalf("patching Node %s with %s: %v", name, patch, err)
	}
}

// Annotations returns a Node's annotations.
func (c *Cluster) Annotations(t testing.TB, name string) map[string]string {
	t.Helper()
	node, err := c.API.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("reading Node %s: %v", name, err)
	}
	return node.Annotations
}

// daemonToken makes the daemon's Pod on a node and a token that is good for as long as that Pod exists.
func (c *Cluster) daemonToken(t testing.TB, node string) string {
	t.Helper()
	ctx := t.Context()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "tweed-" + node, Namespace: account},
		Spec: corev1.PodSpec{
			ServiceAccountName: account, NodeName: node, HostNetwork: true,
			Containers: []corev1.Container{{Name: "tweed", Image: "tweed"}},
		},
	}
	Await(t, "the daemon's Pod on "+node, func() (err error) {
		created, err := c.API.CoreV1().Pods(account).Create(ctx, pod, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			created, err = c.API.CoreV1().Pods(account).Get(ctx, pod.Name, metav1.GetOptions{})
		}
		if err == nil {
			pod.UID = created.UID
		}
		return err
	})
	return c.token(t, &authv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID})
}

// token is one of the daemon's service account, good for as long as the object that it is bound to exists, if any.
func (c *Cluster) token(t testing.TB, bound *authv1.BoundObjectReference) string {
	t.Helper()
	hour := int64(3600)
	token, err := c.API.CoreV1().ServiceAccounts(account).CreateToken(t.Context(), account, &authv1.TokenRequest{
		Spec: authv1.TokenRequestSpec{ExpirationSeconds: &hour, BoundObjectRef: bound},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("a token of the service account %s: %v", account, err)
	}
	return token.Status.Token
}

// forget removes what the API holds about a node, if it still holds it.
func (c *Cluster) forget(node string) error {
	ctx, now := context.Background(), int64(0)
	err := c.API.CoreV1().Pods(account).Delete(ctx, "tweed-"+node, metav1.DeleteOptions{GracePeriodSeconds: &now})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting the daemon's Pod on %s: %w", node, err)
	}
	err = c.API.CoreV1().Nodes().Delete(ctx, node, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting Node %s: %w", node, err)
	}
	return nil
}

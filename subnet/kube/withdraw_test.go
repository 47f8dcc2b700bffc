package kube_test

import (
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"tweed.dev/tweed/subnet/kube"
)

// leaving is a Node with all that a daemon and an operator can have written on it.
func leaving(a *apiServer) {
	populate(a)
	a.put("n1", func(n *corev1.Node) {
		n.Annotations[kube.Network], n.Annotations[kube.Claim] = "10.244.0.0/16", "10.244.9.0/24 abc"
		n.Annotations[kube.HostOverride], n.Annotations[kube.Sources] = "203.0.113.7", "192.0.2.99"
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse}}
	})
}

func TestWithdrawalTakesTooMuchOrTooLittle(t *testing.T) {
	a := newAPIServer(t)
	leaving(a)
	published, err := kube.Published(t.Context(), a.config(), "n1")
	want := []string{kube.Subnets, kube.Host, kube.Backend, kube.BackendData, kube.Network, kube.Claim}
	if err != nil || !slices.Equal(published, want) {
		t.Errorf("published: %v, %v", published, err)
	}
	if n := a.writes(); n != 0 {
		t.Errorf("%d writes by looking: %v", n, a.patched())
	}
	for range 2 {
		if err := kube.Withdraw(t.Context(), a.config(), "n1"); err != nil {
			t.Fatal(err)
		}
	}
	kept := []string{"example.com/other", kube.HostOverride, kube.Sources}
	if left := slices.Sorted(maps.Keys(a.annotations("n1"))); !slices.Equal(left, kept) {
		t.Errorf("left: %v, want %v", left, kept)
	}
	if n := a.writes(); n != 1 {
		t.Errorf("%d writes: %v", n, a.patched())
	}
	if published, err = kube.Published(t.Context(), a.config(), "n1"); err != nil || len(published) > 0 {
		t.Errorf("published afterwards: %v, %v", published, err)
	}
	if others := a.annotations("n2"); others[kube.Subnets] == "" {
		t.Errorf("n2 has %v", others)
	}
}

func TestWithdrawalMeetsANewerNode(t *testing.T) {
	a := newAPIServer(t)
	leaving(a)
	a.with(func() { a.stale = 2 })
	if err := kube.Withdraw(t.Context(), a.config(), "n1"); err != nil {
		t.Errorf("two conflicts: %v", err)
	}
	if left := a.annotations("n1"); left[kube.Subnets] != "" {
		t.Errorf("left: %v", left)
	}
	leaving(a)
	a.with(func() { a.stale = 1000 })
	err := kube.Withdraw(t.Context(), a.config(), "n1")
	if err == nil || !strings.Contains(err.Error(), "cannot withdraw what is published of node n1: others keep changing") {
		t.Errorf("conflicts without end: %v", err)
	}
}

func TestWithdrawalOfANodeThatIsGone(t *testing.T) {
	a := newAPIServer(t)
	if err := kube.Withdraw(t.Context(), a.config(), "n9"); err != nil {
		t.Error(err)
	}
	if published, err := kube.Published(t.Context(), a.config(), "n9"); err != nil || len(published) > 0 {
		t.Errorf("published: %v, %v", published, err)
	}
}

func TestWithdrawalIsForbidden(t *testing.T) {
	a := newAPIServer(t)
	leaving(a)
	a.with(func() { a.refuse["patch"] = 403 })
	err := kube.Withdraw(t.Context(), a.config(), "n1")
	if err == nil || !strings.Contains(err.Error(), `give our account the verb "patch" on the resource "nodes"`) {
		t.Errorf("no patch: %v", err)
	}
	a.with(func() { a.refuse["get"] = 403 })
	err = kube.Withdraw(t.Context(), a.config(), "n1")
	if err == nil || !strings.Contains(err.Error(), `give our account the verb "get" on the resource "nodes"`) ||
		strings.Contains(err.Error(), "patch") {
		t.Errorf("no get: %v", err)
	}
}

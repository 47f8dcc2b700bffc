package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"tweed.dev/tweed/e2e/cluster"
)

// An identitySuite asks a real API server who may do what to Nodes. n1 is a large Node, n2 a small one, and n3 has no
// podCIDRs yet.
type identitySuite struct {
	*cluster.Cluster
	callers map[caller]*kubernetes.Clientset
}

// A caller is somebody with credentials.
type caller string

const (
	daemon1    caller = "the daemon of n1"
	daemon2    caller = "the daemon of n2"
	daemon3    caller = "the daemon of n3"
	unbound    caller = "a token that no pod has"
	certified  caller = "a certificate for n1"
	nameless   caller = "a certificate in tweed:nodes that names no node"
	groupless  caller = "a certificate for n1 in another group"
	kubelet1   caller = "the kubelet of n1"
	kubelet8   caller = "the kubelet of n8, which has not registered"
	controller caller = "the node controller"
	otherTweed caller = "another service account of the namespace tweed"
	operator   caller = "an administrator"
)

// What an administrator applies.
const (
	policyFiles = "../manifests/base/policy.yaml"
	roleFiles   = "../manifests/base/identity.yaml"
)

func TestIdentity(t *testing.T) {
	s := identitySuite{Cluster: cluster.Start(t, programs(t))}
	s.createBigNode(t, "n1", podCIDRs(1)...)
	s.CreateNode(t, "n2", nil, podCIDRs(2), nil)
	s.CreateNode(t, "n3", nil, nil, nil)
	s.createEvents(t)
	s.callers = map[caller]*kubernetes.Clientset{
		daemon1: s.AsDaemon(t, "n1"), daemon2: s.AsDaemon(t, "n2"), daemon3: s.AsDaemon(t, "n3"),
		unbound:    s.AsAccount(t),
		certified:  s.AsUser(t, "tweed:node:n1", "tweed:nodes"),
		nameless:   s.AsUser(t, "alice", "tweed:nodes"),
		groupless:  s.AsUser(t, "tweed:node:n1", "system:masters"),
		kubelet1:   s.AsUser(t, "system:node:n1", "system:nodes"),
		kubelet8:   s.AsUser(t, "system:node:n8", "system:nodes"),
		controller: s.AsUser(t, "system:serviceaccount:kube-system:node-controller"),
		otherTweed: s.AsUser(t, "system:serviceaccount:tweed:other", "system:masters"),
		operator:   s.API,
	}
	s.setSource(t, "=node-spec")
	t.Run("PoliciesFitTheTypes", s.policiesFitTheTypes)
	t.Run("RoleAllowsWhatDaemonsNeed", s.roleIsSmall)
	s.allowEverything(t)
	t.Run("Refused", s.refused)
	t.Run("Allowed", s.allowed)
	t.Run("UpdatesAreRefused", s.updatesRefused)
	t.Run("WithoutEffect", s.withoutEffect)
	t.Run("SubnetSource", s.subnetSource)
	t.Run("RoleIsDeleted", s.roleIsDeleted)
	t.Run("DaemonWithACertificate", s.daemonWithCertificate)
	t.Run("DaemonWithTheKubeletsKubeconfig", s.daemonAsKubelet)
	t.Run("PolicyIsDeleted", s.policyIsDeleted)
}

// roleIsSmall asks for each verb on what daemons have to do with, and on what they have not.
func (s *identitySuite) roleIsSmall(t *testing.T) {
	may := map[string]string{"nodes": "get list watch patch", "nodes/status": "patch", "events": "create patch"}
	for _, who := range []caller{daemon1, certified} {
		for _, resource := range []string{
			"nodes", "nodes/status", "nodes/proxy", "events", "pods", "configmaps", "secrets", "serviceaccounts/token",
		} {
			for verb := range strings.FieldsSeq("get list watch create update patch delete deletecollection") {
				want := strings.Contains(" "+may[resource]+" ", " "+verb+" ")
				if got := s.may(t, who, verb, resource); got != want {
					t.Errorf("%s may %s %s: %v, want %v", who, verb, resource, got, want)
				}
			}
		}
	}
}

func (s *identitySuite) may(t *testing.T, who caller, verb, resource string) bool {
	t.Helper()
	resource, sub, _ := strings.Cut(resource, "/")
	review, err := s.callers[who].AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(),
		&authzv1.SelfSubjectAccessReview{Spec: authzv1.SelfSubjectAccessReviewSpec{
			ResourceAttributes: &authzv1.ResourceAttributes{Verb: verb, Resource: resource, Subresource: sub},
		}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("asking what %s may do: %v", who, err)
	}
	return review.Status.Allowed
}

// allowEverything gives daemons every verb, so that the policies alone can refuse.
func (s *identitySuite) allowEverything(t *testing.T) {
	t.Helper()
	_, err := s.API.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "e2e-everything"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{
			{Kind: rbacv1.ServiceAccountKind, Namespace: "tweed", Name: "tweed"},
			{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: "tweed:nodes"},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cluster.Await(t, "daemons to be allowed everything, but by the policies", func() error {
		for _, who := range []caller{daemon1, certified} {
			if !s.may(t, who, "delete", "nodes") {
				return fmt.Errorf("%s may not delete nodes", who)
			}
		}
		return nil
	})
	for _, r := range []request{
		{daemon1, http.MethodPatch, "nodes/n1", merge, `{"metadata":{"annotations":{"tweed.dev/subnets":"192.0.2.0/24"}}}`},
		{unbound, http.MethodPost, "namespaces/default/events", "", eventAbout("Node", "n1")},
		{kubelet1, http.MethodPatch, "nodes/n1", merge, `{"metadata":{"annotations":{"tweed.dev/host":"192.0.2.1"}}}`},
	} {
		cluster.Await(t, "the policies to be in force", func() error {
			if _, err := s.do(t, r, true); err == nil {
				return errors.New(r.String() + " is allowed")
			}
			return nil
		})
	}
}

// refused makes attempts in earnest. None may change anything, and each answer has to say why.
func (s *identitySuite) refused(t *testing.T) {
	before := s.versions(t)
	for _, a := range refusals() {
		_, err := s.do(t, a.request, false)
		switch {
		case err == nil:
			t.Errorf("allowed: %s", a.request)
		case contains(err.Error(), a.because...) != nil:
			t.Errorf("%s: %v\nthe answer is %v", a.request, contains(err.Error(), a.because...), err)
		case !apierrors.IsForbidden(err):
			t.Errorf("%s: the answer is %v, want one with status 403", a.request, err)
		}
	}
	if after := s.versions(t); after != before {
		t.Errorf("a refused attempt changed something:\n%s\n%s", before, after)
	}
}

// versions names every Node and Event with its version.
func (s *identitySuite) versions(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	nodes, err := s.API.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	events, err := s.API.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes.Items {
		fmt.Fprintf(&all, "%s@%s ", n.Name, n.ResourceVersion)
	}
	for _, e := range events.Items {
		fmt.Fprintf(&all, "%s@%s ", e.Name, e.ResourceVersion)
	}
	return all.String()
}

// allowed makes requests that have to succeed and show in the answer. The API server keeps nothing of them.
func (s *identitySuite) allowed(t *testing.T) {
	for _, a := range permissions(s.node(t, "n1")) {
		answer, err := s.do(t, a.request, true)
		if err != nil {
			t.Errorf("refused: %s: %v", a.request, err)
			continue
		}
		if err := contains(answer, a.shows...); err != nil {
			t.Errorf("%s: %v in the answer\n%.3000s", a.request, err, answer)
		}
		for _, gone := range a.hides {
			if strings.Contains(answer, gone) {
				t.Errorf("%s: %s is in the answer\n%.3000s", a.request, gone, answer)
			}
		}
	}
}

// withoutEffect sends status where only spec is written, and the other way round: the API server ignores it.
func (s *identitySuite) withoutEffect(t *testing.T) {
	for path, body := range map[string]string{
		"nodes/n1":        `{"status":{"capacity":{"cpu":"4711"},"daemonEndpoints":{"kubeletEndpoint":{"Port":4711}}}}`,
		"nodes/n1/status": `{"spec":{"providerID":"4711","taints":[{"key":"4711","effect":"NoExecute"}]}}`,
	} {
		r := request{daemon1, http.MethodPatch, path, merge, body}
		if answer, err := s.do(t, r, true); err != nil || strings.Contains(answer, "4711") {
			t.Errorf("%s: %v, the answer is\n%.3000s", r, err, answer)
		}
	}
}

func (s *identitySuite) node(t *testing.T, name string) *corev1.Node {
	t.Helper()
	n, err := s.API.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// awaitAnswer repeats a request, that keeps nothing, until it is answered as it shall be; "" is success.
func (s *identitySuite) awaitAnswer(t *testing.T, r request, want string) {
	t.Helper()
	cluster.Await(t, fmt.Sprintf("%s to be answered with %q", r, want), func() error {
		_, err := s.do(t, r, true)
		switch {
		case want == "":
			return err
		case err == nil:
			return errors.New("it is allowed")
		}
		return contains(err.Error(), want)
	})
}

const foreignSubnet = `{"metadata":{"annotations":{"tweed.dev/subnets":"10.244.99.0/24"}}}`

// setSource changes the policy's parameter.
func (s *identitySuite) setSource(t *testing.T, value string) {
	t.Helper()
	s.Kubectl(t, "annotate", "--overwrite", "clusterrole", "tweed", "tweed.dev/subnet-source"+value)
}

// subnetSource has a Node with podCIDRs (n1) and one without (n3) publish a subnet of its own choice. What the policy
// does not know is as strict as node-spec.
func (s *identitySuite) subnetSource(t *testing.T) {
	with := request{daemon1, http.MethodPatch, "nodes/n1", merge, foreignSubnet}
	without := request{daemon3, http.MethodPatch, "nodes/n3", merge, foreignSubnet}
	for _, c := range []struct{ value, with, without string }{
		{"=lease", "", ""},
		{"=node-spec", "spec.podCIDRs", "spec.podCIDRs"},
		{"=auto", "spec.podCIDRs", ""},
		{"=leese", "spec.podCIDRs", "spec.podCIDRs"},
		{"=lease", "", ""},
		{"-", "spec.podCIDRs", "spec.podCIDRs"},
	} {
		s.setSource(t, c.value)
		s.awaitAnswer(t, with, c.with)
		s.awaitAnswer(t, without, c.without)
	}
	s.setSource(t, "=node-spec")
}

// roleIsDeleted takes the policy's parameter away: daemons alone may feel it.
func (s *identitySuite) roleIsDeleted(t *testing.T) {
	s.Kubectl(t, "delete", "clusterrole", "tweed")
	defer s.Kubectl(t, "apply", "-f", roleFiles)
	s.awaitAnswer(t, request{daemon1, http.MethodPatch, "nodes/n1", merge, foreignSubnet}, "")
	label := `{"metadata":{"labels":{"example.com/e2e":"x"}}}`
	s.awaitAnswer(t, request{daemon1, http.MethodPatch, "nodes/n1", merge, label}, "metadata.labels")
	for _, r := range []request{
		{operator, http.MethodPatch, "nodes/n1", merge, label},
		{kubelet1, http.MethodPatch, "nodes/n1/status", strategic, heartbeat},
	} {
		if _, err := s.do(t, r, true); err != nil {
			t.Errorf("refused while the ClusterRole is missing: %s: %v", r, err)
		}
	}
}

// daemonWithCertificate runs a daemon outside a pod, as docs/security.md has it. It writes all that daemons write.
func (s *identitySuite) daemonWithCertificate(t *testing.T) {
	n := s.AddNode(t, "outside", podCIDRs(21)...)
	defer s.RemoveNode(t, n)
	s.PatchNode(t, n.Name, `{"spec":{"taints":[{"key":"tweed.dev/not-ready","effect":"NoSchedule"}]}}`)
	n.UseCertificate(t, "tweed:node:outside", "tweed:nodes")
	n.StartDaemon(t)
	n.AwaitReady(t)
	cluster.Await(t, "the Node to say so", func() error {
		node := s.node(t, n.Name)
		if got, want := node.Annotations["tweed.dev/subnets"], strings.Join(podCIDRs(21), ","); got != want {
			return fmt.Errorf("it has published %q, want %q", got, want)
		}
		if slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == "tweed.dev/not-ready" }) {
			return fmt.Errorf("its taints are %v", node.Spec.Taints)
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse {
				return nil
			}
		}
		return fmt.Errorf("its conditions are %v", node.Status.Conditions)
	})
}

// daemonAsKubelet gives a daemon what is at hand on every node.
func (s *identitySuite) daemonAsKubelet(t *testing.T) {
	n := s.AddNode(t, "borrower", podCIDRs(22)...)
	defer s.RemoveNode(t, n)
	n.UseCertificate(t, "system:node:borrower", "system:nodes")
	n.StartDaemon(t)
	const reason = "node 'borrower' cannot read all nodes, only its own Node object"
	cluster.Await(t, "the daemon to say that the kubelet's kubeconfig will not do", func() error {
		if err := n.Daemon.LogContains(reason, "the identity of a kubelet"); err != nil {
			return err
		}
		if err := n.Ready(); err == nil || !strings.Contains(err.Error(), reason) {
			return fmt.Errorf("/readyz: %w", err)
		}
		return nil
	})
	if a := s.Annotations(t, n.Name); len(a) > 0 {
		t.Errorf("it has published %v", a)
	}
}

// policyIsDeleted is a cluster whose administrator left the policies out: daemons run, and RBAC alone holds them.
func (s *identitySuite) policyIsDeleted(t *testing.T) {
	label := request{daemon1, http.MethodPatch, "nodes/n2", merge, `{"metadata":{"labels":{"example.com/e2e":"x"}}}`}
	s.Kubectl(t, "delete", "-f", policyFiles)
	s.awaitAnswer(t, label, "")
	n := s.AddNode(t, "free", podCIDRs(23)...)
	defer s.RemoveNode(t, n)
	n.StartDaemon(t)
	n.AwaitReady(t)
	s.Kubectl(t, "apply", "-f", policyFiles)
	s.awaitAnswer(t, label, "may change its own Node alone")
}

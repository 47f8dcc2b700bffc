package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A permission is a request that has to succeed. The answer has to contain what shows and nothing of what hides.
type permission struct {
	request
	shows, hides []string
}

// heartbeat is what a kubelet says of its node.
const heartbeat = `{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"E2E"}]}}`

// lease is all that a daemon ever writes to the annotations.
const lease = `{"tweed.dev/subnets":"10.244.1.0/24,fd00:10:244:1::/64","tweed.dev/host":"192.0.2.77",
	"tweed.dev/backend":"new","tweed.dev/backend-data":"{\"vni\":77}","tweed.dev/network":"10.0.0.0/8",
	"tweed.dev/claim":"10.244.1.0/24 7777"}`

// permissions are requests about n1 that have to succeed, with n1 as it is.
func permissions(n1 *corev1.Node) (all []permission) {
	add := func(who caller, form types.PatchType, body string, shows []string) {
		all = append(all, permission{request{who, http.MethodPatch, "nodes/n1/status", form, body}, shows, nil})
	}
	for _, who := range []caller{daemon1, certified, groupless} {
		all = append(all, annotationPermissions(who, n1)...)
		unavailable := `{"status":{"conditions":[{"type":"NetworkUnavailable","status":"True","reason":"E2E"}]}}`
		shows := []string{`"reason":"E2E"`}
		add(who, strategic, unavailable, shows)
		add(who, apply, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},`+unavailable[1:], shows)
		add(who, jsonPatch, fmt.Sprintf(`[{"op":"replace","path":"/status/conditions/%d/reason","value":"E2E"}]`,
			len(n1.Status.Conditions)-1), shows)
		all = append(all, taintPermissions(who, n1)...)
	}
	return slices.Concat(all, otherPermissions(n1), eventPermissions())
}

// annotationPermissions are the ways to write a lease.
func annotationPermissions(who caller, n1 *corev1.Node) (all []permission) {
	leased := []string{`"tweed.dev/host":"192.0.2.77"`, `"tweed.dev/backend":"new"`, `7777"`, `:77}"`}
	precise := fmt.Sprintf(`{"metadata":{"uid":%q,"resourceVersion":%q,"annotations":%s}}`,
		n1.UID, n1.ResourceVersion, lease)
	for _, path := range []string{"nodes/n1", "nodes/n1/status"} {
		add := func(form types.PatchType, body string, shows, hides []string) {
			all = append(all, permission{request{who, http.MethodPatch, path, form, body}, shows, hides})
		}
		add(merge, precise, leased, nil)
		add(strategic, precise, leased, nil)
		add(apply, applied("n1", `"annotations":`+lease), leased, nil)
		add(jsonPatch, `[{"op":"replace","path":"/metadata/annotations/tweed.dev~1host","value":"192.0.2.77"}]`,
			leased[:1], nil)
		add(merge, `{"metadata":{"annotations":{"tweed.dev/subnets":null,"tweed.dev/host":null,"tweed.dev/backend":null,
			"tweed.dev/backend-data":null,"tweed.dev/network":null,"tweed.dev/claim":null}}}`,
			nil, []string{`"tweed.dev/subnets":`, `"tweed.dev/backend`})
		add(merge, `{"metadata":{"annotations":{"tweed.dev/subnets":"fd00:10:244:1::/64"}}}`,
			[]string{`"tweed.dev/subnets":"fd00:10:244:1::/64"`}, nil)
		add(merge, "{}", nil, nil)
	}
	return all
}

// taintPermissions are the ways to remove the startup taints, which are the first two of n1.
func taintPermissions(who caller, n1 *corev1.Node) (all []permission) {
	last := n1.Spec.Taints[len(n1.Spec.Taints)-1].Key
	add := func(form types.PatchType, body string, hides ...string) {
		all = append(all, permission{request{who, http.MethodPatch, "nodes/n1", form, body}, []string{last}, hides})
	}
	rest := func(from int) string { return fmt.Sprintf(`{"spec":{"taints":%s}}`, asJSON(n1.Spec.Taints[from:])) }
	const key, first, second = `"key":"tweed.dev/not-ready"`, `"effect":"NoSchedule",`, `"effect":"NoExecute",`
	add(jsonPatch, `[{"op":"test","path":"/spec/taints/0/key","value":"tweed.dev/not-ready"},
		{"op":"remove","path":"/spec/taints/0"}]`, first+key)
	add(jsonPatch, `[{"op":"remove","path":"/spec/taints/1"}]`, second+key)
	add(merge, rest(1), first+key)
	add(merge, rest(2), key)
	add(strategic, rest(2), key)
	return all
}

// otherPermissions are what kubelets, controllers and administrators do all day.
func otherPermissions(n1 *corev1.Node) (all []permission) {
	add := func(who caller, method, path string, form types.PatchType, body string, shows ...string) {
		all = append(all, permission{request{who, method, path, form, body}, shows, nil})
	}
	label := `{"metadata":{"labels":{"example.com/e2e":"x"}}}`
	ours := `{"metadata":{"annotations":{"tweed.dev/subnets":"10.244.99.0/24","tweed.dev/host-override":"192.0.2.99"}}}`
	status := n1.DeepCopy()
	status.Status.Phase = corev1.NodeRunning
	add(kubelet1, http.MethodPatch, "nodes/n1/status", strategic, heartbeat, `"reason":"E2E"`)
	add(kubelet1, http.MethodPut, "nodes/n1/status", "", asJSON(status), `"phase":"Running"`)
	add(kubelet1, http.MethodPatch, "nodes/n1", strategic, label, `"example.com/e2e":"x"`)
	add(kubelet1, http.MethodPatch, "nodes/n1", merge, `{"metadata":{"annotations":{"volumes.example.com/x":"x"}}}`,
		"volumes")
	add(kubelet8, http.MethodPost, "nodes", "", applied("n8", `"labels":{"kubernetes.io/hostname":"n8"}`), `"n8"`)
	add(controller, http.MethodPatch, "nodes/n1", strategic, `{"spec":{"taints":[{"key":"e2e","effect":"NoExecute"}]}}`,
		`"e2e"`)
	add(controller, http.MethodPatch, "nodes/n1/status", strategic, heartbeat, `"reason":"E2E"`)
	for _, who := range []caller{operator, otherTweed} {
		add(who, http.MethodPatch, "nodes/n1", merge, ours, "10.244.99.0/24", "192.0.2.99")
		add(who, http.MethodPatch, "nodes/n1", merge, label, `"example.com/e2e":"x"`)
		add(who, http.MethodPatch, "nodes/n1/status", merge, `{"status":{"phase":"Running"}}`, `"phase":"Running"`)
		add(who, http.MethodPost, "nodes", "", applied("n9", `"annotations":{"tweed.dev/subnets":"10.244.9.0/24"}`),
			"10.244.9.0/24")
		add(who, http.MethodDelete, "nodes/n1", "", "")
		add(who, http.MethodPost, "namespaces/default/events", "", eventAbout("Node", "n2"), `"n2"`)
	}
	return all
}

func eventPermissions() (all []permission) {
	const events = "namespaces/default/events"
	for _, who := range []caller{daemon1, certified} {
		about := request{who, http.MethodPost, events, "", eventAbout("Node", "n1")}
		again := request{who, http.MethodPatch, events + "/of-n1", strategic, `{"count":7}`}
		all = append(all, permission{about, []string{`"n1"`}, nil}, permission{again, []string{`"count":7`}, nil})
	}
	return all
}

// updatesRefused sends whole objects, each with one thing changed that is not the daemon's.
func (s *identitySuite) updatesRefused(t *testing.T) {
	for because, change := range map[string]func(*corev1.Node){
		"metadata.labels":              func(n *corev1.Node) { n.Labels["label-2"] = "x" },
		"metadata.finalizers":          func(n *corev1.Node) { n.Finalizers = []string{"example.com/stay"} },
		"annotation annotation-2":      func(n *corev1.Node) { delete(n.Annotations, "annotation-2") },
		"annotation tweed.dev/sources": func(n *corev1.Node) { n.Annotations["tweed.dev/sources"] = "192.0.2.99" },
		"spec.unschedulable":           func(n *corev1.Node) { n.Spec.Unschedulable = true },
		"change the taints":            func(n *corev1.Node) { n.Spec.Taints = slices.Delete(n.Spec.Taints, 3, 4) },
		"status.capacity":              func(n *corev1.Node) { n.Status.Capacity["cpu"] = resource.MustParse("4711") },
		"status.images":                func(n *corev1.Node) { n.Status.Images[99].SizeBytes++ },
		"change the conditions":        func(n *corev1.Node) { slices.Reverse(n.Status.Conditions) },
	} {
		for _, path := range []string{"nodes/n1", "nodes/n1/status"} {
			n := s.node(t, "n1")
			change(n)
			_, err := s.do(t, request{daemon1, http.MethodPut, path, "", asJSON(n)}, true)
			ignored := strings.HasPrefix(because, "status") || strings.HasSuffix(because, "conditions")
			if strings.HasSuffix(path, "status") {
				ignored = strings.HasPrefix(because, "spec") || strings.HasSuffix(because, "taints")
			}
			switch {
			case ignored && err != nil:
				t.Errorf("PUT %s with another %s: %v, want it ignored", path, because, err)
			case !ignored && err == nil:
				t.Errorf("PUT %s: allowed, want it refused with %q", path, because)
			case !ignored && contains(err.Error(), because) != nil:
				t.Errorf("PUT %s: %v, want %q in it", path, err, because)
			}
		}
	}
	n := s.node(t, "n1")
	n.Annotations["tweed.dev/host"] = "192.0.2.77"
	if _, err := s.do(t, request{daemon1, http.MethodPut, "nodes/n1", "", asJSON(n)}, true); err != nil {
		t.Errorf("PUT of a daemon's own annotation: %v", err)
	}
}

// createBigNode makes a Node at which a policy with a budget has something to do. Its first two taints are the startup
// taint, its last condition is the daemon's.
func (s *identitySuite) createBigNode(t *testing.T, name string, podCIDRs ...string) {
	t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	n.Annotations = map[string]string{
		"tweed.dev/subnets": strings.Join(podCIDRs, ","), "tweed.dev/host": "192.0.2.11", "tweed.dev/backend": "vxlan",
		"tweed.dev/backend-data": `{"vni":1}`, "tweed.dev/network": "10.244.0.0/16", "tweed.dev/claim": "x",
		"tweed.dev/sources": "198.51.100.1", "tweed.dev/host-override": "198.51.100.1",
		"example.com/huge": strings.Repeat("x", 200<<10),
	}
	n.Spec.PodCIDR, n.Spec.PodCIDRs = podCIDRs[0], podCIDRs
	n.Spec.Taints = []corev1.Taint{
		{Key: "tweed.dev/not-ready", Effect: corev1.TaintEffectNoSchedule},
		{Key: "tweed.dev/not-ready", Effect: corev1.TaintEffectNoExecute},
	}
	n.Status.Capacity = corev1.ResourceList{"cpu": resource.MustParse("2"), "memory": resource.MustParse("8Gi")}
	for i := range 100 {
		is := fmt.Sprint(i)
		n.Labels["label-"+is], n.Annotations["annotation-"+is] = is, is
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{
			Names: []string{"example.com/image-" + is + "@sha256:" + strings.Repeat("0", 64), "example.com/image-" + is},
		})
		if i < 50 {
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: "taint-" + is, Value: is, Effect: "NoSchedule"})
		}
	}
	for _, kind := range []corev1.NodeConditionType{
		"Ready", "MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable",
	} {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: kind, Status: "False", Reason: "Here"})
	}
	if _, err := s.API.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// createEvents makes an Event about n1 and one about n2.
func (s *identitySuite) createEvents(t *testing.T) {
	t.Helper()
	for _, name := range []string{"n1", "n2"} {
		about := corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: name}
		_, err := s.API.CoreV1().Events("default").Create(t.Context(), &corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Name: "of-" + name, Namespace: "default"}, InvolvedObject: about, Reason: "E2E",
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
}

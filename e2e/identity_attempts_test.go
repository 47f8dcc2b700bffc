package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/types"
)

// The forms of a patch.
const (
	merge     = types.MergePatchType
	strategic = types.StrategicMergePatchType
	jsonPatch = types.JSONPatchType
	apply     = types.ApplyPatchType
)

// A request is one call of the API, at a path below /api/v1.
type request struct {
	who          caller
	method, path string
	form         types.PatchType
	body         string
}

func (r request) String() string {
	return fmt.Sprintf("%s: %s %s %s %.200s", r.who, r.method, r.path, r.form, r.body)
}

// do makes a request and returns the answer. With dry, the API server does all but keep it.
func (s *identitySuite) do(t *testing.T, r request, dry bool) (string, error) {
	t.Helper()
	q := s.callers[r.who].CoreV1().RESTClient().Verb(r.method).AbsPath("/api/v1/" + r.path)
	if dry {
		q = q.Param("dryRun", "All")
	}
	form := string(r.form)
	switch {
	case r.form == apply:
		q = q.Param("fieldManager", "e2e").Param("force", "true")
	case form == "":
		form = "application/json"
	}
	q = q.SetHeader("Content-Type", form).SetHeader("Accept", "application/json").Body([]byte(r.body))
	answer := q.Do(t.Context())
	b, _ := answer.Raw()
	return string(b), answer.Error() // Raw's error lacks the message
}

// An attempt has to fail, and the answer has to contain each of the words.
type attempt struct {
	request
	because []string
}

// refusals are attempts of daemons, and of kubelets in their place, by everything that they could send.
func refusals() []attempt {
	var all []attempt
	add := func(who caller, method, path string, form types.PatchType, body string, because ...string) {
		all = append(all, attempt{request{who, method, path, form, body}, because})
	}
	// Other metadata of the own Node, by each way.
	for _, path := range []string{"nodes/n1", "nodes/n1/status"} {
		for _, m := range []struct{ field, value, because string }{
			{"labels", `{"node-role.kubernetes.io/control-plane":""}`, "metadata.labels"},
			{"labels", `{"label-1":null}`, "metadata.labels"},
			{"finalizers", `["example.com/stay"]`, "metadata.finalizers"},
			{"ownerReferences", `[{"apiVersion":"v1","kind":"Pod","name":"p","uid":"u"}]`, "metadata.ownerReferences"},
			{"generateName", `"n"`, "metadata.generateName"},
			{"annotations", `{"example.com/new":"x"}`, "annotation example.com/new"},
			{"annotations", `{"annotation-1":null}`, "annotation annotation-1"},
			{"annotations", `{"annotation-1":"x","tweed.dev/host":"192.0.2.11"}`, "annotation annotation-1"},
			{"annotations", `{"tweed.dev/host-override":"192.0.2.99"}`, "annotation tweed.dev/host-override"},
			{"annotations", `{"tweed.dev/sources":"192.0.2.99"}`, "annotation tweed.dev/sources"},
			{"annotations", `{"tweed.dev/sub":"x"}`, "annotation tweed.dev/sub"},
		} {
			body := fmt.Sprintf(`{"metadata":{%q:%s}}`, m.field, m.value)
			add(daemon1, http.MethodPatch, path, merge, body, "tweed-own-node", "the daemon of node n1 tried", m.because)
			add(certified, http.MethodPatch, path, strategic, body, "tweed-own-node", "the daemon of node n1 tried", m.because)
		}
		add(daemon1, http.MethodPatch, path, apply, applied("n1", `"labels":{"example.com/e2e":"x"}`), "metadata.labels")
		add(daemon1, http.MethodPatch, path, jsonPatch, `[{"op":"remove","path":"/metadata/labels/label-1"}]`,
			"metadata.labels")
		for _, subnets := range []string{
			"10.244.2.0/24", "10.244.1.0/24,10.244.2.0/24", "10.244.1.0/25", "10.244.0.0/16", "10.244.1.0/024",
			"10.244.1.1/24", "10.244.1.0/24, fd00:10:244:1::/64", "FD00:10:244:1::/64", "fd00:10:244:1:0::/64",
			"", ",", "10.244.1.0/24,",
			strings.Repeat("10.244.9.0/24,", 600),
		} {
			body := fmt.Sprintf(`{"metadata":{"annotations":{"tweed.dev/subnets":%q}}}`, subnets)
			add(daemon1, http.MethodPatch, path, merge, body, "tweed-subnets", "subnets of spec.podCIDRs")
		}
		annotation := applied("n1", `"annotations":{"tweed.dev/subnets":"10.244.2.0/24"}`)
		add(daemon1, http.MethodPatch, path, apply, annotation,
			`of Node n1 these are "10.244.1.0/24,fd00:10:244:1::/64", and not "10.244.2.0/24"`)
		add(daemon3, http.MethodPatch, strings.Replace(path, "n1", "n3", 1), merge, foreignSubnet, "subnets of spec.podCIDRs")

		// Other Nodes, and callers on none.
		host := `{"metadata":{"annotations":{"tweed.dev/host":"192.0.2.99"}}}`
		const notIts = "the daemon of node n2 tried to change Node n1; it may change its own Node alone"
		add(daemon2, http.MethodPatch, path, merge, host, notIts)
		add(daemon2, http.MethodPatch, path, strategic, host, notIts)
		add(daemon2, http.MethodPatch, path, jsonPatch,
			`[{"op":"add","path":"/metadata/annotations/tweed.dev~1host","value":"192.0.2.99"}]`, notIts)
		add(daemon2, http.MethodPatch, path, apply, applied("n1", `"annotations":{"tweed.dev/host":"192.0.2.99"}`), notIts)
		for _, who := range []caller{daemon1, certified, groupless} {
			add(who, http.MethodPatch, strings.Replace(path, "n1", "n2", 1), merge, host,
				"the daemon of node n1 tried to change Node n2")
		}
		add(unbound, http.MethodPatch, path, merge, host, "names no node", "the token that the kubelet mounts")
		add(nameless, http.MethodPatch, path, merge, host, "alice is in the group tweed:nodes", "common name tweed:node:")

		// The kubelet in the daemon's place.
		const kubelet = "system:node:n1 is a kubelet and may not change the annotation tweed.dev/"
		add(kubelet1, http.MethodPatch, path, merge, host, "tweed-kubelets", kubelet+"host",
			"tweed:node:n1 in the group tweed:nodes")
		add(kubelet1, http.MethodPatch, path, strategic, host, kubelet+"host")
		add(kubelet1, http.MethodPatch, path, merge, `{"metadata":{"annotations":{"tweed.dev/sources":null}}}`,
			kubelet+"sources")
	}
	return slices.Concat(all, specRefusals(), statusRefusals(), createRefusals(), eventRefusals())
}

func specRefusals() (all []attempt) {
	add := func(who caller, form types.PatchType, body string, because ...string) {
		path := "nodes/n1"
		if who == daemon3 {
			path = "nodes/n3"
		}
		all = append(all, attempt{request{who, http.MethodPatch, path, form, body}, because})
	}
	const taints = "the daemon of node n1 tried to change the taints"
	add(daemon1, merge, `{"spec":{"unschedulable":true}}`, "spec.unschedulable", "the taint tweed.dev/not-ready alone")
	add(certified, strategic, `{"spec":{"unschedulable":true}}`, "spec.unschedulable")
	add(daemon1, strategic, `{"spec":{"providerID":"e2e://n1"}}`, "spec.providerID")
	add(daemon1, jsonPatch, `[{"op":"add","path":"/spec/unschedulable","value":true}]`, "spec.unschedulable")
	add(daemon1, apply, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"spec":{"unschedulable":true}}`,
		"spec.unschedulable")
	add(daemon3, merge, `{"spec":{"podCIDR":"10.244.99.0/24","podCIDRs":["10.244.99.0/24"]}}`, "spec.podCIDR")
	add(daemon1, merge, `{"spec":{"taints":null}}`, taints)
	add(daemon1, strategic, `{"spec":{"taints":[{"key":"example.com/mine","effect":"NoExecute"}]}}`, taints)
	add(daemon1, jsonPatch, `[{"op":"add","path":"/spec/taints/-","value":{"key":"mine","effect":"NoExecute"}}]`, taints)
	add(daemon1, jsonPatch, `[{"op":"remove","path":"/spec/taints/2"}]`, taints)
	add(daemon1, jsonPatch, `[{"op":"replace","path":"/spec/taints/2/value","value":"x"}]`, taints)
	add(daemon1, jsonPatch, `[{"op":"replace","path":"/spec/taints/0/effect","value":"PreferNoSchedule"}]`, taints)
	add(daemon1, jsonPatch, `[{"op":"replace","path":"/spec/taints/0/value","value":"x"}]`, taints)
	add(daemon1, jsonPatch, `[{"op":"remove","path":"/spec/taints/0"},{"op":"remove","path":"/spec/taints/5"}]`, taints)
	add(daemon1, jsonPatch,
		`[{"op":"add","path":"/spec/taints/0","value":{"key":"tweed.dev/not-ready","effect":"PreferNoSchedule"}}]`, taints)
	add(daemon3, merge, `{"spec":{"taints":[{"key":"tweed.dev/not-ready","effect":"NoSchedule"}]}}`, "change the taints")
	return all
}

func statusRefusals() (all []attempt) {
	add := func(form types.PatchType, body string, because ...string) {
		all = append(all, attempt{request{daemon1, http.MethodPatch, "nodes/n1/status", form, body}, because})
	}
	const conditions = "the daemon of node n1 tried to change the conditions"
	add(strategic, heartbeat, conditions)
	add(strategic, `{"status":{"conditions":[{"type":"Mine","status":"True"}]}}`, conditions)
	add(strategic, `{"status":{"conditions":[{"type":"Ready","$patch":"delete"}]}}`, conditions)
	add(merge, `{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False"}]}}`, conditions)
	add(jsonPatch, `[{"op":"remove","path":"/status/conditions/0"}]`, conditions)
	add(jsonPatch, `[{"op":"replace","path":"/status/conditions/0/type","value":"NetworkUnavailable"}]`, conditions)
	add(jsonPatch,
		`[{"op":"add","path":"/status/conditions/-","value":{"type":"NetworkUnavailable","status":"True"}}]`, conditions)
	add(apply, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},
		"status":{"conditions":[{"type":"Ready","status":"Unknown"}]}}`, conditions)
	add(merge, `{"status":{"capacity":{"cpu":"4711"}}}`, "status.capacity", "the condition NetworkUnavailable alone")
	add(strategic, `{"status":{"allocatable":{"example.com/gpu":"8"}}}`, "status.allocatable")
	add(merge, `{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.99"}]}}`, "status.addresses")
	add(strategic, `{"status":{"addresses":[{"type":"ExternalIP","address":"192.0.2.99"}]}}`, "status.addresses")
	add(merge, `{"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":4711}}}}`, "status.daemonEndpoints")
	add(merge, `{"status":{"images":null}}`, "status.images")
	add(merge, `{"status":{"nodeInfo":{"kubeletVersion":"v9.9.9"}}}`, "status.nodeInfo")
	add(merge, `{"status":{"volumesInUse":["x"],"phase":"Pending"}}`, "status.phase", "status.volumesInUse")
	return all
}

func createRefusals() (all []attempt) {
	add := func(who caller, method, path string, form types.PatchType, body string, because ...string) {
		all = append(all, attempt{request{who, method, path, form, body}, because})
	}
	const create = "the daemon of node n1 tried to create "
	add(daemon1, http.MethodPost, "nodes", "", applied("n9", ""), create+"Node n9", "creating and deleting Nodes is for")
	add(daemon1, http.MethodPost, "nodes", "", `{"metadata":{"generateName":"n"}}`, create)
	add(daemon1, http.MethodPatch, "nodes/n9", apply, applied("n9", ""), create+"Node n9")
	add(certified, http.MethodPost, "nodes", "", applied("n9", ""), create+"Node n9")
	add(unbound, http.MethodPost, "nodes", "", applied("n9", ""), "names no node")
	add(nameless, http.MethodPost, "nodes", "", applied("n9", ""), "names no node")
	add(kubelet8, http.MethodPost, "nodes", "", applied("n8", `"annotations":{"tweed.dev/subnets":"10.244.1.0/24"}`),
		"system:node:n8 is a kubelet and may not change the annotation tweed.dev/subnets")
	add(daemon1, http.MethodDelete, "nodes/n1", "", "", "the daemon of node n1 tried to delete Node n1")
	add(daemon1, http.MethodDelete, "nodes/n2", "", "", "the daemon of node n1 tried to delete Node n2")
	add(certified, http.MethodDelete, "nodes/n1", "", "", "the daemon of node n1 tried to delete Node n1")
	add(unbound, http.MethodDelete, "nodes/n1", "", "", "names no node")
	add(daemon1, http.MethodDelete, "nodes", "", "", "the daemon of node n1 tried to delete Nodes")
	return all
}

func eventRefusals() (all []attempt) {
	add := func(who caller, method, path string, form types.PatchType, body string, because ...string) {
		r := request{who, method, "namespaces/default/events" + path, form, body}
		all = append(all, attempt{r, append(because, "tweed-events")})
	}
	const about = "the daemon of node n1 tried to write an Event about "
	add(daemon1, http.MethodPost, "", "", eventAbout("Node", "n2"), about+"Node n2")
	add(daemon1, http.MethodPost, "", "", eventAbout("PersistentVolume", "n1"), about+"PersistentVolume n1")
	add(certified, http.MethodPost, "", "", eventAbout("Node", "n2"), about+"Node n2")
	add(unbound, http.MethodPost, "", "", eventAbout("Node", "n1"), "a daemon of tweed on no node")
	add(daemon1, http.MethodPatch, "/of-n2", merge, `{"message":"x"}`, about+"Node n2")
	add(daemon1, http.MethodPatch, "/of-n2", merge, `{"involvedObject":{"name":"n1","uid":"n1"}}`, about+"Node n2")
	return all
}

// applied is a Node with some metadata beside its name.
func applied(name, metadata string) string {
	if metadata != "" {
		metadata = "," + metadata
	}
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"Node","metadata":{"name":%q%s}}`, name, metadata)
}

func eventAbout(kind, name string) string {
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"Event","metadata":{"generateName":"e2e-","namespace":"default"},
		"involvedObject":{"apiVersion":"v1","kind":%q,"name":%q,"uid":%q},"reason":"E2E","message":"m","type":"Warning",
		"source":{"component":"tweed"}}`, kind, name, name)
}

func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // these are values that the API server sent
	}
	return string(b)
}

package kube_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/subnet/kube"
)

// says returns the condition NetworkUnavailable of a Node, and the types of all its conditions.
func says(a *apiServer, name string) (c corev1.NodeCondition, types []corev1.NodeConditionType) {
	for _, have := range a.node(name).Status.Conditions {
		types = append(types, have.Type)
		if have.Type == corev1.NodeNetworkUnavailable {
			c = have
		}
	}
	return c, types
}

func taint(key string, effect corev1.TaintEffect) corev1.Taint {
	return corev1.Taint{Key: key, Value: "v", Effect: effect}
}

func TestConditionIsWrittenOnceAndAlone(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	a.heartbeat("n3")
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	for range 5 {
		if err := d.SetNetwork(t.Context(), true, "TweedIsUp", "all is well"); err != nil {
			t.Fatal(err)
		}
		a.heartbeatOnly("n3")
	}
	c, types := says(a, "n3")
	if c.Status != corev1.ConditionFalse || c.Reason != "TweedIsUp" || c.Message != "all is well" || c.LastTransitionTime.IsZero() {
		t.Errorf("condition is %+v", c)
	}
	if n := a.writes(); n != 1 || len(types) != 2 {
		t.Errorf("%d writes: %v; conditions are %v", n, a.patched(), types)
	}
	// Another reason is another condition; as long as the status is the same, so is its time.
	since := metav1.NewTime(time.Unix(1_800_000_000, 0))
	a.put("n3", func(n *corev1.Node) { n.Status.Conditions[1].LastTransitionTime = since })
	a.with(func() { a.muted = true }) // what follows must be known from the answers to writes
	for range 3 {
		if err := d.SetNetwork(t.Context(), true, "Other", ""); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.writes(); n != 2 {
		t.Errorf("%d writes: %v", n, a.patched())
	}
	if c, _ := says(a, "n3"); c.Reason != "Other" || !c.LastTransitionTime.Equal(&since) {
		t.Errorf("condition is %+v, and was of %v", c, since)
	}
	if err := d.SetNetwork(t.Context(), false, "NoPodSubnet", "none"); err != nil {
		t.Fatal(err)
	}
	if c, _ := says(a, "n3"); c.Status != corev1.ConditionTrue || c.Reason != "NoPodSubnet" {
		t.Errorf("condition is %+v", c)
	}
}

// heartbeatOnly is a heartbeat that keeps what others have written.
func (a *apiServer) heartbeatOnly(name string) {
	a.put(name, func(n *corev1.Node) {
		for i := range n.Status.Conditions {
			if n.Status.Conditions[i].Type == corev1.NodeReady {
				n.Status.Conditions[i].LastHeartbeatTime = metav1.Now()
			}
		}
	})
}

func TestConditionMeetsANewerNode(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	a.with(func() { a.stale = 1 })
	if err := d.SetNetwork(t.Context(), true, "TweedIsUp", ""); err != nil {
		t.Errorf("one conflict: %v", err)
	}
	a.with(func() { a.stale = 2 })
	err := d.SetNetwork(t.Context(), false, "NoPodSubnet", "")
	if err == nil || !strings.Contains(err.Error(), "cannot set the condition NetworkUnavailable of node n3: others keep changing") {
		t.Errorf("two conflicts: %v", err)
	}
	// Another Node of the same name, which this daemon does not know yet, and which says it already.
	a.with(func() { a.muted = true })
	a.remove("n3")
	a.put("n3", func(n *corev1.Node) {
		n.Status.Conditions = []corev1.NodeCondition{{
			Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: "NoPodSubnet"}}
	})
	before := len(a.patched())
	for range 2 {
		if err := d.SetNetwork(t.Context(), false, "NoPodSubnet", ""); err != nil || len(a.patched()) != before+1 {
			t.Errorf("%v, after %v", err, a.patched()[before:])
		}
	}
}

func TestWritesAreRefused(t *testing.T) {
	const policy = "ValidatingAdmissionPolicy 'tweed-own-node' with binding 'tweed-own-node' denied request: not your Node"
	for name, c := range map[string]struct {
		code      int
		why, want string
	}{
		"no role": {http.StatusForbidden, "not allowed", `the verb "patch" on the resource "nodes/status"`},
		"policy":  {http.StatusForbidden, policy, "an admission policy refuses it, for the reason at the end): nodes \"n3\" is forbidden: " + policy},
		"expired": {http.StatusUnauthorized, "", "does not accept our token"},
		"broken":  {http.StatusInternalServerError, "", "cannot set the condition NetworkUnavailable of node n3"},
		"invalid": {http.StatusUnprocessableEntity, "", "refuses it, perhaps by an admission policy"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAPIServer(t, func(a *apiServer) { a.refuse["patch status"], a.why = c.code, c.why })
			populate(a)
			d := startDaemon(t, a, "n3")
			d.awaitSelf("")
			err := d.SetNetwork(t.Context(), true, "TweedIsUp", "")
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

func TestServerDoesNotAnswerAWrite(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	d.SetPatience(300 * time.Millisecond)
	hung := make(chan struct{})
	a.with(func() { a.hung = hung })
	err := d.SetNetwork(t.Context(), true, "TweedIsUp", "")
	close(hung)
	if err == nil || !strings.Contains(err.Error(), "no answer in 300ms") {
		t.Errorf("got %v", err)
	}
}

func TestAnotherWriterKeepsSettingTheCondition(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	undo := func() {
		a.put("n3", func(n *corev1.Node) {
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable,
				Status: corev1.ConditionTrue, Reason: "NoRouteCreated", Message: "Node created without a route"}}
			fields := metav1.NewFieldsV1(`{"f:status":{"f:conditions":{"k:{\"type\":\"NetworkUnavailable\"}":{"f:status":{}}}}}`)
			n.ManagedFields = []metav1.ManagedFieldsEntry{
				{Manager: "tweed", Time: &metav1.Time{Time: time.Now()}, FieldsV1: fields},
				{Manager: "flanneld", Time: &metav1.Time{Time: time.Now().Add(-time.Hour)}, FieldsV1: fields},
				{Manager: "cloud-controller-manager", Time: &metav1.Time{Time: time.Now()}, FieldsV1: fields},
				{Manager: "kubelet", Time: &metav1.Time{Time: time.Now()}, FieldsV1: metav1.NewFieldsV1(`{"f:status":{}}`)},
			}
		})
	}
	var err error
	for round := 0; err == nil && round < 10; round++ {
		rings := d.rings.Load()
		undo()
		d.await("a ring", func() bool { return d.rings.Load() > rings })
		err = d.SetNetwork(t.Context(), true, "TweedIsUp", "")
	}
	want := "each time cloud-controller-manager set it to True (NoRouteCreated: \"Node created without a route\"); it is left so for 1h"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %s", err, want)
	}
	if n := a.writes(); n != 3 {
		t.Errorf("%d writes", n)
	}
	for range 20 {
		if d.SetNetwork(t.Context(), true, "TweedIsUp", "") == nil || a.writes() != 3 {
			t.Fatalf("it was not left alone: %v", a.patched())
		}
	}
	// The other one comes to agree, and that is that.
	a.put("n3", func(n *corev1.Node) {
		n.Status.Conditions[0].Status, n.Status.Conditions[0].Reason = corev1.ConditionFalse, "TweedIsUp"
	})
	d.await("agreement", func() bool { return d.SetNetwork(t.Context(), true, "TweedIsUp", "") == nil })
}

func TestStartupTaintAloneIsRemoved(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	kept := []corev1.Taint{
		taint("example.com/a", corev1.TaintEffectNoSchedule),
		taint("tweed.dev/not-ready-yet", corev1.TaintEffectNoSchedule),
		taint("node.kubernetes.io/not-ready", corev1.TaintEffectNoExecute),
	}
	a.put("n3", func(n *corev1.Node) {
		n.Spec.Taints = []corev1.Taint{
			taint(kube.StartupTaint, corev1.TaintEffectNoExecute), kept[0], kept[1],
			taint(kube.StartupTaint, corev1.TaintEffectNoSchedule), kept[2],
		}
	})
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	a.with(func() { a.stale = 1 })
	for range 3 {
		if err := d.Admit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := a.node("n3").Spec.Taints; !slices.Equal(got, kept) {
		t.Errorf("taints are %v", got)
	}
	if p := a.patched(); len(p) != 2 { // one for the conflict
		t.Errorf("writes: %v", p)
	}
	if !strings.Contains(d.log.String(), "startup taint removed") {
		t.Errorf("log: %s", d.log)
	}
	// Places have changed since they were read: nothing of somebody else's goes.
	a.put("n3", func(n *corev1.Node) { n.Spec.Taints = append(n.Spec.Taints, taint(kube.StartupTaint, "")) })
	d.await("the taint to be seen and removed", func() bool {
		if err := d.Admit(t.Context()); err != nil {
			t.Fatal(err)
		}
		return len(a.node("n3").Spec.Taints) == len(kept)
	})
}

func TestTaintIsKnownAfterTheLeaseIsWritten(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	a.put("n3", func(n *corev1.Node) {
		n.Spec.Taints = []corev1.Taint{taint(kube.StartupTaint, corev1.TaintEffectNoSchedule)}
	})
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	a.with(func() { a.muted = true }) // only the answers to writes tell
	if err := d.Publish(t.Context(), mine("192.0.2.3")); err != nil {
		t.Fatal(err)
	}
	if err := d.Admit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := a.node("n3").Spec.Taints; len(got) != 0 || len(a.patched()) != 2 {
		t.Errorf("taints are %v after %v", got, a.patched())
	}
}

func TestNodeThatDoesNotExistSaysNothing(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "nowhere")
	d.awaitSelf("node nowhere does not exist")
	for what, err := range map[string]error{
		"condition": d.SetNetwork(t.Context(), true, "TweedIsUp", ""),
		"taint":     d.Admit(t.Context()),
		"event":     d.Tell(t.Context(), "Reason", "text"),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if len(a.patched()) != 0 || len(a.toldEvents()) != 0 {
		t.Errorf("writes %v, events %v", a.patched(), a.toldEvents())
	}
	if self, _ := d.Self(); self.Name != "nowhere" {
		t.Errorf("the daemon does not know its own name: %+v", self)
	}
}

func TestEventOfTheSameTextIsTheSame(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	long := strings.Repeat("ä", 1000)
	for _, text := range []string{"one", "two", "one", long} {
		if err := d.Tell(t.Context(), "Reason", text); err != nil {
			t.Fatal(err)
		}
	}
	if err := kube.TellOnce(t.Context(), a.config(), "n3", "Reason", "one"); err != nil {
		t.Fatal(err)
	}
	told := a.toldEvents()
	if len(told) != 3 {
		t.Fatalf("events: %v", told)
	}
	counts := map[string]int32{}
	for _, e := range told {
		counts[e.Message] = e.Count
		if e.Namespace != "default" || e.Type != "Warning" || e.Reason != "Reason" || len(e.Message) > 1024 ||
			e.Source.Component != "tweed" || e.LastTimestamp.Before(&e.FirstTimestamp) {
			t.Errorf("event %+v", e)
		}
		if o := e.InvolvedObject; o.Kind != "Node" || o.Name != "n3" || o.UID != "n3" || o.Namespace != "" {
			t.Errorf("it is about %+v", o)
		}
	}
	if counts["one"] != 3 || counts["two"] != 1 || counts[long[:1024]] != 1 {
		t.Errorf("told %v", counts)
	}
}

func TestEventsAreRefused(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	a.with(func() { a.refuse["create events"] = http.StatusForbidden })
	if err := d.Tell(t.Context(), "Reason", "text"); err == nil || !strings.Contains(err.Error(), `the verb "create" on the resource "events"`) {
		t.Errorf("create: %v", err)
	}
	a.with(func() { delete(a.refuse, "create events"); a.refuse["patch events"] = http.StatusForbidden })
	if err := d.Tell(t.Context(), "Reason", "text"); err != nil {
		t.Fatal(err)
	}
	if err := d.Tell(t.Context(), "Reason", "text"); err == nil || !strings.Contains(err.Error(), `the verb "patch" on the resource "events"`) {
		t.Errorf("patch: %v", err)
	}
	if d.Err() != nil {
		t.Errorf("the leases are said to be away: %v", d.Err())
	}
	a.stop()
	err := kube.TellOnce(t.Context(), a.config(), "n3", "Reason", "text")
	if err == nil || !strings.Contains(err.Error(), "cannot create events at http://") {
		t.Errorf("server away: %v", err)
	}
}

func TestConfigurationInTheCluster(t *testing.T) {
	for name, c := range map[string]struct {
		change     func(*apiServer)
		text, want string
	}{
		"there":     {func(a *apiServer) { a.maps = netConf("net-conf.json") }, "{}", ""},
		"no map":    {func(*apiServer) {}, "", "there is no ConfigMap tweed in namespace tweed at http://"},
		"no key":    {func(a *apiServer) { a.maps = netConf("other") }, "", "has no key net-conf.json"},
		"forbidden": {func(a *apiServer) { a.refuse["get configmap"] = http.StatusForbidden }, "", `the verb "get" on the resource "configmaps"`},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAPIServer(t, c.change)
			text, err := kube.NetConf(t.Context(), a.config())
			if text != c.text || (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %q, %v; want %q, %s", text, err, c.text, c.want)
			}
		})
	}
}

func netConf(key string) map[string]map[string]string {
	return map[string]map[string]string{"tweed": {key: "{}"}}
}

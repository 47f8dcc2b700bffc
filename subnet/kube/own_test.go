package kube

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestWhatOthersWriteToOurNode rings where it is ours to write, and not otherwise.
func TestWhatOthersWriteToOurNode(t *testing.T) {
	node := func(change func(*corev1.Node)) *corev1.Node {
		n := &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "uid-1", ResourceVersion: "1", Annotations: map[string]string{Host: "192.0.2.1"}},
			Spec:       corev1.NodeSpec{Taints: []corev1.Taint{{Key: "a"}, {Key: StartupTaint}}},
			Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
				{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "TweedIsUp", Message: "m"},
			}},
		}
		change(n)
		return n
	}
	network := func(n *corev1.Node) *corev1.NodeCondition { return &n.Status.Conditions[0] }
	for name, c := range map[string]struct {
		rings  bool
		change func(*corev1.Node)
	}{
		"nothing":          {false, func(*corev1.Node) {}},
		"another version":  {false, func(n *corev1.Node) { n.ResourceVersion = "2" }},
		"their annotation": {false, func(n *corev1.Node) { n.Annotations["example.com/a"] = "b" }},
		"their taint":      {false, func(n *corev1.Node) { n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: "b"}) }},
		"message":          {false, func(n *corev1.Node) { network(n).Message = "other" }},
		"heartbeat":        {false, func(n *corev1.Node) { network(n).LastHeartbeatTime = metav1.Now() }},
		"another Node":     {true, func(n *corev1.Node) { n.UID = "uid-2" }},
		"our annotation":   {true, func(n *corev1.Node) { n.Annotations[Host] = "192.0.2.2" }},
		"status":           {true, func(n *corev1.Node) { network(n).Status = corev1.ConditionTrue }},
		"reason":           {true, func(n *corev1.Node) { network(n).Reason = "FlannelIsUp" }},
		"condition":        {true, func(n *corev1.Node) { n.Status.Conditions = nil }},
		"our taint":        {true, func(n *corev1.Node) { n.Spec.Taints = nil }},
		"podCIDRs":         {true, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.1.0/24"} }},
		"host override":    {true, func(n *corev1.Node) { n.Annotations[HostOverride] = "203.0.113.7" }},
		"claim":            {true, func(n *corev1.Node) { n.Annotations[Claim] = "10.244.1.0/24 a" }},
		"its place":        {true, func(n *corev1.Node) { n.Spec.Taints = n.Spec.Taints[1:] }},
	} {
		o := own{name: "n1", object: objectOf(node(func(*corev1.Node) {}))}
		if got := o.set(objectOf(node(c.change)), nil); got != c.rings {
			t.Errorf("%s: rings %v", name, got)
		}
	}
}

func TestWatchIsAheadOfTheAnswerToAWrite(t *testing.T) {
	v := func(resource string) version { return version{uid: "uid-1", resource: resource} }
	o := own{object: &object{version: v("1")}}
	o.wrote(v("1"), v("2"))
	if have, _ := o.current(); have.resource != "2" {
		t.Errorf("after a write, version %s is known", have.resource)
	}
	o.set(&object{version: v("4")}, nil)
	o.wrote(v("2"), v("3"))
	if have, _ := o.current(); have.resource != "4" {
		t.Errorf("a late answer put version %s in place of a newer one", have.resource)
	}
}

func TestContestIsTakenUpAgain(t *testing.T) {
	var c contest
	now := time.Unix(1_800_000_000, 0)
	up, down := condition{status: "False", reason: "TweedIsUp"}, condition{status: "True", reason: "NoPodSubnet"}
	for range mostRounds {
		if c.lost("uid-1", up, now) {
			t.Fatal("lost too early")
		}
		c.wrote("uid-1", up, now)
	}
	if !c.lost("uid-1", up, now.Add(truce-time.Second)) {
		t.Error("not lost after as many rounds as there may be")
	}
	if c.lost("uid-1", down, now) || c.lost("uid-2", up, now) {
		t.Error("what was never written, or to another Node, is lost")
	}
	now = now.Add(truce)
	if c.lost("uid-1", up, now) {
		t.Error("no other try after the truce")
	}
	c.wrote("uid-1", up, now)
	if !c.lost("uid-1", up, now.Add(time.Minute)) {
		t.Error("more than one try after the truce")
	}
	c.rest(now.Add(time.Minute))
	if !c.lost("uid-1", up, now.Add(time.Minute)) {
		t.Error("one agreement of a minute ends the contest")
	}
	c.rest(now.Add(truce))
	c.wrote("uid-1", up, now.Add(truce))
	if c.lost("uid-1", up, now.Add(truce)) {
		t.Error("rounds are remembered after what was written has stood for long")
	}
}

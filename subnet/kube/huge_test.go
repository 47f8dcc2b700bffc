package kube_test

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"tweed.dev/tweed/subnet/kube"
)

// TestNodeWithHugeAnnotations has one that is good beside 256 KB that say nothing, and one whose own are that large.
// What a pass reads stays small, is not made anew for a heartbeat, and costs as much as before.
func TestNodeWithHugeAnnotations(t *testing.T) {
	huge := strings.Repeat("10.244.7.0/24,", 32<<10/14) // eight of them are all that a Node may have
	servers(t, func(t *testing.T, a *apiServer) {
		populate(a)
		d := startDaemon(t, a, "n1")
		d.awaitNodes("n1", "n2")
		before := testing.AllocsPerRun(10, func() { d.List() })

		a.put("n4", func(n *corev1.Node) {
			maps.Copy(n.Annotations, nth(4))
			n.Annotations["example.com/other"] = strings.Repeat(huge, 4)
			n.Annotations["tweed.dev/later"] = strings.Repeat(huge, 4)
		})
		set(a, "n5", map[string]string{
			kube.Subnets: huge, kube.Host: huge, kube.Backend: huge, kube.BackendData: huge, kube.Network: huge,
			kube.Sources: huge, kube.Claim: huge, kube.HostOverride: huge,
		})
		d.await("problems of n5", func() bool { list, _ := d.List(); return len(list.Problems) > 0 })
		list := d.awaitNodes("n1", "n2", "n4")
		for _, p := range list.Problems {
			if p.Node != "n5" || !strings.Contains(p.Text, "has 32760 bytes; at most ") || len(p.Text) > 400 {
				t.Errorf("problem %.500s", p)
			}
		}
		text, err := json.Marshal(list)
		if err != nil || len(text) > 8<<10 || len(list.Problems) != 6 {
			t.Errorf("%d problems, and a list of %d bytes: %v", len(list.Problems), len(text), err)
		}
		for range 3 {
			a.heartbeat("n4")
			a.heartbeat("n5")
		}
		set(a, "n2", map[string]string{kube.Host: "192.0.2.99"}) // the watch keeps order
		d.await("the change of n2", func() bool {
			now, _ := d.List()
			return now.Generation > list.Generation
		})
		if now, _ := d.List(); now.Generation != list.Generation+1 {
			t.Errorf("generation %d after heartbeats and one change, want %d", now.Generation, list.Generation+1)
		}
		if after := testing.AllocsPerRun(10, func() { d.List() }); after > before {
			t.Errorf("a list costs %v allocations, and %v before", after, before)
		}
	})
}

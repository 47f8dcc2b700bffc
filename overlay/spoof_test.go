package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
	"tweed.dev/tweed/overlay/podnet"
)

// attach records a pod as the plugin does, and puts its veth there.
func (n *node) attach(t *testing.T, veth, ip, namespace string) {
	t.Helper()
	text, err := json.Marshal(map[string]any{"container": veth, "interface": "eth0", "veth": veth, "ifindex": 0,
		"mac": "0a:58:0a:f4:01:02", "addresses": []string{ip}, "namespace": namespace})
	if err != nil {
		t.Fatal(err)
	}
	n.kern.AddPort(veth)
	dir := filepath.Join(n.planner.RunDir, "pods")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, veth), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// wantJudged checks which pods' ports are locked, and known to nftables.
func (n *node) wantJudged(t *testing.T, when string, table bool, want ...string) {
	t.Helper()
	rules, err := n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
	if err != nil {
		t.Fatal(err)
	}
	here := n.planner.pods(podnet.Spoofing{})
	state := n.state(t)
	state.Ports = here.ports
	have, err := n.kern.Observe(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	var locked, known []string
	for name, p := range have.Ports {
		if p.Locked && p.NoLearning && p.NoFlood {
			locked = append(locked, name)
		}
	}
	for e := range rules.Spoof.Entries {
		if e.Set == spoof.Ports {
			known = append(known, e.Port)
		}
	}
	slices.Sort(locked)
	slices.Sort(known)
	if rules.Spoof.Made != table || !slices.Equal(locked, want) || !slices.Equal(known, want) {
		t.Errorf("%s: table %v, locked %v, known to nftables %v, want %v", when, rules.Spoof.Made, locked, known, want)
	}
}

func TestPodSpoofingChangesUnderRunningPods(t *testing.T) {
	n, _ := following(t, oneFamily)
	n.attach(t, "tweed1", "10.244.1.2/24", "lab")
	n.attach(t, "tweed2", "10.244.1.3/24", "apps")
	n.attach(t, "tweed3", "10.244.1.4/24", "")
	n.step(t)
	n.wantJudged(t, "by default", true, "tweed1", "tweed2", "tweed3")
	for _, c := range []struct {
		key   string
		table bool
		want  []string
	}{
		{`{"allow": ["lab", "other"]}`, true, []string{"tweed2", "tweed3"}},
		{`{"allow": ["apps"]}`, true, []string{"tweed1", "tweed3"}},
		{`"allow"`, false, nil},
		{`"deny"`, true, []string{"tweed1", "tweed2", "tweed3"}},
	} {
		n.rewrite(t, `{"Network": "10.244.0.0/16", "PodSpoofing": `+c.key+`}`)
		rep := n.step(t)
		n.wantJudged(t, c.key, c.table, c.want...)
		if rep.Drift > 0 || !rep.Converged {
			t.Errorf("%s: %+v", c.key, rep)
		}
		if rep = n.step(t); rep.Done > 0 {
			t.Errorf("%s: a second pass does %d", c.key, rep.Done)
		}
		info, err := podnet.ReadNodeInfo(n.planner.RunDir)
		if err != nil || info.Spoofing.All != !c.table {
			t.Errorf("%s: the plugin is told %+v, %v", c.key, info.Spoofing, err)
		}
	}
}

// What is left of a pod goes from nftables, and what a plugin is at work on is left to it.
func TestPodComesAndGoesWithoutAPass(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.attach(t, "tweed1", "10.244.1.2/24", "")
	n.attach(t, "tweed2", "10.244.1.3/24", "")
	n.step(t)
	n.wantJudged(t, "two pods", true, "tweed1", "tweed2")
	pods := filepath.Join(n.planner.RunDir, "pods")
	if err := os.Remove(filepath.Join(pods, "tweed1")); err != nil {
		t.Fatal(err)
	}
	n.step(t)
	n.wantJudged(t, "one has gone", true, "tweed2")
	// A record that cannot be read says nothing of who the pod is.
	if err := os.WriteFile(filepath.Join(pods, "tweed2"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.step(t)
}

// A kernel that cannot judge frames is named, and its node works without. Any other refusal keeps pods waiting.
func TestKernelJudgesNoFrames(t *testing.T) {
	for _, c := range []struct {
		err       error
		converged bool
	}{{spoof.ErrUnsupported, true}, {errors.New("no buffer space available"), false}} {
		n := newNode(t)
		n.cluster.set()
		n.kern.Fail(func(op backend.Op) error {
			if op.What.Kind() == "spoof" {
				return c.err
			}
			return nil
		})
		rep := n.step(t)
		if rep.Converged != c.converged || rep.Failed == 0 || !hasProblem(rep, "n1", c.err.Error()) {
			t.Errorf("%v: %+v", c.err, rep)
		}
	}
}

// unjudged is a host without nftables.
type unjudged struct{ Kernel }

func (u unjudged) ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error) {
	have, err := u.Kernel.ObserveFilter(ctx, want)
	have.Unjudged = "protocol not supported"
	return have, err
}

func TestHostHasNoNftables(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.planner.Kernel = unjudged{n.kern}
	for range 2 {
		rep := n.step(t)
		if !rep.Converged || rep.Failed > 0 || !hasProblem(rep, "n1", "what pods send is not judged (protocol") {
			t.Errorf("%+v", rep)
		}
	}
	n.planner.Config.Spoofing.All = true
	if rep := n.step(t); len(rep.Problems) > 0 {
		t.Errorf("where it is allowed: %+v", rep.Problems)
	}
}

func TestSpoofedFramesAreCounted(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	arp := masq.Chain{Family: masq.Bridge, Table: spoof.Name, Name: "pod-arp"}
	n.kern.SetRuleCounts(arp, 3, 0, 0, 4)
	n.wantSeries(t, map[string]float64{"tweed_spoof_drops_total arp": 7, "tweed_spoof_drops_total ipv4": 0,
		"tweed_spoof_drops_total ra": 0, "tweed_spoof_drops_total dhcp": 0})
	n.kern.SetRuleCounts(arp, 3) // somebody has changed the chain
	n.wantSeries(t, map[string]float64{"tweed_spoof_drops_total arp": 0})
	n.planner.Config.Spoofing.All = true
	n.step(t)
	if _, there := n.scrape(t)["tweed_spoof_drops_total arp"]; there {
		t.Error("counted where it is allowed")
	}
}

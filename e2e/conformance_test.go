package e2e

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/onsi/ginkgo/v2/types"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/world"
)

var wide = flag.Bool("wide", false, "TestConformance runs every spec that can run here and writes docs/conformance.md")

// A leftOut is a kind of spec that does not run, by words in its name or among its labels.
type leftOut struct{ words, reason string }

// leftOuts are the specs of sig-network that cannot run on these hosts, or are not about a pod network.
func leftOuts() []leftOut {
	return []leftOut{
		{`SCTP`, "the kernel of the hosts has no SCTP"},
		{`LoadBalancer|load balancer`, "there is no cloud to balance load"},
		{`Feature:NetworkPolicy|NetworkPolicy|Netpol`, "tweed enforces no NetworkPolicy"},
		{`Ingress|Gateway`, "an ingress controller's, not a pod network's"},
		{`Internet|internet|outbound|external DNS`, "the hosts reach no internet"},
		{`Serial|Disruptive`, "it changes or needs the whole cluster for itself; specs here run side by side"},
		{`Feature:Networking-Performance|iperf`, "a measurement without a floor; docs/performance.md has those"},
		{`ClusterTrustBundle|Windows|GCE|gce|kubemci|NEG`, "for another platform"},
		{`Slow`, "more than five minutes each"},
	}
}

// known are specs that fail, with the reason.
var known = map[string]string{
	"Services should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes": "a host that " +
		"calls its own NodePort is masqueraded by kube-proxy to the address of the tunnel's device, not to the node's",
}

// TestConformance runs the part of Kubernetes' own test suite that is about networks against a cluster that nothing but
// the manifest was applied to.
func TestConformance(t *testing.T) {
	k := startKube(t, 3, cluster.HostOptions{ProxyMode: "iptables", PodCIDRs: []string{"10.244.0.0/16"}})
	k.install(t, "-f", manifest)
	k.prepareForSuite(t)
	narrow := suiteRun{focus: `\[sig-network\].*\[Conformance\]|\[sig-network\].*Granular Checks`, skip: `SCTP|IPv6DualStack`, least: 47 + 17}
	if !*wide {
		k.runSuite(t, narrow)
		return
	}
	single := k.runSuite(t, suiteRun{focus: `\[sig-network\]`, skip: skipAll() + `|IPv6DualStack|DualStack`, least: 100})
	k.writeConformance(t, single)
}

// prepareForSuite gives the cluster what the suite takes for granted.
func (k *kube) prepareForSuite(t *testing.T) {
	t.Helper()
	for i, h := range k.Hosts {
		k.Kubectl(t, "label", "node", h.Name, fmt.Sprintf("topology.kubernetes.io/zone=zone%d", i), "--overwrite")
		for _, cidr := range k.podCIDRs(t, h.Name) { // the control plane is no node, and is to reach pods all the same
			k.ControlPlane().Run(t, "ip route replace "+cidr.subnet+" via "+cidr.host)
		}
	}
}

type route struct{ subnet, host string }

func (k *kube) podCIDRs(t *testing.T, node string) (routes []route) {
	t.Helper()
	for i, cidr := range strings.Split(k.annotation(t, node, "tweed.dev/subnets"), ",") {
		routes = append(routes, route{cidr, k.Host(node).Addrs[i].String()})
	}
	return routes
}

func skipAll() string {
	var all []string
	for _, l := range leftOuts() {
		all = append(all, l.words)
	}
	return strings.Join(all, "|")
}

// A suiteRun says which specs run, as regular expressions of their names, and how many there are at least.
type suiteRun struct {
	focus, skip string
	least       int
}

// runSuite runs specs side by side and fails the test for each that fails.
func (k *kube) runSuite(t *testing.T, r suiteRun) []types.SpecReport {
	t.Helper()
	p := programs(t)
	dir := filepath.Join(world.Dir, "suite")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	budget := 15 * time.Minute
	if *wide {
		budget = 40 * time.Minute
	}
	cmd := k.KubectlCommand(t.Context()) // for its environment
	cmd.Path, cmd.Dir = p.Ginkgo, dir
	cmd.Args = []string{"ginkgo", "--procs=12", "--timeout=" + budget.String(), "--focus=" + r.focus, "--skip=" + r.skip,
		"--json-report=report.json", "--output-dir=" + dir, "--no-color", "--succinct", p.Suite, "--",
		"--provider=skeleton", "--kubeconfig=" + k.AdminKubeconfig(), "--kubectl-path=" + p.Kube("kubectl"),
		fmt.Sprintf("--num-nodes=%d", len(k.Hosts)), "--node-os-distro=debian"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begun := time.Now()
	err := k.ControlPlane().Do(cmd.Run)
	text, rerr := os.ReadFile(filepath.Join(dir, "report.json"))
	if rerr != nil {
		t.Fatalf("the suite left no report: %v, %v\n%s", err, rerr, out.String())
	}
	var reports []types.Report
	if err := json.Unmarshal(text, &reports); err != nil {
		t.Fatal(err)
	}
	specs := k.judge(t, reports)
	k.Progress("figure: %d specs in %.0f s", len(specs), time.Since(begun).Seconds())
	if len(specs) < r.least {
		t.Errorf("%d specs ran, want at least %d\n%s", len(specs), r.least, tail(out.String(), 60))
	}
	return specs
}

// judge returns the specs that ran, and fails the test for those that failed and are not known to.
func (k *kube) judge(t *testing.T, reports []types.Report) (ran []types.SpecReport) {
	t.Helper()
	for _, r := range reports {
		for _, s := range r.SpecReports {
			if s.LeafNodeType != types.NodeTypeIt || s.State == types.SpecStatePending || s.State == types.SpecStateSkipped {
				continue
			}
			ran = append(ran, s)
			if !s.State.Is(types.SpecStateFailureStates) {
				continue
			}
			if reason, ok := known[plainName(s)]; ok {
				t.Logf("known: %s: %s", s.FullText(), reason)
				continue
			}
			t.Errorf("%s: %s\n%s\n%s", s.FullText(), s.State, s.FailureMessage(), tail(s.CombinedOutput(), 40))
		}
	}
	return ran
}

var bracketed = regexp.MustCompile(`\s*\[[^]]*\]`)

// plainName is a spec's name without labels.
func plainName(s types.SpecReport) string {
	return strings.TrimSpace(bracketed.ReplaceAllString(s.FullText(), ""))
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// writeConformance writes docs/conformance.md.
func (k *kube) writeConformance(t *testing.T, specs []types.SpecReport) {
	t.Helper()
	slices.SortFunc(specs, func(a, b types.SpecReport) int { return strings.Compare(a.FullText(), b.FullText()) })
	var b strings.Builder
	fmt.Fprintf(&b, "# Conformance\n\n`make conformance` wrote this: specs of Kubernetes' own test suite for sig-network, on three "+
		"nodes with\nnothing but `manifests/tweed.yaml` applied. Written by Kubernetes' ginkgo, side by side, on 2 cores.\n\n"+
		"| Spec | Result | Seconds |\n| --- | --- | --- |\n")
	for _, s := range specs {
		fmt.Fprintf(&b, "| %s | %s | %.0f |\n", strings.ReplaceAll(s.FullText(), "|", "\\|"), s.State, s.RunTime.Seconds())
	}
	fmt.Fprintf(&b, "\n## Left out\n\n| Specs with these words | Because |\n| --- | --- |\n")
	for _, l := range leftOuts() {
		fmt.Fprintf(&b, "| %s | %s |\n", strings.ReplaceAll(l.words, "|", ", "), l.reason)
	}
	fmt.Fprintf(&b, "\n## Known to fail\n\n")
	for name, reason := range known {
		fmt.Fprintf(&b, "- %s: %s.\n", name, reason)
	}
	if err := os.WriteFile("../docs/conformance.md", []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

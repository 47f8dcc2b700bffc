package e2e

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
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
		{`LoadBalancer|[Ll]oad balancer|Load Balancer`, "there is no cloud to balance load"},
		{`NetworkPolicy|Netpol`, "tweed enforces no NetworkPolicy"},
		{`Ingress|Gateway`, "an ingress controller's, not a pod network's"},
		{`Internet|internet|outbound|external DNS`, "the hosts reach no internet"},
		{`\[Serial\]|\[Disruptive\]`, "it changes or needs the whole cluster for itself; specs here run side by side"},
		{`Networking-Performance|iperf`, "a measurement without a floor; docs/performance.md has those"},
		{`ClusterTrustBundle|Windows|GCE|gce|kubemci|NEG`, "for another platform"},
		{`\[Slow\]`, "more than five minutes each"},
		{`CLOSE_WAIT`, "it pulls an image that only a registry has"},
	}
}

// TestConformance runs the part of Kubernetes' own test suite that is about networks against a cluster that nothing but
// the manifest was applied to.
func TestConformance(t *testing.T) {
	single := cluster.HostOptions{ProxyMode: "iptables", PodCIDRs: []string{"10.244.0.0/16"}}
	if !*wide {
		k := suiteCluster(t, single, "-f", manifest)
		k.runSuite(t, suiteRun{
			focus: `\[sig-network\].*\[Conformance\]|\[sig-network\].*Granular Checks`, skip: `SCTP|IPv6DualStack`, least: 47 + 17,
		})
		return
	}
	var specs []types.SpecReport
	t.Run("SingleStack", func(t *testing.T) {
		k := suiteCluster(t, single, "-f", manifest)
		specs = append(specs, k.runSuite(t, suiteRun{focus: `\[sig-network\]`, skip: skipped(leftOuts()) + `|` + dualOnly, least: 100})...)
	})
	t.Run("DualStack", func(t *testing.T) {
		k := suiteCluster(t, cluster.HostOptions{
			ProxyMode: "nftables", PodCIDRs: []string{"10.244.0.0/16", "fd00:10:244::/48"},
		}, "-k", dualManifest)
		specs = append(specs, k.runSuite(t, suiteRun{focus: `\[sig-network\].*(` + dualOnly + `)`, skip: skipped(leftOuts()), least: 10})...)
	})
	writeConformance(t, specs)
}

// dualOnly are the specs that need a cluster with both families.
const dualOnly = `IPv6DualStack`

func suiteCluster(t *testing.T, o cluster.HostOptions, how ...string) *kube {
	t.Helper()
	k := startKube(t, 3, o)
	k.install(t, how...)
	k.prepareForSuite(t)
	return k
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

func skipped(kinds []leftOut) string {
	var all []string
	for _, l := range kinds {
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
	specs := sigNetwork(reports)
	ran := 0
	for _, spec := range specs {
		if didRun(spec) {
			ran++
			judge(t, spec)
		}
	}
	k.Progress("figure: %d specs in %.0f s", ran, time.Since(begun).Seconds())
	if ran < r.least {
		t.Errorf("%d specs ran, want at least %d\n%s", ran, r.least, tail(out.String(), 60))
	}
	return specs
}

// sigNetwork picks the specs about networks, whether or not they ran.
func sigNetwork(reports []types.Report) (specs []types.SpecReport) {
	for _, r := range reports {
		for _, s := range r.SpecReports {
			if s.LeafNodeType == types.NodeTypeIt && strings.Contains(s.FullText(), "[sig-network]") {
				specs = append(specs, s)
			}
		}
	}
	return specs
}

func didRun(s types.SpecReport) bool {
	return s.State != types.SpecStatePending && s.State != types.SpecStateSkipped
}

// judge fails the test for a spec that failed.
func judge(t *testing.T, s types.SpecReport) {
	t.Helper()
	if !s.State.Is(types.SpecStateFailureStates) {
		return
	}
	t.Errorf("%s: %s\n%s\n%s", s.FullText(), s.State, s.FailureMessage(), tail(s.CombinedOutput(), 40))
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// writeConformance writes docs/conformance.md from the specs of all runs.
func writeConformance(t *testing.T, specs []types.SpecReport) {
	t.Helper()
	slices.SortFunc(specs, func(a, b types.SpecReport) int { return strings.Compare(a.FullText(), b.FullText()) })
	ran := map[string]bool{}
	var table, out strings.Builder
	for _, s := range specs {
		if didRun(s) {
			ran[s.FullText()] = true
			fmt.Fprintf(&table, "| %s | %s | %.0f |\n", cell(s.FullText()), s.State, s.RunTime.Seconds())
		}
	}
	reasons := map[string]string{} // a spec that one run has selected and skipped itself has its own
	for _, s := range specs {
		if name := s.FullText(); !ran[name] {
			reasons[name] = cmp.Or(s.Failure.Message, reasons[name], whyNot(s))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(reasons)) {
		if reasons[name] == "" {
			t.Errorf("nobody says why this spec is left out: %s", name)
		}
		fmt.Fprintf(&out, "| %s | %s |\n", cell(name), cell(reasons[name]))
	}
	text := fmt.Sprintf(conformanceText, len(ran), table.String(), out.String())
	if err := os.WriteFile("../docs/conformance.md", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

const conformanceText = `# Conformance

` + "`make conformance`" + ` wrote this. It runs the specs of Kubernetes' own test suite that are about networks (sig-network): first
on three nodes with nothing but ` + "`manifests/tweed.yaml`" + ` applied and kube-proxy in iptables mode, then those for two families
on three dual-stack nodes with kube-proxy in nftables mode. Twelve run side by side, on 2 cores.

%d specs ran:

| Spec | Result | Seconds |
| --- | --- | --- |
%s
Left out:

| Spec | Because |
| --- | --- |
%s`

func cell(text string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", "\\|")
}

// whyNot is our reason for which a spec did not run.
func whyNot(s types.SpecReport) string {
	if s.State == types.SpecStatePending {
		return "upstream has put it off"
	}
	for _, l := range leftOuts() {
		if regexp.MustCompile(l.words).MatchString(s.FullText()) {
			return l.reason
		}
	}
	return ""
}

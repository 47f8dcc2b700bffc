package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "tweed.dev/tweed/"

// ours says which of our packages each may import, and why not others. Tests may import more.
var ours = map[string][]string{
	"subnet":                   {},
	"subnet/kube":              {"subnet"},
	"subnet/local":             {"subnet"},
	"backend":                  {"subnet"},
	"backend/vxlan":            {"backend", "subnet"},
	"backend/hostgw":           {"backend", "subnet"},
	"backend/bridge":           {"backend", "subnet"},
	"backend/spoof":            {"backend"},
	"backend/masq":             {"backend", "backend/spoof", "subnet"},
	"backend/kernel":           {"backend", "backend/masq", "backend/spoof"},
	"backend/kernel/netnstest": {},
	"overlay/podnet":           {"backend", "backend/spoof"},
	"overlay/lab":              {"overlay/podnet"},
	"overlay": {"subnet", "backend", "backend/vxlan", "backend/hostgw", "backend/bridge", "backend/masq",
		"backend/spoof", "overlay/podnet"},
	"cmd/tweed-cni": {"overlay/podnet"},
	"cmd/tweed": {"subnet", "subnet/kube", "subnet/local", "backend", "backend/vxlan", "backend/bridge",
		"backend/masq", "backend/kernel", "overlay", "overlay/podnet", "overlay/lab"},
}

// homes says where a library may be imported, and why nowhere else.
var homes = []struct {
	library string
	in      []string
	why     string
}{
	{"k8s.io/", []string{"subnet/kube", "cmd/tweed"},
		"what becomes of leases must not depend on where they come from"},
	{"github.com/vishvananda/netlink", []string{"backend/kernel", "overlay/podnet"},
		"everything else says what the kernel should hold, as values"},
	{"github.com/spf13/cobra", []string{"cmd/tweed"},
		"below the commands there are arguments, not flags"},
	{"github.com/spf13/pflag", []string{"cmd/tweed"},
		"below the commands there are arguments, not flags"},
	{"github.com/fsnotify/fsnotify", []string{"subnet/local", "overlay"},
		"leases in files and net-conf.json are watched, nothing else is"},
	{"github.com/prometheus/", []string{"overlay"},
		"what is counted is in Reports; how it is told is the daemon's business alone"},
	{"github.com/containernetworking/cni", []string{"overlay/podnet", "overlay/lab", "cmd/tweed-cni"},
		"the daemon speaks to pods' runtimes by files alone"},
}

// TestPackageImportsWhatItMustNot holds the import map of ARCHITECTURE.md.
func TestPackageImportsWhatItMustNot(t *testing.T) {
	seen := map[string]bool{}
	for _, line := range goList(t, "-f", "{{.ImportPath}} {{join .Imports \" \"}}", "./...") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(fields[0], module)
		seen[pkg] = true
		allowed, known := ours[pkg]
		if !known {
			t.Errorf("%s is not in the import map: say in ARCHITECTURE.md and here what it may import", pkg)
		}
		for _, imp := range fields[1:] {
			checkImport(t, pkg, imp, allowed)
		}
	}
	for pkg := range ours {
		if !seen[pkg] {
			t.Errorf("%s is in the import map and not in the tree", pkg)
		}
	}
}

func checkImport(t *testing.T, pkg, imp string, allowed []string) {
	t.Helper()
	if own, ok := strings.CutPrefix(imp, module); ok {
		if !slices.Contains(allowed, own) {
			t.Errorf("%s imports %s; it may import %v: see the import map in ARCHITECTURE.md for the reason", pkg, own, allowed)
		}
		return
	}
	if pkg == "subnet" && strings.Contains(imp, ".") {
		t.Errorf("subnet imports %s; it needs the standard library alone", imp)
	}
	for _, h := range homes {
		if strings.HasPrefix(imp, h.library) && !slices.Contains(h.in, pkg) {
			t.Errorf("%s imports %s, which only %v may: %s", pkg, imp, h.in, h.why)
		}
	}
}

// TestPluginPullsInMoreThanItNeeds keeps what starts for every pod small.
func TestPluginPullsInMoreThanItNeeds(t *testing.T) {
	allowed := []string{
		"github.com/containernetworking/cni/", "github.com/vishvananda/netlink", "github.com/vishvananda/netns",
		"golang.org/x/sys/", module + "overlay/podnet", module + "cmd/tweed-cni",
		module + "backend/", module + "subnet/", // plain values: whose link is whose, what a MAC is
	}
	for _, dep := range goList(t, "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", module+"cmd/tweed-cni") {
		if !slices.ContainsFunc(allowed, func(a string) bool { return strings.HasPrefix(dep+"/", a) && dep != module+"backend/kernel" }) {
			t.Errorf("cmd/tweed-cni pulls in %s; it starts for every pod, so it has only %v", dep, allowed)
		}
	}
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = "../.."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

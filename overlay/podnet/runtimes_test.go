package podnet

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// A cniProgram is one that calls the plugin by the configuration that the daemon writes.
type cniProgram struct {
	n       *node
	program string
	confDir string
	cache   string
	env     []string
}

// cniPrograms builds, once, cnitool, and one with an older libcni, which is a module of its own.
var cniPrograms = sync.OnceValues(func() (string, error) {
	const dir = "/run/bin/"
	for _, build := range [][]string{
		{"-o", dir, "github.com/containernetworking/cni/cnitool"},
		{"-C", "testdata/libcni-1.1.2", "-o", dir, "."},
	} {
		args := []string{"build"}
		if build[0] == "-C" {
			args, build = append(args, build[:2]...), build[2:]
		}
		cmd := exec.Command("go", append(args, build...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%w: %s (make unit downloads what they need)", err, out)
		}
	}
	return dir, nil
})

func newProgram(t *testing.T, n *node, program string) cniProgram {
	t.Helper()
	dir, err := cniPrograms()
	if err != nil {
		t.Fatal(err)
	}
	r := cniProgram{n: n, program: dir + program, confDir: t.TempDir(), cache: t.TempDir()}
	conf := fmt.Sprintf(`{"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "1.1.0"], "name": "tweed", "plugins": [
		{"type": "tweed-cni", "runDir": %q, "capabilities": {"portMappings": true, "bandwidth": true}}]}`, n.runDir)
	r.env = append(os.Environ(), "CNI_PATH="+pluginDir(t), "NETCONFPATH="+r.confDir, "CNI_CACHE=/var/lib")
	if err := os.WriteFile(r.conf(), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r cniProgram) conf() string { return filepath.Join(r.confDir, "10-tweed.conflist") }

// call runs the program on the node, with a directory of the test's for what libcni keeps in /var/lib.
func (r cniProgram) call(args ...string) (string, error) {
	r.n.t.Helper()
	cmd := exec.Command("unshare", append([]string{
		"--mount", "sh", "-c", `mount --bind "$0" /var/lib && exec "$@"`, r.cache, r.program}, args...)...)
	cmd.Env = r.env
	var out []byte
	var err error
	r.n.Do(r.n.t, func() { out, err = cmd.CombinedOutput() })
	return string(out), err
}

func (r cniProgram) must(args ...string) string {
	r.n.t.Helper()
	out, err := r.call(args...)
	if err != nil {
		r.n.t.Errorf("%v: %v: %s", args, err, out)
	}
	return out
}

// fails sees that a call ends with an error that says so.
func (r cniProgram) fails(says string, args ...string) {
	r.n.t.Helper()
	if out, err := r.call(args...); err == nil || !strings.Contains(out, says) {
		r.n.t.Errorf("%v: %v, without %q: %s", args, err, says, out)
	}
}

func wantResult(t *testing.T, text, version string) {
	t.Helper()
	var result struct {
		CNIVersion string
		IPs        []struct{ Address string }
	}
	if err := json.Unmarshal([]byte(text), &result); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if result.CNIVersion != version || len(result.IPs) != 2 {
		t.Errorf("the result of version %s, with %v; want %s", result.CNIVersion, result.IPs, version)
	}
}

func TestRuntimeHasAnOlderLibcni(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	r := newProgram(t, n, "libcni")
	pod := netnstest.New(t)
	netns := pod.Path()
	wantResult(t, r.must("ADD", r.conf(), "one", netns), "1.0.0")
	r.must("CHECK", r.conf(), "one", netns)
	reach(t, pod, "10.244.3.1")
	r.fails("already has interface eth0", "ADD", r.conf(), "one", netns)
	pod.Run(t, "ip link set eth0 down")
	r.fails("interface eth0 is down", "CHECK", r.conf(), "one", netns)
	r.must("DEL", r.conf(), "one", netns)
	r.must("DEL", r.conf(), "one", netns)
	n.wantNothing("DEL")
	r.fails("there is no network namespace", "ADD", r.conf(), "two", "/run/netns/none")
	n.wantNothing("the failed ADD")
}

func TestAdministratorUsesCnitool(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	r := newProgram(t, n, "cnitool")
	pod, other := netnstest.New(t), netnstest.New(t)
	r.must("status", "tweed", pod.Path())
	wantResult(t, r.must("add", "tweed", pod.Path()), "1.1.0")
	wantResult(t, r.must("add", "tweed", other.Path()), "1.1.0")
	r.must("check", "tweed", pod.Path())
	reach(t, pod, "10.244.3.1")
	pod.Run(t, "ip route del default")
	r.fails("no default route via 10.244.3.1", "check", "tweed", pod.Path())
	r.must("del", "tweed", pod.Path())
	r.must("del", "tweed", pod.Path())
	if left := names(t, filepath.Join(n.runDir, "addrs")); len(left) != 2 {
		t.Errorf("taken: %v", left)
	}
	// It calls DEL for all that it has added, and GC without a list: another runtime's pods stay.
	n.mustAdd("theirs", pod)
	r.must("gc", "tweed", pod.Path())
	n.wantPods("gc", "theirs")
	n.Run(t, "ip link del tweed0")
	r.fails("tweed0 is missing", "status", "tweed", pod.Path())
}

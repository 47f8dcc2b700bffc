package podnet

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// valid is the list of attachments for GC, as JSON: container names, each with its interface where that is not eth0.
func valid(t testing.TB, attachments ...string) string {
	t.Helper()
	list := []types.GCAttachment{}
	for _, a := range attachments {
		container, iface, ok := strings.Cut(a, "/")
		if !ok {
			iface = "eth0"
		}
		list = append(list, types.GCAttachment{ContainerID: container, IfName: iface})
	}
	text, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// gcInput is a network configuration with a list of valid attachments, or with no such key where list is "".
func (n *node) gcInput(network, list string) string {
	key := ""
	if list != "" {
		key = `, "cni.dev/valid-attachments": ` + list
	}
	return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "type": "tweed-cni", "runDir": %q%s}`, network, n.runDir, key)
}

// gc calls the plugin itself: libcni would call DEL first for what it remembers.
func (n *node) gc(list string, env ...string) error {
	n.t.Helper()
	return n.call("GC", n.gcInput("tweed", list), env...)
}

// wantPods sees that just these containers' first interfaces are on record, and have a veth.
func (n *node) wantPods(after string, containers ...string) {
	n.t.Helper()
	var want []string
	for _, c := range containers {
		want = append(want, vethName(c, "eth0"))
	}
	slices.Sort(want)
	have := names(n.t, filepath.Join(n.runDir, "pods"))
	slices.Sort(have)
	if !slices.Equal(have, want) {
		n.t.Errorf("after %s: on record: %v, want %v of %v", after, have, want, containers)
	}
	for _, veth := range want {
		if !strings.Contains(strings.Join(n.ports(), " "), veth) {
			n.t.Errorf("after %s: %s is gone", after, veth)
		}
	}
	if have := strings.Count(n.Run(n.t, "ip -brief link show type veth"), "\n"); have != len(want) {
		n.t.Errorf("after %s: %d veths, want %d", after, have, len(want))
	}
}

func TestGCLeavesWhatIsNotValid(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.filter()
	living, stale := netnstest.New(t), netnstest.New(t)
	n.mustAdd("living", living)
	n.mustAdd("stale", stale)
	n.wishing("ports", netnstest.New(t), both()).mustAdd()
	if err := n.gc(valid(t, "living", "unheard-of"), "PATH="+os.Getenv("PATH")); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.wantPods("GC", "living")
	n.wantNoDelegates("GC")
	if err := n.check("living", living.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if left := names(t, filepath.Join(n.runDir, "addrs")); len(left) != 2 {
		t.Errorf("taken: %v", left)
	}
	if err := n.gc(valid(t)); err != nil {
		t.Errorf("GC of all: %v", err)
	}
	n.wantNothing("GC of all")
}

func TestGCTakesOneInterfaceForAnother(t *testing.T) {
	n := newNode(t, subnet4)
	pod := netnstest.New(t)
	n.mustAdd("one", pod)
	second := runtimeConf("one", pod.Path())
	second.IfName = "net1"
	pod.Run(t, "ip route del default")
	if _, err := n.addAs(second, n.conflist("1.1.0")); err != nil {
		t.Fatal(err)
	}
	if err := n.gc(valid(t, "one/net1", "on/eeth0")); err != nil {
		t.Errorf("GC: %v", err)
	}
	if got := names(t, filepath.Join(n.runDir, "pods")); len(got) != 1 || got[0] != vethName("one", "net1") {
		t.Errorf("on record: %v", got)
	}
}

func TestGCIsNotToldWhatIsValid(t *testing.T) {
	n := newNode(t, subnet4)
	n.mustAdd("living", netnstest.New(t))
	n.mustAdd("dead", netnstest.New(t))
	n.Run(t, "ip link del "+vethName("dead", "eth0"))
	for _, list := range []string{`"all"`, `[{"containerID": "living"}]`, `[{"ifname": "eth0"}]`, `[{}]`, `{}`} {
		wantCode(t, list, n.gc(list), 7, validKey)
		if got := names(t, filepath.Join(n.runDir, "pods")); len(got) != 2 {
			t.Errorf("%s: on record: %v", list, got)
		}
	}
	if err := n.gc(""); err != nil {
		t.Errorf("GC without a list: %v", err)
	}
	n.wantPods("GC without a list", "living")
	if err := n.gc("null"); err != nil { // a list that was never appended to, in the words of a Go program
		t.Errorf("GC with an empty list: %v", err)
	}
	n.wantNothing("GC with an empty list")
}

func TestGCIsCalledInAnOlderVersion(t *testing.T) {
	n := newNode(t, subnet4)
	n.mustAdd("one", netnstest.New(t))
	for _, version := range []string{"0.4.0", "1.0.0"} {
		text := strings.Replace(n.gcInput("tweed", "[]"), "1.1.0", version, 1)
		wantCode(t, version, n.call("GC", text), 1)
	}
	n.wantPods("GC", "one")
}

func TestGCMeetsAnAddAtWork(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	g := newGate(t)
	pod := netnstest.New(t)
	n.mustAdd("stale", netnstest.New(t))
	add := n.start(g, pod)
	if err := n.gc(valid(t)); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.wantPods("GC", "one")
	g.open(t)
	if err := add.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := n.checkAgainst("one", pod.Path(), fmt.Sprint(add.Stdout), "PATH="+os.Getenv("PATH")); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

// TestAddEndsWhileGCIsAtWork has GC see the pod's record free, of which its list cannot tell.
func TestAddEndsWhileGCIsAtWork(t *testing.T) {
	n := newNode(t, subnet4)
	slowly := newGate(t)
	if err := os.Rename(filepath.Join(slowly.dir, "portmap"), filepath.Join(slowly.dir, "bandwidth")); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\ncat > /dev/null\ncd " + slowly.dir + `
		echo '{"cniVersion": "1.0.0"}'
		if [ $CNI_COMMAND = DEL ]; then
			touch reached
			while [ ! -e open ]; do sleep 0.01; done
		fi`
	if err := os.WriteFile(filepath.Join(slowly.dir, "bandwidth"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	n.usePlugins(slowly.dir, pluginDir(t))
	for i := range 5 { // GC comes by some of them before it comes by the pod
		n.wishing(fmt.Sprint("stale", i), netnstest.New(t), slow()).mustAdd()
	}

	g, pod := newGate(t), netnstest.New(t)
	add := n.start(g, pod)
	gc := n.command("GC", "", "", n.gcInput("tweed", valid(t)))
	gc.Env = append(gc.Env, "PATH="+os.Getenv("PATH"), "CNI_PATH="+slowly.dir)
	var out bytes.Buffer
	gc.Stdout, gc.WaitDelay = &out, time.Minute
	var err error
	n.Do(t, func() { err = gc.Start() })
	if err != nil {
		t.Fatal(err)
	}
	await(t, "GC to be at work", slowly.reached)
	g.open(t)
	if err := add.Wait(); err != nil {
		t.Fatal(err)
	}
	slowly.open(t)
	if err := gc.Wait(); err != nil {
		t.Errorf("GC: %v: %s", err, &out)
	}
	n.wantPods("GC", "one")
	if err := n.checkAgainst("one", pod.Path(), fmt.Sprint(add.Stdout), "PATH="+os.Getenv("PATH")); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

func TestGCMeetsAnotherNetwork(t *testing.T) {
	n := newNode(t, subnet4)
	n.mustAdd("one", netnstest.New(t))
	theirs := n.conflist("1.1.0")
	theirs.Name = "theirs"
	if _, err := n.addAs(runtimeConf("two", netnstest.New(t).Path()), theirs); err != nil {
		t.Fatal(err)
	}
	n.mustAdd("lost", netnstest.New(t)) // of a network that nobody knows
	n.mustAdd("unread", netnstest.New(t))
	lose(t, n, "lost")
	if err := os.Truncate(filepath.Join(n.runDir, "pods", vethName("unread", "eth0")), 0); err != nil {
		t.Fatal(err)
	}
	if err := n.gc(valid(t)); err != nil {
		t.Errorf("GC: %v", err)
	}
	ports := strings.Join(n.ports(), " ")
	for container, want := range map[string]bool{"one": false, "two": true, "lost": true, "unread": true} {
		if have := strings.Contains(ports, vethName(container, "eth0")); have != want {
			t.Errorf("%s has a veth: %t, want %t", container, have, want)
		}
	}
	if err := n.call("GC", n.gcInput("theirs", valid(t, "lost"))); err != nil {
		t.Errorf("GC of the other network: %v", err)
	}
	ports = strings.Join(n.ports(), " ")
	for container, want := range map[string]bool{"two": false, "lost": true, "unread": false} {
		if have := strings.Contains(ports, vethName(container, "eth0")); have != want {
			t.Errorf("where the network is alone, %s has a veth: %t, want %t", container, have, want)
		}
	}
	if err := n.gc(valid(t)); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.wantNothing("GC where there is no sign of another network")
}

// lose removes what is on record of a pod.
func lose(t *testing.T, n *node, container string) {
	t.Helper()
	s := &store{runDir: n.runDir}
	h, err := s.find(container, "eth0")
	if err != nil || h == nil {
		t.Fatal(h, err)
	}
	if _, err := h.free(); err != nil {
		t.Fatal(err)
	}
}

func TestGCCannotTakeOneAway(t *testing.T) {
	n := newNode(t, subnet4)
	n.wishing("one", netnstest.New(t), slow()).mustAdd()
	n.mustAdd("two", netnstest.New(t))
	n.mustAdd("three", netnstest.New(t))
	failing := fakes(t, map[string]string{"bandwidth": `echo '{"code": 123, "msg": "no"}'; exit 1`})
	err := n.gc(valid(t, "three"), "CNI_PATH="+failing, "PATH="+os.Getenv("PATH"))
	if err == nil || !strings.Contains(err.Error(), "container one") || !strings.Contains(err.Error(), "stay taken") {
		t.Errorf("GC: %v", err)
	}
	if got := names(t, filepath.Join(n.runDir, "addrs")); len(got) != 2 {
		t.Errorf("taken: %v", got)
	}
	if err := n.gc(valid(t, "three"), "PATH="+os.Getenv("PATH")); err != nil {
		t.Errorf("GC with a plugin that works: %v", err)
	}
	n.wantPods("GC", "three")
}

func TestRuntimeCollectsThroughLibcni(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	n.mustAdd("living", pod)
	n.mustAdd("stale", netnstest.New(t))
	n.mustAdd("forgotten", netnstest.New(t))
	for _, file := range must(filepath.Glob(n.cache + "/results/*forgotten*")) {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	n.Do(t, func() {
		err = n.cni.GCNetworkList(t.Context(), n.conflist("1.1.0"), &libcni.GCArgs{
			ValidAttachments: []types.GCAttachment{{ContainerID: "living", IfName: "eth0"}},
		})
	})
	if err != nil {
		t.Errorf("GC: %v", err)
	}
	n.wantPods("GC", "living")
	if err := n.check("living", pod.Path()); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/e2e/cluster"
)

// A remembered is what containerd keeps of an ADD, in libcni's words.
type remembered struct {
	ContainerID string
	IfName      string
	NetworkName string
	Result      struct {
		IPs []struct{ Address netip.Prefix }
	}

	result json.RawMessage
}

// attachments are those of a host's pods, by address.
func attachments(t *testing.T, h *cluster.Host) map[netip.Addr]remembered {
	t.Helper()
	files, err := filepath.Glob(h.Path("/var/lib/cni/results/tweed-*"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[netip.Addr]remembered{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var a remembered
		var whole struct{ Result json.RawMessage }
		if err := json.Unmarshal(text, &a); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if err := json.Unmarshal(text, &whole); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		a.result = whole.Result
		for _, ip := range a.Result.IPs {
			found[ip.Address.Addr()] = a
		}
	}
	return found
}

// plugin calls a host's tweed-cni as a runtime would.
func plugin(h *cluster.Host, verb string, conf map[string]any, env ...string) error {
	conf["type"], conf["name"] = "tweed-cni", "tweed"
	text, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	argv := append([]string{"env", "CNI_COMMAND=" + verb, "CNI_PATH=/opt/cni/bin"}, env...)
	cmd := h.Command(append(argv, "/opt/cni/bin/tweed-cni")...)
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", verb, env, err, out)
	}
	return nil
}

// check asks the plugin whether a pod is attached as containerd remembers.
func (a remembered) check(t *testing.T, h *cluster.Host) error {
	t.Helper()
	ns, err := h.PodNetNS(a.Result.IPs[0].Address.Addr())
	if err != nil {
		return err
	}
	return plugin(h, "CHECK", map[string]any{"cniVersion": "1.0.0", "prevResult": a.result}, "CNI_IFNAME="+a.IfName,
		"CNI_CONTAINERID="+a.ContainerID, "CNI_NETNS=/run/netns/"+filepath.Base(ns.Path))
}

// collect tells the plugin that these are all attachments that there are.
func collect(h *cluster.Host, valid []remembered) error {
	list := []map[string]string{}
	for _, a := range valid {
		list = append(list, map[string]string{"containerID": a.ContainerID, "ifname": a.IfName})
	}
	return plugin(h, "GC", map[string]any{"cniVersion": "1.1.0", "cni.dev/valid-attachments": list})
}

// taken are the addresses of a host's pods, as `tweed subnet addresses` in the daemon's pod has them, by container.
func (k *kube) taken(t *testing.T, host string) map[netip.Addr]string {
	t.Helper()
	out := k.Kubectl(t, "--namespace=tweed", "exec", k.daemonPods(t)[host].Name, "--", "tweed", "subnet", "addresses",
		"-o", "json")
	var said struct {
		Addresses []struct {
			Address   netip.Addr
			Container string
		}
	}
	if err := json.Unmarshal([]byte(out), &said); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	taken := map[netip.Addr]string{}
	for _, a := range said.Addresses {
		taken[a.Address] = a.Container
	}
	return taken
}

// verbs calls what containerd does not, CHECK and GC, for pods that containerd has attached.
func (k *kube) verbs(t *testing.T) {
	cluster.AwaitLong(t, "the pods of earlier stories to be gone", 2*time.Minute, func() error {
		namespaces, err := k.API.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, n := range namespaces.Items {
			if n.DeletionTimestamp != nil {
				return fmt.Errorf("namespace %s is on its way out", n.Name)
			}
		}
		return nil
	})
	s, h := k.story(t), k.Host("n1")
	stays, goes := s.server("stays", "n1"), s.server("goes", "n1")
	all := attachments(t, h)
	for _, pod := range []corev1.Pod{stays, goes} {
		for _, ip := range pod.Status.PodIPs {
			a, ok := all[netip.MustParseAddr(ip.IP)]
			if !ok {
				t.Fatalf("containerd has no record of %s, %s", pod.Name, ip.IP)
			}
			if got := k.taken(t, "n1")[netip.MustParseAddr(ip.IP)]; got != a.ContainerID {
				t.Errorf("subnet addresses: %s is container %q's, want %s", ip.IP, got, a.ContainerID)
			}
		}
	}
	gone := all[netip.MustParseAddr(goes.Status.PodIP)]
	var valid, others []remembered
	for _, a := range all {
		valid = append(valid, a)
		if a.ContainerID != gone.ContainerID {
			others = append(others, a)
		}
	}
	before := len(k.taken(t, "n1"))
	if err := collect(h, valid); err != nil {
		t.Error(err)
	}
	for _, a := range valid {
		if err := a.check(t, h); err != nil {
			t.Errorf("after a GC that it is valid for: %v", err)
		}
	}
	if err := collect(h, others); err != nil {
		t.Error(err)
	}
	for _, a := range others {
		if err := a.check(t, h); err != nil {
			t.Errorf("after the GC of another: %v", err)
		}
	}
	if after := len(k.taken(t, "n1")); before-after != len(goes.Status.PodIPs) {
		t.Errorf("%d addresses were taken, and %d are after GC", before, after)
	}
	s.kubectl("delete", "pod", "goes", "--timeout=1m") // whose DEL finds nothing any more
	if out := s.in("stays", "curl", "-sSf", "--max-time", "5", "http://localhost:8080/clientip"); out == "" {
		t.Error("the pod that stays does not answer")
	}
	k.Progress("tweed subnet addresses\n%s", k.Kubectl(t, "--namespace=tweed", "exec", k.daemonPods(t)["n1"].Name, "--",
		"tweed", "subnet", "addresses"))
}

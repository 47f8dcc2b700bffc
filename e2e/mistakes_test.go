package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"tweed.dev/tweed/e2e/cluster"
)

// TestMistakes makes the mistakes that people make with a pod network, on a cluster that has none yet, and looks where
// an operator looks first: at the nodes, at what describes them, and at the daemons' logs. Each is then put right.
func TestMistakes(t *testing.T) {
	k := startKube(t, 2, cluster.HostOptions{
		ProxyMode: "nftables", PodCIDRs: []string{"10.244.0.0/16"},
		Absent: []string{"/usr/sbin/iptables", "/usr/sbin/iptables-save", "/usr/sbin/iptables-restore"},
	})
	k.step(t, "NetworkIsNoPrefix", k.networkIsNoPrefix)
	k.step(t, "NetworkIsAnother", k.networkIsAnother)
	k.step(t, "CapabilityIsMissing", k.capabilityMissing)
	k.step(t, "VXLANCannotBeMade", k.vxlanCannotBeMade)
	k.step(t, "FlannelIsStillThere", k.flannelIsStillThere)
	k.step(t, "AnotherCNIComesFirst", k.anotherCNI)
	k.step(t, "HostHasNoIptables", k.hostHasNoIptables)
	k.step(t, "ConfigMapIsDeleted", k.configMapDeleted)
	k.step(t, "PolicyIsMissing", k.policyMissing)
}

// applyChanged applies the manifest with words in it replaced.
func (k *kube) applyChanged(t *testing.T, replace ...string) {
	t.Helper()
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.NewReplacer(replace...).Replace(string(text))
	if changed == string(text) && len(replace) > 0 {
		t.Fatalf("the manifest has no %q", replace[0])
	}
	k.Apply(t, changed)
}

// putRight applies the manifest as it is and starts the daemons anew, as docs/install.md says.
func (k *kube) putRight(t *testing.T) {
	t.Helper()
	k.applyChanged(t)
	k.Kubectl(t, "--namespace=tweed", "rollout", "restart", "daemonset/tweed")
	k.Kubectl(t, "--namespace=tweed", "rollout", "status", "daemonset/tweed", "--timeout=2m")
	k.awaitReady(t)
}

// logged waits until the log of the daemon on n1 has the words.
func (k *kube) logged(t *testing.T, words ...string) {
	t.Helper()
	cluster.Await(t, "the daemon's log", func() error {
		var all string
		for _, p := range k.daemonPods(t) {
			for _, args := range [][]string{nil, {"--previous"}} {
				out, err := k.TryKubectl(append([]string{"--namespace=tweed", "logs", p.Name, "--container=tweed"}, args...)...)
				if err == nil {
					all += out
				}
			}
		}
		return contains(all, words...)
	})
}

// described waits until `kubectl describe node` has the words.
func (k *kube) described(t *testing.T, node string, words ...string) {
	t.Helper()
	cluster.Await(t, "kubectl describe node "+node, func() error {
		return contains(k.Kubectl(t, "describe", "node", node), words...)
	})
}

// notReadyYet checks that no node looks ready.
func (k *kube) notReadyYet(t *testing.T) {
	t.Helper()
	for _, h := range k.Hosts {
		if h.IsReady() == nil {
			t.Errorf("%s is ready", h.Name)
		}
	}
}

func (k *kube) networkIsNoPrefix(t *testing.T) {
	k.applyChanged(t, `"10.244.0.0/16"`, `"10.244.0.0/33"`)
	k.logged(t, "net-conf.json", "Network", "10.244.0.0/33")
	k.described(t, "n1", "Network", "10.244.0.0/33")
	k.notReadyYet(t)
}

func (k *kube) networkIsAnother(t *testing.T) {
	k.applyChanged(t, `"10.244.0.0/16"`, `"10.99.0.0/16"`)
	k.Kubectl(t, "--namespace=tweed", "rollout", "restart", "daemonset/tweed")
	k.logged(t, "10.99.0.0/16", "10.244.")
	k.described(t, "n1", "10.99.0.0/16", "10.244.")
	k.conditionIs(t, "n1", corev1.ConditionTrue, "NoPodSubnet")
	k.notReadyYet(t)
	k.putRight(t)
	k.conditionIs(t, "n1", corev1.ConditionFalse, "TweedIsUp")
}

// rebootAll makes the hosts forget the pod network.
func (k *kube) rebootAll(t *testing.T) {
	t.Helper()
	k.Kubectl(t, "delete", "-f", manifest, "--ignore-not-found", "--timeout=2m")
	for _, h := range k.Hosts {
		h.Reboot(t, conflist)
	}
	for _, h := range k.Hosts {
		cluster.Await(t, h.Name+" to be back without a network", func() error {
			if h.IsReady() == nil {
				return errStill
			}
			return h.IsDone("images")
		})
	}
}

func (k *kube) capabilityMissing(t *testing.T) {
	k.rebootAll(t)
	k.applyChanged(t, "- NET_ADMIN", "- NET_BIND_SERVICE")
	k.logged(t, "needs root or CAP_NET_ADMIN")
	k.described(t, "n1", "CannotStart", "CAP_NET_ADMIN")
	k.notReadyYet(t)
}

// vxlanCannotBeMade has somebody else on a host listen at the tunnel's port, so that the kernel refuses the device.
func (k *kube) vxlanCannotBeMade(t *testing.T) {
	k.rebootAll(t)
	h := k.Host("n1")
	var other net.PacketConn
	err := h.NetNS.Do(func() (err error) {
		other, err = net.ListenPacket("udp4", ":8472")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	k.applyChanged(t)
	k.logged(t, "tweed.1", "address already in use")
	k.described(t, "n1", "KernelRefused", "tweed.1", "address already in use")
	if h.IsReady() == nil {
		t.Error("n1 is ready")
	}
	cluster.Await(t, "n2 to be ready all the same", k.Host("n2").IsReady)
	other.Close() // no restart: the daemon tries again
	cluster.Await(t, "n1 to be ready", h.IsReady)
}

func (k *kube) flannelIsStillThere(t *testing.T) {
	k.rebootAll(t)
	h := k.Host("n1")
	h.NetNS.Run(t, "ip link add flannel.1 type vxlan id 1 dstport 8472 local "+h.Addrs[0].String()+" dev eth0 nolearning")
	k.applyChanged(t)
	k.logged(t, "flannel.1")
	k.described(t, "n1", "flannel.1")
	if h.IsReady() == nil {
		t.Error("n1 is ready")
	}
	h.NetNS.Run(t, "ip link del flannel.1") // no restart: the daemon looks for itself
	cluster.Await(t, "n1 to be ready", h.IsReady)
}

func (k *kube) anotherCNI(t *testing.T) {
	h := k.Host("n1")
	const other = `{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge"}]}`
	path := h.Path("/etc/cni/net.d/00-other.conflist")
	if err := os.WriteFile(path, []byte(other), 0o644); err != nil {
		t.Fatal(err)
	}
	k.logged(t, "00-other.conflist")
	k.described(t, "n1", "00-other.conflist")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	k.logged(t, "problem gone")
}

// hostHasNoIptables shows that the daemon brings its own, and that a host port says what is missing.
func (k *kube) hostHasNoIptables(t *testing.T) {
	if out, err := k.Host("n1").Run("sh", "-c", "command -v iptables"); err == nil {
		t.Fatalf("the host has %s", out)
	}
	k.answersIn(t, "n1", "n2")
	s := k.story(t)
	s.apply("hostport.yaml", "NODE", "n1")
	cluster.Await(t, "a word about the host port", func() error {
		pod := s.kubectl("describe", "pod", "hosted")
		if strings.Contains(pod, "portmap") && strings.Contains(pod, "iptables") {
			k.Progress("without iptables: %s", lineWith(pod, "portmap"))
			return nil
		}
		p, err := fetch(k.ControlPlane(), "http://"+k.Host("n1").Addrs[0].String()+":18080/hostname", "")
		if err == nil && p == "hosted" {
			k.Progress("without iptables: the host port works")
			return nil
		}
		return fmt.Errorf("neither an error nor an answer:\n%s", pod)
	})
}

func lineWith(text, word string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

func (k *kube) configMapDeleted(t *testing.T) {
	k.Kubectl(t, "--namespace=tweed", "delete", "configmap", "tweed")
	k.answersIn(t, "n1", "n2")
	old := k.daemonPods(t)["n1"]
	k.Kubectl(t, "--namespace=tweed", "delete", "pod", old.Name)
	cluster.Await(t, "a word about the ConfigMap", func() error {
		now, ok := k.daemonPods(t)["n1"]
		if !ok || now.UID == old.UID {
			return errStill
		}
		return contains(k.Kubectl(t, "--namespace=tweed", "describe", "pod", now.Name), `configmap "tweed" not found`)
	})
	k.answersIn(t, "n2", "n1")
	k.applyChanged(t)
	k.awaitDaemons(t, func(p corev1.Pod) error {
		if p.UID == old.UID {
			return errStill
		}
		return nil
	})
}

func (k *kube) policyMissing(t *testing.T) {
	k.Kubectl(t, "delete", "validatingadmissionpolicy", "tweed-own-node")
	k.Kubectl(t, "--namespace=tweed", "rollout", "restart", "daemonset/tweed")
	k.Kubectl(t, "--namespace=tweed", "rollout", "status", "daemonset/tweed", "--timeout=2m")
	k.answersIn(t, "n1", "n2")
	k.applyChanged(t)
}

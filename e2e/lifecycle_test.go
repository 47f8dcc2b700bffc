package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/e2e/build"
	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/image"
	"tweed.dev/tweed/e2e/probe"
)

// conflist is what makes a node ready; it is on disk.
const conflist = "/etc/cni/net.d/10-tweed.conflist"

// startupTaint keeps pods off a node until its network is up.
const startupTaint = "tweed.dev/not-ready"

// streams sends numbered datagrams between two pods on different nodes, both ways, while f runs. All must arrive.
func (s *story) streams(f func()) {
	s.t.Helper()
	a, b := s.server("left", "n1"), s.server("right", "n2")
	left, right := s.place("n1", a), s.place("n2", b)
	var all []*probe.Stream
	for i := range a.Status.PodIPs {
		for _, way := range []struct {
			from, to cluster.NetNS
			ip       string
		}{{left, right, b.Status.PodIPs[i].IP}, {right, left, a.Status.PodIPs[i].IP}} {
			stream, err := probe.StartStream(way.from, way.to, netip.MustParseAddr(way.ip))
			if err != nil {
				s.t.Fatal(err)
			}
			all = append(all, stream)
		}
	}
	f()
	for _, stream := range all {
		sent, err := stream.Stop()
		if err != nil {
			s.t.Errorf("a stream between nodes: %v", err)
		}
		s.Progress("  a stream of %d datagrams", sent)
	}
}

// place is the network namespace of a pod on a host.
func (s *story) place(host string, pod corev1.Pod) cluster.NetNS {
	s.t.Helper()
	ns, err := s.Host(host).PodNetNS(netip.MustParseAddr(pod.Status.PodIP))
	if err != nil {
		s.t.Fatal(err)
	}
	return ns
}

// daemonPods are the daemons' pods by the node that they are on.
func (k *kube) daemonPods(t *testing.T) map[string]corev1.Pod {
	t.Helper()
	list, err := k.API.CoreV1().Pods("tweed").List(t.Context(), metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/name=tweed",
	})
	if err != nil {
		t.Fatalf("listing the daemons' pods: %v", err)
	}
	pods := map[string]corev1.Pod{}
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil {
			pods[p.Spec.NodeName] = p
		}
	}
	return pods
}

func (k *kube) daemonIsTight(t *testing.T) {
	daemon := k.daemonPods(t)["n1"]
	spec := daemon.Spec.Containers[0]
	for what, ok := range map[string]bool{
		"it is privileged":             spec.SecurityContext.Privileged == nil || !*spec.SecurityContext.Privileged,
		"its root is writable":         *spec.SecurityContext.ReadOnlyRootFilesystem,
		"it has no host network":       daemon.Spec.HostNetwork,
		"it is not node-critical":      daemon.Spec.PriorityClassName == "system-node-critical",
		"it runs another image":        strings.HasSuffix(spec.Image, ":"+build.Version),
		"the image has a shell":        k.hasNoShell(daemon.Name),
		"it has restarted by itself":   daemon.Status.ContainerStatuses[0].RestartCount == 0,
		"its processes are the host's": !daemon.Spec.HostPID,
	} {
		if !ok {
			t.Errorf("%s", what)
		}
	}
	pid := k.Host("n1").DaemonPID(t)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	if err := contains(string(status), "CapEff:\t0000000000003000", "CapBnd:\t0000000000003000", "Seccomp:\t2"); err != nil {
		t.Errorf("the daemon's process has other rights than NET_ADMIN and NET_RAW: %v\n%s", err, status)
	}
	for _, line := range strings.Split(string(status), "\n") {
		if strings.HasPrefix(line, "VmRSS") {
			k.Progress("figure: the daemon's resident memory in its pod: %s", strings.Join(strings.Fields(line)[1:], " "))
		}
	}
	table := k.Kubectl(t, "--namespace=tweed", "exec", "daemonset/tweed", "--", "tweed", "subnet", "status")
	k.Progress("tweed subnet status\n%s", table)
	if err := contains(table, "n1", "n2", "n3", "192.0.2.11", "Network 10.244.0.0/16: 3 of 256"); err != nil {
		t.Errorf("tweed subnet status: %v\n%s", err, table)
	}
	if out, err := k.TryKubectl("--namespace=tweed", "exec", "daemonset/tweed", "--", "tweed", "plan"); err != nil {
		t.Errorf("tweed plan: %v\n%s", err, out)
	}
}

// daemonRests measures what a daemon takes while nothing happens, and holds it to say nothing.
func (k *kube) daemonRests(t *testing.T) {
	const rest = 20 * time.Second
	h := k.Host("n1")
	pid := h.DaemonPID(t)
	log := func() string { return k.Kubectl(t, "--namespace=tweed", "logs", k.daemonPods(t)["n1"].Name) }
	said, before := log(), processorTime(t, pid)
	time.Sleep(rest) // this is what is measured
	used := processorTime(t, pid) - before
	k.Progress("figure: the daemon at rest took %.2f %% of a core", 100*used.Seconds()/rest.Seconds())
	if used > rest/20 {
		t.Errorf("in %v of rest the daemon took %v of a core", rest, used)
	}
	if now := log(); now != said {
		t.Errorf("the daemon logged while nothing happened:\n%s", strings.TrimPrefix(now, said))
	}
}

// processorTime is what a process has used (proc_pid_stat(5)).
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks int64
	for _, field := range fields[11:13] { // utime and stime, the 14th and 15th
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	const tick = time.Second / 100 // USER_HZ on every architecture that this runs on
	return time.Duration(ticks) * tick
}

func (k *kube) hasNoShell(pod string) bool {
	_, err := k.TryKubectl("--namespace=tweed", "exec", pod, "--", "sh", "-c", "true")
	return err != nil
}

func (k *kube) daemonDeleted(t *testing.T) {
	s := k.story(t)
	s.streams(func() {
		before := k.daemonPods(t)
		k.Kubectl(t, "--namespace=tweed", "delete", "pod", before["n1"].Name, before["n2"].Name)
		k.awaitDaemons(t, func(p corev1.Pod) error {
			if p.UID == before[p.Spec.NodeName].UID && p.Spec.NodeName != "n3" {
				return errStill
			}
			return nil
		})
	})
}

// awaitDaemons waits until a daemon is ready on every host, and is as wanted.
func (k *kube) awaitDaemons(t *testing.T, wanted func(corev1.Pod) error) {
	t.Helper()
	cluster.Await(t, "the daemons", func() error {
		pods := k.daemonPods(t)
		for _, h := range k.Hosts {
			p, ok := pods[h.Name]
			if !ok {
				return fmt.Errorf("there is none on %s", h.Name)
			}
			if err := notReady(&p); err != nil {
				return fmt.Errorf("that on %s: %w", h.Name, err)
			}
			if err := wanted(p); err != nil {
				return fmt.Errorf("that on %s: %w", h.Name, err)
			}
		}
		return nil
	})
}

func (k *kube) daemonRolled(t *testing.T) {
	s := k.story(t)
	const next = image.Name + ":next"
	for _, h := range k.Hosts {
		out, err := h.Run("ctr", "--namespace", "k8s.io", "images", "tag", "--force", image.Name+":"+build.Version, next)
		if err != nil {
			t.Fatal(err, out)
		}
	}
	s.streams(func() {
		begun := time.Now()
		k.Kubectl(t, "--namespace=tweed", "set", "image", "daemonset/tweed", "*="+next)
		k.Kubectl(t, "--namespace=tweed", "rollout", "status", "daemonset/tweed", "--timeout=2m")
		k.Progress("figure: rolled to a new image in %.1f s", time.Since(begun).Seconds())
		k.awaitDaemons(t, runs(next))
		k.Kubectl(t, "--namespace=tweed", "rollout", "undo", "daemonset/tweed")
		k.awaitDaemons(t, runs(image.Name+":"+build.Version))
	})
}

// runs says which image a daemon runs if it is not that.
func runs(image string) func(corev1.Pod) error {
	return func(p corev1.Pod) error {
		if has := p.Spec.Containers[0].Image; has != image {
			return fmt.Errorf("it runs %s", has)
		}
		return nil
	}
}

// answers checks that a pod on a host reaches a pod on another, and is reached.
func (k *kube) answers(t *testing.T, host, other string) {
	t.Helper()
	s := k.story(t)
	here, there := s.server("here", host), s.server("there", other)
	for _, way := range []struct {
		from string
		to   corev1.Pod
	}{{"here", there}, {"there", here}} {
		url := "http://" + netip.AddrPortFrom(netip.MustParseAddr(way.to.Status.PodIP), 8080).String() + "/clientip"
		from := s.pod(way.from)
		if seen := callerOf(t, s.get(way.from, url)); !hasIP(from, seen) {
			t.Errorf("%s is seen as %s, has %v", way.from, seen, from.Status.PodIPs)
		}
	}
}

// awaitLost waits until the cluster has noticed that a host is off, so that its being ready again is news.
func (k *kube) awaitLost(t *testing.T, h *cluster.Host) {
	t.Helper()
	k.Kubectl(t, "get", "--raw", "/readyz")
	cluster.AwaitLong(t, h.Name+" to be missed", 2*time.Minute, func() error {
		if h.IsReady() == nil {
			return errStill
		}
		return nil
	})
}

func (k *kube) powerCut(t *testing.T) {
	s := k.story(t)
	h := k.Host("n2")
	before := s.server("survivor", h.Name)
	if err := h.PowerCut(); err != nil {
		t.Fatal(err)
	}
	k.awaitLost(t, h)
	begun := time.Now()
	h.SwitchOn(t) // its network devices are as they were, its processes are gone
	cluster.Await(t, h.Name+" to be ready", h.IsReady)
	after := s.pod("survivor")
	k.Progress("figure: pods run again %.1f s after the power is back", time.Since(begun).Seconds())
	if after.UID != before.UID {
		t.Errorf("pod survivor is another one")
	}
	k.answersIn(t, h.Name, "n1")
}

func (k *kube) reboot(t *testing.T) {
	s := k.story(t)
	h := k.Host("n2")
	s.server("survivor", h.Name)
	subnet := k.annotation(t, h.Name, "tweed.dev/subnets")
	begun := time.Now()
	h.Reboot(t)
	k.awaitDaemonAgain(t, h)
	cluster.Await(t, h.Name+" to be ready", h.IsReady)
	cluster.AwaitLong(t, "survivor to answer", 2*time.Minute, func() error {
		p, err := k.API.CoreV1().Pods(s.namespace).Get(t.Context(), "survivor", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if p.Status.ContainerStatuses[0].RestartCount == 0 {
			return fmt.Errorf("it has not been restarted; %w", errStill)
		}
		return notReady(p)
	})
	k.Progress("figure: pods run again %.1f s after a reboot began", time.Since(begun).Seconds())
	if now := k.annotation(t, h.Name, "tweed.dev/subnets"); now != subnet {
		t.Errorf("%s has subnets %s after the reboot, %s before", h.Name, now, subnet)
	}
	k.answersIn(t, h.Name, "n1")
}

// awaitDaemonAgain waits until a daemon that started on h answers there.
func (k *kube) awaitDaemonAgain(t *testing.T, h *cluster.Host) {
	t.Helper()
	cluster.AwaitLong(t, "the daemon on "+h.Name, 2*time.Minute, func() error {
		_, err := fetch(h.NetNS, "http://127.0.0.1:9479/readyz", "")
		return err
	})
}

func (k *kube) annotation(t *testing.T, node, key string) string {
	t.Helper()
	n, err := k.API.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("reading Node %s: %v", node, err)
	}
	return n.Annotations[key]
}

// answersIn is answers as a part of another test.
func (k *kube) answersIn(t *testing.T, host, other string) {
	t.Helper()
	t.Run("PodsAnswer"+host+other, func(t *testing.T) { k.answers(t, host, other) })
}

func (k *kube) nodeLeaves(t *testing.T) {
	leaving := k.Host("n3")
	subnet := k.annotation(t, leaving.Name, "tweed.dev/subnets")
	k.RemoveHost(t, leaving)
	cluster.Await(t, "the others to forget "+leaving.Name, func() error {
		for _, h := range k.Hosts {
			if out := h.NetNS.Run(t, "ip route show proto 116"); strings.Contains(out, subnet) {
				return fmt.Errorf("%s still routes to it:\n%s", h.Name, out)
			}
		}
		return nil
	})
	o := k.options
	o.Taints = []string{startupTaint + "=:NoSchedule", "example.com/theirs=:PreferNoSchedule"}
	joins := k.AddHost(t, "n4", o)
	k.awaitNode(t, joins.Name)
	begun := time.Now()
	cluster.Await(t, joins.Name+" to be ready", joins.IsReady)
	k.Progress("figure: a node that joined was ready after %.1f s", time.Since(begun).Seconds())
	cluster.Await(t, "the startup taint to go, and no other", func() error {
		n, err := k.API.CoreV1().Nodes().Get(t.Context(), joins.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		var keys []string
		for _, taint := range n.Spec.Taints {
			keys = append(keys, taint.Key)
		}
		if !slices.Equal(keys, []string{"example.com/theirs"}) {
			return fmt.Errorf("the taints are %v", keys)
		}
		return nil
	})
	k.answersIn(t, joins.Name, "n1")
}

func (k *kube) manifestDeleted(t *testing.T) {
	s := k.story(t)
	s.streams(func() {
		k.Kubectl(t, "delete", "-f", manifest, "--timeout=2m")
		cluster.Await(t, "the daemons to be gone", func() error {
			for _, h := range k.Hosts {
				if _, err := fetch(h.NetNS, "http://127.0.0.1:9479/healthz", ""); err == nil {
					return fmt.Errorf("that on %s answers", h.Name)
				}
			}
			return nil
		})
	})
	k.Kubectl(t, "apply", "-f", manifest)
	k.awaitDaemons(t, func(corev1.Pod) error { return nil })
}

// uninstalled does what docs/install.md says, looks for what is left, and installs tweed again.
func (k *kube) uninstalled(t *testing.T) {
	drain := []string{"drain", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=2m"}
	uncordon := []string{"uncordon"}
	for _, h := range k.Hosts {
		drain, uncordon = append(drain, h.Name), append(uncordon, h.Name)
	}
	k.Kubectl(t, drain...)
	k.Kubectl(t, "delete", "-f", manifest, "--timeout=2m")
	for _, h := range k.Hosts {
		for what, left := range k.leftovers(t, h) {
			if left == "" && !strings.Contains(what, "legacy") {
				t.Errorf("%s has no %s before it is cleaned: looking for it proves nothing", h.Name, what)
			}
		}
	}
	k.Kubectl(t, "apply", "-f", cleanup)
	out, err := k.TryKubectl("--namespace=tweed-cleanup", "rollout", "status", "daemonset/tweed-cleanup", "--timeout=2m")
	said := k.Kubectl(t, "--namespace=tweed-cleanup", "logs", "--selector=app.kubernetes.io/name=tweed-cleanup", "--prefix",
		"--all-containers", "--tail=-1")
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, said)
	}
	for _, h := range k.Hosts {
		for what, left := range k.leftovers(t, h) {
			if left != "" {
				t.Errorf("%s: left of %s:\n%s", h.Name, what, left)
			}
		}
	}
	if t.Failed() {
		t.Logf("cleanup said\n%s", said)
	}
	k.Kubectl(t, "delete", "-f", cleanup, "--timeout=2m")
	k.Kubectl(t, "apply", "-f", manifest)
	k.Kubectl(t, uncordon...)
	k.awaitReady(t)
	for _, h := range k.Hosts {
		k.subnetIsRight(t, h.Name)
	}
}

// leftovers is what there is of tweed on a host and its Node, by what it is.
func (k *kube) leftovers(t *testing.T, h *cluster.Host) map[string]string {
	t.Helper()
	left := map[string]string{"nftables": ours(t, h, "nft list ruleset")}
	for _, command := range []string{
		"ip -o link show group 116", "ip route show table all proto 116",
	} {
		left[command] = h.NetNS.Run(t, command)
	}
	left["iptables-legacy"] = ours(t, h, "iptables-legacy-save", "ip6tables-legacy-save")
	// The directory itself is where cleanup's container has it mounted.
	for _, path := range []string{"/run/tweed/*", conflist, "/opt/cni/bin/tweed-cni"} {
		found, err := filepath.Glob(h.Path(path))
		if err != nil {
			t.Fatal(err)
		}
		left[path] = strings.Join(found, "\n")
	}
	node, err := k.API.CoreV1().Nodes().Get(t.Context(), h.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	left["annotations"] = ""
	for key, value := range node.Annotations {
		if strings.HasPrefix(key, "tweed.dev/") {
			left["annotations"] += key + "=" + value + "\n"
		}
	}
	return left
}

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/e2e/cluster"
)

// TestApply applies the manifest to a cluster without a pod network, and then uses the cluster. Its steps go in order;
// -run TestApply/Name takes some of them.
func TestApply(t *testing.T) {
	k := startKube(t, 3, cluster.HostOptions{ProxyMode: "iptables", PodCIDRs: []string{"10.244.0.0/16"}})
	k.install(t, "-f", manifest)
	k.step(t, "DaemonRests", k.daemonRests)
	k.step(t, "OverlaysAreAccepted", k.overlaysAccepted)
	k.step(t, "TwoContainersShareAVolume", k.twoContainers)
	k.step(t, "PodsRunOnOneNodeAndOnTwo", k.kubectlRun)
	k.step(t, "ServiceIsReachedFromEverywhere", k.clusterIP)
	k.step(t, "HeadlessServiceNamesItsPods", k.headless)
	k.step(t, "NodePortKeepsOrHidesTheCaller", k.nodePort)
	k.step(t, "HostPortIsReachedFromEverywhere", k.hostPort)
	k.step(t, "SidecarOpensTheDoor", k.sidecar)
	k.step(t, "ReverseProxyTellsHostsApart", k.ingress)
	k.step(t, "PodTalksToTheAPIServer", k.apiFromPod)
	k.step(t, "ExecLogsAndPortForward", k.execLogsForward)
	k.step(t, "DaemonIsWhatTheManifestSays", k.daemonIsTight)
	k.step(t, "DeploymentGrowsAndShrinks", k.scale)
	k.step(t, "DaemonPodIsDeletedUnderTraffic", k.daemonDeleted)
	k.step(t, "DaemonSetIsRolledUnderTraffic", k.daemonRolled)
	k.step(t, "NodeLosesPower", k.powerCut)
	k.step(t, "NodeReboots", k.reboot)
	k.step(t, "NodeLeavesAndAnotherJoins", k.nodeLeaves)
	k.step(t, "ManifestIsDeletedUnderTraffic", k.manifestDeleted)
	k.step(t, "UninstallLeavesNothing", k.uninstalled)
}

// TestApplyDualStack is the same with both families, and kube-proxy's other mode.
func TestApplyDualStack(t *testing.T) {
	k := startKube(t, 3, cluster.HostOptions{
		ProxyMode: "nftables", PodCIDRs: []string{"10.244.0.0/16", "fd00:10:244::/48"},
	})
	k.install(t, "-k", dualManifest)
	k.step(t, "PodsRunOnOneNodeAndOnTwo", k.kubectlRun)
	k.step(t, "ServiceIsReachedFromEverywhere", k.clusterIP)
	k.step(t, "HeadlessServiceNamesItsPods", k.headless)
	k.step(t, "NodePortKeepsOrHidesTheCaller", k.nodePort)
	k.step(t, "HostPortIsReachedFromEverywhere", k.hostPort)
	k.step(t, "PodTalksToTheAPIServer", k.apiFromPod)
	k.step(t, "RuntimeAsksForCheckAndGC", k.verbs)
	k.step(t, "DaemonSetIsRolledUnderTraffic", k.daemonRolled)
}

// TestApplyLeases is the same in a cluster that hands out no podCIDRs, so that nodes lease their subnets.
func TestApplyLeases(t *testing.T) {
	k := startKube(t, 3, cluster.HostOptions{ProxyMode: "iptables"})
	k.install(t, "-f", manifest)
	k.step(t, "PodsRunOnOneNodeAndOnTwo", k.kubectlRun)
	k.step(t, "ServiceIsReachedFromEverywhere", k.clusterIP)
	k.step(t, "NodeReboots", k.reboot)
	k.step(t, "NodeLeavesAndAnotherJoins", k.nodeLeaves)
	k.step(t, "UninstallLeavesNothing", k.uninstalled)
}

// install applies the manifest, and nothing else, and waits for every node to be ready. Then it adds the cluster's DNS.
func (k *kube) install(t *testing.T, how ...string) {
	t.Helper()
	defer explain(t, k)
	for _, h := range k.Hosts {
		if err := h.IsReady(); err == nil {
			t.Errorf("%s is ready without a pod network", h.Name)
		}
	}
	begun := time.Now()
	k.Kubectl(t, append([]string{"apply"}, how...)...)
	k.awaitReady(t)
	k.Progress("figure: from kubectl apply to %d ready nodes %.1f s", len(k.Hosts), time.Since(begun).Seconds())
	k.Kubectl(t, "apply", "-f", "testdata/coredns.yaml")
	k.Kubectl(t, "--namespace=kube-system", "rollout", "status", "deployment/coredns", "--timeout=2m")
	k.Progress("figure: from nothing to pods that answer across nodes %.1f s", time.Since(k.begun).Seconds())
	for _, h := range k.Hosts {
		k.conditionIs(t, h.Name, corev1.ConditionFalse, "TweedIsUp")
		k.subnetIsRight(t, h.Name)
	}
}

// subnetIsRight holds what a node has recorded as its subnets against where they come from.
func (k *kube) subnetIsRight(t *testing.T, node string) {
	t.Helper()
	n, err := k.API.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	recorded := n.Annotations["tweed.dev/subnets"]
	switch {
	case len(k.options.PodCIDRs) > 0 && recorded != strings.Join(n.Spec.PodCIDRs, ","):
		t.Errorf("%s publishes %q, and has podCIDRs %v", node, recorded, n.Spec.PodCIDRs)
	case len(k.options.PodCIDRs) == 0 && (recorded == "" || len(n.Spec.PodCIDRs) > 0):
		t.Errorf("%s publishes %q, and has podCIDRs %v where nobody hands out any", node, recorded, n.Spec.PodCIDRs)
	}
	if claim := n.Annotations["tweed.dev/claim"]; claim != "" {
		t.Errorf("%s claims %q", node, claim)
	}
}

// conditionIs waits for a Node's condition NetworkUnavailable.
func (k *kube) conditionIs(t *testing.T, node string, status corev1.ConditionStatus, reason string) {
	t.Helper()
	awaitCondition(t, k.Cluster, node, status, reason)
}

// overlaysAccepted has the API server judge every overlay by strict field validation.
func (k *kube) overlaysAccepted(t *testing.T) {
	overlays, err := filepath.Glob("../manifests/overlays/*")
	if err != nil || len(overlays) == 0 {
		t.Fatalf("overlays %v: %v", overlays, err)
	}
	for _, how := range append([]string{manifest}, overlays...) {
		flag := "-k"
		if how == manifest {
			flag = "-f"
		}
		out, err := k.TryKubectl("apply", "--dry-run=server", "--validate=strict", flag, how)
		if err != nil {
			t.Errorf("%s: %v", how, err)
		}
		if how == manifest && strings.Contains(out, "configured") {
			t.Errorf("applied again, %s changes something:\n%s", how, out)
		}
	}
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	wrong := strings.Replace(string(text), "hostNetwork: true", "hostNetwrk: true", 1)
	if _, err := k.KubectlWith(wrong, "apply", "--dry-run=server", "--validate=strict", "-f", "-"); err == nil {
		t.Error("a field that does not exist is accepted")
	}
}

func (k *kube) twoContainers(t *testing.T) {
	s := k.story(t)
	s.apply("two-containers.yaml")
	web := s.pod("web")
	over := s.kubectl("exec", "web", "-c", "reader", "--", "wget", "-qO-", "http://127.0.0.1/page.html")
	page := regexp.MustCompile(`^page \d+\n$`)
	if !page.MatchString(over) {
		t.Errorf("over localhost the server answers %q, want what the writer wrote", over)
	}
	s.server("caller", "n1")
	if got := s.get("caller", "http://"+web.Status.PodIP+"/page.html"); !page.MatchString(got) {
		t.Errorf("from another pod the server answers %q, want what the writer wrote", got)
	}
}

func (k *kube) kubectlRun(t *testing.T) {
	s := k.story(t)
	for name, node := range map[string]string{"pod1": "n1", "pod2": "n1", "pod3": "n2"} {
		s.kubectl("run", name, "--image=localhost/busybox:e2e", "--restart=Never",
			`--overrides={"spec":{"nodeName":"`+node+`","terminationGracePeriodSeconds":1}}`, "--",
			"sh", "-c", "mkdir /www && echo "+name+" > /www/index.html && exec httpd -f -p 80 -h /www")
	}
	for _, from := range []string{"pod1", "pod2", "pod3"} {
		s.pod(from)
		for _, to := range []string{"pod1", "pod2", "pod3"} {
			for _, ip := range s.pod(to).Status.PodIPs {
				url := "http://" + netip.AddrPortFrom(netip.MustParseAddr(ip.IP), 80).String() + "/"
				cluster.Await(t, from+" to get "+url, func() error {
					got, err := s.TryKubectl("-n", s.namespace, "exec", from, "--", "wget", "-qO-", url)
					if err == nil && got != to+"\n" {
						err = fmt.Errorf("%s answers %q", url, got)
					}
					return err
				})
			}
		}
	}
}

func (k *kube) clusterIP(t *testing.T) {
	s := k.story(t)
	policy := corev1.IPFamilyPolicyPreferDualStack
	svc := s.expose("front", "back", func(svc *corev1.Service) { svc.Spec.IPFamilyPolicy = &policy })
	s.server("back", "n1")
	s.server("near", "n1")
	s.server("far", "n2")
	if len(svc.Spec.ClusterIPs) < len(k.options.PodCIDRs) {
		t.Errorf("the service has addresses %v, want one a family", svc.Spec.ClusterIPs)
	}
	for _, ip := range svc.Spec.ClusterIPs[:len(k.options.PodCIDRs)] {
		at := "http://" + netip.AddrPortFrom(netip.MustParseAddr(ip), 80).String()
		for _, from := range []string{"near", "far", "back"} { // back reaches itself through the service
			if got := s.get(from, at+"/hostname"); got != "back" {
				t.Errorf("%s gets %q from %s, want the name of the backend", from, got, at)
			}
		}
		seen := callerOf(t, s.get("far", at+"/clientip"))
		if far := s.pod("far"); !hasIP(far, seen) {
			t.Errorf("the backend sees %s behind the service, want the caller's own of %v", seen, far.Status.PodIPs)
		}
		for _, h := range k.Hosts {
			if got := awaitFetch(t, h.NetNS, at+"/hostname", ""); got != "back" {
				t.Errorf("%s gets %q from %s", h.Name, got, at)
			}
		}
	}
	for _, name := range []string{"front", "front." + s.namespace, "front." + s.namespace + ".svc.cluster.local"} {
		if got := s.get("far", "http://"+name+"/hostname"); got != "back" {
			t.Errorf("by the name %s the service answers %q", name, got)
		}
	}
}

func hasIP(p corev1.Pod, a netip.Addr) bool {
	return slices.ContainsFunc(p.Status.PodIPs, func(ip corev1.PodIP) bool { return netip.MustParseAddr(ip.IP) == a })
}

func (k *kube) headless(t *testing.T) {
	s := k.story(t)
	s.expose("set", "set", func(svc *corev1.Service) {
		policy := corev1.IPFamilyPolicyPreferDualStack
		svc.Spec.ClusterIP, svc.Spec.IPFamilyPolicy = corev1.ClusterIPNone, &policy
	})
	var want []string
	for i, h := range k.Hosts {
		name := fmt.Sprintf("set%d", i)
		s.server(name, h.Name)
		s.kubectl("label", "pod", name, "app=set", "--overwrite")
		for _, ip := range s.pod(name).Status.PodIPs {
			want = append(want, ip.IP)
		}
	}
	sort.Strings(want)
	cluster.Await(t, "the name set to have all addresses", func() error {
		var got []string
		for _, kind := range []string{"A", "AAAA"} {
			out, err := s.TryKubectl("-n", s.namespace, "exec", "set0", "--", "dig", "+short", "+search", "set", kind)
			if err != nil {
				return err
			}
			got = append(got, strings.Fields(out)...)
		}
		sort.Strings(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("it has %v, want %v", got, want)
		}
		return nil
	})
}

func (k *kube) nodePort(t *testing.T) {
	s := k.story(t)
	s.server("back", "n1")
	outside := k.ControlPlane()
	families := len(k.options.PodCIDRs)
	client := cluster.ControlPlaneAddrs()
	for _, policy := range []corev1.ServiceExternalTrafficPolicy{"Cluster", "Local"} {
		svc := s.expose(strings.ToLower(string(policy)), "back", func(svc *corev1.Service) {
			prefer := corev1.IPFamilyPolicyPreferDualStack
			svc.Spec.Type, svc.Spec.ExternalTrafficPolicy, svc.Spec.IPFamilyPolicy = corev1.ServiceTypeNodePort, policy, &prefer
		})
		for i, h := range k.Hosts {
			for f, addr := range h.Addrs[:families] {
				url := fmt.Sprintf("http://%s/clientip", netip.AddrPortFrom(addr, uint16(svc.Spec.Ports[0].NodePort)))
				if policy == "Local" && i > 0 {
					if got, err := fetch(outside, url, ""); err == nil {
						t.Errorf("policy Local, %s without a backend: it answers %s", h.Name, got)
					}
					continue
				}
				seen := callerOf(t, awaitFetch(t, outside, url, ""))
				if policy == "Local" && seen != client[f] {
					t.Errorf("policy Local: the backend sees %s, want the caller %s", seen, client[f])
				}
				if policy == "Cluster" && seen == client[f] && i > 0 {
					t.Errorf("policy Cluster by %s: the backend sees the caller %s, to which it would answer past %s",
						h.Name, seen, h.Name)
				}
			}
		}
	}
}

func (k *kube) hostPort(t *testing.T) {
	s := k.story(t)
	s.apply("hostport.yaml", "NODE", "n1")
	s.pod("hosted")
	s.server("near", "n1")
	s.server("far", "n2")
	h := k.Hosts[0]
	for _, addr := range h.Addrs[:len(k.options.PodCIDRs)] {
		url := fmt.Sprintf("http://%s/hostname", netip.AddrPortFrom(addr, 18080))
		for who, ns := range map[string]cluster.NetNS{"outside": k.ControlPlane(), "the node": h.NetNS, "another node": k.Hosts[1].NetNS} {
			if got := awaitFetch(t, ns, url, ""); got != "hosted" {
				t.Errorf("from %s, %s answers %q", who, url, got)
			}
		}
		for _, pod := range []string{"near", "far", "hosted"} {
			if got := s.get(pod, url); got != "hosted" {
				t.Errorf("from pod %s, %s answers %q", pod, url, got)
			}
		}
		udp := netip.AddrPortFrom(addr, 18080)
		got := s.in("far", "sh", "-c", fmt.Sprintf("echo hostname | nc -u -w1 %s %d", udp.Addr(), udp.Port()))
		if strings.TrimSpace(got) != "hosted" {
			t.Errorf("over UDP, %s answers %q", udp, got)
		}
	}
	s.kubectl("delete", "pod", "hosted", "--wait=true")
	cluster.Await(t, "the host port to close", func() error {
		if got, err := fetch(k.ControlPlane(), fmt.Sprintf("http://%s/", netip.AddrPortFrom(h.Addrs[0], 18080)), ""); err == nil {
			return fmt.Errorf("it answers %q", got)
		}
		return nil
	})
}

func (k *kube) sidecar(t *testing.T) {
	s := k.story(t)
	s.apply("sidecar.yaml")
	shy := s.pod("shy")
	s.server("caller", "n2")
	if got := s.get("caller", "http://"+shy.Status.PodIP+":8080/"); got != "behind the door\n" {
		t.Errorf("through the sidecar the server answers %q", got)
	}
}

func (k *kube) ingress(t *testing.T) {
	s := k.story(t)
	s.apply("ingress.yaml")
	s.pod("proxy")
	var svc *corev1.Service
	cluster.Await(t, "service proxy", func() (err error) {
		svc, err = s.API.CoreV1().Services(s.namespace).Get(t.Context(), "proxy", metav1.GetOptions{})
		return err
	})
	for _, h := range k.Hosts {
		for _, color := range []string{"red", "blue"} {
			url := fmt.Sprintf("http://%s/hostname", netip.AddrPortFrom(h.Addrs[0], uint16(svc.Spec.Ports[0].NodePort)))
			if got := awaitFetch(t, k.ControlPlane(), url, color+".example"); got != color {
				t.Errorf("for %s.example, %s answers %q", color, url, got)
			}
		}
	}
}

func (k *kube) apiFromPod(t *testing.T) {
	s := k.story(t)
	s.server("caller", "n3")
	const account = "/var/run/secrets/kubernetes.io/serviceaccount"
	got := s.in("caller", "sh", "-c", "curl -sS --max-time 10 --cacert "+account+"/ca.crt -H \"Authorization: Bearer $(cat "+
		account+"/token)\" https://kubernetes.default.svc.cluster.local/version")
	if err := contains(got, `"gitVersion"`); err != nil {
		t.Errorf("the API server answers %s: %v", got, err)
	}
}

func (k *kube) execLogsForward(t *testing.T) {
	s := k.story(t)
	s.server("server", "n2")
	if got := s.in("server", "hostname"); got != "server\n" {
		t.Errorf("exec hostname prints %q", got)
	}
	if got, err := s.KubectlWith("from stdin", "-n", s.namespace, "exec", "-i", "server", "--", "cat"); got != "from stdin" {
		t.Errorf("exec -i cat prints %q (%v)", got, err)
	}
	if err := contains(s.kubectl("logs", "server"), "Started HTTP server"); err != nil {
		t.Errorf("logs: %v", err)
	}
	cmd := k.KubectlCommand(t.Context(), "-n", s.namespace, "port-forward", "pod/server", "28080:8080")
	if err := k.ControlPlane().Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	if got := awaitFetch(t, k.ControlPlane(), "http://127.0.0.1:28080/hostname", ""); got != "server" {
		t.Errorf("through port-forward the server answers %q", got)
	}
}

func (k *kube) scale(t *testing.T) {
	s := k.story(t)
	before := k.podAddresses(t)
	s.apply("scale.yaml")
	s.kubectl("rollout", "status", "deployment/many", "--timeout=1m")
	const many = 60
	begun := time.Now()
	s.kubectl("scale", "deployment/many", fmt.Sprintf("--replicas=%d", many))
	s.kubectl("rollout", "status", "deployment/many", "--timeout=3m")
	total := time.Since(begun)
	pods, err := s.API.CoreV1().Pods(s.namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	addrs := map[string]string{}
	for _, p := range pods.Items {
		if other, taken := addrs[p.Status.PodIP]; taken {
			t.Errorf("%s and %s both have %s", p.Name, other, p.Status.PodIP)
		}
		addrs[p.Status.PodIP] = p.Name
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady {
				took = append(took, c.LastTransitionTime.Sub(p.CreationTimestamp.Time))
			}
		}
	}
	slices.Sort(took)
	if len(took) != many {
		t.Fatalf("%d pods are ready, want %d", len(took), many)
	}
	k.Progress("figure: 1 to %d pods in %.1f s; a pod took %v in the median, %v at most", many, total.Seconds(),
		took[many/2], took[many-1])
	s.kubectl("scale", "deployment/many", "--replicas=1")
	cluster.Await(t, "the addresses of 59 pods to be free", func() error {
		if now := k.podAddresses(t); now > before+1 {
			return fmt.Errorf("%d are taken, %d were before", now, before)
		}
		return nil
	})
}

// podAddresses counts the veths of pods on all hosts.
func (k *kube) podAddresses(t *testing.T) (count int) {
	t.Helper()
	for _, h := range k.Hosts {
		count += strings.Count(h.NetNS.Run(t, "ip -o link show master tweed0"), "\n")
	}
	return count
}

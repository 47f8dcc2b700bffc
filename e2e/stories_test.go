package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tweed.dev/tweed/e2e/cluster"
)

// The manifests as a user applies them, seen from this directory.
const (
	manifest     = "../manifests/tweed.yaml"
	cleanup      = "../manifests/cleanup.yaml"
	dualManifest = "../manifests/overlays/dual-stack"
)

// A kube is a whole Kubernetes with nodes that boot, as an administrator without a pod network has it.
type kube struct {
	*cluster.Cluster

	options cluster.HostOptions
	begun   time.Time
	stories int
}

// startKube brings up a control plane and hosts n1, n2, ... No pod network is there yet.
func startKube(t *testing.T, hosts int, o cluster.HostOptions) *kube {
	t.Helper()
	k := &kube{options: o, begun: time.Now()}
	k.Cluster = cluster.StartBare(t, programs(t))
	k.StartControllers(t, cluster.ControllerOptions{PodCIDRs: o.PodCIDRs})
	for i := range hosts {
		k.AddHost(t, fmt.Sprintf("n%d", i+1), o)
	}
	k.Progress("%d hosts boot", hosts)
	for _, h := range k.Hosts {
		k.awaitNode(t, h.Name)
	}
	k.Progress("they have registered")
	return k
}

// awaitNode waits for a host's kubelet to register it.
func (k *kube) awaitNode(t *testing.T, name string) {
	t.Helper()
	cluster.Await(t, "Node "+name, func() error {
		node, err := k.API.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && len(node.Spec.PodCIDRs) < len(k.options.PodCIDRs) {
			err = fmt.Errorf("it has podCIDRs %v", node.Spec.PodCIDRs)
		}
		return err
	})
}

// awaitReady waits until every node is ready.
func (k *kube) awaitReady(t *testing.T) {
	t.Helper()
	for _, h := range k.Hosts {
		cluster.AwaitLong(t, h.Name+" to be ready", 2*time.Minute, h.IsReady) // where nodes lease, one has to be a minute old
	}
}

func (k *kube) step(t *testing.T, name string, f func(*testing.T)) { step(t, k, name, f) }

// A story is a namespace for what one test does; it goes with the test.
type story struct {
	*kube

	t         *testing.T
	namespace string
}

func (k *kube) story(t *testing.T) *story {
	t.Helper()
	k.stories++ // a namespace of that name may still be on its way out
	name := fmt.Sprintf("%s-%d", strings.ToLower(t.Name()[strings.LastIndexByte(t.Name(), '/')+1:]), k.stories)
	s := &story{k, t, name}
	k.Kubectl(t, "create", "namespace", name)
	t.Cleanup(func() {
		if _, err := k.TryKubectl("delete", "namespace", name, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	cluster.Await(t, "the service account of "+name, func() error {
		_, err := k.API.CoreV1().ServiceAccounts(name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return s
}

// kubectl runs kubectl in the story's namespace.
func (s *story) kubectl(args ...string) string {
	s.t.Helper()
	return s.Kubectl(s.t, append([]string{"--namespace", s.namespace}, args...)...)
}

// apply applies a file of testdata, with words in it replaced.
func (s *story) apply(file string, replace ...string) {
	s.t.Helper()
	text, err := os.ReadFile("testdata/" + file)
	if err != nil {
		s.t.Fatal(err)
	}
	replace = append(replace, "NAMESPACE", s.namespace)
	_, err = s.KubectlWith(strings.NewReplacer(replace...).Replace(string(text)), "--namespace", s.namespace, "apply", "-f", "-")
	if err != nil {
		s.t.Fatal(err)
	}
}

// server starts a server pod of that name on a node.
func (s *story) server(name, node string) corev1.Pod {
	s.t.Helper()
	s.apply("server.yaml", "NAME", name, "NODE", node)
	return s.pod(name)
}

// pod waits for a pod to be ready.
func (s *story) pod(name string) (pod corev1.Pod) {
	s.t.Helper()
	cluster.Await(s.t, "pod "+name+" to be ready", func() error {
		p, err := s.API.CoreV1().Pods(s.namespace).Get(s.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		pod = *p
		return notReady(p)
	})
	return pod
}

// notReady says why a pod is not ready; nil when it is.
func notReady(p *corev1.Pod) error {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	var said []string
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Waiting != nil {
			said = append(said, c.Name+": "+c.State.Waiting.Reason+" "+c.State.Waiting.Message)
		}
	}
	return fmt.Errorf("it is %s; %s", p.Status.Phase, strings.Join(said, "; "))
}

// in runs a command in a pod's first container and returns what it printed.
func (s *story) in(pod string, command ...string) string {
	s.t.Helper()
	return s.kubectl(append([]string{"exec", pod, "--"}, command...)...)
}

// get fetches a URL from inside a pod, with patience: a service takes a moment to reach every node.
func (s *story) get(pod, url string) (answer string) {
	s.t.Helper()
	cluster.Await(s.t, pod+" to get "+url, func() (err error) {
		answer, err = s.TryKubectl("--namespace", s.namespace, "exec", pod, "--", "curl", "-sSf", "--max-time", "5", url)
		return err
	})
	return answer
}

// expose makes a service in front of the pods with the label app and returns it.
func (s *story) expose(name, app string, change func(*corev1.Service)) corev1.Service {
	s.t.Helper()
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": app}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}
	if change != nil {
		change(svc)
	}
	made, err := s.API.CoreV1().Services(s.namespace).Create(s.t.Context(), svc, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatalf("creating service %s: %v", name, err)
	}
	return *made
}

// fetch gets a URL from somewhere outside the pod network, for a host by that name if one is given.
func fetch(from cluster.NetNS, url, host string) (string, error) {
	client := http.Client{
		Timeout:   3 * time.Second,
		Transport: &http.Transport{DialContext: from.Dial, DisableKeepAlives: true},
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	req.Host = host
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s: %s", url, res.Status, b)
	}
	return string(b), err
}

// awaitFetch is fetch with patience.
func awaitFetch(t *testing.T, from cluster.NetNS, url, host string) (answer string) {
	t.Helper()
	cluster.Await(t, url, func() (err error) {
		answer, err = fetch(from, url, host)
		return err
	})
	return answer
}

// callerOf is the address that a server's /clientip saw.
func callerOf(t *testing.T, answer string) netip.Addr {
	t.Helper()
	seen, err := netip.ParseAddrPort(answer)
	if err != nil {
		t.Fatalf("/clientip answers %q: %v", answer, err)
	}
	return seen.Addr().Unmap()
}

var errStill = errors.New("it is still there")

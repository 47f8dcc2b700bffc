package main

import (
	"os"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
)

// cleanupObjects is cleanup.yaml, decoded strictly.
func cleanupObjects(t *testing.T) (map[string]runtime.Object, *appsv1.DaemonSet) {
	t.Helper()
	text, err := os.ReadFile("cleanup.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects := decode(t, string(text))
	ds, ok := objects["DaemonSet tweed-cleanup"].(*appsv1.DaemonSet)
	if !ok || len(objects) != 5 {
		t.Fatalf("cleanup.yaml has %v", objects)
	}
	return objects, ds
}

// TestCleanupMayDoMoreThanTheDaemon holds what comes last against what was there all the time.
func TestCleanupMayDoMoreThanTheDaemon(t *testing.T) {
	objects, ds := cleanupObjects(t)
	pod, daemons := ds.Spec.Template.Spec, daemonSet(t, manifest(t)).Spec.Template.Spec
	daemon := daemons.Containers[0]
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if c.Image != daemon.Image || !equality.Semantic.DeepEqual(c.SecurityContext, daemon.SecurityContext) {
			t.Errorf("container %s runs %s with %v, the daemon %s with %v",
				c.Name, c.Image, c.SecurityContext, daemon.Image, daemon.SecurityContext)
		}
	}
	for _, v := range pod.Volumes {
		if !slices.ContainsFunc(daemons.Volumes, func(d corev1.Volume) bool { return equality.Semantic.DeepEqual(d, v) }) {
			t.Errorf("the daemon has no volume like %s", v.Name)
		}
	}
	if pod.HostPID || pod.HostIPC || !equality.Semantic.DeepEqual(pod.SecurityContext, daemons.SecurityContext) {
		t.Errorf("the pod shares more with the node than the daemon does, or runs as another: %v", pod.SecurityContext)
	}
	role, ok := objects["ClusterRole tweed-cleanup"].(*rbacv1.ClusterRole)
	want := []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "patch"}}}
	if !ok || !equality.Semantic.DeepEqual(role.Rules, want) {
		t.Errorf("the role is %v, expected %v", role, want)
	}
}

// TestCleanupCannotGetToItsWork sees that the pod runs on every node, as the daemon did, and has what it is to empty.
func TestCleanupCannotGetToItsWork(t *testing.T) {
	_, ds := cleanupObjects(t)
	pod, daemons := ds.Spec.Template.Spec, daemonSet(t, manifest(t)).Spec.Template.Spec
	if !equality.Semantic.DeepEqual(pod.Tolerations, daemons.Tolerations) || !pod.HostNetwork ||
		!equality.Semantic.DeepEqual(pod.NodeSelector, daemons.NodeSelector) {
		t.Errorf("the pod is not on every node: %v, %v, host network %v", pod.Tolerations, pod.NodeSelector, pod.HostNetwork)
	}
	first, second := pod.InitContainers[0], pod.Containers[0]
	if !slices.Equal(second.Args, append(slices.Clone(first.Args), "--stay")) {
		t.Errorf("first %v runs, then %v", first.Args, second.Args)
	}
	second.Name, second.Args = first.Name, first.Args
	if !equality.Semantic.DeepEqual(first, second) {
		t.Errorf("the containers differ in more than --stay:\n%v\n%v", first, second)
	}
	var paths []string
	for _, m := range first.VolumeMounts {
		paths = append(paths, m.MountPath)
	}
	slices.Sort(paths)
	if want := []string{"/etc/cni/net.d", "/opt/cni/bin", "/run/tweed", "/run/xtables.lock"}; !slices.Equal(paths, want) {
		t.Errorf("it has %v, expected %v", paths, want)
	}
}

// TestVersionOfCleanupIsAnother holds its labels to those of tweed.yaml.
func TestVersionOfCleanupIsAnother(t *testing.T) {
	objects, _ := cleanupObjects(t)
	const label = "app.kubernetes.io/version"
	want := daemonSet(t, manifest(t)).Labels[label]
	for name, o := range objects {
		m, err := meta.Accessor(o)
		if err != nil {
			t.Fatal(err)
		}
		if m.GetLabels()[label] != want {
			t.Errorf("%s: label %s is %q, in tweed.yaml %q", name, label, m.GetLabels()[label], want)
		}
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

// overlays are the directories below overlays, and the fields that each changes.
var overlays = map[string][]string{
	"dual-stack": {
		"ConfigMap tweed: data net-conf.json EnableIPv6",
		"ConfigMap tweed: data net-conf.json IPv6Network",
	},
	"host-gw": {
		"ConfigMap tweed: data net-conf.json Backend Type",
	},
	"k3s": {
		"ConfigMap tweed: data net-conf.json Network",
		"DaemonSet tweed: spec template spec volumes cni-bin hostPath path",
		"DaemonSet tweed: spec template spec volumes cni-conf hostPath path",
	},
}

func TestCommittedFileIsNotWhatBaseMakes(t *testing.T) {
	files, err := generate(".")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if have, err := os.ReadFile(name); err != nil || string(have) != want {
			t.Errorf("%s is not what base and this program make (%v): run `make manifests`", name, err)
		}
	}
}

// TestObjectIsNotWhatKubernetesKnows decodes every object into its type of k8s.io/api, strictly.
func TestObjectIsNotWhatKubernetesKnows(t *testing.T) {
	objects := manifest(t)
	for _, want := range []string{
		"Namespace tweed", "ServiceAccount tweed", "ClusterRole tweed", "ClusterRoleBinding tweed", "ConfigMap tweed",
		"DaemonSet tweed",
	} {
		if objects[want] == nil {
			t.Errorf("tweed.yaml has no %s, only %v", want, slices.Collect(maps.Keys(objects)))
		}
	}
}

// TestKustomizeLosesWhatBaseSays compares what is made of base with its files as they were written.
func TestKustomizeLosesWhatBaseSays(t *testing.T) {
	files, err := filepath.Glob("base/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	written := map[string]runtime.Object{}
	for _, name := range files {
		if name == "base/kustomization.yaml" {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		maps.Copy(written, decode(t, "---\n"+string(text)))
	}
	for _, path := range differences(written, built(t, "base")) {
		if !strings.Contains(path, " labels app.kubernetes.io/") {
			t.Errorf("what kustomize makes of base and its files differ in %s", path)
		}
	}
}

func TestOverlayChangesMoreOrLessThanItShould(t *testing.T) {
	dirs, err := os.ReadDir("overlays")
	if err != nil {
		t.Fatal(err)
	}
	base := built(t, "base")
	for _, dir := range dirs {
		want, known := overlays[dir.Name()]
		if !known {
			t.Errorf("overlays/%s: say in the table of this test what it changes", dir.Name())
		}
		if have := differences(base, built(t, "overlays/"+dir.Name())); !slices.Equal(have, want) {
			t.Errorf("overlays/%s changes\n%s\nand should change\n%s",
				dir.Name(), strings.Join(have, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestVersionsDisagree holds together what names the version: image, labels, chart.
func TestVersionsDisagree(t *testing.T) {
	_, version, _ := strings.Cut(daemonSet(t, manifest(t)).Spec.Template.Spec.Containers[0].Image, ":")
	chart := loadChart(t)
	if chart.Metadata.AppVersion != version || "v"+chart.Metadata.Version != version {
		t.Errorf("the image is of %s, the chart %s of %s", version, chart.Metadata.Version, chart.Metadata.AppVersion)
	}
	for name, o := range manifest(t) {
		m, err := meta.Accessor(o)
		if err != nil {
			t.Fatal(err)
		}
		if label := m.GetLabels()["app.kubernetes.io/version"]; label != version {
			t.Errorf("%s: label app.kubernetes.io/version is %q, the image is of %s", name, label, version)
		}
	}
}

// TestDaemonMayDoMoreThanItNeeds is where a new privilege or path of the node has to be argued for.
func TestDaemonMayDoMoreThanItNeeds(t *testing.T) {
	pod := daemonSet(t, manifest(t)).Spec.Template.Spec
	allowed := map[string][]corev1.Capability{"install": nil, "tweed": {"NET_ADMIN", "NET_RAW"}}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		want := corev1.SecurityContext{
			AllowPrivilegeEscalation: new(bool),
			ReadOnlyRootFilesystem:   ptrTo(true),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: allowed[c.Name]},
		}
		if !equality.Semantic.DeepEqual(*c.SecurityContext, want) {
			t.Errorf("container %s runs with %v, expected %v", c.Name, c.SecurityContext, want)
		}
	}
	var paths []string
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			paths = append(paths, v.HostPath.Path)
		}
	}
	slices.Sort(paths)
	want := []string{"/etc/cni/net.d", "/opt/cni/bin", "/proc/sys/net", "/run/tweed", "/run/xtables.lock"}
	if !slices.Equal(paths, want) {
		t.Errorf("the pod has the node's %v, expected %v", paths, want)
	}
	if pod.HostPID || pod.HostIPC || pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("the pod shares the node's processes or IPC, or runs without a seccomp profile: %v", pod.SecurityContext)
	}
}

func TestProbeAsksAnotherAddress(t *testing.T) {
	c := daemonSet(t, manifest(t)).Spec.Template.Spec.Containers[0]
	for p, path := range map[*corev1.Probe]string{
		c.StartupProbe: "/healthz", c.LivenessProbe: "/healthz", c.ReadinessProbe: "/readyz",
	} {
		get := p.HTTPGet
		if get.Host != "127.0.0.1" || get.Port.IntValue() != 9479 || get.Path != path {
			t.Errorf("a probe asks %s:%s%s, expected 127.0.0.1:9479%s", get.Host, get.Port.String(), get.Path, path)
		}
	}
}

// manifest is tweed.yaml.
func manifest(t *testing.T) map[string]runtime.Object {
	t.Helper()
	text, err := os.ReadFile("tweed.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, string(text))
}

// built is what kustomize makes of a directory.
func built(t *testing.T, dir string) map[string]runtime.Object {
	t.Helper()
	nodes, err := build(dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := textOf(nodes)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, text)
}

// decode reads objects strictly: a field that their type does not have, or has twice, fails the test.
func decode(t *testing.T, text string) map[string]runtime.Object {
	t.Helper()
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	objects := map[string]runtime.Object{}
	for _, doc := range strings.Split("\n"+text, "\n---\n")[1:] {
		o, kind, err := strict.Decode([]byte(doc+"\n"), nil, nil)
		if err != nil {
			t.Fatalf("%v, in\n%s", err, doc)
		}
		m, err := meta.Accessor(o)
		if err != nil {
			t.Fatal(err)
		}
		name := kind.Kind + " " + m.GetName()
		if objects[name] != nil {
			t.Fatalf("%s is there twice", name)
		}
		objects[name] = o
	}
	return objects
}

func daemonSet(t *testing.T, objects map[string]runtime.Object) *appsv1.DaemonSet {
	t.Helper()
	ds, ok := objects["DaemonSet tweed"].(*appsv1.DaemonSet)
	if !ok {
		t.Fatal("there is no DaemonSet tweed")
	}
	return ds
}

// differences lists the fields in which two sets of objects differ.
func differences(a, b map[string]runtime.Object) []string {
	fieldsA, fieldsB := map[string]string{}, map[string]string{}
	for name, o := range a {
		flatten(fieldsA, name+":", plain(o))
	}
	for name, o := range b {
		flatten(fieldsB, name+":", plain(o))
	}
	var paths []string
	for path := range maps.Keys(fieldsA) {
		if value, ok := fieldsB[path]; !ok || value != fieldsA[path] {
			paths = append(paths, path)
		}
	}
	for path := range maps.Keys(fieldsB) {
		if _, ok := fieldsA[path]; !ok {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	return paths
}

// flatten writes the leaves of a value by their path. An element of a list goes by its name, where it has one. A file
// of JSON is looked into.
func flatten(to map[string]string, path string, value any) {
	switch v := value.(type) {
	case map[string]any:
		for key, field := range v {
			flatten(to, path+" "+key, field)
		}
	case []any:
		for i, element := range v {
			key := strconv.Itoa(i)
			if m, ok := element.(map[string]any); ok && m["name"] != nil {
				key = fmt.Sprint(m["name"])
			}
			flatten(to, path+" "+key, element)
		}
	case string:
		var file map[string]any
		if strings.HasSuffix(path, ".json") && json.Unmarshal([]byte(v), &file) == nil {
			flatten(to, path, file)
			return
		}
		to[path] = v
	default:
		to[path] = fmt.Sprint(v)
	}
}

func plain(o runtime.Object) any {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err) // objects of Kubernetes do marshal
	}
	var v any
	if err := yaml.Unmarshal(text, &v); err != nil {
		panic(err)
	}
	return v
}

func ptrTo[T any](v T) *T { return &v }

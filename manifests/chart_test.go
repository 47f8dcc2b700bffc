package main

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

func TestChartMakesOtherObjectsThanTheManifest(t *testing.T) {
	if diff := differences(manifest(t), render(t, "")); diff != nil {
		t.Errorf("with its default values, the chart differs from tweed.yaml in\n%s", strings.Join(diff, "\n"))
	}
}

func TestChartMakesOtherObjectsThanTheOverlay(t *testing.T) {
	for name := range overlays {
		values, err := os.ReadFile(filepath.Join("overlays", name, "values.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := differences(built(t, "overlays/"+name), render(t, string(values))); diff != nil {
			t.Errorf("with overlays/%s/values.yaml, the chart differs from the overlay in\n%s", name, strings.Join(diff, "\n"))
		}
	}
}

func TestValueDoesNotArrive(t *testing.T) {
	objects := render(t, `
image: example.org/net/tweed@sha256:0123
imagePullPolicy: Always
imagePullSecrets: [{name: key}]
netConf: {Backend: {VNI: 16777215, MTU: 1400}, SubnetSource: lease}
flags: {iface: eth1, verbose: true}
resources: {limits: {memory: 1Gi}}
`)
	pod := daemonSet(t, objects).Spec.Template.Spec
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if c.Image != "example.org/net/tweed@sha256:0123" || c.ImagePullPolicy != "Always" ||
			c.Resources.Limits.Memory().String() != "1Gi" || c.Resources.Requests.Memory().String() != "40Mi" {
			t.Errorf("container %s: %s %s %v", c.Name, c.Image, c.ImagePullPolicy, c.Resources)
		}
	}
	if len(pod.ImagePullSecrets) != 1 || pod.ImagePullSecrets[0].Name != "key" {
		t.Errorf("imagePullSecrets: %v", pod.ImagePullSecrets)
	}
	want := map[string]string{
		"flags": "iface = eth1\nverbose = true\n",
		"net-conf.json": `{
  "Backend": {
    "MTU": 1400,
    "VNI": 16777215
  },
  "Network": "10.244.0.0/16",
  "SubnetSource": "lease"
}
`}
	if role, err := meta.Accessor(objects["ClusterRole tweed"]); err != nil ||
		role.GetAnnotations()["tweed.dev/subnet-source"] != "lease" {
		t.Errorf("the policy's parameter is that of %v (%v)", role, err)
	}
	if config, ok := objects["ConfigMap tweed"].(*corev1.ConfigMap); !ok || !maps.Equal(config.Data, want) {
		t.Errorf("ConfigMap tweed has %q, expected %q", config.Data, want)
	}
}

func TestTextOfBaseIsTakenForTemplate(t *testing.T) {
	objects, err := build("base")
	if err != nil {
		t.Fatal(err)
	}
	const text = "{{ .Values.image }} {{ nonsense"
	if err := objects[0].SetAnnotations(map[string]string{"text": text}); err != nil {
		t.Fatal(err)
	}
	template, err := templateOf(objects)
	if err != nil {
		t.Fatal(err)
	}
	c := loadChart(t)
	c.Templates[0].Data = []byte(template)
	rendered, err := tryRender(t, c, "")
	if err != nil {
		t.Fatal(err)
	}
	ns, ok := decode(t, rendered)["Namespace tweed"].(*corev1.Namespace)
	if !ok || ns.Annotations["text"] != text {
		t.Errorf("annotation %q became %v", text, ns)
	}
}

func TestBadValueIsTaken(t *testing.T) {
	for values, named := range map[string]string{
		"colour: red":                                        "colour",
		"image: 7":                                           "/image",
		"image: tweed":                                       "/image",
		"imagePullPolicy: Sometimes":                         "/imagePullPolicy",
		"imagePullSecrets: [key]":                            "/imagePullSecrets/0",
		"netConf: {Network: 10.244.0.0}":                     "/netConf/Network",
		"netConf: {Network: 10.244.0.0/33}":                  "/netConf/Network",
		"netConf: {Network: 10.244/0.0/16}":                  "/netConf/Network",
		"netConf: {Network: 10.256.0.0/16}":                  "/netConf/Network",
		"netConf: {Network: \"fd00:10:244::/48\"}":           "/netConf/Network",
		"netConf: {Network: null}":                           "Network",
		"netConf: {Network: [10.244.0.0/16]}":                "/netConf/Network",
		"netConf: {network: 10.244.0.0/16}":                  "network",
		"netConf: {EnableIPv6: true}":                        "IPv6Network",
		"netConf: {EnableIPv6: \"true\"}":                    "/netConf/EnableIPv6",
		"netConf: {IPv6Network: 10.244.0.0/16}":              "/netConf/IPv6Network",
		"netConf: {SubnetLen: 31}":                           "/netConf/SubnetLen",
		"netConf: {SubnetMin: 10.244.0.0/24}":                "/netConf/SubnetMin",
		"netConf: {Reserved: 10.244.0.0/24}":                 "/netConf/Reserved",
		"netConf: {Underlay: both}":                          "/netConf/Underlay",
		"netConf: {SubnetSource: spec}":                      "/netConf/SubnetSource",
		"netConf: {PacketFilter: legacy}":                    "/netConf/PacketFilter",
		"netConf: {PodSpoofing: true}":                       "/netConf/PodSpoofing",
		"netConf: {PodSpoofing: {allow: []}}":                "/netConf/PodSpoofing",
		"netConf: {PodSpoofing: {allow: [Lab]}}":             "/netConf/PodSpoofing",
		"netConf: {NonMasqueradeCIDRs: [10.0.0.1]}":          "/netConf/NonMasqueradeCIDRs/0",
		"netConf: {Backend: {Type: udp}}":                    "/netConf/Backend/Type",
		"netConf: {Backend: {VNI: 0}}":                       "/netConf/Backend/VNI",
		"netConf: {Backend: {Port: 70000}}":                  "/netConf/Backend/Port",
		"netConf: {Backend: {MTU: \"1400\"}}":                "/netConf/Backend/MTU",
		"netConf: {Backend: {MTU: 600}}":                     "/netConf/Backend/MTU",
		"netConf: {Backend: {DirectRouting: yes please}}":    "/netConf/Backend/DirectRouting",
		"netConf: {Backend: {Type: host-gw, VNI: 1}}":        "/netConf/Backend",
		"netConf: {Backend: {Learning: true}}":               "Learning",
		"netConf: '{\"Network\": \"10.244.0.0/16\"}'":        "/netConf",
		"flags: [--iface=eth1]":                              "/flags",
		"flags: {--iface: eth1}":                             "/flags",
		"flags: {iface: \"eth1\\nkubeconfig = /etc/admin\"}": "/flags/iface",
		"cni: {binDir: opt/cni/bin}":                         "/cni/binDir",
		"cni: {confDir: \"\"}":                               "/cni/confDir",
		"cni: {dir: /opt/cni/bin}":                           "dir",
		"resources: {requests: {cpus: 1}}":                   "/resources/requests",
		"resources: 40Mi":                                    "/resources",
	} {
		_, err := tryRender(t, loadChart(t), values)
		if err == nil || !strings.Contains(err.Error(), named) {
			t.Errorf("%s: expected to be refused with %q, got: %v", values, named, err)
		}
	}
}

func TestGoodValueIsRefused(t *testing.T) {
	for _, values := range []string{
		"netConf: {Network: null, EnableIPv4: false, EnableIPv6: true, IPv6Network: \"fd00:10:244::/48\", Underlay: ipv6}",
		"netConf: {Network: 192.168.64.0/24, SubnetLen: 27, SubnetMin: 192.168.64.32, SubnetMax: 192.168.64.192}",
		"netConf: {Reserved: [10.244.0.0/22, \"fd00::/64\"], Backend: {Type: vxlan, VNI: 1, Port: 8472}}",
		"netConf: {Backend: {DirectRouting: true, ChecksumOffload: \"off\"}}",
		"netConf: {Backend: {Type: host-gw, MTU: 600}}",
		"netConf: {PodSpoofing: allow}",
		"netConf: {PodSpoofing: {allow: [metallb-system, lab]}}",
		"netConf: {PacketFilter: nftables, NonMasqueradeCIDRs: [10.0.0.0/8, \"fd00::/8\"]}",
		"global: {registry: example.org}",
		"image: example.org:5000/tweed:v0.1.0",
	} {
		if _, err := tryRender(t, loadChart(t), values); err != nil {
			t.Errorf("%s: %v", values, err)
		}
	}
}

// TestSchemaKnowsOtherKeysThanTheDaemon compares the schema with the table in docs/configuration.md.
func TestSchemaKnowsOtherKeysThanTheDaemon(t *testing.T) {
	doc, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	keyOfFourColumns := regexp.MustCompile("(?m)^\\| `([A-Za-z0-9.]+)` \\|[^|]+\\|[^|]*\\|[^|]+\\|$")
	var documented []string
	for _, row := range keyOfFourColumns.FindAllStringSubmatch(string(doc), -1) {
		documented = append(documented, row[1])
	}
	type node struct{ Properties map[string]node }
	var schema node
	if err := yaml.Unmarshal(loadChart(t).Schema, &schema); err != nil {
		t.Fatal(err)
	}
	conf := schema.Properties["netConf"].Properties
	known := slices.Collect(maps.Keys(conf))
	for key := range conf["Backend"].Properties {
		known = append(known, "Backend."+key)
	}
	slices.Sort(documented)
	slices.Sort(known)
	if len(known) == 0 || !slices.Equal(known, documented) {
		t.Errorf("values.schema.json knows\n%v\ndocs/configuration.md has\n%v", known, documented)
	}
}

func TestHelmLint(t *testing.T) {
	result := lint.RunAll("chart", nil, "kube-system")
	for _, m := range result.Messages {
		if m.Severity > support.InfoSev {
			t.Error(m)
		}
	}
}

func loadChart(t *testing.T) *chart.Chart {
	t.Helper()
	c, err := loader.LoadDir("chart")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// render is what the chart makes of values, as `helm install --namespace kube-system` would apply it.
func render(t *testing.T, values string) map[string]runtime.Object {
	t.Helper()
	text, err := tryRender(t, loadChart(t), values)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, text)
}

func tryRender(t *testing.T, c *chart.Chart, values string) (string, error) {
	t.Helper()
	given, err := loader.LoadValues(strings.NewReader(values))
	if err != nil {
		t.Fatal(err)
	}
	all, err := util.ToRenderValues(c, given, common.ReleaseOptions{Name: "net", Namespace: "kube-system"}, nil)
	if err != nil {
		return "", err
	}
	files, err := engine.Render(c, all)
	return strings.Join(slices.Collect(maps.Values(files)), "\n"), err
}

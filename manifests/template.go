package main

import (
	"fmt"
	"strings"

	kyaml "sigs.k8s.io/kustomize/kyaml/yaml"
)

const templateHeader = `{{- /* Made from manifests/base by "make manifests": change it there, and values in template.go. */ -}}
`

// A hole is a field of an object that the chart fills from its values.
type hole struct {
	kind     string
	path     string // of fields, separated by spaces
	template string // what stands in the field's place
}

const (
	pod     = "spec template spec "
	install = pod + "initContainers [name=install] "
	daemon  = pod + "containers [name=tweed] "
	volumes = pod + "volumes "

	netConf = `|
    {{- toPrettyJson .Values.netConf | nindent 4 }}
  {{- with .Values.flags }}
  flags: |
    {{- range $name, $value := . }}
    {{ $name }} = {{ $value }}
    {{- end }}
  {{- end }}`
)

var holes = []hole{
	{"ConfigMap", "data net-conf.json", netConf},
	{"ClusterRole", "metadata annotations tweed.dev/subnet-source", `{{ .Values.netConf.SubnetSource | default "auto" }}`},
	{"DaemonSet", pod + "imagePullSecrets", `{{ toJson .Values.imagePullSecrets }}`},
	{"DaemonSet", install + "image", `{{ quote .Values.image }}`},
	{"DaemonSet", install + "imagePullPolicy", `{{ .Values.imagePullPolicy }}`},
	{"DaemonSet", install + "resources", `{{ toJson .Values.resources }}`},
	{"DaemonSet", daemon + "image", `{{ quote .Values.image }}`},
	{"DaemonSet", daemon + "imagePullPolicy", `{{ .Values.imagePullPolicy }}`},
	{"DaemonSet", daemon + "resources", `{{ toJson .Values.resources }}`},
	{"DaemonSet", volumes + "[name=cni-bin] hostPath path", `{{ quote .Values.cni.binDir }}`},
	{"DaemonSet", volumes + "[name=cni-conf] hostPath path", `{{ quote .Values.cni.confDir }}`},
}

// templateOf writes objects as a template of a Helm chart. It makes holes in them.
func templateOf(objects []*kyaml.RNode) (string, error) {
	// What looks like a template in the objects is text.
	replace := []string{"{{", `{{ "{{" }}`}
	for i, h := range holes {
		mark := fmt.Sprintf("tweed-hole-%02d", i)
		if err := h.make(objects, mark); err != nil {
			return "", err
		}
		replace = append(replace, mark, h.template)
	}
	text, err := textOf(objects)
	return templateHeader + strings.NewReplacer(replace...).Replace(text), err
}

// make puts a mark into the field.
func (h hole) make(objects []*kyaml.RNode, mark string) error {
	for _, o := range objects {
		if o.GetKind() != h.kind {
			continue
		}
		path := strings.Fields(h.path)
		parent, err := o.Pipe(kyaml.Lookup(path[:len(path)-1]...))
		if err == nil && parent == nil {
			err = fmt.Errorf("base has no field %v to hold it", path[:len(path)-1])
		}
		if err == nil {
			_, err = parent.Pipe(kyaml.FieldSetter{
				Name: path[len(path)-1], Value: kyaml.NewStringRNode(mark), OverrideStyle: true,
			})
		}
		if err != nil {
			return fmt.Errorf("%s %s of the chart's values: %w", h.kind, h.path, err)
		}
		return nil
	}
	return fmt.Errorf("base has no %s, which the chart's values are for", h.kind)
}

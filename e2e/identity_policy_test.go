package e2e

import (
	"errors"
	"io"
	"os"
	"testing"

	"github.com/google/cel-go/cel"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/apimachinery/pkg/util/yaml"
	plugincel "k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/cel/environment"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/restmapper"
)

// policies reads those of the manifest.
func policies(t *testing.T) (all []*admissionv1.ValidatingAdmissionPolicy) {
	t.Helper()
	f, err := os.Open(policyFiles)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for d := yaml.NewYAMLOrJSONDecoder(f, 4096); ; {
		p := &admissionv1.ValidatingAdmissionPolicy{}
		if err := d.Decode(p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("%s: %v", policyFiles, err)
		}
		if p.Kind == "ValidatingAdmissionPolicy" {
			all = append(all, p)
		}
	}
}

// An expression is one of a policy, whatever it results in.
type expression struct{ name, text string }

func (e expression) GetName() string          { return e.name }
func (e expression) GetExpression() string    { return e.text }
func (e expression) ReturnTypes() []*cel.Type { return []*cel.Type{cel.AnyType} }

// expressions are all of a policy's, and again its variables, by their names.
func expressions(
	p *admissionv1.ValidatingAdmissionPolicy,
) (all []expression, named []plugincel.NamedExpressionAccessor) {
	for _, v := range p.Spec.Variables {
		named = append(named, expression{v.Name, v.Expression})
		all = append(all, expression{"", v.Expression})
	}
	for _, m := range p.Spec.MatchConditions {
		all = append(all, expression{m.Name, m.Expression})
	}
	for _, v := range p.Spec.Validations {
		all = append(all, expression{"", v.Expression}, expression{"", v.MessageExpression})
	}
	return all, named
}

// An API server takes new expressions if the version before it understands them: 1.30 those of 1.29.
func TestPoliciesSuitTheOldestKubernetes(t *testing.T) {
	for _, p := range policies(t) {
		compiler, err := plugincel.NewCompositedCompiler(environment.MustBaseEnvSet(version.MajorMinor(1, 29)))
		if err != nil {
			t.Fatal(err)
		}
		options := plugincel.OptionalVariableDeclarations{HasParams: p.Spec.ParamKind != nil}
		all, variables := expressions(p)
		compiler.CompileAndStoreVariables(variables, options, environment.NewExpressions)
		for _, e := range all {
			if r := compiler.CompileCELExpression(e, options, environment.NewExpressions); r.Error != nil {
				t.Errorf("%s: %s: %v", p.Name, e.text, r.Error)
			}
		}
	}
}

// policiesFitTheTypes checks the expressions as kube-controller-manager does, which has a warning for what is wrong.
func (s *identitySuite) policiesFitTheTypes(t *testing.T) {
	groups, err := restmapper.GetAPIGroupResources(s.API.Discovery())
	if err != nil {
		t.Fatal(err)
	}
	checker := validating.TypeChecker{
		SchemaResolver: &resolver.ClientDiscoveryResolver{Discovery: s.API.Discovery()},
		RestMapper:     restmapper.NewDiscoveryRESTMapper(groups),
	}
	for _, p := range policies(t) {
		for _, w := range checker.Check(p) {
			t.Errorf("%s: %s: %s", p.Name, w.FieldRef, w.Warning)
		}
	}
}

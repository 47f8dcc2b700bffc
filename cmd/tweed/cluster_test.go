package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// nodeList is what an API server has of two nodes, one of which is outside the pod network.
const nodeList = `{"apiVersion":"meta.k8s.io/v1","kind":"PartialObjectMetadataList","metadata":{"resourceVersion":"7"},"items":[
{"metadata":{"name":"n1","creationTimestamp":"2026-01-02T03:04:05Z","annotations":{
 "tweed.dev/subnets":"10.244.1.0/24","tweed.dev/host":"192.0.2.11","tweed.dev/backend":"vxlan",
 "tweed.dev/backend-data":"{\"vni\":1,\"port\":8472,\"mac\":\"0e:00:00:00:00:01\"}"}}},
{"metadata":{"name":"n2","creationTimestamp":"2026-01-02T03:04:06Z","annotations":{
 "tweed.dev/subnets":"10.96.2.0/24","tweed.dev/host":"192.0.2.12","tweed.dev/backend":"vxlan",
 "tweed.dev/backend-data":"{\"vni\":1,\"port\":8472,\"mac\":\"0e:00:00:00:00:02\"}"}}}]}`

// apiServer answers each path with a status and a body, and returns a kubeconfig for it.
func apiServer(t *testing.T, answer func(method, path string, body []byte) (int, string)) (kubeconfig string) {
	t.Helper()
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil { // of the tests' own namespace
		t.Fatalf("%v: %s", err, out)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent, _ := io.ReadAll(r.Body)
		code, body := answer(r.Method, r.URL.Path, sent)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		fmt.Fprint(w, body)
	}))
	t.Cleanup(s.Close)
	kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":"` + s.URL + `"}}],
"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u","user":{}}],"current-context":"c"}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return kubeconfig
}

func tweed(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	cmd := rootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(io.Discard)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestStatusFromAnAdministratorsMachine(t *testing.T) {
	const configMap = "/api/v1/namespaces/tweed/configmaps/tweed"
	const outside = "subnet 10.96.2.0/24 is outside the network 10.244.0.0/16"
	for name, c := range map[string]struct {
		code       int
		body, want string
		err        string
	}{
		"judged by the ConfigMap": {200, `{"data":{"net-conf.json":"{\"Network\":\"10.244.0.0/16\"}"}}`, outside, "exit status 2"},
		"no ConfigMap": {404, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`,
			"are not judged by it: there is no ConfigMap tweed in namespace tweed", ""},
		"forbidden": {403, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403,"message":"no"}`,
			`are not judged by it: cannot get configmaps`, ""},
		"wrong": {200, `{"data":{"net-conf.json":"{\"Netwrk\":1}"}}`, "", "ConfigMap tweed in namespace tweed: Netwrk: unknown key"},
	} {
		t.Run(name, func(t *testing.T) {
			kubeconfig := apiServer(t, func(_, path string, _ []byte) (int, string) {
				switch path {
				case "/api/v1/nodes":
					return 200, nodeList
				case configMap:
					return c.code, strings.Replace(c.body, `{"data"`, `{"apiVersion":"v1","kind":"ConfigMap","data"`, 1)
				}
				return 404, ""
			})
			out, err := tweed(t, "subnet", "status", "--kubeconfig", kubeconfig)
			if !strings.Contains(out, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, output:\n%s", err, out)
			}
		})
	}
	t.Run("a file that is asked for wins", func(t *testing.T) {
		kubeconfig := apiServer(t, func(_, path string, _ []byte) (int, string) {
			if path == configMap {
				t.Error("the ConfigMap was read")
			}
			return 200, nodeList
		})
		file := filepath.Join(t.TempDir(), "net-conf.json")
		if err := os.WriteFile(file, []byte(`{"Network":"10.0.0.0/8","SubnetLen":24}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := tweed(t, "subnet", "status", "--kubeconfig", kubeconfig, "--net-conf", file); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func TestDaemonThatCannotRunTellsItsNode(t *testing.T) {
	for reason, c := range map[string]struct{ network, runDir, want string }{
		"ConfigInvalid": {"10.244.3.0/16", ".", "did you mean 10.244.0.0/16?"},
		"CannotStart":   {"10.244.0.0/16", "net-conf.json", "--run-dir names another"},
	} {
		t.Run(reason, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "net-conf.json")
			if err := os.WriteFile(file, []byte(`{"Network":"`+c.network+`"}`), 0o600); err != nil {
				t.Fatal(err)
			}
			var told []string
			kubeconfig := apiServer(t, func(method, path string, body []byte) (int, string) {
				told = append(told, method+" "+path+" "+string(body))
				return 201, `{"apiVersion":"v1","kind":"Event"}`
			})
			_, err := tweed(t, "run", "--kubeconfig", kubeconfig, "--node-name", "n1", "--net-conf", file,
				"--run-dir", filepath.Join(dir, c.runDir), "--cni-conf-dir", dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("it ends with %v", err)
			}
			if len(told) != 1 || !strings.HasPrefix(told[0], "POST /api/v1/namespaces/default/events ") ||
				!strings.Contains(told[0], reason) || !strings.Contains(told[0], c.want) {
				t.Errorf("it told %q", told)
			}
		})
	}
}

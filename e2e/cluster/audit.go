package cluster

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// auditPolicy has each request of the daemons written down as it arrives.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [ResponseStarted, ResponseComplete, Panic]
rules:
- level: Metadata
  users: ["system:serviceaccount:` + account + `:` + account + `"]
- level: None
`

// Audit starts the API server anew, and has it write down what daemons with tokens ask from then on.
func (c *Cluster) Audit(t testing.TB) {
	t.Helper()
	policy := filepath.Join(filesOf("cp"), "audit.yaml")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	c.flags = append(c.flags, "--audit-policy-file="+policy, "--audit-log-path="+auditLog())
	c.StopAPIServer(t)
	c.StartAPIServer(t)
}

func auditLog() string { return filepath.Join(filesOf("cp"), "audit.log") }

// A Request is one that the API server was asked.
type Request struct {
	Verb string `json:"verb"` // list, watch, get, patch, create
	URI  string `json:"requestURI"`
}

// Requests are those that daemons have made since Audit, in their order.
func (c *Cluster) Requests(t testing.TB) (all []Request) {
	t.Helper()
	b, err := os.ReadFile(auditLog())
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var r Request
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("the audit log has a line %s: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

package cluster

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// auditPolicy has each request of the daemons written down as it arrives, and when it has been answered.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [ResponseStarted, Panic]
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

	Stage string    `json:"stage"`
	At    time.Time `json:"stageTimestamp"`
}

// Requests are those that daemons have made since Audit, in their order.
func (c *Cluster) Requests(t testing.TB) []Request {
	t.Helper()
	return slices.DeleteFunc(c.audited(t), func(r Request) bool { return r.Stage != "RequestReceived" })
}

// ListSent is when the API server had answered the last list of a daemon, to its last byte.
func (c *Cluster) ListSent(t testing.TB) (at time.Time) {
	t.Helper()
	for _, r := range c.audited(t) {
		if r.Stage == "ResponseComplete" && r.Verb == "list" {
			at = r.At
		}
	}
	return at
}

func (c *Cluster) audited(t testing.TB) (all []Request) {
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

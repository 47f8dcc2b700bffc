//go:build tools

package build

// The test suite of Kubernetes is built by name; this keeps what it imports in go.mod.
import _ "k8s.io/kubernetes/test/e2e"

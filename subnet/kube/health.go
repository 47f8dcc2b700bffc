package kube

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// health remembers what the API server last answered to each sort of request.
type health struct {
	log *slog.Logger

	mu       sync.Mutex
	failures []failure
}

type failure struct {
	request string
	err     error
}

// note records the outcome of a request, and reports whether that begins or ends a time of failures. Only these two are
// logged.
func (h *health) note(request string, err error) (changed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := len(h.failures)
	var failures []failure
	for _, f := range h.failures {
		if f.request != request {
			failures = append(failures, f)
		}
	}
	if err != nil {
		failures = append(failures, failure{request, err})
	}
	h.failures = failures
	switch {
	case before == 0 && err != nil:
		h.log.Warn("API server away, the last complete list of leases stays in force", "err", err)
	case before > 0 && len(failures) == 0:
		h.log.Info("API server back")
	}
	return (before == 0) != (len(failures) == 0)
}

// err returns the failure that has just happened, if none has been made good since.
func (h *health) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failures) == 0 {
		return nil
	}
	return h.failures[len(h.failures)-1].err
}

// explain adds to err what was asked of which API server, and what to do about it. verb and resource are those of RBAC.
func explain(verb, resource, server string, err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // the URL of the request says no more than verb and server
	}
	hint := ""
	switch {
	case apierrors.IsUnauthorized(err):
		hint = " (it does not accept our token or client certificate; check the kubeconfig or the service account)"
	case apierrors.IsForbidden(err) && isDenied(err):
		hint = " (an admission policy refuses it, for the reason at the end)"
	case apierrors.IsForbidden(err) && strings.Contains(err.Error(), `User "system:node:`):
		hint = " (this is the identity of a kubelet; give the daemon one of its own: the token of its pod, " +
			"or a certificate as in docs/security.md)"
	case apierrors.IsForbidden(err):
		hint = fmt.Sprintf(" (give our account the verb %q on the resource %q)", verb, resource)
	}
	return fmt.Errorf("cannot %s %s at %s%s: %w", verb, resource, server, hint, err)
}

// isDenied reports whether a refusal is that of a policy or of a webhook, and not for lack of a role.
func isDenied(err error) bool {
	text := err.Error()
	return strings.Contains(text, " denied request: ") || strings.Contains(text, " denied the request")
}

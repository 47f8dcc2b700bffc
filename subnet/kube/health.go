package kube

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
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

// explain adds to err what was asked of which API server, and what to do about it. verb is that of RBAC.
func explain(verb, server string, err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // the URL of the request says no more than verb and server
	}
	hint := ""
	switch {
	case apierrors.IsUnauthorized(err):
		hint = " (it does not accept our token or client certificate; check the kubeconfig or the service account)"
	case apierrors.IsForbidden(err):
		hint = fmt.Sprintf(" (give our account the verb %q on the resource \"nodes\")", verb)
	}
	return fmt.Errorf("cannot %s nodes at %s%s: %w", verb, server, hint, err)
}

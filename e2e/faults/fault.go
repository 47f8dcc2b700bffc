package faults

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Hold never answers. The connection lives, and HTTP/2's pings are answered.
func Hold(_ http.ResponseWriter, r *http.Request, _ http.Handler, held <-chan struct{}) {
	select {
	case <-held:
		panic(http.ErrAbortHandler)
	case <-r.Context().Done():
	}
}

// Delay passes requests on after a while.
func Delay(d time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler, held <-chan struct{}) {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-held:
		case <-r.Context().Done():
			return
		}
		next.ServeHTTP(w, r)
	}
}

// LoseAnswer passes requests on, and ends them without the answer.
func LoseAnswer(_ http.ResponseWriter, r *http.Request, next http.Handler, _ <-chan struct{}) {
	next.ServeHTTP(httptest.NewRecorder(), r)
	panic(http.ErrAbortHandler)
}

// CutAfter ends answers after that many bytes.
func CutAfter(n int) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler, _ <-chan struct{}) {
		next.ServeHTTP(&cutter{w, n}, r)
	}
}

type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *cutter) Write(b []byte) (int, error) {
	if len(b) <= c.left {
		c.left -= len(b)
		return c.ResponseWriter.Write(b)
	}
	_, _ = c.ResponseWriter.Write(b[:c.left])
	_ = http.NewResponseController(c.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

// Answer answers as an API server does that will not do what it is asked.
func Answer(err *apierrors.StatusError) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler, _ <-chan struct{}) {
		status := err.Status()
		status.APIVersion, status.Kind = "v1", "Status"
		if d := status.Details; d != nil && d.RetryAfterSeconds > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(int(d.RetryAfterSeconds)))
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(int(status.Code))
		_ = json.NewEncoder(w).Encode(status)
	}
}

var nodes = schema.GroupResource{Resource: "nodes"}

// Overloaded answers 429 and wants to be asked again after a second.
func Overloaded() Fault { return Answer(apierrors.NewTooManyRequests("try again later", 1)) }

// Unauthorized answers 401.
func Unauthorized() Fault { return Answer(apierrors.NewUnauthorized("Unauthorized")) }

// Forbidden answers 403.
func Forbidden() Fault { return Answer(apierrors.NewForbidden(nodes, "", nil)) }

// Conflict answers 409.
func Conflict() Fault { return Answer(apierrors.NewConflict(nodes, "", nil)) }

// Gone answers 410, as a server does that has forgotten the version that a watch is to go on from.
func Gone() Fault { return Answer(expired()) }

func expired() *apierrors.StatusError {
	return apierrors.NewResourceExpired("too old resource version")
}

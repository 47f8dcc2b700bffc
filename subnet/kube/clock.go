package kube

import (
	"net/http"
	"sync/atomic"
	"time"
)

// A clock tells the API server's time, as far as its answers do (RFC 9110, section 6.6.1): to the second.
type clock struct{ ahead atomic.Int64 } // of ours, in nanoseconds

// now is the server's time, or ours before its first answer.
func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// listen has the clock set by each answer that comes through next.
func (c *clock) listen(next http.RoundTripper) http.RoundTripper { return listener{next, c} }

type listener struct {
	http.RoundTripper
	clock *clock
}

func (l listener) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := l.RoundTripper.RoundTrip(r)
	if err == nil {
		if date, err := http.ParseTime(answer.Header.Get("Date")); err == nil {
			l.clock.ahead.Store(int64(time.Until(date)))
		}
	}
	return answer, err
}

// WrappedRoundTripper lets client-go find what is below.
func (l listener) WrappedRoundTripper() http.RoundTripper { return l.RoundTripper }

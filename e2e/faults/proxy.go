// Package faults stands between a daemon and an API server, and does to requests what a test asks for.
package faults

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"
)

// A Proxy passes requests on to an API server, with the token of who asks, and counts them. To some it does what Rules
// say.
type Proxy struct {
	listen func() (net.Listener, error)
	cert   tls.Certificate
	next   http.Handler

	mu       sync.Mutex
	server   *http.Server // nil while connections are refused
	done     chan struct{}
	conns    map[net.Conn]bool
	requests []Request
	rules    []Rule
	lifted   chan struct{} // closed by Lift
	streams  map[*stream]bool
}

// A Request is one that the proxy was asked.
type Request struct {
	At   time.Time
	Verb string // get, list, watch, patch, create
	Path string
	Auth string // the header Authorization
}

func (r Request) String() string { return r.Verb + " " + r.Path }

// A Rule has something done to the requests that it is for.
type Rule struct {
	For func(Request) bool // nil for all
	Do  Fault
}

// A Fault does something to a request, of which next would be to pass it on. held is closed when faults are lifted.
type Fault func(w http.ResponseWriter, r *http.Request, next http.Handler, held <-chan struct{})

// Start has a Proxy for the API server at that URL answer where listen opens a listener. It is at rest: it passes on.
func Start(listen func() (net.Listener, error), cert tls.Certificate, server *url.URL, transport http.RoundTripper,
) (*Proxy, error) {
	p := &Proxy{
		listen: listen, cert: cert, conns: map[net.Conn]bool{}, lifted: make(chan struct{}), streams: map[*stream]bool{},
		next: &httputil.ReverseProxy{
			Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(server) },
			Transport:     transport,
			FlushInterval: -1,
			ErrorLog:      log.New(io.Discard, "", 0),
			ErrorHandler:  func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
		},
	}
	return p, p.open()
}

func (p *Proxy) open() error {
	l, err := p.listen()
	if err != nil {
		return fmt.Errorf("listening in place of the API server: %w", err)
	}
	server := &http.Server{
		Handler:   p,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{p.cert}, NextProtos: []string{"h2", "http/1.1"}},
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnState: p.note,
	}
	done := make(chan struct{})
	p.mu.Lock()
	p.server, p.done = server, done
	p.mu.Unlock()
	go func() {
		defer close(done)
		_ = server.ServeTLS(l, "", "") // until it is closed
	}()
	return nil
}

func (p *Proxy) note(c net.Conn, state http.ConnState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch state {
	case http.StateNew:
		p.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(p.conns, c)
	}
}

// Refuse ends all connections and has new ones refused, as the machine of a server that is down does.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	server, done := p.server, p.done
	p.server = nil
	p.mu.Unlock()
	if server != nil {
		server.Close()
		<-done
	}
}

// Cut ends all connections. New ones are accepted.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

// Impose has rules take effect beside those that are; of two that are for a request, the earlier does.
func (p *Proxy) Impose(rules ...Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules = append(p.rules, rules...)
}

// Lift ends all faults: requests that are held end without an answer, and all others are passed on. Watches that were
// silenced stay so.
func (p *Proxy) Lift() error {
	p.mu.Lock()
	p.rules = nil
	close(p.lifted)
	p.lifted = make(chan struct{})
	refusing := p.server == nil
	p.mu.Unlock()
	if refusing {
		return p.open()
	}
	return nil
}

// Close ends the Proxy.
func (p *Proxy) Close() { p.Refuse() }

// Requests are those since then.
func (p *Proxy) Requests(since time.Time) (all []Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.requests {
		if !r.At.Before(since) {
			all = append(all, r)
		}
	}
	return all
}

// ServeHTTP does to a request what the rules say.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	req := Request{At: time.Now(), Verb: verb(r), Path: r.URL.Path, Auth: r.Header.Get("Authorization")}
	p.mu.Lock()
	p.requests = append(p.requests, req)
	var do Fault
	for _, rule := range p.rules {
		if do == nil && (rule.For == nil || rule.For(req)) {
			do = rule.Do
		}
	}
	held := p.lifted
	p.mu.Unlock()
	if req.Verb == "watch" {
		s := &stream{ResponseWriter: w}
		p.enter(s)
		defer p.leave(s)
		w = s
	}
	if do == nil {
		p.next.ServeHTTP(w, r)
		return
	}
	do(w, r, p.next, held)
}

func (p *Proxy) enter(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streams[s] = true
}

func (p *Proxy) leave(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.streams, s)
}

func verb(r *http.Request) string {
	switch {
	case r.Method != http.MethodGet:
		return map[string]string{http.MethodPatch: "patch", http.MethodPost: "create"}[r.Method]
	case r.URL.Query().Get("watch") != "":
		return "watch"
	case strings.HasSuffix(r.URL.Path, "/nodes"):
		return "list"
	}
	return "get"
}

// Silence has the watches that are open say nothing more, with their connections well and alive.
func (p *Proxy) Silence() {
	for _, s := range p.watches() {
		s.silence()
	}
}

// Expire has the watches that are open say that the server has forgotten what they go on from.
func (p *Proxy) Expire() (err error) {
	for _, s := range p.watches() {
		err = errors.Join(err, s.expire())
	}
	return err
}

func (p *Proxy) watches() (all []*stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.streams {
		all = append(all, s)
	}
	return all
}

// Upstream is a transport to the API server itself.
func Upstream(trust *tls.Config, dial func(context.Context, string, string) (net.Conn, error)) http.RoundTripper {
	return &http.Transport{TLSClientConfig: trust, DialContext: dial, ForceAttemptHTTP2: true}
}

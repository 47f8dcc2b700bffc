package kube

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"
)

const (
	// dialTimeout bounds an attempt to connect: one that was begun while packets were lost must not be waited for when
	// they are not any more.
	dialTimeout = 3 * time.Second
	// ackTimeout is how long what we send may stay without an acknowledgement before the kernel ends the connection:
	// TCP_USER_TIMEOUT of tcp(7). Without it that takes a quarter of an hour, and HTTP/2's own pings take 45 s.
	ackTimeout = 5 * time.Second
	// An idle connection is probed by the kernel, which costs the API server nothing. An unanswered probe ends it after
	// ackTimeout, and not later than the next: without that, an event that was lost on its way is sent again in
	// pauses that double as long as packets are lost.
	probeAfter, probeEvery = 10 * time.Second, 3 * time.Second
	// longestWish bounds for how long a server can keep us away by Retry-After.
	longestWish = 30 * time.Second
)

// reach returns a configuration whose clients share one way to the API server of cfg, and leave to us what client-go
// would do about a failure.
func reach(cfg *rest.Config) (*rest.Config, error) {
	server, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("%q is not the address of an API server: %w", cfg.Host, err)
	}
	way := rest.CopyConfig(cfg)
	if way.Dial == nil {
		way.Dial = dialer().DialContext
	}
	if file := way.BearerTokenFile; file != "" {
		// In place of client-go's, which reads the file once a minute, whatever the server says of the token.
		way.BearerToken, way.BearerTokenFile = "", ""
		way.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(file)))
	}
	way.Wrap(func(next http.RoundTripper) http.RoundTripper { return &patient{next: next} })
	rt, err := rest.TransportFor(way)
	if err != nil {
		return nil, fmt.Errorf("setting up a client for the API server at %s: %w", server, err)
	}
	return &rest.Config{
		Host: server.String(), Transport: rt,
		UserAgent: cfg.UserAgent, QPS: cfg.QPS, Burst: cfg.Burst, RateLimiter: cfg.RateLimiter, Timeout: cfg.Timeout,
	}, nil
}

func dialer() *net.Dialer {
	return &net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeAfter, Interval: probeEvery},
		Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(ackTimeout.Milliseconds()))
			}), err)
		},
	}
}

// A patient transport asks once and says at once what came of it. client-go alone would ask up to ten times, a second
// apart, and then take a watch that could not be opened for one that has ended.
type patient struct {
	next http.RoundTripper

	mu    sync.Mutex
	until time.Time // the server wants to be left alone until then
}

// RoundTrip asks, once the server wants to be asked.
func (p *patient) RoundTrip(req *http.Request) (*http.Response, error) {
	p.mu.Lock()
	until := p.until
	p.mu.Unlock()
	if d := time.Until(until); d > 0 && !sleep(req.Context(), d) {
		return nil, req.Context().Err()
	}
	res, err := p.next.RoundTrip(req)
	if err != nil {
		if req.Context().Err() == nil {
			err = final(err)
		}
		return nil, err
	}
	p.obey(res)
	return res, nil
}

// obey keeps the server's wish, and keeps it from client-go.
func (p *patient) obey(res *http.Response) {
	seconds, err := strconv.Atoi(res.Header.Get("Retry-After"))
	res.Header.Del("Retry-After")
	if err != nil || seconds <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = time.Now().Add(min(time.Duration(seconds)*time.Second, longestWish))
}

// final returns err as one that client-go has no reason to ask again for. It knows those by their text as well.
func final(err error) error {
	switch {
	case utilnet.IsProbableEOF(err), utilnet.IsConnectionReset(err), utilnet.IsHTTP2ConnectionLost(err):
		return errors.New("the connection ended before there was an answer")
	case utilnet.IsTimeout(err):
		return errors.New(err.Error())
	}
	return err
}

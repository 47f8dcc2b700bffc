package faults_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/faults"
)

// A mock API server answers a list with 100 bytes, and a watch with one line at once and another when news is closed.
type mockServer struct {
	*httptest.Server
	proxy   *faults.Proxy
	patched atomic.Int64
	news    chan struct{}
}

func startMock(t *testing.T) *mockServer {
	t.Helper()
	m := &mockServer{news: make(chan struct{})}
	m.Server = httptest.NewUnstartedServer(m)
	m.Config.ErrorLog = log.New(io.Discard, "", 0)
	m.StartTLS()
	t.Cleanup(m.Close)
	server, err := url.Parse(m.URL)
	if err != nil {
		t.Fatal(err)
	}
	addr := "127.0.0.1:0"
	listen := func() (net.Listener, error) {
		l, err := net.Listen("tcp", addr)
		if err == nil {
			addr = l.Addr().String()
		}
		return l, err
	}
	trust := m.Client().Transport.(*http.Transport).TLSClientConfig
	upstream := faults.Upstream(&tls.Config{RootCAs: trust.RootCAs}, (&net.Dialer{}).DialContext)
	if m.proxy, err = faults.Start(listen, m.TLS.Certificates[0], server, upstream); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.proxy.Close)
	m.URL = "https://" + addr
	m.Client().Transport = &http.Transport{TLSClientConfig: trust.Clone(), ForceAttemptHTTP2: true}
	return m
}

func (m *mockServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.Method == http.MethodPatch:
		m.patched.Add(1)
	case r.URL.RawQuery == "":
		fmt.Fprint(w, strings.Repeat("x", 100))
	default:
		fmt.Fprintln(w, "one")
		_ = http.NewResponseController(w).Flush()
		select {
		case <-m.news:
			fmt.Fprintln(w, "two")
		case <-r.Context().Done():
		}
	}
}

// ask makes a request and reads the answer to its end, or until that takes too long.
func (m *mockServer) ask(t *testing.T, method, path string) (*http.Response, string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, m.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := m.Client().Do(req)
	if err != nil {
		return &http.Response{}, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, string(b), err
}

const (
	listPath  = "/api/v1/nodes"
	watchPath = "/api/v1/nodes?watch=1"
)

// TestProxyDoesWhatIsAsked holds the proxy to its own words, without which TestAPIFaults proves little.
func TestProxyDoesWhatIsAsked(t *testing.T) {
	late := context.DeadlineExceeded
	for name, c := range map[string]struct {
		do           faults.Fault
		method, path string
		status       int
		body         int
		end          error // nil for a whole answer, errAny for any
		patched      int64
	}{
		"Nothing":    {nil, "GET", listPath, 200, 100, nil, 0},
		"Hold":       {faults.Hold, "GET", listPath, 0, 0, late, 0},
		"DelayLong":  {faults.Delay(time.Minute), "GET", listPath, 0, 0, late, 0},
		"DelayShort": {faults.Delay(time.Millisecond), "GET", listPath, 200, 100, nil, 0},
		"LoseAnswer": {faults.LoseAnswer, "PATCH", listPath, 0, 0, errAny, 1},
		"CutAfter":   {faults.CutAfter(10), "GET", listPath, 200, 10, errAny, 0},
		"CutWatch":   {faults.CutAfter(2), "GET", watchPath, 200, 2, errAny, 0},
		"Overloaded": {faults.Overloaded(), "PATCH", listPath, 429, -1, nil, 0},
		"Gone":       {faults.Gone(), "GET", watchPath, 410, -1, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			m := startMock(t)
			if c.do != nil {
				m.proxy.Impose(faults.Rule{Do: c.do})
			}
			res, body, err := m.ask(t, c.method, c.path)
			if res.StatusCode != c.status || c.body >= 0 && len(body) != c.body || m.patched.Load() != c.patched {
				t.Errorf("status %d, %d bytes, %d patched: %v", res.StatusCode, len(body), m.patched.Load(), err)
			}
			broke := err != nil && !errors.Is(err, late)
			if free := errors.Is(c.end, errAny); free != broke || !free && !errors.Is(err, c.end) {
				t.Errorf("it ends with %v, want %v", err, c.end)
			}
			if c.status > 0 && res.ProtoMajor != 2 {
				t.Errorf("it speaks %s", res.Proto)
			}
			if err := m.proxy.Lift(); err != nil {
				t.Error(err)
			}
			if _, body, err := m.ask(t, "GET", listPath); len(body) != 100 || err != nil {
				t.Errorf("afterwards: %d bytes, %v", len(body), err)
			}
			if n := len(m.proxy.Requests(time.Time{})); n != 2 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

var errAny = errors.New("any error")

func TestProxyRefuses(t *testing.T) {
	m := startMock(t)
	for range 2 {
		m.proxy.Refuse()
		m.Client().CloseIdleConnections() // it may not know yet that there is none
		if _, _, err := m.ask(t, "GET", listPath); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("refused: %v", err)
		}
		if err := m.proxy.Lift(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := m.ask(t, "GET", listPath); err != nil {
			t.Error(err)
		}
	}
}

func TestProxyTouchesWatches(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(*faults.Proxy) error
		want string
		end  error
	}{
		"Nothing": {func(*faults.Proxy) error { return nil }, "two\n", nil},
		"Silence": {func(p *faults.Proxy) error { p.Silence(); return nil }, "", nil},
		"Expire":  {(*faults.Proxy).Expire, `"code":410}}` + "\n", nil},
		"Cut":     {func(p *faults.Proxy) error { p.Cut(); return nil }, "", errAny},
	} {
		t.Run(name, func(t *testing.T) {
			m := startMock(t)
			res, err := m.Client().Get(m.URL + watchPath)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if _, err := io.ReadFull(res.Body, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			if err := c.do(m.proxy); err != nil {
				t.Error(err)
			}
			close(m.news)
			b, err := io.ReadAll(res.Body)
			if !strings.HasSuffix(string(b), c.want) || c.want == "" && len(b) > 0 || (err != nil) != (c.end != nil) {
				t.Errorf("then it says %q and ends with %v", b, err)
			}
		})
	}
}

func TestProxyEndsWhatItHeld(t *testing.T) {
	m := startMock(t)
	m.proxy.Impose(faults.Rule{Do: faults.Hold})
	ended := make(chan error, 1)
	go func() {
		res, err := m.Client().Get(m.URL + listPath)
		if err == nil {
			res.Body.Close()
		}
		ended <- err
	}()
	for len(m.proxy.Requests(time.Time{})) == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := m.proxy.Lift(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("what was held is answered")
	}
}

package kube

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
)

// clientOf is a client of a server that does as f says.
func clientOf(t *testing.T, change func(*rest.Config), f http.HandlerFunc) metadata.Getter {
	t.Helper()
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	cfg := &rest.Config{Host: server.URL}
	change(cfg)
	way, err := reach(cfg)
	if err != nil {
		t.Fatal(err)
	}
	client, _, err := metadataClient(way)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func TestServerEndsTheConnection(t *testing.T) {
	var asked atomic.Int64
	client := clientOf(t, func(*rest.Config) {}, func(http.ResponseWriter, *http.Request) {
		asked.Add(1)
		panic(http.ErrAbortHandler)
	})
	begun := time.Now()
	if _, err := client.List(t.Context(), metav1.ListOptions{}); err == nil || asked.Load() != 1 {
		t.Errorf("a list was asked for %d times: %v", asked.Load(), err)
	}
	if w, err := client.Watch(t.Context(), metav1.ListOptions{}); err == nil || asked.Load() != 2 {
		t.Errorf("a watch was asked for %d times: %v, %v", asked.Load()-1, w, err)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("both took %v", took)
	}
}

func TestNobodyCanBeReached(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fillBacklog(t, l)
	way, err := reach(&rest.Config{Host: "http://" + l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	client, _, err := metadataClient(way)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	w, err := client.Watch(t.Context(), metav1.ListOptions{})
	if err == nil || !strings.Contains(err.Error(), "i/o timeout") {
		t.Errorf("a watch is %v, %v", w, err)
	}
	if took := time.Since(begun); took < dialTimeout || took > 2*dialTimeout {
		t.Errorf("it took %v", took)
	}
}

// fillBacklog has the listener, which accepts nothing, let nobody in any more.
func fillBacklog(t *testing.T, l net.Listener) {
	t.Helper()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { _ = unix.Listen(int(fd), 0) })
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 100*time.Millisecond)
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
	}
}

func TestServerWantsToBeLeftAlone(t *testing.T) {
	var asked atomic.Int64
	client := clientOf(t, func(*rest.Config) {}, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	begun := time.Now()
	_, err := client.List(t.Context(), metav1.ListOptions{})
	if took := time.Since(begun); err == nil || asked.Load() != 1 || took > 500*time.Millisecond {
		t.Errorf("a list was asked for %d times in %v: %v", asked.Load(), took, err)
	}
	if _, err := client.Watch(t.Context(), metav1.ListOptions{}); err == nil || asked.Load() != 2 {
		t.Errorf("a watch was asked for %d times: %v", asked.Load()-1, err)
	}
	if took := time.Since(begun); took < time.Second {
		t.Errorf("both took %v", took)
	}
}

func TestTokenIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(path, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("old")
	var valid atomic.Value
	valid.Store("old")
	client := clientOf(t, func(cfg *rest.Config) { cfg.BearerToken, cfg.BearerTokenFile = "old", path },
		func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer "+valid.Load().(string) {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte(`{"apiVersion":"meta.k8s.io/v1","kind":"PartialObjectMetadataList"}`))
		})
	list := func() error {
		_, err := client.List(t.Context(), metav1.ListOptions{})
		return err
	}
	if err := list(); err != nil {
		t.Error(err)
	}
	valid.Store("new")
	if list() == nil {
		t.Error("the server takes the old token")
	}
	write("new")
	_ = list() // has the refusal of the token that was read before
	if err := list(); err != nil {
		t.Errorf("with a new token: %v", err)
	}
}

func TestLostPacketsEndAConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := dialer().DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, want := range map[int]int{
		unix.TCP_USER_TIMEOUT: int(ackTimeout / time.Millisecond), unix.TCP_KEEPIDLE: int(probeAfter / time.Second),
		unix.TCP_KEEPINTVL: int(probeEvery / time.Second),
	} {
		if got := option(t, c.(syscall.Conn), name); got != want {
			t.Errorf("option %d is %d, want %d", name, got, want)
		}
	}
}

func option(t *testing.T, c syscall.Conn, name int) (value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cerr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, name) })
	if cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return value
}

package cluster

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// wirePort is where a Wire listens, beside the API server's own port.
const wirePort = 6444

// A Wire passes connections on to the API server and counts what goes over them, TLS and all.
type Wire struct {
	// URL is where the API server seems to be.
	URL string

	cluster  *Cluster
	received atomic.Int64
	sent     atomic.Int64
}

// NewWire opens the cluster's one Wire. It ends with the test.
func (c *Cluster) NewWire(t testing.TB) *Wire {
	t.Helper()
	addr := fmt.Sprintf("%s:%d", underlayAddrs(controlPlaneNumber)[0], wirePort)
	w := &Wire{URL: "https://" + addr, cluster: c}
	var l net.Listener
	err := c.controlPlane.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatalf("listening for the daemon: %v", err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			all.Go(func() { w.pass(t, conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return w
}

// pass returns when both ends have nothing more to say, or the test ends.
func (w *Wire) pass(t testing.TB, daemon net.Conn) {
	defer daemon.Close()
	server, err := w.cluster.controlPlane.Dial(t.Context(), "tcp", strings.TrimPrefix(w.cluster.URL(), "https://"))
	if err != nil {
		return // the daemon sees its connection end
	}
	defer server.Close()
	stop := context.AfterFunc(t.Context(), func() {
		daemon.Close()
		server.Close()
	})
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { count(server, daemon, &w.sent) })
	both.Go(func() { count(daemon, server, &w.received) })
	both.Wait()
}

// count copies until either end is gone, and then ends the other.
func count(to, from net.Conn, n *atomic.Int64) {
	defer to.Close()
	defer from.Close()
	_, _ = io.Copy(&counted{to, n}, from)
}

type counted struct {
	io.Writer
	n *atomic.Int64
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// Received is how many bytes the API server has sent so far.
func (w *Wire) Received() int64 { return w.received.Load() }

// Sent is how many bytes it has been sent.
func (w *Wire) Sent() int64 { return w.sent.Load() }

package podnet

import (
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"testing"
	"time"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// TestLimitIsNotKept has a pod send and receive at once, from the first byte on, as a person would measure it.
func TestLimitIsNotKept(t *testing.T) {
	for name, burst := range map[string]uint64{
		"burst that the runtime has in mind": 1_000_000,
		"containerd's burst":                 math.MaxUint32,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, subnet4)
			pod := netnstest.New(t)
			const in, out = 12_000_000, 20_000_000
			a := n.wishing("one", pod, wishes{"bandwidth": struct{ IngressRate, IngressBurst, EgressRate, EgressBurst uint64 }{
				in, burst, out, burst}})
			a.mustAdd()
			reach(t, n.NS, "10.244.3.2")
			var both sync.WaitGroup
			for _, way := range []struct {
				name     string
				from, to *netnstest.NS
				addr     string
				limit    float64
			}{{"to the pod", n.NS, pod, "10.244.3.2:5001", in}, {"from the pod", pod, n.NS, "10.244.3.1:5002", out}} {
				both.Go(func() {
					var got float64
					var err error
					// A computer at work sends more slowly at times, but never faster.
					for tries := 0; tries < 4 && err == nil && got < 0.9*way.limit; tries++ {
						got, err = measure(t, way.from, way.to, way.addr, way.limit)
					}
					if err != nil || math.Abs(got/way.limit-1) > 0.10 {
						t.Errorf("%s: %.2f Mbit/s, the limit is %.2f; %v", way.name, got/1e6, way.limit/1e6, err)
					}
				})
			}
			both.Wait()
		})
	}
}

// measure sends by TCP what takes two seconds at a limit, and returns the bits that arrived in a second.
func measure(t *testing.T, from, to *netnstest.NS, addr string, limit float64) (rate float64, err error) {
	var l net.Listener
	to.Do(t, func() { l, err = net.Listen("tcp", addr) })
	if err != nil {
		return 0, err
	}
	defer l.Close()
	var conn net.Conn
	from.Do(t, func() { conn, err = net.DialTimeout("tcp", addr, 10*time.Second) })
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	total := int64(limit / 8 * 2)
	sent := make(chan error, 1)
	start := time.Now()
	go func() {
		chunk := make([]byte, 64<<10)
		for left := total; left > 0; left -= int64(len(chunk)) {
			if _, err := conn.Write(chunk[:min(int64(len(chunk)), left)]); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	peer, err := l.Accept()
	if err != nil {
		return 0, err
	}
	defer peer.Close()
	_ = peer.SetReadDeadline(start.Add(time.Minute))
	if _, err = io.CopyN(io.Discard, peer, total); err == nil {
		rate = float64(total) * 8 / time.Since(start).Seconds()
	}
	return rate, errors.Join(err, <-sent)
}

func TestBurstIsNotWhatThePodAskedFor(t *testing.T) {
	const much = "4294967295" // containerd's
	for _, tt := range []struct{ given, want string }{
		{`{"ingressRate":8,"ingressBurst":8}`, `{"ingressRate":8,"ingressBurst":8}`},
		{`{"IngressRate":50000000,"IngressBurst":` + much + `}`, `{"ingressRate":50000000,"ingressBurst":5000000}`},
		{`{"EgressRate":50000,"EgressBurst":` + much + `}`, `{"egressRate":50000,"egressBurst":131072}`},
		{`{"egressRate":90000000,"egressBurst":2147483647}`, `{"egressRate":90000000,"egressBurst":9000000}`},
		{`{"ingressRate":9,"ingressBurst":9,"egressRate":7000000,"egressBurst":34359738359}`,
			`{"ingressRate":9,"ingressBurst":9,"egressRate":7000000,"egressBurst":700000}`},
		{`{"egressRate":9,"egressBurst":1e400}`, `{"egressRate":9,"egressBurst":1e400}`},
		{`"slow"`, `"slow"`},
	} {
		if got := string(withBurst([]byte(tt.given))); got != tt.want {
			t.Errorf("%s gives %s, want %s", tt.given, got, tt.want)
		}
	}
}

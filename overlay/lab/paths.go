package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	proofTimeout = 30 * time.Second
	dialTimeout  = 2 * time.Second
)

// An endpoint is one address of one pod. Whoever connects to it is told from where it sees the connection come.
type endpoint struct {
	node, pod string
	addr      netip.Addr
	listener  net.Listener
}

func (e *endpoint) String() string { return fmt.Sprintf("%s/%s (%v)", e.node, e.pod, e.addr) }

// A path leads from one pod's address to another's of the same family.
type path struct {
	from, to *endpoint
	err      error // why it was not proved when last tried
}

// proof is how many paths there are, and those that could not be proved.
type proof struct {
	paths  int
	failed []path
}

func (p proof) err() error {
	if len(p.failed) == 0 {
		return nil
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%d of %d paths do not work:", len(p.failed), p.paths)
	for i, f := range p.failed {
		if i == 10 {
			fmt.Fprintf(&text, "\n  and %d more", len(p.failed)-i)
			break
		}
		fmt.Fprintf(&text, "\n  %v -> %v: %v", f.from, f.to, f.err)
	}
	return errors.New(text.String())
}

// prove connects every pod with every other by TCP, in both families, and has each say who it thinks connects. Paths
// that fail are tried again for a while: a daemon may only just have heard of its youngest peer.
func (l *Lab) prove(ctx context.Context, o Options) (proof, error) {
	ends, err := l.listen(ctx, o)
	defer func() {
		for _, e := range ends {
			e.listener.Close()
		}
	}()
	if err != nil {
		return proof{}, err
	}
	todo := pathsBetween(ends)
	result := proof{paths: len(todo)}
	ctx, cancel := context.WithTimeout(ctx, proofTimeout+time.Duration(len(todo))*time.Millisecond)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		todo = l.try(ctx, todo)
		if len(todo) == 0 {
			return result, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			result.failed = todo
			return result, nil
		}
	}
}

// listen opens a listener on every address of every pod. It also returns those that it had opened when it failed.
func (l *Lab) listen(ctx context.Context, o Options) ([]*endpoint, error) {
	var ends []*endpoint
	for _, node := range o.nodeNames() {
		for _, pod := range o.podNames() {
			if ctx.Err() != nil {
				return ends, ctx.Err()
			}
			addrs, err := l.podAddrs(node, pod)
			if err == nil {
				err = dualStack(addrs)
			}
			if err != nil {
				return ends, fmt.Errorf("%s/%s: %w", node, pod, err)
			}
			err = inNetns(l.netns(node, pod), func() error {
				for _, addr := range addrs {
					listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
					if err != nil {
						return err
					}
					ends = append(ends, &endpoint{node, pod, addr, listener})
				}
				return nil
			})
			if err != nil {
				return ends, fmt.Errorf("listening in %s/%s: %w", node, pod, err)
			}
		}
	}
	for _, e := range ends {
		go answer(e.listener)
	}
	return ends, nil
}

func dualStack(addrs []netip.Addr) error {
	if len(addrs) == 2 && addrs[0].Is4() != addrs[1].Is4() {
		return nil
	}
	return fmt.Errorf("expected one IPv4 and one IPv6 address on eth0, found %v", addrs)
}

// answer tells each caller the address that it is seen with, until the listener is closed.
func answer(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		if conn.SetDeadline(time.Now().Add(dialTimeout)) == nil {
			_, _ = io.WriteString(conn, conn.RemoteAddr().String()) // the caller misses what is not written
		}
		conn.Close()
	}
}

func pathsBetween(ends []*endpoint) []path {
	var paths []path
	for _, from := range ends {
		for _, to := range ends {
			if (from.node != to.node || from.pod != to.pod) && from.addr.Is4() == to.addr.Is4() {
				paths = append(paths, path{from: from, to: to})
			}
		}
	}
	return paths
}

// try tries each path once, those with one source one after the other, and returns those that failed.
func (l *Lab) try(ctx context.Context, paths []path) []path {
	var g errgroup.Group
	g.SetLimit(4 * runtime.GOMAXPROCS(0))
	var mu sync.Mutex
	var failed []path
	for _, same := range bySource(paths) {
		g.Go(func() error {
			bad := l.tryFrom(ctx, same)
			mu.Lock()
			defer mu.Unlock()
			failed = append(failed, bad...)
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	slices.SortFunc(failed, func(a, b path) int {
		if c := a.from.addr.Compare(b.from.addr); c != 0 {
			return c
		}
		return a.to.addr.Compare(b.to.addr)
	})
	return failed
}

// tryFrom tries paths from one address and returns those that failed.
func (l *Lab) tryFrom(ctx context.Context, paths []path) (failed []path) {
	from := paths[0].from
	err := inNetns(l.netns(from.node, from.pod), func() error {
		for _, p := range paths {
			err := p.connect(ctx)
			if err == nil {
				continue
			}
			if !over(ctx) || p.err == nil { // running out of time says less than what was wrong before
				p.err = err
			}
			failed = append(failed, p)
		}
		return nil
	})
	if err != nil {
		failed = paths
		for i := range failed {
			failed[i].err = err
		}
	}
	return failed
}

// over reports whether ctx has ended, or has to at this moment: a dialer that has its deadline can be quicker than it.
func over(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

// connect connects from the calling thread's network namespace, and compares the source address that the other side
// sees.
func (p path) connect(ctx context.Context) error {
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", p.to.listener.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
		return err
	}
	seen, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	source, err := netip.ParseAddrPort(string(seen))
	if err != nil {
		return fmt.Errorf("something else answers: %q", seen)
	}
	if source.Addr() != p.from.addr {
		return fmt.Errorf("arrives as %v instead of with its own address", source.Addr())
	}
	return nil
}

// bySource splits paths, in which those with one source stand together, by source.
func bySource(paths []path) [][]path {
	var groups [][]path
	for start, i := 0, 1; i <= len(paths); i++ {
		if i == len(paths) || paths[i].from != paths[start].from {
			groups = append(groups, paths[start:i])
			start = i
		}
	}
	return groups
}

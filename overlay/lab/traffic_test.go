package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Traffic is made by system calls that wait, each end on a thread: Go's own sockets would be measured with it otherwise.

// A route is who calls whom.
type route struct {
	from, to     string // network namespaces
	source, addr netip.Addr
}

// A load is one kind of traffic. run makes it in turns, each for a while, and tells of each how much there was in a
// second.
type load struct {
	name, unit string
	rounds     int
	turn       time.Duration
	run        func(r route, turns <-chan time.Duration, rate chan<- float64) error
}

// loads are in long turns where traffic takes a while to get going. What is small is made in many short ones: the machine is
// as fast for one as for the next.
func loads() []load {
	const long, short = 250 * time.Millisecond, 5 * time.Millisecond
	return []load{
		{"TCP, one stream", "Gbit/s", 33, long, anew(stream)},
		{"UDP, 64 bytes", "packets/s", 33, long, anew(datagrams)},
		{"requests", "1/s", 550, short, requests},
		{"connections", "1/s", 550, short, connections},
	}
}

// anew makes a load of one that begins anew each turn.
func anew(f func(route, time.Duration) (float64, error)) func(route, <-chan time.Duration, chan<- float64) error {
	return func(r route, turns <-chan time.Duration, rate chan<- float64) error {
		for d := range turns {
			done, err := f(r, d)
			if err != nil {
				return err
			}
			rate <- done
		}
		return nil
	}
}

// stream is TCP in one direction, in gigabits.
func stream(r route, d time.Duration) (float64, error) {
	return serve(r, func(conn int, done *atomic.Int64) error {
		block := make([]byte, 256<<10)
		for {
			n, err := read(conn, block)
			if n <= 0 || err != nil {
				return err
			}
			done.Add(int64(n))
		}
	}, func(to unix.Sockaddr, done *atomic.Int64) (float64, error) {
		conn, err := dialTCP(r, to)
		if err != nil {
			return 0, err
		}
		defer unix.Close(conn)
		block := make([]byte, 128<<10)
		start := time.Now()
		for time.Since(start) < d {
			if _, err := unix.Write(conn, block); err != nil {
				return 0, err
			}
		}
		return 8e-9 * float64(done.Load()) / time.Since(start).Seconds(), nil
	})
}

// requests are bytes that are each sent back before the next.
func requests(r route, turns <-chan time.Duration, rate chan<- float64) error {
	_, err := serve(r, echo, func(to unix.Sockaddr, _ *atomic.Int64) (float64, error) {
		conn, err := dialTCP(r, to)
		if err != nil {
			return 0, err
		}
		defer unix.Close(conn)
		return 0, repeat(turns, rate, func() error { return ask(conn) })
	})
	return err
}

// connections are each opened, used for one request and reset, so that none waits for its end.
func connections(r route, turns <-chan time.Duration, rate chan<- float64) error {
	_, err := serve(r, echo, func(to unix.Sockaddr, _ *atomic.Int64) (float64, error) {
		return 0, repeat(turns, rate, func() error {
			conn, err := dialTCP(r, to)
			if err != nil {
				return err
			}
			err = ask(conn)
			return errors.Join(err, unix.SetsockoptLinger(conn, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
				unix.Close(conn))
		})
	})
	return err
}

// datagrams are counted where they arrive.
func datagrams(r route, d time.Duration) (rate float64, err error) {
	in, to, err := bound(r.to, unix.SOCK_DGRAM, r.addr)
	if err != nil {
		return 0, err
	}
	defer unix.Close(in)
	var arrived, over atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		packet := make([]byte, 64)
		for over.Load() == 0 {
			if n, _, err := unix.Recvfrom(in, packet, 0); n > 0 && err == nil {
				arrived.Add(1)
			}
		}
	}()
	err = inNetns(r.from, func() error {
		out, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(out)
		if err := errors.Join(unix.Bind(out, sockaddr(r.source, 0)), unix.Connect(out, to)); err != nil {
			return err
		}
		packet, start := make([]byte, 64), time.Now()
		for time.Since(start) < d {
			if _, err := unix.Write(out, packet); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return err
			}
		}
		rate = float64(arrived.Load()) / time.Since(start).Seconds()
		return nil
	})
	over.Store(1)
	<-ended
	return rate, err
}

// serve answers connections by answer while call runs where the caller is.
func serve(r route, answer func(conn int, done *atomic.Int64) error,
	call func(unix.Sockaddr, *atomic.Int64) (float64, error)) (rate float64, err error) {
	listener, to, err := bound(r.to, unix.SOCK_STREAM, r.addr)
	if err != nil {
		return 0, err
	}
	defer unix.Close(listener)
	if err := unix.Listen(listener, 128); err != nil {
		return 0, err
	}
	var done atomic.Int64
	ended := make(chan error, 1)
	go func() {
		for {
			conn, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			switch {
			case errors.Is(err, unix.EINVAL): // shut down, see below
				ended <- nil
				return
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
				continue
			case err != nil:
				ended <- err
				return
			}
			err = errors.Join(unix.SetsockoptInt(conn, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), wait(conn, patience))
			if err == nil {
				err = answer(conn, &done)
			}
			unix.Close(conn)
			if err != nil && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				ended <- err
				return
			}
		}
	}()
	err = inNetns(r.from, func() error {
		rate, err = call(to, &done)
		return err
	})
	return rate, errors.Join(err, unix.Shutdown(listener, unix.SHUT_RDWR), <-ended)
}

func echo(conn int, _ *atomic.Int64) error {
	one := make([]byte, 1)
	for {
		n, err := read(conn, one)
		if n <= 0 || err != nil {
			return err
		}
		if _, err := unix.Write(conn, one); err != nil {
			return err
		}
	}
}

func ask(conn int) error {
	one := make([]byte, 1)
	if _, err := unix.Write(conn, one); err != nil {
		return err
	}
	if n, err := read(conn, one); n != 1 || err != nil {
		return fmt.Errorf("an answer of %d bytes: %w", n, err)
	}
	return nil
}

// repeat does something again and again, in turns, and tells of each how often in a second.
func repeat(turns <-chan time.Duration, rate chan<- float64, f func() error) error {
	for d := range turns {
		n, start := 0, time.Now()
		for ; time.Since(start) < d; n++ {
			if err := f(); err != nil {
				return err
			}
		}
		rate <- float64(n) / time.Since(start).Seconds()
	}
	return nil
}

// patience is how long a call may wait for the other end. The kernel does not send a lost packet again sooner than after
// 200 ms.
const patience = 5 * time.Second

// bound makes a socket in a network namespace that is called at addr, and says by which port.
func bound(netns string, kind int, addr netip.Addr) (fd int, at unix.Sockaddr, err error) {
	err = inNetns(netns, func() error {
		if fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(fd, sockaddr(addr, 0)), wait(fd, 100*time.Millisecond)); err != nil {
			return err
		}
		at, err = unix.Getsockname(fd)
		return err
	})
	return fd, at, err
}

// dialTCP connects; it is called in the caller's network namespace.
func dialTCP(r route, to unix.Sockaddr) (int, error) {
	conn, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	err = errors.Join(unix.SetsockoptInt(conn, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptInt(conn, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.Bind(conn, sockaddr(r.source, 0)), wait(conn, patience), unix.Connect(conn, to))
	if err != nil {
		unix.Close(conn)
		return -1, err
	}
	return conn, nil
}

// read is not ended by the signals that Go sends its threads. Calls that wait for only so long are.
func read(fd int, buf []byte) (int, error) {
	for {
		if n, err := unix.Read(fd, buf); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func wait(fd int, d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

func sockaddr(a netip.Addr, port int) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
}

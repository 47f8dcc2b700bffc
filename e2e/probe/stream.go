package probe

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Stream is a flow of numbered datagrams, one a millisecond.
type Stream struct {
	stop      chan struct{}
	sender    sync.WaitGroup
	out       net.Conn
	in        net.PacketConn
	sent      uint64
	sendError error

	mu   sync.Mutex
	seen map[uint64]int
}

// StartStream begins to send from one place to an address in another.
func StartStream(from, to Place, addr netip.Addr) (*Stream, error) {
	s := &Stream{stop: make(chan struct{}), seen: map[uint64]int{}}
	err := to.Do(func() (err error) {
		s.in, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := deepQueue(s.in.(*net.UDPConn)); err != nil {
		return nil, err
	}
	if s.out, err = dial(from, "udp", s.in.LocalAddr().String(), nil); err != nil {
		return nil, err
	}
	if err := s.out.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	go s.receive()
	s.sender.Go(s.send)
	return s, nil
}

// deepQueue lets the receiver be late by seconds before the socket, rather than the network, loses something.
func deepQueue(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	if err := raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	}); err != nil {
		return err
	}
	return set
}

// send keeps the average at one a millisecond, also when it was not scheduled in time.
func (s *Stream) send() {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		for s.sent < uint64(time.Since(begun)/time.Millisecond) {
			if _, err := s.out.Write(binary.BigEndian.AppendUint64(nil, s.sent)); err != nil {
				s.sendError = fmt.Errorf("datagram %d: %w", s.sent, err)
				return
			}
			s.sent++
		}
	}
}

func (s *Stream) receive() {
	b := make([]byte, 64)
	for {
		n, _, err := s.in.ReadFrom(b)
		if err != nil {
			return // closed
		}
		if n == 8 {
			s.mu.Lock()
			s.seen[binary.BigEndian.Uint64(b)]++
			s.mu.Unlock()
		}
	}
}

// Stop ends the stream and says how many datagrams were sent. Unless each arrived exactly once, an error says which.
func (s *Stream) Stop() (sent uint64, err error) {
	close(s.stop)
	s.sender.Wait()
	defer s.in.Close()
	defer s.out.Close()
	if s.sendError != nil {
		return s.sent, s.sendError
	}
	for deadline := time.Now().Add(answerWithin); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		arrived := uint64(len(s.seen))
		s.mu.Unlock()
		if arrived == s.sent {
			break
		}
	}
	return s.sent, s.verdict()
}

func (s *Stream) verdict() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lost, doubled []uint64
	for i := range s.sent {
		switch s.seen[i] {
		case 0:
			lost = append(lost, i)
		case 1:
		default:
			doubled = append(doubled, i)
		}
	}
	if len(lost)+len(doubled) == 0 {
		return nil
	}
	return fmt.Errorf("of %d datagrams %d were lost and %d came twice; lost %s",
		s.sent, len(lost), len(doubled), some(lost))
}

func some(numbers []uint64) string {
	if len(numbers) > 20 {
		return fmt.Sprintf("%d and more up to %d", numbers[:20], numbers[len(numbers)-1])
	}
	return fmt.Sprint(numbers)
}

package probe

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"
)

// A LongTransfer is a TCP connection that bytes go through until it is stopped.
type LongTransfer struct {
	stop chan struct{}
	done chan error
	sent int64
}

// StartTransfer begins to send from one place to the server of Serve in another.
func StartTransfer(from Place, to netip.Addr) (*LongTransfer, error) {
	c, err := dial(from, "tcp", net.JoinHostPort(to.String(), sinkPort), nil)
	if err != nil {
		return nil, err
	}
	l := &LongTransfer{stop: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		defer c.Close()
		l.done <- l.send(c.(*net.TCPConn))
	}()
	return l, nil
}

// send sends some 100 Mbit/s, since others need the processors too. It fails where nothing gets through for answerWithin.
func (l *LongTransfer) send(c *net.TCPConn) error {
	sum := sha256.New()
	source := rand.NewChaCha8([32]byte{1})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for b := make([]byte, 64<<10); ; {
		select {
		case <-l.stop:
			return l.verdict(c, sum.Sum(nil))
		case <-tick.C:
		}
		source.Read(b)
		sum.Write(b)
		if err := c.SetDeadline(time.Now().Add(answerWithin)); err != nil {
			return err
		}
		n, err := c.Write(b)
		l.sent += int64(n)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", l.sent, err)
		}
	}
}

func (l *LongTransfer) verdict(c *net.TCPConn, sum []byte) error {
	if err := c.CloseWrite(); err != nil {
		return err
	}
	arrived, err := io.ReadAll(c)
	if err == nil && !bytes.Equal(arrived, sum) {
		err = fmt.Errorf("sent %d bytes with SHA-256 %x; the other side has %x", l.sent, sum, arrived)
	}
	return err
}

// Stop ends the transfer and says how many bytes were sent. Unless all have arrived unchanged, an error says so.
func (l *LongTransfer) Stop() (sent int64, err error) {
	close(l.stop)
	err = <-l.done
	return l.sent, err
}

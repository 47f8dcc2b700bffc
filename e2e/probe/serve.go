// Package probe sends packets from one pod to another and looks at what arrives.
package probe

import (
	"crypto/sha256"
	"errors"
	"io"
	"net"
)

// A Place is where sockets are opened: a network namespace.
type Place interface {
	Do(f func() error) error
}

// The ports of Serve.
const (
	whoPort  = "8080" // TCP: answers with the caller's address; UDP: answers with the datagram
	sinkPort = "8081" // TCP: reads to the end, answers with the SHA-256 of it
)

type servers []io.Closer

// Close ends the servers.
func (s servers) Close() (err error) {
	for _, c := range s {
		err = errors.Join(err, c.Close())
	}
	return err
}

// Serve starts the servers that the other functions of this package talk to.
func Serve(in Place) (io.Closer, error) {
	var who, sink net.Listener
	var echo net.PacketConn
	err := in.Do(func() (err error) {
		if who, err = net.Listen("tcp", ":"+whoPort); err != nil {
			return err
		}
		if sink, err = net.Listen("tcp", ":"+sinkPort); err != nil {
			return err
		}
		echo, err = net.ListenPacket("udp", ":"+whoPort)
		return err
	})
	if err != nil {
		return nil, err
	}
	go accept(who, func(c net.Conn) { io.WriteString(c, c.RemoteAddr().String()) })
	go accept(sink, func(c net.Conn) {
		sum := sha256.New()
		if _, err := io.Copy(sum, c); err == nil {
			c.Write(sum.Sum(nil))
		}
	})
	go answer(echo)
	return servers{who, sink, echo}, nil
}

func accept(l net.Listener, talk func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer c.Close()
			talk(c)
		}()
	}
}

func answer(c net.PacketConn) {
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			c.WriteTo(b[:n], from)
		}
	}
}

package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// answerTime is how many seconds the kernel has for an answer. It works while a request is sent, and never needs them.
const answerTime = 60

// A wire carries requests to the kernel and its answers back. All that a conn sends and receives passes here, so it is
// where a test has calls fail.
type wire interface {
	// send puts requests on their way, as one datagram.
	send(requests []byte) error
	// receive puts the next datagram of answers into buf. flags are of recv(2); with MSG_DONTWAIT the error is EAGAIN
	// where there is none. ENOBUFS says that some are lost.
	receive(buf []byte, flags int) (int, error)
	close()
}

// A socket is a wire: the descriptor of a netlink socket.
type socket int

func openSocket(protocol int) (socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return 0, fmt.Errorf("opening a netlink socket: %w", err)
	}
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: answerTime}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTime}),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1),
		// Without it the kernel ignores what a dump asks to leave out.
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1),
	); err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("preparing a netlink socket: %w", err)
	}
	return socket(fd), nil
}

func (s socket) send(requests []byte) error {
	for {
		err := unix.Sendto(int(s), requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (s socket) receive(buf []byte, flags int) (int, error) {
	for {
		n, from, err := unix.Recvfrom(int(s), buf, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if sender, ok := from.(*unix.SockaddrNetlink); err == nil && (!ok || sender.Pid != 0) {
			continue // from another process, not from the kernel
		}
		return n, err
	}
}

func (s socket) close() { unix.Close(int(s)) }

// answerBuffer is more than the kernel puts into one part of a dump (32 kB, netlink_recvmsg in net/netlink/af_netlink.c).
const answerBuffer = 64 << 10

// exchange sends one request and calls each for every message of its answer. What each gets is good until it returns:
// nothing is copied, so that a long list leaves nothing for the garbage collector.
func (c *conn) exchange(typ uint16, flags int, m message, each func(msg []byte)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	if err := c.wire.send(appendRequest(nil, typ, flags, c.seq, m)); err != nil {
		return err
	}
	interrupted, done := false, false
	var refused error
	for !done {
		err := c.receive(0, func(h syscall.NlMsghdr, body []byte) {
			if h.Seq != c.seq || done { // of a request that was given up
				return
			}
			interrupted = interrupted || h.Flags&unix.NLM_F_DUMP_INTR != 0
			done, refused = take(h, body, each)
		})
		if err != nil {
			c.drain()
			return err
		}
	}
	if refused == nil && interrupted {
		return errInterrupted
	}
	return refused
}

// take calls each for a message that has something to it, and reports whether it is the last of an answer.
func take(h syscall.NlMsghdr, body []byte, each func(msg []byte)) (last bool, err error) {
	if h.Type == unix.NLMSG_DONE || h.Type == unix.NLMSG_ERROR {
		return true, refusal(h.Type, h.Flags, body)
	}
	each(body)
	return h.Flags&unix.NLM_F_MULTI == 0, nil
}

// receive calls each for the messages of the next datagram, which are good until it returns.
func (c *conn) receive(flags int, each func(h syscall.NlMsghdr, body []byte)) error {
	n, err := c.wire.receive(c.buf, flags)
	if err != nil {
		return err
	}
	for b := c.buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
		h := syscall.NlMsghdr{
			Len: binary.NativeEndian.Uint32(b), Type: binary.NativeEndian.Uint16(b[4:]),
			Flags: binary.NativeEndian.Uint16(b[6:]), Seq: binary.NativeEndian.Uint32(b[8:]),
		}
		if h.Len < unix.SizeofNlMsghdr || int(h.Len) > len(b) {
			return errCutOff
		}
		each(h, b[unix.SizeofNlMsghdr:h.Len])
		b = b[min(len(b), (int(h.Len)+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return nil
}

// drain takes in what is left of an answer. The kernel begins no other list before one is at its end.
func (c *conn) drain() {
	for err := error(nil); err == nil; {
		_, err = c.wire.receive(c.buf, unix.MSG_DONTWAIT)
	}
}

// appendRequest adds a netlink message to a datagram.
func appendRequest(to []byte, typ uint16, flags int, seq uint32, body message) []byte {
	to = binary.NativeEndian.AppendUint32(to, uint32(unix.SizeofNlMsghdr+len(body)))
	to = binary.NativeEndian.AppendUint16(to, typ)
	to = binary.NativeEndian.AppendUint16(to, uint16(unix.NLM_F_REQUEST|flags))
	to = binary.NativeEndian.AppendUint32(to, seq)
	to = append(to, 0, 0, 0, 0) // the port, which the kernel fills in
	return append(to, body...)
}

// refusal returns what the last message of an answer says, with the kernel's own words where it has any
// (Documentation/userspace-api/netlink/intro.rst); nil where it did as it was asked.
func refusal(typ, flags uint16, b []byte) error {
	errno := syscall.Errno(-int32(getU32(b)))
	if errno == 0 {
		return nil
	}
	words := b[4:]
	if typ == unix.NLMSG_ERROR { // they come behind the request, which it sends back
		words = words[min(len(words), int(getU32(words)+3)&^3):]
	}
	if flags&unix.NLM_F_ACK_TLVS != 0 {
		for typ, v := range attrs(words) {
			if typ == nlmsgerrMsg {
				return fmt.Errorf("%w: %s", errno, getString(v))
			}
		}
	}
	return errno
}

// nlmsgerrMsg is NLMSGERR_ATTR_MSG of linux/netlink.h.
const nlmsgerrMsg = 1

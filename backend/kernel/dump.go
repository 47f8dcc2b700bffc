package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// dumpBuffer is more than the kernel puts into one part of a dump (32 kB, netlink_recvmsg in net/netlink/af_netlink.c).
const dumpBuffer = 64 << 10

// eachAnswer asks for a dump and calls each for every object in it. What each gets is good until it returns: unlike
// with the library, which copies every part and every header, nothing is left for the garbage collector.
func (c *conn) eachAnswer(typ uint16, m message, each func(msg []byte)) error {
	h := c.sockets[c.protocol]
	h.Socket.Lock()
	defer h.Socket.Unlock()
	if c.buffer == nil {
		c.buffer = make([]byte, dumpBuffer)
	}
	r := c.request(typ, unix.NLM_F_DUMP, m)
	r.Seq = atomic.AddUint32(&h.Seq, 1)
	if err := h.Socket.Send(r); err != nil {
		return err
	}
	interrupted := false
	for {
		b, err := receive(h.Socket, c.buffer)
		if err != nil {
			return err
		}
		ended, err := eachMessage(b, r.Seq, &interrupted, each)
		switch {
		case err != nil:
			return err
		case ended && interrupted:
			return nl.ErrDumpInterrupted
		case ended:
			return nil
		}
	}
}

// receive reads what the kernel sent into b.
func receive(s *nl.NetlinkSocket, b []byte) ([]byte, error) {
	for {
		n, _, err := unix.Recvfrom(s.GetFd(), b, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			fds := []unix.PollFd{{Fd: int32(s.GetFd()), Events: unix.POLLIN}}
			if n, err := unix.Poll(fds, int(nl.SocketTimeoutTv.Nano()/1e6)); n == 0 && err == nil {
				return nil, fmt.Errorf("the kernel does not answer: %w", unix.EAGAIN)
			}
			continue
		case err != nil:
			return nil, err
		}
		return b[:n], nil
	}
}

// eachMessage calls each for the objects of a dump in b, and reports whether that was the end of the dump.
func eachMessage(b []byte, seq uint32, interrupted *bool, each func(msg []byte)) (ended bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		typ, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return false, errors.New("the kernel's answer is cut off")
		}
		body := b[unix.SizeofNlMsghdr:size]
		ours := binary.NativeEndian.Uint32(b[8:]) == seq
		b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
		if !ours { // left from a request that was given up
			continue
		}
		*interrupted = *interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch typ {
		case unix.NLMSG_ERROR:
			return true, refusal(flags, body)
		case unix.NLMSG_DONE:
			if errno := int32(getU32(body)); errno != 0 {
				return true, unix.Errno(-errno)
			}
			return true, nil
		}
		each(body)
	}
	return false, nil
}

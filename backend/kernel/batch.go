package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// batchSize is how many changes go to the kernel at once. It does them one after the other and answers only those that
// fail, and the last: so many answers fit into a socket's receive buffer as it comes (net.core.rmem_default).
const batchSize = 100

// A change is a request that has no answer but that it was done or why not.
type change struct {
	typ   uint16
	flags int
	body  message
}

// ApplyAll makes changes in their order, and returns what Apply would for each. One that fails keeps none of the others
// from being made.
func (k *Kernel) ApplyAll(ctx context.Context, ops []backend.Op) []error {
	errs := make([]error, len(ops))
	var changes []change
	var of []int // of which operations they are
	send := func() {
		for i, err := range k.conn.doAll(changes) {
			errs[of[i]] = explain(ops[of[i]], err)
		}
		changes, of = changes[:0], of[:0]
	}
	for i, op := range ops {
		c, ok, err := k.changeOf(op)
		switch {
		case err != nil:
			errs[i] = explain(op, err)
		case ok:
			changes, of = append(changes, c), append(of, i)
		default:
			send()
			errs[i] = k.Apply(ctx, op)
		}
		if len(changes) == batchSize {
			send()
		}
	}
	send()
	return errs
}

// changeOf returns the one request that an operation on an entry of a table consists of, and false for other objects.
func (k *Kernel) changeOf(op backend.Op) (c change, ok bool, err error) {
	switch o := op.What.(type) {
	case backend.Neigh:
		c, err = k.neighChange(op.Do, o)
	case backend.FDBEntry:
		c, err = k.fdbChange(op.Do, o)
	case backend.Route:
		c, err = k.routeChange(op.Do, o)
	default:
		return c, false, nil
	}
	return c, true, err
}

// doAll asks for changes, at most batchSize, and waits until all have been tried.
func (c *conn) doAll(changes []change) []error {
	if len(changes) == 0 {
		return nil
	}
	h := c.sockets[c.protocol]
	h.Socket.Lock()
	defer h.Socket.Unlock()
	last := atomic.AddUint32(&h.Seq, uint32(len(changes)))
	first := last - uint32(len(changes)) + 1
	var b []byte
	for i, change := range changes {
		flags := unix.NLM_F_REQUEST | uint16(change.flags)
		if i == len(changes)-1 {
			flags |= unix.NLM_F_ACK
		}
		b = binary.NativeEndian.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(change.body)))
		b = binary.NativeEndian.AppendUint16(b, change.typ)
		b = binary.NativeEndian.AppendUint16(b, flags)
		b = binary.NativeEndian.AppendUint32(b, first+uint32(i))
		b = binary.NativeEndian.AppendUint32(b, 0) // from us to the kernel
		b = append(b, change.body...)
	}
	errs := make([]error, len(changes))
	known, err := 0, send(h.Socket, b)
	for err == nil && known < len(changes) {
		var msgs []syscall.NetlinkMessage
		if msgs, _, err = h.Socket.Receive(); errors.Is(err, unix.EINTR) {
			err = nil
		}
		for _, m := range msgs {
			if i := m.Header.Seq - first; m.Header.Type == unix.NLMSG_ERROR && i < uint32(len(changes)) {
				errs[i] = refusal(m.Header.Flags, m.Data)
				known = int(i) + 1 // the kernel goes in order, so what was before it is known too
			}
		}
	}
	for i := known; i < len(changes); i++ {
		errs[i] = fmt.Errorf("the kernel's answer is missing: %w", err)
	}
	return errs
}

// send is the library's Send for what is more than one request.
func send(s *nl.NetlinkSocket, b []byte) error {
	for {
		err := unix.Sendto(s.GetFd(), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// refusal is what the body of an NLMSG_ERROR says, nil where that is that all is well.
func refusal(flags uint16, b []byte) error {
	if len(b) < unix.SizeofNlMsgerr {
		return errors.New("the kernel's answer is cut off")
	}
	errno := int32(binary.NativeEndian.Uint32(b))
	if errno == 0 {
		return nil
	}
	err := error(unix.Errno(-errno))
	if flags&unix.NLM_F_ACK_TLVS == 0 {
		return err
	}
	// The kernel's words come behind the request, which it sends back.
	request := int(binary.NativeEndian.Uint32(b[4:]))
	request = (request + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1)
	if words := 4 + request; words <= len(b) {
		for typ, v := range attrs(b[words:]) {
			if typ == nl.NLMSGERR_ATTR_MSG {
				return fmt.Errorf("%w: %s", err, getString(v))
			}
		}
	}
	return err
}

package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A host is a netlink socket in one network namespace, the host's unless said otherwise.
//
// It is not the library's: that one clears 64 KB of new memory for each answer, and asks the kernel again and again for
// its own address, which is a good part of the time that an ADD takes.
type host struct {
	fd     int
	seq    uint32
	answer []byte
}

// answerSize is enough for what the kernel tells of a link, and for an error with the message that it is about.
const answerSize = 16 << 10

// dial opens a socket in the network namespace of the calling thread.
func dial() (*host, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return &host{fd: fd}, nil
}

func (h *host) close() { unix.Close(h.fd) }

// A request is a message to the kernel, made as the library has it.
type request struct {
	*nl.NetlinkRequest
	host *host
}

func (h *host) request(kind, flags int) request {
	return request{nl.NewNetlinkRequest(kind, flags|unix.NLM_F_ACK), h}
}

// Execute sends the request and returns what of that kind the kernel answers. It goes by the
// request's own socket, whatever the first argument.
func (r request) Execute(_ int, kind uint16) (found [][]byte, err error) {
	h := r.host
	h.seq++
	r.Seq = h.seq
	if err := unix.Sendto(h.fd, r.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	for {
		msgs, err := h.receive()
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			switch {
			case m.Header.Seq != r.Seq: // what an earlier request did not wait for
			case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
				if errno := int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
					return nil, syscall.Errno(-errno)
				}
				return found, nil
			case m.Header.Type == unix.NLMSG_DONE:
				return found, nil
			case m.Header.Type == kind:
				found = append(found, slices.Clone(m.Data))
			}
		}
	}
}

// receive waits for the next messages. They are good until it is called again.
func (h *host) receive() ([]syscall.NetlinkMessage, error) {
	if h.answer == nil {
		h.answer = make([]byte, answerSize)
	}
	for {
		n, _, err := unix.Recvfrom(h.fd, h.answer, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		case n > len(h.answer):
			return nil, fmt.Errorf("the kernel's answer has %d bytes, %d more than were expected", n, n-len(h.answer))
		default:
			return syscall.ParseNetlinkMessage(h.answer[:n])
		}
	}
}

// index looks up a device's index, without waiting for whoever changes links at the time.
func (h *host) index(dev string) (int, error) {
	req, err := unix.NewIfreq(dev)
	if err == nil {
		err = unix.IoctlIfreq(h.fd, unix.SIOCGIFINDEX, req)
	}
	if err != nil {
		return 0, fmt.Errorf("looking up %s: %w", dev, meaning(err))
	}
	return int(req.Uint32()), nil
}

// settle has the kernel take note of a device's carrier now. By itself it does so when a worker gets to it, and until
// then drops what the device is to send: a pod's first packet would be lost, and be sent again a second later. Asking
// for the state of the link does it (linkwatch_sync_dev, net/core/link_watch.c).
func (h *host) settle(dev string) error {
	value := struct{ cmd, data uint32 }{cmd: unix.ETHTOOL_GLINK} // struct ethtool_value, linux/ethtool.h
	var req struct {                                             // struct ifreq, linux/if.h
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], dev)
	req.data = unsafe.Pointer(&value)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(h.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	if errno != 0 {
		return fmt.Errorf("ethtool %s: %w", dev, errno)
	}
	return nil
}

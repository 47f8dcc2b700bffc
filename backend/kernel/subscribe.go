package kernel

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// watchBuffer is how many bytes of notifications may wait. Programming a thousand peers makes some thousand.
const watchBuffer = 4 << 20

// A subscription is a socket that the kernel sends notifications to. It reads them into one place, where the library
// makes a new one of 64 kB for each, and each route and each neighbour is one.
type subscription struct {
	file   *os.File
	conn   syscall.RawConn
	buffer []byte
}

func subscribe(protocol int, groups ...int) (*subscription, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("subscribing to the kernel's notifications: %w", err)
	}
	s := &subscription{file: os.NewFile(uintptr(fd), "netlink"), buffer: make([]byte, answerBuffer)}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, group := range groups {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group))
	}
	if err == nil {
		s.conn, err = s.file.SyscallConn()
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("subscribing to the kernel's notifications: %w", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, watchBuffer) != nil { // beyond net.core.rmem_max
		// Up to it; if it is too small, a loss rings.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, watchBuffer)
	}
	return s, nil
}

func (s *subscription) close() { s.file.Close() }

// receive waits for notifications. They are good until the next call. It fails once s is closed.
func (s *subscription) receive() ([]syscall.NetlinkMessage, error) {
	var n int
	var err error
	closed := s.conn.Read(func(fd uintptr) (done bool) {
		n, _, err = unix.Recvfrom(int(fd), s.buffer, 0)
		return !errors.Is(err, unix.EAGAIN)
	})
	if err := errors.Join(closed, err); err != nil {
		return nil, err
	}
	return syscall.ParseNetlinkMessage(s.buffer[:n])
}

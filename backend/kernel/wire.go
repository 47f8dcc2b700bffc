package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// A conn is one netlink socket. Requests of several goroutines take turns on it.
//
// Messages are built and read here and not by the library's typed functions: these read every attribute of every
// object, and refuse or forget some that we need.
type conn struct {
	mu   sync.Mutex
	wire wire
	seq  uint32 // of the last request
	buf  []byte
}

// errInterrupted says that objects changed while they were listed, so that some may be missing (NLM_F_DUMP_INTR).
var errInterrupted = errors.New("others changed what was being listed")

// dial opens a socket in the calling thread's network namespace.
func dial(protocol int) (*conn, error) {
	s, err := openSocket(protocol)
	if err != nil {
		return nil, err
	}
	return &conn{wire: s, buf: make([]byte, answerBuffer)}, nil
}

func (c *conn) close() { c.wire.close() }

// do asks for a change and waits for its acknowledgement.
func (c *conn) do(typ uint16, flags int, m message) error {
	return c.exchange(typ, unix.NLM_F_ACK|flags, m, func([]byte) {})
}

// get asks for one object.
func (c *conn) get(typ uint16, m message) (answer []byte, err error) {
	err = c.exchange(typ, 0, m, func(msg []byte) { answer = slices.Clone(msg) })
	if err == nil && answer == nil {
		err = errors.New("the kernel answered nothing")
	}
	return answer, err
}

// dump calls each for every object that m asks for; each must not keep what it gets. It starts over when objects
// changed meanwhile, so before each try reset is called.
func (c *conn) dump(typ uint16, m message, reset func(), each func(msg []byte)) error {
	const tries = 10
	var err error
	for range tries {
		reset()
		if err = c.exchange(typ, unix.NLM_F_DUMP, m, each); !errors.Is(err, errInterrupted) {
			return err
		}
	}
	return fmt.Errorf("%w, %d times over", err, tries)
}

// A message is the body of a netlink message: a fixed header and attributes.
type message []byte

func linkMessage(index int, flags, change uint32) message {
	m := make(message, unix.SizeofIfInfomsg, 128)
	binary.NativeEndian.PutUint32(m[4:], uint32(index))
	binary.NativeEndian.PutUint32(m[8:], flags)
	binary.NativeEndian.PutUint32(m[12:], change)
	return m
}

func (m *message) bytes(typ uint16, v []byte) {
	*m = binary.NativeEndian.AppendUint16(*m, uint16(unix.SizeofRtAttr+len(v)))
	*m = binary.NativeEndian.AppendUint16(*m, typ)
	*m = append(*m, v...)
	for len(*m)%unix.RTA_ALIGNTO != 0 {
		*m = append(*m, 0)
	}
}

func (m *message) u8(typ uint16, v uint8)    { m.bytes(typ, []byte{v}) }
func (m *message) u32(typ uint16, v uint32)  { m.bytes(typ, binary.NativeEndian.AppendUint32(nil, v)) }
func (m *message) be16(typ, v uint16)        { m.bytes(typ, binary.BigEndian.AppendUint16(nil, v)) }
func (m *message) be32(typ uint16, v uint32) { m.bytes(typ, binary.BigEndian.AppendUint32(nil, v)) }
func (m *message) be64(typ uint16, v uint64) { m.bytes(typ, binary.BigEndian.AppendUint64(nil, v)) }
func (m *message) string(typ uint16, v string) {
	m.bytes(typ, append([]byte(v), 0))
}

func (m *message) addr(typ uint16, a netip.Addr) { m.bytes(typ, a.AsSlice()) }

func (m *message) bool(typ uint16, v bool) {
	if v {
		m.u8(typ, 1)
	} else {
		m.u8(typ, 0)
	}
}

func (m *message) nest(typ uint16, fill func(*message)) {
	var inner message
	fill(&inner)
	m.bytes(typ, inner)
}

// attrs yields the type and value of each attribute in b, and stops at one that is cut off.
func attrs(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(binary.NativeEndian.Uint16(b))
			typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if size < unix.SizeofRtAttr || size > len(b) || !yield(typ, b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min(len(b), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
		}
	}
}

// The readers of values answer zero for a value that is too short.

func getU8(v []byte) uint8 {
	if len(v) < 1 {
		return 0
	}
	return v[0]
}

func getU32(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(v)
}

func getBE16(v []byte) uint16 {
	if len(v) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(v)
}

func getBE32(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(v)
}

func getBE64(v []byte) uint64 {
	if len(v) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

func getString(v []byte) string { return unix.ByteSliceToString(v) }

func getAddr(v []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(v)
	return a
}

func getMAC(v []byte) backend.MAC {
	if len(v) != len(backend.MAC{}) {
		return backend.MAC{}
	}
	return backend.MAC(v)
}

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

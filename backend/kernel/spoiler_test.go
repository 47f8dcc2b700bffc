package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A call is one request on its way to the kernel.
type call struct {
	protocol int
	typ      uint16
	flags    uint16
	family   uint8
}

func (c call) isDump() bool { return c.flags&unix.NLM_F_DUMP == unix.NLM_F_DUMP }

// reads reports whether c changes nothing.
func (c call) reads() bool {
	if c.protocol == unix.NETLINK_ROUTE {
		return c.typ&3 == 2 // linux/rtnetlink.h: NEW, DEL, GET, SET of each kind
	}
	return c.typ != unix.NFNL_MSG_BATCH_BEGIN
}

// isLook reports whether c is a look for what drops packets in chains of others, which nothing else depends on.
func (c call) isLook() bool { return c.typ == nftType(unix.NFT_MSG_GETCHAIN) && c.isDump() }

// String names what is asked for, the same for all requests that differ only in what of it.
func (c call) String() string {
	what := fmt.Sprintf("nft %d", c.typ&0xff)
	if c.protocol == unix.NETLINK_ROUTE {
		kind := [...]string{"LINK", "ADDR", "ROUTE", "NEIGH", "RULE"}[(c.typ-unix.RTM_BASE)/4]
		what = [...]string{"NEW", "DEL", "GET", "SET"}[c.typ&3] + kind
		if c.family == unix.AF_BRIDGE {
			what += " of bridge"
		}
	} else if !c.reads() {
		what = "nft transaction"
	}
	if c.isDump() {
		what += " all"
	}
	return what
}

// A fate is what becomes of a call. The zero one is that of every day.
type fate struct {
	refused     syscall.Errno // by the kernel
	unanswered  bool          // done, but the answer is lost
	interrupted bool          // a list that others change meanwhile
}

// decide says what becomes of the calls of one Kernel. It counts them all.
type decide struct {
	mu   sync.Mutex
	fate func(n int, c call) fate // n counts from 1
	n    int
	hits int // how often something was not as every day
	seen []call
}

// begin counts from 1 again.
func (d *decide) begin(f func(n int, c call) fate) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fate, d.n, d.hits, d.seen = f, 0, 0, nil
}

// end lets everything work, and says how many calls there were and how many of them did not.
func (d *decide) end() (calls []call, hits int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fate = nil
	return d.seen, d.hits
}

func (d *decide) of(c call) fate {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fate == nil {
		return fate{}
	}
	d.n++
	d.seen = append(d.seen, c)
	f := d.fate(d.n, c)
	if f != (fate{}) {
		d.hits++
	}
	return f
}

// A spoiler stands in front of a wire, and has some calls fail.
type spoiler struct {
	wire
	protocol int
	decide   *decide

	answers     [][]byte // that the kernel never gave
	early       []byte   // an answer of the kernel's that others come before
	lost        bool     // the next answer is
	interrupted bool     // the list that is under way is
}

// spoil puts spoilers in front of all wires of k.
func spoil(k *Kernel) *decide {
	d := &decide{}
	k.conn.wire = &spoiler{wire: k.conn.wire, protocol: unix.NETLINK_ROUTE, decide: d}
	for _, c := range []*conn{k.nft.conn, k.sets.conn} {
		c.wire = &spoiler{wire: c.wire, protocol: unix.NETLINK_NETFILTER, decide: d}
	}
	return d
}

func (s *spoiler) send(requests []byte) error {
	s.answers, s.early, s.lost, s.interrupted = nil, nil, false, false
	var pass []byte
	for rest := requests; len(rest) > 0; {
		size := int(binary.NativeEndian.Uint32(rest))
		c := call{s.protocol, binary.NativeEndian.Uint16(rest[4:]), binary.NativeEndian.Uint16(rest[6:]), rest[16]}
		if c.typ == unix.NFNL_MSG_BATCH_BEGIN && s.protocol == unix.NETLINK_NETFILTER { // all or nothing
			size = len(rest)
		}
		f := s.decide.of(c)
		if f.refused != 0 {
			s.answers = append(s.answers, refuse(rest, f.refused))
		} else {
			pass = append(pass, rest[:size]...)
		}
		s.lost = s.lost || f.unanswered
		s.interrupted = s.interrupted || f.interrupted
		rest = rest[size:]
	}
	if len(pass) == 0 {
		return nil
	}
	return s.wire.send(pass)
}

// refuse makes the kernel's answer to a request that it does not do (struct nlmsgerr).
func refuse(request []byte, errno syscall.Errno) []byte {
	m := binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno)))
	m = append(m, request[:unix.SizeofNlMsghdr]...)
	return appendRequest(nil, unix.NLMSG_ERROR, 0, binary.NativeEndian.Uint32(request[8:]), m)
}

func (s *spoiler) receive(buf []byte, flags int) (int, error) {
	if s.lost {
		s.lost = false
		return 0, unix.ENOBUFS
	}
	n, err := s.next(buf, flags)
	if s.interrupted && err == nil {
		for rest := buf[:n]; len(rest) >= unix.SizeofNlMsghdr; {
			binary.NativeEndian.PutUint16(rest[6:], binary.NativeEndian.Uint16(rest[6:])|unix.NLM_F_DUMP_INTR)
			rest = rest[min(len(rest), int(binary.NativeEndian.Uint32(rest)+3)&^3):]
		}
	}
	return n, err
}

// next is the next answer, in the order of the requests, as the kernel answers.
func (s *spoiler) next(buf []byte, flags int) (n int, err error) {
	if s.early == nil {
		if len(s.answers) > 0 {
			flags |= unix.MSG_DONTWAIT
		}
		if n, err = s.wire.receive(buf, flags); err == nil {
			s.early = slices.Clone(buf[:n])
		}
	}
	sequence := func(answer []byte) uint32 { return binary.NativeEndian.Uint32(answer[8:]) }
	if len(s.answers) > 0 && (s.early == nil && errors.Is(err, unix.EAGAIN) ||
		s.early != nil && sequence(s.answers[0]) < sequence(s.early)) {
		n = copy(buf, s.answers[0])
		s.answers = s.answers[1:]
		return n, nil
	}
	if s.early != nil {
		n, err = copy(buf, s.early), nil
		s.early = nil
	}
	return n, err
}

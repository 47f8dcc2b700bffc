package kernel

import (
	"encoding/binary"
	"hash/maphash"
	"maps"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// A memory is how the kernel listed the neighbours, FDB entries and routes of a state when it held just these. As long as
// it lists the same again, message by message, nobody needs to read what they say: with ten thousand routes that is half
// of what a pass with nothing to do costs.
type memory struct {
	version uint64         // of the state
	devices map[int]string // of ours, by their indexes
	digests []uint64       // of the messages, in their order
}

// lookAtEntries reads neighbours, FDB entries and routes.
func (s *survey) lookAtEntries() error {
	same, err := s.recall()
	if err != nil || same {
		return err
	}
	s.digests = make([]uint64, 0, len(s.want.Neighs)+len(s.want.FDB)+len(s.want.Routes))
	if err := s.lookAtNeighs(); err != nil {
		return err
	}
	if err := s.lookAtRoutes(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remembered = memory{}
	if s.neighsSeen.asWanted() && s.fdbSeen.asWanted() && s.routesSeen.asWanted() {
		s.remembered = memory{s.want.Version, s.devices(), s.digests}
	}
	return nil
}

// recall reports whether the kernel lists what it listed when it held all that is wanted, and so holds it still.
func (s *survey) recall() (same bool, err error) {
	s.mu.Lock()
	before := s.remembered
	s.mu.Unlock()
	if before.version == 0 || before.version != s.want.Version || !maps.Equal(before.devices, s.devices()) {
		return false, nil
	}
	at, same := 0, true // what is listed anew because it changed meanwhile comes on top, and is not the same
	take := func(digest uint64) {
		same = same && at < len(before.digests) && before.digests[at] == digest
		at++
	}
	if err := s.eachNeigh(func(_ link, b []byte) { take(s.neighDigest(b)) }); err != nil {
		return false, err
	}
	for _, family := range routeFamilies() {
		err := s.eachRouteMessage(family, backend.Owner, unix.RT_TABLE_UNSPEC, func() {}, func(b []byte) { take(s.routeDigest(b)) })
		if err != nil {
			return false, err
		}
	}
	if same = same && at == len(before.digests); same {
		s.have.Neighs, s.have.FDB, s.have.Routes = s.want.Neighs, s.want.FDB, s.want.Routes
	}
	return same, nil
}

// devices are the names of our links by their indexes.
func (s *survey) devices() map[int]string {
	names := make(map[int]string, len(s.ours))
	for index, l := range s.ours {
		names[index] = l.name
	}
	return names
}

func (s *survey) neighDigest(b []byte) uint64 {
	return s.digest(b, unix.SizeofNdMsg, unix.NDA_CACHEINFO)
}

func (s *survey) routeDigest(b []byte) uint64 {
	return s.digest(b, unix.SizeofRtMsg, unix.RTA_CACHEINFO)
}

// digest is that of a message with a header of size bytes, but for one attribute: it says when an entry was used last.
func (s *survey) digest(b []byte, size int, volatile uint16) uint64 {
	for at := size; at+unix.SizeofRtAttr <= len(b); {
		length := int(binary.NativeEndian.Uint16(b[at:]))
		next := at + (length+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)
		if length < unix.SizeofRtAttr || next > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[at+2:]) == volatile {
			return maphash.Bytes(s.seed, b[:at])*31 + maphash.Bytes(s.seed, b[next:])
		}
		at = next
	}
	return maphash.Bytes(s.seed, b)
}

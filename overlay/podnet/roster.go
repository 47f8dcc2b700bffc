package podnet

import (
	"bytes"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// An Attachment is what is recorded of a pod's interface. MAC and Addrs are not set where the record cannot be read, or
// is not complete yet. Veth, the host's end, does not need to be there.
type Attachment struct {
	Veth      string
	MAC       backend.MAC
	Addrs     []netip.Addr
	Namespace string // of Kubernetes; "" where it is not known
}

// A Roster reads which pods there are, each record once as long as it does not change.
type Roster struct{ known map[string]page }

// A page is a record with what tells whether the file is still the same.
type page struct {
	Attachment
	file  uint64 // inode
	saved time.Time
	size  int64
}

// fresh is how long a file may change without its time changing: the kernel's clock for files goes by ticks.
const fresh = time.Second

// Attached lists the attachments that runDir records, in no order.
func (r *Roster) Attached(runDir string) ([]Attachment, error) {
	s := &store{runDir: runDir}
	names, err := list(s.podDir())
	if err != nil {
		return nil, err
	}
	known := make(map[string]page, len(names))
	all := make([]Attachment, 0, len(names))
	for _, name := range names {
		if strings.HasPrefix(name, litter) {
			continue
		}
		p, keep, err := r.read(s, name)
		if errors.Is(err, fs.ErrNotExist) { // gone meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		if keep {
			known[name] = p
		}
		all = append(all, p.Attachment)
	}
	r.known = known
	return all, nil
}

// read returns a record, and whether it can be relied on as long as the file says that it has not changed.
func (r *Roster) read(s *store, veth string) (p page, keep bool, err error) {
	info, err := os.Lstat(s.pod(veth))
	if err != nil {
		return page{}, false, err
	}
	now := page{Attachment: Attachment{Veth: veth}, saved: info.ModTime(), size: info.Size()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		now.file = st.Ino
	}
	if was, ok := r.known[veth]; ok && was.file == now.file && was.saved.Equal(now.saved) && was.size == now.size {
		return was, true, nil
	}
	text, err := os.ReadFile(s.pod(veth))
	if err != nil {
		return page{}, false, err
	}
	if rec, err := readRecord(bytes.NewReader(text)); err == nil && rec.Veth == veth && len(rec.Addrs) > 0 {
		now.MAC, now.Addrs, now.Namespace = rec.MAC, rec.ips(), rec.Namespace
	}
	return now, time.Since(now.saved) > fresh, nil
}

// Attending reports whether somebody is attaching or detaching the pod with that veth. Unlike Busy it says no of a pod
// that has no record.
func Attending(runDir, veth string) bool {
	s := &store{runDir: runDir}
	h, err := s.hold(s.pod(veth), unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		h.release()
	}
	return ignore(err, fs.ErrNotExist) != nil
}

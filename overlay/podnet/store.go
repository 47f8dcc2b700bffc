package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// A record is what the store keeps of one pod interface. It is one file with several names: <run directory>/pods/<veth>
// is the first that it gets and the last that it loses, <run directory>/addrs/<address> one for each of its addresses.
type record struct {
	Network   string `json:"network"`   // the name of its configuration; "" in files of older plugins
	Container string `json:"container"` // CNI_CONTAINERID
	Interface string `json:"interface"` // CNI_IFNAME
	Veth      string `json:"veth"`      // the host's end; vethName of the two above
	Index     int    `json:"ifindex"`   // of Veth; 0 until it exists
	// MAC is that of the pod's end.
	MAC backend.MAC `json:"mac"`
	// Addrs are the pod's addresses, each with the length of the subnet it is from.
	Addrs []netip.Prefix `json:"addresses"`
	// Apart are those of Addrs that are looked up in a routing table of their own in the pod.
	Apart []netip.Prefix `json:"apart,omitempty"`
	// Namespace is the pod's in Kubernetes; empty where the runtime has not said.
	Namespace string `json:"namespace,omitempty"`
	// Delegates are the configurations that further plugins were called with for this pod, each with its type.
	Delegates []json.RawMessage `json:"delegates"`

	// asked is for the ADD alone.
	asked asked
}

// A store hands out the addresses of the node's pods.
//
// A file's flock says that somebody is at work on it: it is held from before the file has its first lasting name until
// the ADD is done. A file that nobody has locked and whose veth does not exist is free. That is judged from the host's
// network namespace alone, so a pod whose namespace cannot be seen is never taken for dead.
type store struct {
	runDir string
	// alive reports whether a veth is there. Index 0 stands for any.
	alive func(veth string, index int) (bool, error)
	// call has the delegates take back what they did for a pod that is gone.
	call caller
	// wait lets some time pass for the kernel to take away the veths of pods that have just gone, and reports false when
	// that has been enough. Where it is nil nobody waits.
	wait func() bool
}

// litter begins the names of files that are not yet in place.
const litter = ".new-"

// A hold is a record whose file this process has locked.
type hold struct {
	record
	store *store
	file  *os.File
}

func (s *store) podDir() string           { return filepath.Join(s.runDir, "pods") }
func (s *store) addrDir() string          { return filepath.Join(s.runDir, "addrs") }
func (s *store) pod(veth string) string   { return filepath.Join(s.podDir(), veth) }
func (s *store) addr(a netip.Addr) string { return filepath.Join(s.addrDir(), a.String()) }
func (s *store) last(p netip.Prefix) string {
	return filepath.Join(s.runDir, fmt.Sprintf("last-%d", p.Addr().BitLen()))
}

// trouble gives an error of the store's file system the CNI code of a failed input or output, and says what to do.
func (s *store) trouble(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	var coded *types.Error
	if errors.As(err, &coded) || !errors.As(err, &path) && !errors.As(err, &link) {
		return err
	}
	hint := ""
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		hint = "; make room on the file system of " + s.runDir
	case errors.Is(err, unix.EROFS):
		hint = "; have the file system of " + s.runDir + " mounted for writing"
	}
	return fail(types.ErrIOFailure, "the address store: %v%s", err, hint)
}

// take gives r an address of each subnet, and a MAC: those that are asked for, or free ones. The hold is the caller's
// to release, or to free if what follows fails.
func (s *store) take(r record, subnets []netip.Prefix) (*hold, error) {
	ips, err := r.asked.fit(subnets)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{s.podDir(), s.addrDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, s.trouble(err)
		}
	}
	h, err := s.claim(r)
	if err != nil {
		return nil, s.trouble(err)
	}
	if err := h.fill(subnets, ips); err != nil {
		_, freeErr := h.free()
		return nil, s.trouble(errors.Join(err, freeErr))
	}
	return h, nil
}

// fill finds the addresses and the MAC, and writes them down.
func (h *hold) fill(subnets []netip.Prefix, ips map[netip.Prefix]netip.Addr) error {
	for _, subnet := range subnets {
		a, ok := ips[subnet]
		var err error
		if ok {
			err = h.takeAsked(a, h.asked.ipField)
		} else {
			a, err = h.pick(subnet)
		}
		if err != nil {
			return err
		}
		h.Addrs = append(h.Addrs, netip.PrefixFrom(a, subnet.Bits()))
	}
	if h.asked.mac != (backend.MAC{}) {
		return h.takeMAC(h.asked.mac, h.asked.macField)
	}
	h.MAC = podMAC(h.Addrs)
	if a := h.Addrs[0]; a.Addr().Is6() && !inPodRange(a) {
		return h.takeMAC(h.MAC, h.asked.ipField+": the MAC of "+field(a.Addr().String()))
	}
	return h.save()
}

// claim makes the file of r, locked, under the name of its veth.
func (s *store) claim(r record) (*hold, error) {
	for {
		h, tmp, err := s.create(r)
		if err != nil {
			return nil, err
		}
		err = os.Link(tmp, s.pod(r.Veth))
		os.Remove(tmp)
		if err == nil {
			return h, nil
		}
		h.release()
		switch {
		case errors.Is(err, fs.ErrExist):
			err = s.clear(r)
		case errors.Is(err, fs.ErrNotExist):
			err = nil // a sweep came between creating and locking
		}
		if err != nil {
			return nil, err
		}
	}
}

func (s *store) create(r record) (h *hold, tmp string, err error) {
	f, err := os.CreateTemp(s.podDir(), litter) // by a name that never was: a sweep may take it away before it is locked
	if err != nil {
		return nil, "", err
	}
	h = &hold{record: r, store: s, file: f}
	if err = errors.Join(flock(f, unix.LOCK_EX), h.save()); err != nil {
		os.Remove(f.Name())
		h.release()
	}
	return h, f.Name(), err
}

// clear makes way for r where an earlier attachment of the same name is gone without a DEL.
func (s *store) clear(r record) error {
	h, err := s.hold(s.pod(r.Veth), unix.LOCK_EX)
	if err != nil {
		return ignore(err, fs.ErrNotExist)
	}
	h.nameIs(r.Veth)
	alive, err := s.alive(r.Veth, h.Index)
	if err != nil || alive {
		h.release()
	}
	if err != nil {
		return err
	}
	if alive {
		return fail(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID, CNI_IFNAME: container %s already has "+
			"interface %s (its veth on the host is %s); delete that first", r.Container, r.Interface, r.Veth)
	}
	_, err = h.freeDead()
	return err
}

// hold opens and locks a file of the store. The error is fs.ErrNotExist where there is none, EWOULDBLOCK where how has
// LOCK_NB and somebody is at work on it. A file that cannot be read as a record gives an empty one.
func (s *store) hold(path string, how int) (*hold, error) {
	flags := os.O_RDWR // also to free it, which is then not begun where it cannot be done: on a read-only file system
	if how&unix.LOCK_SH != 0 {
		flags = os.O_RDONLY
	}
	for {
		f, err := open(path, flags|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		h := &hold{store: s, file: f}
		if err := flock(f, how); err != nil {
			h.release()
			return nil, err
		}
		if h.named(path) {
			h.record, _ = readRecord(f)
			return h, nil
		}
		h.release() // freed, and perhaps taken anew, while we waited
	}
}

// readRecord reads the first JSON value only: save writes over a longer text without cutting it off first.
func readRecord(r io.Reader) (record, error) {
	var rec record
	err := json.NewDecoder(r).Decode(&rec)
	if err == nil && rec.Veth == "" {
		err = errors.New("no veth is named")
	}
	if err != nil {
		return record{}, err
	}
	return rec, nil
}

// save writes the record in place, for the lock is on this very file.
func (h *hold) save() error {
	text := h.plain()
	if text == nil {
		var err error
		if text, err = json.Marshal(h.record); err != nil {
			return err
		}
	}
	_, err := h.file.WriteAt(append(text, '\n'), 0)
	return h.store.trouble(err)
}

// pick links the file to the next free address of a subnet.
func (h *hold) pick(subnet netip.Prefix) (netip.Addr, error) {
	a, err := h.next(subnet)
	if err != nil || a.IsValid() {
		return a, err
	}
	for {
		_, sweepErr := h.store.sweep()
		if a, err = h.next(subnet); err != nil || a.IsValid() {
			return a, err
		}
		if h.store.wait == nil || !h.store.wait() {
			return a, h.store.exhausted(subnet, sweepErr)
		}
	}
}

// next goes once round the subnet, beginning behind the address that was handed out last. The address is invalid if
// all are taken.
func (h *hold) next(subnet netip.Prefix) (netip.Addr, error) {
	first, last := podRange(subnet)
	start := first
	if text, err := readFile(h.store.last(subnet)); err == nil {
		if a, err := netip.ParseAddr(strings.TrimSpace(string(text))); err == nil && !a.Less(first) && a.Less(last) {
			start = a.Next()
		}
	}
	for a := start; ; {
		err := os.Link(h.store.pod(h.Veth), h.store.addr(a))
		if err == nil {
			return a, h.store.remember(subnet, a)
		}
		if !errors.Is(err, fs.ErrExist) {
			return netip.Addr{}, err
		}
		if a = a.Next(); last.Less(a) {
			a = first
		}
		if a == start {
			return netip.Addr{}, nil
		}
	}
}

// remember writes which address was handed out last, always as many bytes, so that no reader finds the file empty.
func (s *store) remember(subnet netip.Prefix, a netip.Addr) error {
	f, err := open(s.last(subnet), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%-39s\n", a)
	return errors.Join(err, f.Close())
}

// exhausted says that a subnet is used up, and names the files that a sweep could not judge.
func (s *store) exhausted(subnet netip.Prefix, sweepErr error) error {
	names, err := list(s.addrDir())
	if err != nil {
		return err
	}
	used := 0
	for _, name := range names {
		if a, err := netip.ParseAddr(name); err == nil && subnet.Contains(a) {
			used++
		}
	}
	text := fmt.Sprintf("subnet %s is used up: all %d addresses for pods are taken; remove pods from this node, or give "+
		"the nodes larger subnets (SubnetLen, IPv6SubnetLen in net-conf.json)", subnet, used)
	if sweepErr != nil {
		text = fmt.Sprintf("%s; %v", text, sweepErr)
	}
	return fail(types.ErrTryAgainLater, "%s", text)
}

// find locks the record of an attachment, waiting for an ADD that is still at work. It is nil where there is none.
func (s *store) find(container, iface string) (*hold, error) {
	return s.lookUp(container, iface, unix.LOCK_EX)
}

func (s *store) lookUp(container, iface string, how int) (*hold, error) {
	veth := vethName(container, iface)
	h, err := s.hold(s.pod(veth), how)
	if err != nil {
		return nil, ignore(err, fs.ErrNotExist)
	}
	if h.Veth == "" { // unreadable: its name tells enough
		h.record = record{Container: container, Interface: iface, Veth: veth}
	}
	if h.Container != container || h.Interface != iface {
		h.release()
		return nil, nil
	}
	return h, nil
}

// legible reports whether the record could be read, and is that of an ADD that got as far as its addresses.
func (h *hold) legible() bool { return len(h.Addrs) > 0 }

// release ends the work on a file and leaves it in place.
func (h *hold) release() { h.file.Close() }

// free takes all names from the file while it is locked, and releases it.
func (h *hold) free() (freed []netip.Addr, err error) {
	defer h.release()
	names := make([]string, 0, len(h.Addrs))
	for _, p := range h.Addrs {
		names = append(names, p.Addr().String())
	}
	freed, err = h.unlink(names)
	// An ADD that was killed may have taken an address and not written it down.
	if err == nil && h.links() > 1 {
		var more []netip.Addr
		if names, err = list(h.store.addrDir()); err == nil {
			more, err = h.unlink(names)
		}
		freed = append(freed, more...)
	}
	if pod := h.store.pod(h.Veth); err == nil && h.named(pod) {
		err = os.Remove(pod)
	}
	return freed, err
}

// unlink removes those names in the directory of addresses that are this file's.
func (h *hold) unlink(names []string) (freed []netip.Addr, err error) {
	for _, name := range names {
		a, err := netip.ParseAddr(name)
		if err != nil || !h.named(h.store.addr(a)) {
			continue
		}
		if err := os.Remove(h.store.addr(a)); err != nil {
			return freed, err
		}
		freed = append(freed, a)
	}
	return freed, nil
}

// named reports whether path is a name of the file.
func (h *hold) named(path string) bool {
	here, err := h.file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(here, there)
}

// links counts the file's names.
func (h *hold) links() uint64 {
	info, err := h.file.Stat()
	if err != nil {
		return 0
	}
	return nlink(info)
}

// sweep frees what belongs to no pod any more. The error names the files that it cannot judge; they count as taken.
func (s *store) sweep() (freed []netip.Addr, err error) {
	pods, err := list(s.podDir())
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, name := range pods {
		some, err := s.sweepPod(name)
		freed, errs = append(freed, some...), append(errs, err)
	}
	addrs, err := list(s.addrDir())
	errs = append(errs, err)
	for _, name := range addrs {
		some, err := s.sweepAddr(name)
		freed, errs = append(freed, some...), append(errs, err)
	}
	return freed, errors.Join(errs...)
}

func (s *store) sweepPod(name string) (freed []netip.Addr, err error) {
	h, err := s.hold(s.pod(name), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return nil, ignore(err, fs.ErrNotExist, unix.EWOULDBLOCK)
	}
	if strings.HasPrefix(name, litter) {
		defer h.release()
		return nil, os.Remove(s.pod(name))
	}
	h.nameIs(name)
	return h.freeIfDead()
}

// nameIs goes by the name of the file where what is in it cannot be read, or is another's.
func (h *hold) nameIs(veth string) {
	if h.Veth != veth {
		h.record = record{Veth: veth}
	}
}

// sweepAddr deals with files that have no name but their address: somebody has removed the other by hand.
func (s *store) sweepAddr(name string) (freed []netip.Addr, err error) {
	path := filepath.Join(s.addrDir(), name)
	if info, err := os.Lstat(path); err != nil || info.Mode().IsRegular() && nlink(info) > 1 {
		return nil, ignore(err, fs.ErrNotExist)
	}
	h, err := s.hold(path, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return nil, ignore(err, fs.ErrNotExist, unix.EWOULDBLOCK)
	}
	if h.Veth == "" {
		h.release()
		return nil, errors.New(unowned(path))
	}
	return h.freeIfDead()
}

func (h *hold) freeIfDead() (freed []netip.Addr, err error) {
	alive, err := h.store.alive(h.Veth, h.Index)
	if err != nil || alive {
		h.release()
		return nil, err
	}
	return h.freeDead()
}

// freeDead is free for a pod that is gone without a DEL.
func (h *hold) freeDead() (freed []netip.Addr, err error) {
	if err := h.undelegate(); err != nil {
		h.release()
		return nil, err
	}
	if nft, err := dialNFT(); err == nil {
		nft.acquit(h.record)
		nft.close()
	}
	return h.free()
}

// podRange is the first and the last address of a subnet that a pod can have. In IPv4 the network's address, the
// gateway and the broadcast address are reserved; in IPv6 the subnet-router anycast address (RFC 4291, section 2.6.1),
// the gateway and the VXLAN device's, and pods stay within the low 2^16.
func podRange(subnet netip.Prefix) (first, last netip.Addr) {
	base := subnet.Masked().Addr()
	if base.Is4() {
		b := base.As4()
		for i := subnet.Bits(); i < 32; i++ {
			b[i/8] |= 0x80 >> (i % 8)
		}
		return base.Next().Next(), netip.AddrFrom4(b).Prev()
	}
	b := base.As16()
	for i := max(subnet.Bits(), 112); i < 128; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return base.Next().Next().Next(), netip.AddrFrom16(b)
}

// Sweep frees the addresses of pods that are gone without a DEL, and returns them. Where further plugins did something
// for such a pod it calls them, from the directories of path (DelegatePath, say), to take it back. It must be called in
// the host's network namespace. The error names the files that it cannot judge, and the pods whose plugins fail; their
// addresses count as taken.
func Sweep(ctx context.Context, runDir, path string) ([]netip.Addr, error) {
	host, err := dial()
	if err != nil {
		return nil, err
	}
	defer host.close()
	return host.store(runDir, callIn(ctx, runDir, path)).sweep()
}

// Busy reports whether somebody is attaching or detaching the pod with that veth, or has just done so.
func Busy(runDir, veth string) bool {
	s := &store{runDir: runDir}
	h, err := s.hold(s.pod(veth), unix.LOCK_SH|unix.LOCK_NB)
	if err != nil {
		return true
	}
	h.release()
	return false
}

// FormerSubnets returns the subnets, in order, that addresses of pods on this node are from and that are not among
// present. It costs next to nothing while there are none.
func FormerSubnets(runDir string, present []netip.Prefix) ([]netip.Prefix, error) {
	s := &store{runDir: runDir}
	names, err := list(s.addrDir())
	if err != nil {
		return nil, err
	}
	var former []netip.Prefix
	for _, name := range names {
		a, err := netip.ParseAddr(name)
		if err != nil || isIn(a, present) || isIn(a, former) {
			continue
		}
		f, err := os.Open(s.addr(a))
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, err
		}
		rec, _ := readRecord(f) // what cannot be read is for Sweep to name
		f.Close()
		for _, p := range rec.Addrs {
			if p.Addr() == a {
				former = append(former, p.Masked())
			}
		}
	}
	slices.SortFunc(former, netip.Prefix.Compare)
	return former, nil
}

func isIn(a netip.Addr, subnets []netip.Prefix) bool {
	return slices.ContainsFunc(subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// list returns the names in a directory, none if it does not exist.
func list(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, ignore(err, fs.ErrNotExist)
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// open is os.OpenFile for files that never block. It leaves out what the runtime prepares for others, which is a good
// part of what an ADD does with files.
func open(path string, flags int, perm uint32) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, perm)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case !errors.Is(err, unix.EINTR):
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// readFile is os.ReadFile for such files.
func readFile(path string) ([]byte, error) {
	f, err := open(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

func nlink(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Nlink)
	}
	return 0
}

// ignore returns err unless it is one of those.
func ignore(err error, those ...error) error {
	for _, e := range those {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

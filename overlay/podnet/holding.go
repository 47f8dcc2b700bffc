package podnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// A Holding is an address that is taken, and who has it.
type Holding struct {
	Address netip.Addr `json:"address"`
	// Container and Interface are the runtime's words; "" where the record cannot be read.
	Container string `json:"container,omitempty"`
	Interface string `json:"interface,omitempty"`
	// Veth is the interface's end on the host; "" where nobody knows it.
	Veth string `json:"veth,omitempty"`
	// Since is when the record was written.
	Since time.Time `json:"since"`
	// Problem is what is wrong, and what to do; "" where nothing is.
	Problem string `json:"problem,omitempty"`
}

// Holdings lists the addresses that runDir records, in order. It changes nothing, and must be called in the host's
// network namespace.
func Holdings(runDir string) ([]Holding, error) {
	host, err := dial()
	if err != nil {
		return nil, err
	}
	defer host.close()
	s := host.store(runDir, nil)
	names, err := list(s.addrDir())
	if err != nil {
		return nil, err
	}
	holdings := []Holding{}
	for _, name := range names {
		a, err := netip.ParseAddr(name)
		if err != nil {
			continue // not the plugin's
		}
		h, err := s.holding(a)
		if errors.Is(err, fs.ErrNotExist) {
			continue // freed meanwhile
		}
		if err != nil {
			return nil, err
		}
		holdings = append(holdings, h)
	}
	slices.SortFunc(holdings, func(a, b Holding) int { return a.Address.Compare(b.Address) })
	return holdings, nil
}

func (s *store) holding(a netip.Addr) (Holding, error) {
	f, err := os.Open(s.addr(a))
	if err != nil {
		return Holding{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Holding{}, err
	}
	rec, err := readRecord(f)
	h := Holding{Address: a, Container: rec.Container, Interface: rec.Interface, Veth: rec.Veth, Since: info.ModTime()}
	if err != nil {
		h.Veth, h.Problem = s.unreadable(s.addr(a), info)
		return h, nil
	}
	alive, err := s.alive(rec.Veth, rec.Index)
	if err == nil && !alive && !Busy(s.runDir, rec.Veth) {
		h.Problem = fmt.Sprintf("veth %s does not exist any more; the tweed daemon frees the address within 30 s", rec.Veth)
	}
	return h, err
}

// unreadable tells of a file that is no record, and of which veth it is if one of its names says so.
func (s *store) unreadable(path string, info fs.FileInfo) (veth, problem string) {
	names, _ := list(s.podDir())
	for _, name := range names {
		if other, err := os.Lstat(filepath.Join(s.podDir(), name)); err == nil && os.SameFile(info, other) {
			return name, fmt.Sprintf("%s cannot be read; the address is taken for as long as %s exists: delete the pod whose "+
				"interface's other end that is", path, name)
		}
	}
	return "", unowned(path)
}

// unowned is what to do about an address whose file does not tell whose it is.
func unowned(path string) string {
	return path + " does not say whose address it is, so it counts as taken; remove the file if no pod on this node has " +
		"the address"
}

package podnet

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Clear frees all addresses, as Sweep does, once no pod of this node is attached any more: then also those whose files
// do not say whose they are. The error names the pods that a further plugin fails for, whose addresses stay taken.
func Clear(ctx context.Context, runDir, path string) ([]netip.Addr, error) {
	freed, err := Sweep(ctx, runDir, path)
	s := &store{runDir: runDir}
	names, listErr := list(s.addrDir())
	if listErr != nil {
		return freed, errors.Join(err, listErr)
	}
	ownerless := 0
	for _, name := range names {
		file := filepath.Join(s.addrDir(), name)
		if info, statErr := os.Lstat(file); statErr != nil || nlink(info) > 1 {
			continue
		}
		if rmErr := os.Remove(file); rmErr != nil {
			return freed, errors.Join(err, rmErr)
		}
		ownerless++
	}
	if ownerless == 0 {
		return freed, err
	}
	more, err := Sweep(ctx, runDir, path) // which has less to complain about
	return append(freed, more...), err
}

// forget removes all records of addresses. What further plugins did for the pods has ended with the boot.
func forget(runDir string) error {
	s := &store{runDir: runDir}
	for _, dir := range []string{s.addrDir(), s.podDir()} { // in this order, so that the rest still says whose it is
		names, err := list(dir)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := os.Remove(filepath.Join(dir, name)); ignore(err, fs.ErrNotExist) != nil {
				return err
			}
		}
	}
	return nil
}

// Files lists what is in runDir, but for the daemon's lock: what daemon and plugin make there, and the rest.
func Files(runDir string) (ours, others []string, err error) {
	entries, err := os.ReadDir(runDir)
	if err != nil {
		return nil, nil, ignore(err, fs.ErrNotExist)
	}
	known := []string{"node.json", "node.json.tmp", "pods", "addrs", "last-32", "last-128"}
	for _, e := range entries {
		path := filepath.Join(runDir, e.Name())
		switch {
		case slices.Contains(known, e.Name()), strings.HasPrefix(e.Name(), shadow):
			ours = append(ours, path)
		case e.Name() != LockName:
			others = append(others, path)
		}
	}
	return ours, others, nil
}

// Package mounts puts file trees together.
package mounts

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mount is mount(2) with an error that says what was to go where.
func Mount(from, to, kind string, flags uintptr, options string) error {
	if err := unix.Mount(from, to, kind, flags, options); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", from, to, err)
	}
	return nil
}

// ReadOnly shows the file or directory from at to, where nobody can change it.
func ReadOnly(from, to string) error {
	if err := Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return Mount("", to, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

// ChangeRoot makes the mount at root the root of this process, and lets the old one go.
func ChangeRoot(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil { // pivot_root(2): the old root then lies above the new one
		return fmt.Errorf("changing root to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leaving the old root: %w", err)
	}
	return os.Chdir("/")
}

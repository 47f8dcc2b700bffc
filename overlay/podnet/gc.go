package podnet

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Collect takes away, as Detach does, what is attached to the network c.Name and not in c.Valid, and frees the
// addresses of pods that are gone (CNI spec, section 2, "GC"). Plugins are called from the directories of path. An
// attachment that somebody is at work on when Collect begins is left alone, even if that work ends meanwhile: no list
// that was made before can know of it. Where there is no list, nothing that is alive is touched. What cannot be taken
// away keeps nothing else from going, and is in the error. It must be called in the host's network namespace.
func Collect(c Config, path string) error {
	valid, err := c.validVeths()
	if err != nil {
		return err
	}
	host, err := dial()
	if err != nil {
		return err
	}
	defer host.close()
	store := host.store(c.RunDir, callIn(context.Background(), c.RunDir, path))
	var errs []error
	if valid != nil {
		errs = append(errs, host.collect(store, c.Name, valid))
	}
	_, err = store.sweep()
	return errors.Join(append(errs, store.trouble(err))...)
}

// validVeths are the host's ends of the attachments that are to stay. It is nil where the runtime does not say.
func (c Config) validVeths() (map[string]bool, error) {
	if c.Valid == nil {
		return nil, nil
	}
	valid := make(map[string]bool, len(c.Valid))
	for _, a := range c.Valid {
		if a.ContainerID == "" || a.IfName == "" {
			return nil, fail(types.ErrInvalidNetworkConfig, "network configuration: %s has an attachment with containerID %q "+
				"and ifname %q; it must have both", validKey, a.ContainerID, a.IfName)
		}
		valid[vethName(a.ContainerID, a.IfName)] = true
	}
	return valid, nil
}

// collect takes away what is not valid.
func (h *host) collect(s *store, network string, valid map[string]bool) error {
	// An ADD has a record before it has a veth. So a veth that is there now and will not be on record is nobody's work.
	veths, err := h.veths()
	if err != nil {
		return err
	}
	stale, alone, err := s.stale(network, valid)
	errs := []error{s.trouble(err)}
	for _, held := range stale {
		errs = append(errs, undo(h, held, ""))
	}
	if !alone { // a veth on no record does not say which network it is of
		return errors.Join(errs...)
	}
	for _, l := range veths {
		if _, err := os.Lstat(s.pod(l.Name)); !valid[l.Name] && errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, h.remove(l.Name, l.Index))
		}
	}
	return errors.Join(errs...)
}

// stale locks the records of a network that are not valid. All are locked before any is dealt with, so that those that
// somebody is at work on now are passed over. alone is set where no record is of another network; then those that
// cannot be read are stale too.
func (s *store) stale(network string, valid map[string]bool) (stale []*hold, alone bool, err error) {
	names, err := list(s.podDir())
	if err != nil {
		return nil, false, err
	}
	alone = true
	var illegible []*hold
	var errs []error
	for _, name := range names {
		if valid[name] || strings.HasPrefix(name, litter) {
			continue
		}
		h, err := s.hold(s.pod(name), unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			errs = append(errs, ignore(err, fs.ErrNotExist, unix.EWOULDBLOCK))
			continue
		}
		h.nameIs(name)
		switch {
		case !h.legible():
			illegible = append(illegible, h)
		case h.Network == network:
			stale = append(stale, h)
		default:
			alone = false
			h.release()
		}
	}
	if alone {
		return append(stale, illegible...), true, errors.Join(errs...)
	}
	for _, h := range illegible {
		h.release()
	}
	return stale, false, errors.Join(errs...)
}

// isVethName reports whether vethName makes such names.
func isVethName(name string) bool {
	digits, ok := strings.CutPrefix(name, vethPrefix)
	sum, err := hex.DecodeString(digits)
	return ok && err == nil && len(sum) == vethBytes
}

// veths lists the host's ends of pods' interfaces.
func (h *host) veths() ([]link, error) {
	req := h.request(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", meaning(err))
	}
	var veths []link
	for _, msg := range msgs {
		l, err := netlink.LinkDeserialize(nil, msg)
		if err != nil {
			return nil, fmt.Errorf("listing links: %w", err)
		}
		if end := (link{LinkAttrs: *l.Attrs(), kind: l.Type()}); end.ours("veth") && isVethName(end.Name) {
			veths = append(veths, end)
		}
	}
	return veths, nil
}

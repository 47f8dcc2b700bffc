package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// A field is where a runtime has written what it wants, as errors name it.
type field string

const (
	argIP  field = "CNI_ARGS: IP"
	argMAC field = "CNI_ARGS: MAC"
)

// refuse makes an error about the field's value.
func (f field) refuse(value, format string, args ...any) error {
	code := types.ErrInvalidNetworkConfig
	if strings.HasPrefix(string(f), "CNI_ARGS") {
		code = types.ErrInvalidEnvironmentVariables
	}
	return fail(code, "%s: %s %s", f, value, fmt.Sprintf(format, args...))
}

// asked is what an interface is to have, where the runtime minds: the capabilities ips and mac, or one of their
// forerunners (CNI conventions).
type asked struct {
	ips      []netip.Prefix // each with its length, or with that of the whole address where none was given
	ipField  field
	mac      backend.MAC // zero where any will do
	macField field
}

// asked reads the runtime's words. What is said in the newest way counts: runtimeConfig, then args, then CNI_ARGS.
func (c Config) asked(p Pod) (a asked, err error) {
	if p.Interface == "all" || p.Interface == "default" { // where the kernel keeps settings of no interface
		return a, fail(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME: no interface can be named %s", p.Interface)
	}
	env, err := readArgs(p.Args)
	if err != nil {
		return a, err
	}
	var args struct {
		CNI struct{ IPs, MAC json.RawMessage }
	}
	_ = json.Unmarshal(c.Args, &args) // what has another form is not meant for us
	if a.ips, a.ipField, err = askedIPs(c.RuntimeConfig["ips"], args.CNI.IPs, env["IP"]); err != nil {
		return a, err
	}
	a.mac, a.macField, err = askedMAC(c.RuntimeConfig["mac"], args.CNI.MAC, env["MAC"])
	return a, err
}

// readArgs reads CNI_ARGS (CNI spec, section 2). What Kubernetes' runtimes put there is known.
func readArgs(text string) (map[string]string, error) {
	args := map[string]string{}
	for pair := range strings.SplitSeq(text, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %q is not of the form KEY=value", pair)
		}
		args[key] = value
	}
	var ignore types.UnmarshallableBool
	if value, ok := args["IgnoreUnknown"]; ok && ignore.UnmarshalText([]byte(value)) != nil {
		return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: IgnoreUnknown is %q; it must be 1 or 0", value)
	}
	for _, key := range slices.Sorted(maps.Keys(args)) {
		known := slices.Contains([]string{"IP", "MAC", "IgnoreUnknown"}, key) || strings.HasPrefix(key, "K8S_")
		if !known && !bool(ignore) {
			return nil, fail(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %s is %q, but there is no such key; those of "+
				"tweed-cni are IP and MAC, and with IgnoreUnknown=1 others are passed over", key, args[key])
		}
	}
	return args, nil
}

func askedIPs(newest, older json.RawMessage, oldest string) ([]netip.Prefix, field, error) {
	for _, s := range []struct {
		field field
		value json.RawMessage
	}{{"runtimeConfig.ips", newest}, {"args.cni.ips", older}} {
		var texts []string
		if len(s.value) > 0 && json.Unmarshal(s.value, &texts) != nil {
			return nil, s.field, s.field.refuse(string(s.value), `must be a list of addresses such as ["10.244.3.7"]`)
		}
		if len(texts) > 0 {
			ips, err := readIPs(s.field, texts)
			return ips, s.field, err
		}
	}
	if oldest == "" {
		return nil, "", nil
	}
	ips, err := readIPs(argIP, strings.Split(oldest, ","))
	return ips, argIP, err
}

func readIPs(f field, texts []string) ([]netip.Prefix, error) {
	var ips []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
				p = netip.PrefixFrom(a, a.BitLen())
			}
		}
		if !p.IsValid() {
			return nil, f.refuse(fmt.Sprintf("%q", text), "is no address such as 10.244.3.7, fd00::7 or 10.244.3.7/24")
		}
		ips = append(ips, p)
	}
	return ips, nil
}

func askedMAC(newest, older json.RawMessage, oldest string) (backend.MAC, field, error) {
	for _, s := range []struct {
		field field
		value json.RawMessage
	}{{"runtimeConfig.mac", newest}, {"args.cni.mac", older}} {
		var text string
		if len(s.value) > 0 && json.Unmarshal(s.value, &text) != nil {
			return backend.MAC{}, s.field, s.field.refuse(string(s.value), `must be a MAC such as "c2:11:22:33:44:55"`)
		}
		if text != "" {
			m, err := readMAC(s.field, text)
			return m, s.field, err
		}
	}
	if oldest == "" {
		return backend.MAC{}, "", nil
	}
	m, err := readMAC(argMAC, oldest)
	return m, argMAC, err
}

func readMAC(f field, text string) (backend.MAC, error) {
	m, err := backend.ParseMAC(text)
	switch {
	case err != nil:
		return m, f.refuse(fmt.Sprintf("%q", text), "is no MAC such as c2:11:22:33:44:55")
	case m[0]&1 != 0:
		return m, f.refuse(text, "is a group's, and cannot be an interface's; the first byte of one is even")
	case m == backend.MAC{}:
		return m, f.refuse(text, "is no interface's; give another")
	}
	return m, nil
}

// fit says which address each subnet is to give, and refuses what no pod of this node can have.
func (a asked) fit(subnets []netip.Prefix) (map[netip.Prefix]netip.Addr, error) {
	wanted := map[netip.Prefix]netip.Addr{}
	for _, p := range a.ips {
		ip := p.Addr()
		i := slices.IndexFunc(subnets, func(s netip.Prefix) bool { return s.Contains(ip) })
		if i < 0 {
			return nil, a.ipField.refuse(ip.String(), "is in none of this node's subnets %v; pods have addresses of their "+
				"node's", subnets)
		}
		subnet := subnets[i]
		if p.Bits() != subnet.Bits() && p.Bits() != ip.BitLen() {
			return nil, a.ipField.refuse(p.String(), "is not of the length of this node's subnet %s; write %s or %s", subnet,
				netip.PrefixFrom(ip, subnet.Bits()), ip)
		}
		if what := reservedFor(ip, subnet); what != "" {
			return nil, a.ipField.refuse(ip.String(), "is %s; take another address of subnet %s", what, subnet)
		}
		if other, ok := wanted[subnet]; ok {
			return nil, a.ipField.refuse(fmt.Sprintf("%s and %s", other, ip), "are both of subnet %s; an interface has one "+
				"address of it", subnet)
		}
		wanted[subnet] = ip
	}
	return wanted, nil
}

// reservedFor says what an address that no pod can have is for. Beyond the range that addresses are handed out from, a
// pod can have those of IPv6 that it asks for.
func reservedFor(a netip.Addr, subnet netip.Prefix) string {
	base := subnet.Masked().Addr()
	first, last := podRange(subnet)
	switch {
	case a == base:
		return "the subnet's own"
	case a == base.Next():
		return "the gateway's"
	case a.Less(first):
		return "the VXLAN device's"
	case a.Is4() && last.Less(a):
		return "the subnet's broadcast address"
	}
	return ""
}

// takeAsked links the file to a certain address of a subnet.
func (h *hold) takeAsked(a netip.Addr, f field) error {
	err := os.Link(h.store.pod(h.Veth), h.store.addr(a))
	if errors.Is(err, fs.ErrExist) {
		if err := h.store.freeIfLeft(h.store.addr(a)); err != nil {
			return err
		}
		err = os.Link(h.store.pod(h.Veth), h.store.addr(a))
	}
	if errors.Is(err, fs.ErrExist) {
		return fail(types.ErrTryAgainLater, "%s: %s is taken by %s; delete that pod, or give another address", f, a,
			holder(h.store.addr(a)))
	}
	if err != nil {
		return fmt.Errorf("taking an address: %w", err)
	}
	return nil
}

// inPodRange reports whether an address is one of those that are handed out.
func inPodRange(a netip.Prefix) bool {
	first, last := podRange(a)
	return !a.Addr().Less(first) && !last.Less(a.Addr())
}

// freeIfLeft frees what a file records, if its pod is gone without a DEL.
func (s *store) freeIfLeft(path string) error {
	h, err := s.hold(path, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return ignore(err, fs.ErrNotExist, unix.EWOULDBLOCK)
	}
	if h.Veth == "" { // whose it is nobody can tell
		h.release()
		return nil
	}
	_, err = h.freeIfDead()
	return err
}

// holder says whose a file is.
func holder(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return path
	}
	defer f.Close()
	rec, err := readRecord(f)
	if err != nil {
		return "a pod that cannot be told, for " + path + " cannot be read"
	}
	return fmt.Sprintf("container %s, interface %s", rec.Container, rec.Interface)
}

// takeMAC makes sure of a MAC that does not follow from an address that is this pod's alone, and writes it down. Two
// ports of a bridge with one MAC would take each other's frames.
func (h *hold) takeMAC(m backend.MAC, f field) error {
	dir, err := os.Open(h.store.podDir())
	if err != nil {
		return err
	}
	defer dir.Close()
	// One at a time, to the end: of two that ask for the same, the later one finds what the earlier one wrote.
	if err := flock(dir, unix.LOCK_EX); err != nil {
		return err
	}
	// The address that the MAC would follow from is taken with it, so that no other pod is given either.
	if a := h.addrOf(m); a.IsValid() && !h.named(h.store.addr(a)) {
		if err := h.takeAsked(a, field(fmt.Sprintf("%s: %s follows from an address", f, m))); err != nil {
			return err
		}
	}
	names, err := list(h.store.podDir())
	if err != nil {
		return err
	}
	for _, name := range names {
		path := h.store.pod(name)
		if name == h.Veth || strings.HasPrefix(name, litter) || !recordsMAC(path, m) {
			continue
		}
		if err := h.store.freeIfLeft(path); err != nil {
			return err
		}
		if recordsMAC(path, m) {
			return fail(types.ErrTryAgainLater, "%s: %s is that of %s on this node; delete that pod, or give another MAC", f, m,
				holder(path))
		}
	}
	h.MAC = m
	return h.save()
}

func recordsMAC(path string, m backend.MAC) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	rec, err := readRecord(f)
	return err == nil && rec.MAC == m
}

// addrOf is the address of this node that a MAC follows from, the other way round than podMAC.
func (h *hold) addrOf(m backend.MAC) netip.Addr {
	if m[0] != 0x0a || m[1] != 0x58 {
		return netip.Addr{}
	}
	for _, p := range h.Addrs {
		if p.Addr().Is4() {
			return netip.AddrFrom4([4]byte(m[2:]))
		}
	}
	b := h.Addrs[0].Masked().Addr().As16()
	copy(b[12:], m[2:])
	return netip.AddrFrom16(b)
}

package kernel

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// Of linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h.
const (
	iptGetInfo     = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	iptGetEntries  = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	iptName        = 32 // XT_TABLE_MAXNAMELEN
	sizeofIptInfo  = 84 // struct ipt_getinfo
	iptUnderflows  = 56 // offset in it of where each hook's policy is
	iptSize        = 80 // offset in it of the size of all entries
	iptEntries     = 40 // offset of the entries in struct ipt_get_entries
	sizeofXtTarget = 32 // struct xt_entry_target
	iptVerdictDrop = -nfDrop - 1
	targetOffsetV4 = 88  // offset of target_offset in struct ipt_entry
	targetOffsetV6 = 140 // and in struct ip6t_entry
)

// An xtTable is what the kernel has of a table of the older form of iptables.
type xtTable struct {
	info    []byte // struct ipt_getinfo
	entries []byte
}

// legacyTable reads a table. One that is not there it makes.
func legacyTable(family masq.Family, name string) (t xtTable, err error) {
	domain, level := unix.AF_INET, unix.SOL_IP
	if family == masq.IPv6 {
		domain, level = unix.AF_INET6, unix.SOL_IPV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return t, err
	}
	defer unix.Close(fd)
	for range nftTries {
		t.info = make([]byte, sizeofIptInfo)
		copy(t.info, name)
		if err = getsockopt(fd, level, iptGetInfo, t.info); err != nil {
			return t, err
		}
		size := binary.NativeEndian.Uint32(t.info[iptSize:])
		table := make([]byte, iptEntries+size)
		copy(table, name)
		binary.NativeEndian.PutUint32(table[iptName:], size)
		t.entries = table[iptEntries:]
		if err = getsockopt(fd, level, iptGetEntries, table); !errors.Is(err, unix.EAGAIN) { // others wrote in between
			break
		}
	}
	return t, err
}

// legacyDrops reports whether the policy of FORWARD in the older form of iptables is to drop. It asks nothing where
// there is no such table: to ask would make it.
func legacyDrops(family masq.Family) bool {
	if !hasLegacy(family, masq.FilterTable) {
		return false
	}
	t, err := legacyTable(family, masq.FilterTable)
	if err != nil {
		return false
	}
	offset := targetOffsetV4
	if family == masq.IPv6 {
		offset = targetOffsetV6
	}
	at := int(binary.NativeEndian.Uint32(t.info[iptUnderflows+4*unix.NF_INET_FORWARD:]))
	if at+offset+2 > len(t.entries) {
		return false
	}
	at += int(binary.NativeEndian.Uint16(t.entries[at+offset:])) + sizeofXtTarget
	return at+4 <= len(t.entries) && int32(binary.NativeEndian.Uint32(t.entries[at:])) == iptVerdictDrop
}

func getsockopt(fd, level, option int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

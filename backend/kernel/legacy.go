package kernel

import (
	"encoding/binary"
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

// legacyDrops reports whether the policy of FORWARD in the older form of iptables is to drop. It asks nothing where
// there is no such table: to ask would make it.
func legacyDrops(family masq.Family) bool {
	if !hasLegacy(family, masq.FilterTable) {
		return false
	}
	domain, level, offset := unix.AF_INET, unix.SOL_IP, targetOffsetV4
	if family == masq.IPv6 {
		domain, level, offset = unix.AF_INET6, unix.SOL_IPV6, targetOffsetV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	info := make([]byte, sizeofIptInfo)
	copy(info, masq.FilterTable)
	if !getsockopt(fd, level, iptGetInfo, info) {
		return false
	}
	size := binary.NativeEndian.Uint32(info[iptSize:])
	table := make([]byte, iptEntries+size)
	copy(table, masq.FilterTable)
	binary.NativeEndian.PutUint32(table[iptName:], size)
	if !getsockopt(fd, level, iptGetEntries, table) {
		return false
	}
	at := iptEntries + int(binary.NativeEndian.Uint32(info[iptUnderflows+4*unix.NF_INET_FORWARD:]))
	if at+offset+2 > len(table) {
		return false
	}
	at += int(binary.NativeEndian.Uint16(table[at+offset:])) + sizeofXtTarget
	return at+4 <= len(table) && int32(binary.NativeEndian.Uint32(table[at:])) == iptVerdictDrop
}

func getsockopt(fd, level, option int, buf []byte) bool {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	return errno == 0
}

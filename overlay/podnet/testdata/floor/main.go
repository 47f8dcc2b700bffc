// Command floor is the least that a CNI plugin for pods can do: ADD makes a veth with one end in the pod's network
// namespace, DEL deletes it. What it costs to be called and to have the kernel do this, any plugin costs.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
)

// Attributes of a link (linux/if_link.h, linux/veth.h).
const (
	linkInfo, infoKind, infoData, netNSFD = 18, 1, 2, 28
	peer                                  = 1
)

func main() {
	name := "floor-" + os.Getenv("CNI_CONTAINERID")
	var err error
	switch verb := os.Getenv("CNI_COMMAND"); verb {
	case "ADD":
		if err = add(name); err == nil {
			fmt.Println(`{"cniVersion": "1.0.0"}`)
		}
	case "DEL":
		err = request(syscall.RTM_DELLINK, 0, attr(syscall.IFLA_IFNAME, []byte(name+"\x00")))
	case "": // only to be started
	default:
		err = fmt.Errorf("CNI_COMMAND is %q", verb)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func add(name string) error {
	ns, err := syscall.Open(os.Getenv("CNI_NETNS"), syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("CNI_NETNS: %w", err)
	}
	end := append(make([]byte, syscall.SizeofIfInfomsg), attr(syscall.IFLA_IFNAME, []byte(os.Getenv("CNI_IFNAME")+"\x00"))...)
	end = append(end, attr(netNSFD, binary.NativeEndian.AppendUint32(nil, uint32(ns)))...)
	veth := append(attr(infoKind, []byte("veth")), attr(infoData, attr(peer, end))...)
	return request(syscall.RTM_NEWLINK, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL,
		append(attr(syscall.IFLA_IFNAME, []byte(name+"\x00")), attr(linkInfo, veth)...))
}

func attr(kind uint16, value []byte) []byte {
	a := binary.NativeEndian.AppendUint16(nil, uint16(syscall.SizeofRtAttr+len(value)))
	a = append(binary.NativeEndian.AppendUint16(a, kind), value...)
	for len(a)%syscall.RTA_ALIGNTO != 0 {
		a = append(a, 0)
	}
	return a
}

// request sends one message about a link and waits for the kernel's answer.
func request(kind, flags uint16, attrs []byte) error {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	size := syscall.SizeofNlMsghdr + syscall.SizeofIfInfomsg + len(attrs)
	msg := binary.NativeEndian.AppendUint32(nil, uint32(size))
	msg = binary.NativeEndian.AppendUint16(msg, kind)
	msg = binary.NativeEndian.AppendUint16(msg, flags|syscall.NLM_F_REQUEST|syscall.NLM_F_ACK)
	msg = append(msg, make([]byte, 8+syscall.SizeofIfInfomsg)...) // the kernel finds out who asks
	if err := syscall.Sendto(fd, append(msg, attrs...), 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := syscall.Recvfrom(fd, answer, 0)
	if err != nil || n < syscall.SizeofNlMsghdr+4 {
		return fmt.Errorf("an answer of %d bytes: %w", n, err)
	}
	if errno := -int32(binary.NativeEndian.Uint32(answer[syscall.SizeofNlMsghdr:])); errno != 0 {
		return syscall.Errno(errno)
	}
	return nil
}

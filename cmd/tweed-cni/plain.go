package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/overlay/podnet"
)

// plainCall serves an ADD or a DEL that looks as runtimes make them. The skeleton knows better what can be wrong with a
// call and what to say of it, but to find that nothing is takes it as long as the kernel needs to make a veth. So it gets
// what looks otherwise, unread, and then served is false.
func plainCall(versions []string) (failure *types.Error, served bool) {
	args := &skel.CmdArgs{
		ContainerID: os.Getenv("CNI_CONTAINERID"), Netns: os.Getenv("CNI_NETNS"), IfName: os.Getenv("CNI_IFNAME"),
		Args: os.Getenv("CNI_ARGS"), Path: os.Getenv("CNI_PATH"),
	}
	call := add
	switch os.Getenv("CNI_COMMAND") {
	case "ADD":
		if args.Netns == "" {
			return nil, false
		}
	case "DEL":
		call = del
	default:
		return nil, false
	}
	if !plainName(args.ContainerID) || !plainName(args.IfName) || len(args.IfName) >= unix.IFNAMSIZ || args.Path == "" {
		return nil, false
	}
	var err error
	if args.StdinData, err = io.ReadAll(os.Stdin); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("error reading from stdin: %v", err), ""), true
	}
	conf, err := podnet.ParseConfig(args.StdinData)
	if err != nil || !plainName(conf.Name) || !slices.Contains(versions, conf.CNIVersion) {
		return putBack(args.StdinData)
	}
	if err := call(args); err != nil {
		if !errors.As(err, &failure) {
			failure = types.NewError(types.ErrInternal, err.Error(), "")
		}
	}
	return failure, true
}

// plainName reports whether the CNI spec allows a name for networks and containers, and Linux for an interface.
func plainName(name string) bool {
	for i, c := range []byte(name) {
		letter := '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || c != '-' && c != '_' && c != '.') {
			return false
		}
	}
	return name != ""
}

// putBack has stdin begin anew.
func putBack(text []byte) (*types.Error, bool) {
	fd, err := unix.MemfdCreate("stdin", unix.MFD_CLOEXEC)
	if err == nil {
		os.Stdin = os.NewFile(uintptr(fd), "stdin")
		_, err = os.Stdin.WriteAt(text, 0)
	}
	if err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("keeping stdin: %v", err), ""), true
	}
	return nil, false
}

// Command libcni calls plugins as a runtime does that is built with the libcni of this module, an older one.
//
//	libcni ADD|CHECK|DEL CONFLIST CONTAINER NETNS
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("usage: libcni ADD|CHECK|DEL CONFLIST CONTAINER NETNS")
	}
	list, err := libcni.ConfListFromFile(args[1])
	if err != nil {
		return err
	}
	rt := &libcni.RuntimeConf{ContainerID: args[2], NetNS: args[3], IfName: "eth0"}
	cni := libcni.NewCNIConfigWithCacheDir(filepath.SplitList(os.Getenv("CNI_PATH")), os.Getenv("CNI_CACHE"), nil)
	ctx := context.Background()
	switch args[0] {
	case "ADD":
		result, err := cni.AddNetworkList(ctx, list, rt)
		if err != nil {
			return err
		}
		return result.Print()
	case "CHECK":
		return cni.CheckNetworkList(ctx, list, rt)
	case "DEL":
		return cni.DelNetworkList(ctx, list, rt)
	}
	return fmt.Errorf("this libcni has no %s", args[0])
}

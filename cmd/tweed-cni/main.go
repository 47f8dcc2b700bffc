// Command tweed-cni is the CNI plugin that attaches pods to a node's tweed network.
//
// A container runtime calls it with its wishes in the environment and the network configuration on stdin (CNI spec,
// section 2).
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/skel"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"tweed.dev/tweed/overlay/podnet"
)

// version is stamped by the linker.
var version = "unreleased"

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	supported := []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	versions := cniversion.PluginSupports(supported...)
	about := "tweed-cni " + version + ": attaches pods to the node's tweed network"
	switch {
	case len(args) == 1 && args[0] == "--version":
		fmt.Printf("tweed-cni %s\nCNI %s\n", version, strings.Join(versions.SupportedVersions(), ", "))
		return 0
	case len(args) > 0:
		fmt.Fprintf(os.Stderr, "%s\nIts only argument is --version. Container runtimes call it, by the CNI spec.\n", about)
		return 2
	}
	err, served := plainCall(supported)
	if !served {
		funcs := skel.CNIFuncs{Add: add, Del: del, Check: check, Status: status, GC: gc}
		err = skel.PluginMainFuncsWithError(funcs, versions, about)
	}
	if err != nil {
		if err := err.Print(); err != nil {
			fmt.Fprintln(os.Stderr, "tweed-cni: printing the error:", err)
		}
		return 1
	}
	return 0
}

func add(args *skel.CmdArgs) error {
	conf, err := podnet.ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	// Signals stay caught to the end: a process that one kills after the work is done looks as if it had failed. They take
	// threads of their own, which cost as much as the rest; so what is done in a few milliseconds does not mind them.
	ctx := context.Background()
	if conf.Delegates() {
		ctx, _ = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	} else {
		signal.Ignore(os.Interrupt, syscall.SIGTERM)
	}
	result, err := podnet.Attach(ctx, conf, pod(args))
	if err != nil {
		return err
	}
	if err := podnet.PrintResult(result, conf.CNIVersion); err != nil {
		return errors.Join(fmt.Errorf("printing the result: %w", err), podnet.Detach(conf, pod(args)))
	}
	return nil
}

func del(args *skel.CmdArgs) error {
	conf, err := podnet.ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	return podnet.Detach(conf, pod(args))
}

func check(args *skel.CmdArgs) error {
	conf, err := podnet.ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	return podnet.Check(conf, pod(args))
}

func status(args *skel.CmdArgs) error {
	conf, err := podnet.ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	return podnet.Status(conf)
}

func gc(args *skel.CmdArgs) error {
	conf, err := podnet.ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	return podnet.Collect(conf, args.Path)
}

func pod(args *skel.CmdArgs) podnet.Pod {
	return podnet.Pod{Container: args.ContainerID, NetNS: args.Netns, Interface: args.IfName, Path: args.Path,
		Args: args.Args, Namespace: podnet.NamespaceOf(args.Args)}
}

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

	"tweed.dev/tweed/overlay/podnet"
)

// version is stamped by the linker.
var version = "unreleased"

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	about := "tweed-cni " + version + ": attaches pods to the node's tweed network"
	switch {
	case len(args) == 1 && args[0] == "--version":
		fmt.Printf("tweed-cni %s\nCNI %s\n", version, strings.Join(versions(), ", "))
		return 0
	case len(args) > 0:
		fmt.Fprintf(os.Stderr, "%s\nIts only argument is --version. Container runtimes call it, by the CNI spec.\n", about)
		return 2
	case os.Getenv("CNI_COMMAND") == "":
		fmt.Fprintf(os.Stderr, "%s\nCNI protocol versions supported: %s\n", about, strings.Join(versions(), ", "))
		return 0
	}
	if err := serve(); err != nil {
		if err := err.Print(); err != nil {
			fmt.Fprintln(os.Stderr, "tweed-cni: printing the error:", err)
		}
		return 1
	}
	return 0
}

func add(conf podnet.Config, pod podnet.Pod) error {
	// Signals stay caught to the end: a process that one kills after the work is done looks as if it had failed. They take
	// threads of their own, which cost as much as the rest; so what is done in a few milliseconds does not mind them.
	ctx := context.Background()
	if conf.Delegates() {
		ctx, _ = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	} else {
		signal.Ignore(os.Interrupt, syscall.SIGTERM)
	}
	result, err := podnet.Attach(ctx, conf, pod)
	if err != nil {
		return err
	}
	if err := podnet.PrintResult(result, conf.CNIVersion); err != nil {
		return errors.Join(fmt.Errorf("printing the result: %w", err), podnet.Detach(conf, pod))
	}
	return nil
}

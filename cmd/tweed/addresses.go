package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"
	"sigs.k8s.io/yaml"

	"tweed.dev/tweed/overlay/podnet"
)

func addressesCommand() *cobra.Command {
	var runDir, output string
	cmd := &cobra.Command{
		Use:   "addresses",
		Short: "Show which pod of this node has which address",
		Long: `Show each address that is taken on this node: by which container and interface, the interface's
end on the host, and for how long; and how many more there are. Containers are called by the first
13 letters of their names, as crictl does; -o wide, json and yaml have the whole.

Exit status: 0 all is well, 2 something is wrong, 1 error.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"", "wide", "json", "yaml"}, output) {
				return fmt.Errorf("--output %q: it is wide, json or yaml, or not given for a table", output)
			}
			a, err := newAddresses(runDir)
			if err != nil {
				return err
			}
			if err := a.print(cmd.OutOrStdout(), output, time.Now()); err != nil {
				return err
			}
			if len(a.Problems) > 0 {
				return exitStatus(2)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", podnet.DefaultRunDir, "where daemon and plugin meet; emptied by a reboot")
	cmd.Flags().StringVarP(&output, "output", "o", "", "wide, json or yaml (default: a table)")
	return cmd
}

// addresses are what `subnet addresses` shows, and the struct that -o json prints.
type addresses struct {
	Addresses []podnet.Holding `json:"addresses"`
	// Subnets are this node's, with how many of their addresses pods have; absent where its daemon has not run.
	Subnets  []addressUsage `json:"subnets,omitempty"`
	Problems []string       `json:"problems"`
}

type addressUsage struct {
	Subnet netip.Prefix `json:"subnet"`
	Used   int          `json:"used"`
	Free   int          `json:"free"`
}

func newAddresses(runDir string) (addresses, error) {
	a := addresses{Problems: []string{}}
	var err error
	if a.Addresses, err = podnet.Holdings(runDir); err != nil {
		return a, fmt.Errorf("reading the pod addresses in %s: %w", runDir, err)
	}
	for _, h := range a.Addresses {
		if h.Problem != "" {
			a.Problems = append(a.Problems, fmt.Sprintf("%s: %s", h.Address, h.Problem))
		}
	}
	info, err := podnet.ReadNodeInfo(runDir)
	if err != nil {
		a.Problems = append(a.Problems, err.Error())
		return a, nil
	}
	usage, err := podnet.UsageOf(runDir, info.Subnets)
	if err != nil {
		return a, fmt.Errorf("counting the pod addresses in %s: %w", runDir, err)
	}
	for _, u := range usage {
		a.Subnets = append(a.Subnets, addressUsage(u))
	}
	return a, nil
}

func (a addresses) print(w io.Writer, output string, now time.Time) error {
	switch output {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(a)
	case "yaml":
		text, err := yaml.Marshal(a)
		if err != nil {
			return err
		}
		_, err = w.Write(text)
		return err
	}
	return a.table(w, output == "wide", now)
}

// shortName is how many letters of a container's name the table shows.
const shortName = 13

func (a addresses) table(w io.Writer, wide bool, now time.Time) error {
	if len(a.Addresses) == 0 {
		fmt.Fprintln(w, "No pod on this node has an address.")
	} else {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(t, "ADDRESS\tCONTAINER\tINTERFACE\tVETH\tAGE")
		for _, h := range a.Addresses {
			container := h.Container
			if !wide && len(container) > shortName {
				container = container[:shortName]
			}
			fmt.Fprintln(t, strings.Join([]string{h.Address.String(), cmp.Or(container, "-"), cmp.Or(h.Interface, "-"),
				cmp.Or(h.Veth, "-"), duration.HumanDuration(now.Sub(h.Since))}, "\t"))
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	for _, u := range a.Subnets {
		fmt.Fprintf(w, "Subnet %s: %d of %d addresses taken, %d free.\n", u.Subnet, u.Used, u.Used+u.Free, u.Free)
	}
	if len(a.Problems) > 0 {
		fmt.Fprintln(w, "\nProblems:")
		for _, p := range a.Problems {
			fmt.Fprintln(w, " ", p)
		}
	}
	return nil
}

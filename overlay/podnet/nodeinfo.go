// Package podnet wires one pod to the node's bridge and back out.
//
// The daemon and the plugin meet in a directory, by default DefaultRunDir: the daemon writes what the node's pod
// network looks like (NodeInfo), the plugin what it handed out (Store). Neither needs the other to be running.
package podnet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// DefaultRunDir is where daemon and plugin keep what must not outlive a boot.
const DefaultRunDir = "/run/tweed"

// LockName is the file in the run directory that a daemon holds the lock of.
const LockName = "daemon.lock"

// nodeInfoVersion is the form of node.json that this package writes, and the only one that it reads.
const nodeInfoVersion = 1

// ErrAbsent says that there is no NodeInfo of this boot.
var ErrAbsent = errors.New("the tweed daemon has not run on this node since boot")

// NodeInfo is what the daemon tells the plugin about the node's pod network. It is written once links, addresses and
// filter are right.
type NodeInfo struct {
	// Version is the form of the file. Write sets it.
	Version int `json:"version"`
	// BootID is the boot that the rest is about; see BootID. Write sets it where it is empty.
	BootID string `json:"bootID"`
	// Converged is set from the first pass on in which everything local was done and each peer was tried.
	Converged bool   `json:"converged"`
	Node      string `json:"node"`
	// Networks hold all pods of the cluster, Subnets those of this node, at most one a family.
	Networks []netip.Prefix `json:"networks"`
	Subnets  []netip.Prefix `json:"subnets"`
	// Gateways are the bridge's addresses, one for each of Subnets.
	Gateways []netip.Addr `json:"gateways"`
	// Bridge is the link that pods are ports of, Device the one of ours that reaches other nodes; "" where none is needed.
	Bridge string `json:"bridge"`
	Device string `json:"device"`
	// PacketFilter is what the node's packet filter is written in, iptables or nftables; "" stands for iptables.
	PacketFilter string `json:"packetFilter,omitempty"`
	// MTU is that of the pods' interfaces, in bytes.
	MTU int `json:"mtu"`
	// Spoofing says which pods may send as others than themselves.
	Spoofing Spoofing `json:"spoofing"`
}

// Write makes n the node.json of runDir, at once for every reader. A file that says the same already is left alone.
// Where there is one of another boot, runDir has outlived it (it is not in memory) and holds addresses of pods that are
// gone, some perhaps in files that the end of that boot has spoilt. All are freed: until there is a node.json of this
// boot, no pod of this boot has an address.
func (n NodeInfo) Write(runDir string) error {
	n.Version = nodeInfoVersion
	if n.BootID == "" {
		id, err := BootID()
		if err != nil {
			return err
		}
		n.BootID = id
	}
	text, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return fmt.Errorf("writing node.json: %w", err)
	}
	text = append(text, '\n')
	path := nodeInfoPath(runDir)
	have, err := os.ReadFile(path)
	if err == nil && bytes.Equal(have, text) {
		return nil
	}
	var before NodeInfo
	if json.Unmarshal(have, &before) == nil && before.BootID != "" && before.BootID != n.BootID {
		if err := forget(runDir); err != nil {
			return fmt.Errorf("freeing the pod addresses of an earlier boot: %w", err)
		}
	}
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return fmt.Errorf("making the run directory: %w", err)
	}
	return writeByRename(path, text)
}

// ReadNodeInfo reads the node.json of runDir. The error is ErrAbsent where there is none, or one of another boot.
func ReadNodeInfo(runDir string) (NodeInfo, error) {
	path := nodeInfoPath(runDir)
	text, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return NodeInfo{}, fmt.Errorf("%w (no %s); see that its pod runs, and what it logs", ErrAbsent, path)
	}
	if err != nil {
		return NodeInfo{}, err
	}
	var n NodeInfo
	if !n.plain(text) {
		n = NodeInfo{}
		if err := json.Unmarshal(text, &n); err != nil {
			return NodeInfo{}, fmt.Errorf("%s cannot be read: %w; restart the tweed daemon to have it written anew", path, err)
		}
	}
	if n.Version != nodeInfoVersion {
		return NodeInfo{}, fmt.Errorf("%s has version %d, this tweed-cni reads version %d: daemon and plugin are of "+
			"different releases; install both from one", path, n.Version, nodeInfoVersion)
	}
	boot, err := BootID()
	if err != nil {
		return NodeInfo{}, err
	}
	if n.BootID != boot {
		return NodeInfo{}, fmt.Errorf("%w (%s is of an earlier boot); see that its pod runs, and what it logs",
			ErrAbsent, path)
	}
	return n, nil
}

// BootID names this boot of the kernel (/proc/sys/kernel/random/boot_id, random(4)).
func BootID() (string, error) {
	id, err := readFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("reading which boot this is: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

func nodeInfoPath(runDir string) string { return filepath.Join(runDir, "node.json") }

// writeByRename replaces a file so that a reader sees either the old text or the new. It is for files with one writer.
func writeByRename(path string, text []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, text, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

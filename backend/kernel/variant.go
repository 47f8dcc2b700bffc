package kernel

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"tweed.dev/tweed/backend/masq"
)

// hint is a chain in mangle that each kubelet makes for others to see which iptables it uses (Kubernetes' KEP 3178).
const hint, hintTable = "KUBE-IPTABLES-HINT", "mangle"

// variants are the two programs that are called iptables. Neither lists the other's rules (xtables-nft(8),
// xtables-legacy(8)).
func variants() []masq.Variant { return []masq.Variant{masq.NFT, masq.Legacy} }

// chooseVariant finds out which iptables is in use, and has all that is written use it: the one in which the kubelet made
// its hint; without a hint, the one that the host or the image calls iptables. It starts no process, and can change while
// this one runs.
func (k *Kernel) chooseVariant(family masq.Family) (masq.Variant, error) {
	v, err := k.hintedVariant(family)
	if err != nil {
		return "", fmt.Errorf("finding out which iptables is in use: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if v == "" {
		v = k.namedVariant(family)
	}
	k.inUse[family] = v
	return v, nil
}

// variantOf returns which iptables holds a chain.
func (k *Kernel) variantOf(c masq.Chain) masq.Variant {
	if c.Variant != "" {
		return c.Variant
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if v := k.inUse[c.Family]; v != "" {
		return v
	}
	return k.namedVariant(c.Family) // nobody has looked yet
}

func (k *Kernel) hintedVariant(family masq.Family) (masq.Variant, error) {
	there, err := k.nft.holds(masq.Chain{Family: family, Table: hintTable, Name: hint})
	if there || err != nil {
		return masq.NFT, err
	}
	mangle, err := readLegacy(family, hintTable)
	if _, there := mangle.chains[hint]; there {
		return masq.Legacy, err
	}
	return "", err
}

// namedVariant tells which one iptables is, by the name of the program that it leads to, or else by its own word. A host
// without any counts as one of the newer, which every distribution has by now.
func (k *Kernel) namedVariant(family masq.Family) masq.Variant {
	path, err := exec.LookPath(family.Command())
	if err != nil {
		if _, err := exec.LookPath(masq.Legacy.Command(family)); err == nil && !installed(masq.NFT, family) {
			return masq.Legacy
		}
		return masq.NFT
	}
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path = to
	}
	if v, known := k.named[path]; known {
		return v
	}
	v := masq.Legacy
	switch base := filepath.Base(path); {
	case strings.Contains(base, string(masq.Legacy)):
	case strings.Contains(base, string(masq.NFT)):
		v = masq.NFT
	default: // a program of somebody's own making, or one from before there were two
		if said, err := exec.Command(path, "--version").Output(); err != nil || strings.Contains(string(said), "nf_tables") {
			v = masq.NFT
		}
	}
	k.named[path] = v
	return v
}

// installed reports whether a variant's program is here by its own name.
func installed(v masq.Variant, family masq.Family) bool {
	_, err := exec.LookPath(v.Command(family))
	return err == nil
}

// command returns the program of one variant. Older distributions have one variant alone, without a name of its own.
func (k *Kernel) command(v masq.Variant, family masq.Family) (string, error) {
	if installed(v, family) {
		return v.Command(family), nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, err := exec.LookPath(family.Command()); err == nil && k.namedVariant(family) == v {
		return family.Command(), nil
	}
	return "", fmt.Errorf("the program %s is not here; install Debian's package iptables, or what holds it: %w",
		v.Command(family), exec.ErrNotFound)
}

// hasLegacy reports whether this network namespace has a table of the older form of iptables.
func hasLegacy(family masq.Family, table string) bool {
	name := "/proc/thread-self/net/ip_tables_names"
	if family == masq.IPv6 {
		name = "/proc/thread-self/net/ip6_tables_names"
	}
	tables, err := os.ReadFile(name)
	return err == nil && slices.Contains(strings.Fields(string(tables)), table)
}

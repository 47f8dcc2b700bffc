package podnet

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// A caller calls a delegate for a pod and returns what it printed. If it has to be given up, the lock stays held until
// the delegate and what it has started have ended.
type caller func(verb string, d delegation, p Pod, lock *os.File) ([]byte, error)

// callIn finds delegates in the directories of a path in the form of CNI_PATH.
func callIn(ctx context.Context, runDir, path string) caller {
	return func(verb string, d delegation, p Pod, lock *os.File) ([]byte, error) {
		file, err := findPlugin(d.Type, path)
		if err != nil {
			return nil, err
		}
		if d.Backend == nftables && !onPath("nft") { // portmap's DEL would do nothing, and be content
			return nil, fmt.Errorf("%s: its rules are nft's, and the program nft is not in %s: install Debian's package "+
				"nftables, or what holds it", file, os.Getenv("PATH"))
		}
		conf, err := json.Marshal(d)
		if err != nil {
			return nil, err
		}
		cmd := exec.CommandContext(ctx, file)
		cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+cmp.Or(d.Container, p.Container),
			"CNI_NETNS="+p.NetNS, "CNI_IFNAME="+p.Interface, "CNI_PATH="+path)
		if d.Legacy && !legacyIptables() {
			dir, err := preferLegacy(runDir)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			defer os.RemoveAll(dir)
			cmd.Env = append(cmd.Env, "PATH="+dir+":"+os.Getenv("PATH"))
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(conf), &stdout, &stderr
		cmd.WaitDelay = time.Second
		if lock != nil {
			cmd.ExtraFiles = []*os.File{lock}
		}
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("%s: %s%s", file, said(err, stdout.Bytes(), stderr.String()), d.hint())
		}
		_, _ = io.Copy(os.Stderr, &stderr) // warnings, for whoever reads ours
		return stdout.Bytes(), nil
	}
}

// findPlugin finds the file of a delegate.
func findPlugin(name, path string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	for _, d := range delegates() {
		if d.Plugin == name {
			name = fmt.Sprintf("%s, which a %s needs", name, d.Wish)
		}
	}
	return "", fail(types.ErrInvalidEnvironmentVariables, "CNI_PATH: none of its directories (%s) has the plugin %s; "+
		"tweed's pod puts it into /opt/cni/bin when it starts (tweed install --to names another directory)", path, name)
}

// said is what a plugin that failed had to say (CNI spec, section 5, "Error").
func said(err error, stdout []byte, stderr string) string {
	var e types.Error
	if json.Unmarshal(stdout, &e) != nil || e.Msg == "" {
		return strings.TrimSpace(fmt.Sprintf("%v %s%s", err, stdout, stderr))
	}
	text := strings.Join(strings.Fields(e.Error()), " ")
	if e.Code == types.ErrIncompatibleCNIVersion {
		text += "; put a newer one there"
	}
	return text
}

// hint is what is known of why a delegate may have failed.
func (d delegation) hint() string {
	if d.Type == "portmap" && d.Backend != nftables && !onPath("iptables") {
		return fmt.Sprintf("; the program iptables is not in %s: install Debian's package iptables, or what holds it",
			os.Getenv("PATH"))
	}
	return ""
}

// These are portmap's words for what its rules are written in, and the daemon's for its own.
const (
	iptables = "iptables"
	nftables = "nftables"
)

// portmapBackend is what the rules of this portmap shall be written in: what the node's packet filter is, or the other
// where that cannot be. It is written down, so the rules are taken from there also by a caller that has both.
func portmapBackend(form, file string) (string, error) {
	forms := []string{iptables, nftables}
	if form == nftables {
		slices.Reverse(forms)
	}
	for _, f := range forms {
		if f == iptables && onPath("iptables") || f == nftables && onPath("nft") && knowsBackends(file) {
			return f, nil
		}
	}
	if onPath("nft") {
		return "", fail(types.ErrInvalidEnvironmentVariables, "a hostPort needs the program iptables or a newer portmap: %s "+
			"cannot use nft, which is the only one of the two in %s; put portmap 1.6 there, or install Debian's package "+
			"iptables, or what holds it", file, os.Getenv("PATH"))
	}
	return "", fail(types.ErrInvalidEnvironmentVariables, "a hostPort needs the program iptables or nft on the host, and "+
		"neither is in %s; install Debian's package iptables or nftables, or what holds it", os.Getenv("PATH"))
}

// knowsBackends reports whether this portmap can use nft. Older ones know no key backend, and so do not mind what it
// says. Without ports there is nothing that they could do.
func knowsBackends(file string) bool {
	cmd := exec.Command(file)
	cmd.Env = append(os.Environ(), "CNI_COMMAND=DEL", "CNI_CONTAINERID=tweed", "CNI_IFNAME="+firstInterface, "CNI_NETNS=",
		"CNI_PATH="+filepath.Dir(file), "CNI_ARGS=")
	cmd.Stdin = strings.NewReader(`{"cniVersion":"` + delegateVersion + `","name":"tweed","type":"portmap","backend":"?"}`)
	out, err := cmd.Output()
	return err != nil && bytes.Contains(out, []byte("backend"))
}

// legacyIptables reports whether iptables is here, and is the one that keeps its rules apart from nft's. It is asked:
// it may be a script that chooses.
func legacyIptables() bool {
	version, err := exec.Command("iptables", "--version").Output()
	return err == nil && !bytes.Contains(version, []byte("nf_tables"))
}

// shadow begins the names of directories that are made by preferLegacy.
const shadow = ".iptables-"

// preferLegacy makes a directory where iptables is the older one. The daemon's image has both, whatever the host has.
func preferLegacy(runDir string) (dir string, err error) {
	if dir, err = os.MkdirTemp(runDir, shadow); err != nil {
		return "", err
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		file, err := exec.LookPath(name + "-legacy")
		if err == nil {
			err = os.Symlink(file, filepath.Join(dir, name))
		}
		if err != nil {
			os.RemoveAll(dir)
			return "", fmt.Errorf("the rules are in the older iptables (legacy): %w", err)
		}
	}
	return dir, nil
}

func onPath(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

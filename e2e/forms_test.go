package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tweed.dev/tweed/e2e/cluster"
)

// The packet filter in each form meets kube-proxy in each mode: iptables with iptables is TestApply, iptables with
// nftables is TestApplyDualStack, and the other two are here.

// TestApplyNFTables is a cluster in which nothing that is ours goes through iptables, until somebody changes that.
func TestApplyNFTables(t *testing.T) {
	k := startKube(t, 3, cluster.HostOptions{ProxyMode: "nftables", PodCIDRs: []string{"10.244.0.0/16"}})
	k.install(t, "-f", manifestWith(t, `"PacketFilter": "nftables"`))
	k.step(t, "PodsRunOnOneNodeAndOnTwo", k.kubectlRun)
	k.step(t, "ServiceIsReachedFromEverywhere", k.clusterIP)
	k.step(t, "NodePortKeepsOrHidesTheCaller", k.nodePort)
	k.step(t, "HostPortIsReachedFromEverywhere", k.hostPort)
	k.step(t, "FilterChangesFormUnderTraffic", k.filterChangesForm)
	k.step(t, "UninstallLeavesNothing", k.uninstalled)
}

// TestApplyHostGateway is one without a tunnel.
func TestApplyHostGateway(t *testing.T) {
	k := startKube(t, 3, cluster.HostOptions{ProxyMode: "iptables", PodCIDRs: []string{"10.244.0.0/16"}})
	k.install(t, "-f", manifestWith(t, `"PacketFilter": "nftables", "Backend": {"Type": "host-gw"}`))
	for _, h := range k.Hosts {
		if out := h.NetNS.Run(t, "ip -o link show type vxlan"); out != "" {
			t.Errorf("%s has a tunnel: %s", h.Name, out)
		}
	}
	k.step(t, "PodsRunOnOneNodeAndOnTwo", k.kubectlRun)
	k.step(t, "ServiceIsReachedFromEverywhere", k.clusterIP)
	k.step(t, "NodePortKeepsOrHidesTheCaller", k.nodePort)
	k.step(t, "HostPortIsReachedFromEverywhere", k.hostPort)
	k.step(t, "DaemonSetIsRolledUnderTraffic", k.daemonRolled)
	k.step(t, "UninstallLeavesNothing", k.uninstalled)
}

// manifestWith returns a manifest with further keys in net-conf.json.
func manifestWith(t *testing.T, keys string) (file string) {
	t.Helper()
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	const network = `"Network": "10.244.0.0/16"`
	changed := strings.Replace(string(text), network, network+", "+keys, 1)
	if changed == string(text) {
		t.Fatalf("the manifest has no %s", network)
	}
	file = filepath.Join(t.TempDir(), "tweed.yaml")
	if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// filterChangesForm goes from nftables to iptables and back, with pods that talk all the while.
func (k *kube) filterChangesForm(t *testing.T) {
	s := k.story(t)
	s.streams(func() {
		for _, form := range []string{"iptables", "nftables"} {
			k.Kubectl(t, "apply", "-f", manifestWith(t, `"PacketFilter": "`+form+`"`))
			k.Kubectl(t, "--namespace=tweed", "rollout", "restart", "daemonset/tweed")
			k.Kubectl(t, "--namespace=tweed", "rollout", "status", "daemonset/tweed", "--timeout=2m")
			for _, h := range k.Hosts {
				cluster.Await(t, h.Name+" to have its filter in "+form+" alone", func() error { return formIs(t, h, form) })
			}
		}
	})
	k.answers(t, "n1", "n2")
}

// formIs says in what a host's packet filter is ours and not in that form, or is not ours in that one.
func formIs(t *testing.T, h *cluster.Host, form string) error {
	t.Helper()
	is := map[string]bool{
		"nftables": strings.Contains(h.NetNS.Run(t, "nft list tables"), "table ip tweed\n"),
		"iptables": strings.Contains(h.NetNS.Run(t, "iptables-nft-save"), "TWEED-"),
	}
	if !is[form] || is["nftables"] == is["iptables"] {
		return fmt.Errorf("what is there: %v", is)
	}
	return nil
}

// ours are the lines that have our name, of what commands print about a host's packet filter.
func ours(t *testing.T, h *cluster.Host, commands ...string) (lines string) {
	t.Helper()
	for _, command := range commands {
		for line := range strings.Lines(h.NetNS.Run(t, command)) {
			if strings.Contains(strings.ToLower(line), "tweed") {
				lines += line
			}
		}
	}
	return lines
}

package main

import (
	"os"
	"path/filepath"
	"testing"
)

// A flag of the command line must not meet one in the file that contradicts it.
func TestFlagMeetsAnotherOfItsKindInTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "flags")
	text := "# of this node\niface = eth7\npublic-ip = 198.51.100.7\nleases = /srv/leases\nnode-name = n7\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
		want map[string]string
	}{
		{"none is given", nil,
			map[string]string{"iface": "eth7", "iface-regex": "", "public-ip": "198.51.100.7", "leases": "/srv/leases"}},
		{"the same", []string{"--iface", "eth0"},
			map[string]string{"iface": "eth0", "public-ip": "198.51.100.7", "leases": "/srv/leases", "node-name": "n7"}},
		{"another choice of the uplink", []string{"--iface-regex", "^eth"},
			map[string]string{"iface": "", "iface-regex": "^eth", "public-ip": "198.51.100.7", "leases": "/srv/leases"}},
		{"another source of leases", []string{"--kubeconfig", "k"},
			map[string]string{"iface": "eth7", "kubeconfig": "k", "leases": "", "node-name": "n7"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := runCommand()
			if err := cmd.ParseFlags(c.args); err != nil {
				t.Fatal(err)
			}
			if err := flagDefaults(cmd, file); err != nil {
				t.Fatal(err)
			}
			for name, want := range c.want {
				if got := cmd.Flags().Lookup(name).Value.String(); got != want {
					t.Errorf("--%s is %q, want %q", name, got, want)
				}
			}
		})
	}
}

package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"tweed.dev/tweed/overlay/podnet"
)

// TestRuntimeReadsSomethingElse reads the configuration as container runtimes do, also those that read one version.
func TestRuntimeReadsSomethingElse(t *testing.T) {
	for _, runDir := range []string{podnet.DefaultRunDir, "/run/other"} {
		text := CNIConf{Dir: t.TempDir(), RunDir: runDir}.Text()
		list, err := libcni.NetworkConfFromBytes(text)
		if err != nil {
			t.Fatal(err)
		}
		if list.Name != "tweed" || list.CNIVersion != "1.1.0" || len(list.Plugins) != 1 {
			t.Errorf("list: %+v", list)
		}
		plugin := list.Plugins[0]
		// A runtime hands on what a pod asks for only where it is declared.
		if got := fmt.Sprint(plugin.Network.Capabilities); plugin.Network.Type != "tweed-cni" ||
			got != "map[bandwidth:true ips:true mac:true portMappings:true]" {
			t.Errorf("plugin %s declares %s", plugin.Network.Type, got)
		}
		conf, err := podnet.ParseConfig(plugin.Bytes)
		if err != nil || conf.RunDir != runDir {
			t.Errorf("the plugin reads %+v, %v", conf, err)
		}
		if again := (CNIConf{RunDir: runDir}).Text(); !slices.Equal(again, text) {
			t.Errorf("not the same twice:\n%s\n%s", text, again)
		}
	}
}

// TestConfigurationOfAnEarlierReleaseStays would leave runtimes silent on what pods ask for.
func TestConfigurationOfAnEarlierReleaseStays(t *testing.T) {
	c := CNIConf{Dir: t.TempDir(), RunDir: podnet.DefaultRunDir}
	path := filepath.Join(c.Dir, ConflistName)
	earlier := `{"cniVersion": "1.0.0", "name": "tweed", "plugins": [{"type": "tweed-cni", "capabilities": {}}]}`
	if err := os.WriteFile(path, []byte(earlier), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.Write(); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || !slices.Equal(text, c.Text()) {
		t.Errorf("the file: %s, %v", text, err)
	}
}

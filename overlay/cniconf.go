package overlay

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"tweed.dev/tweed/overlay/podnet"
)

// ConflistName is the file that container runtimes find. The number sorts it before others: a runtime takes the first.
const ConflistName = "10-tweed.conflist"

// CNIConf is the network configuration that container runtimes read.
type CNIConf struct {
	Dir    string // of CNI configuration, /etc/cni/net.d on most nodes
	RunDir string // where daemon and plugin meet
}

// Text is the configuration. Runtimes older than CNI 1.1 read only cniVersion, newer ones choose from cniVersions.
func (c CNIConf) Text() []byte {
	plugin := map[string]any{"type": "tweed-cni", "capabilities": podnet.Capabilities()}
	if c.RunDir != podnet.DefaultRunDir {
		plugin["runDir"] = c.RunDir
	}
	text, err := json.MarshalIndent(struct {
		CNIVersion  string   `json:"cniVersion"`
		CNIVersions []string `json:"cniVersions"`
		Name        string   `json:"name"`
		Plugins     []any    `json:"plugins"`
	}{"1.0.0", []string{"1.0.0", "1.1.0"}, "tweed", []any{plugin}}, "", "  ")
	if err != nil {
		panic(err) // strings do marshal
	}
	return append(text, '\n')
}

// Write puts the configuration in place, at once for every reader. One that is right already is left alone.
func (c CNIConf) Write() error {
	path := filepath.Join(c.Dir, ConflistName)
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, c.Text()) {
		return nil
	}
	err := os.MkdirAll(c.Dir, 0o755)
	if err == nil {
		// Runtimes read no file with another ending.
		err = os.WriteFile(path+".tmp", c.Text(), 0o644)
	}
	if err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err != nil {
		return fmt.Errorf("writing the CNI configuration %s: %w; the node stays not ready until it can be written "+
			"(--cni-conf-dir names the directory)", path, err)
	}
	return nil
}

// Remove takes the configuration away.
func (c CNIConf) Remove() error {
	err := os.Remove(filepath.Join(c.Dir, ConflistName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the CNI configuration of an earlier boot: %w", err)
	}
	return nil
}

package podnet

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Config is the plugin's network configuration (CNI spec, section 1, "Plugin configuration objects").
type Config struct {
	// CNIVersion is the version of the protocol in use.
	CNIVersion string
	// Name is the network's.
	Name string
	// RunDir is where daemon and plugin meet; DefaultRunDir unless set.
	RunDir string
	// SysctlRoot is where the kernel's settings are found; /proc/sys unless set.
	SysctlRoot string
	// DNS is handed on to the runtime.
	DNS types.DNS
	// PrevResult is the result of the ADD, for CHECK.
	PrevResult json.RawMessage
	// Args is what the runtime adds for those that understand it.
	Args json.RawMessage
	// RuntimeConfig is what the pod asks for, by the capabilities that the configuration declares.
	RuntimeConfig map[string]json.RawMessage
	// Valid are the attachments that GC is to leave alone; nil where the runtime does not say.
	Valid []types.GCAttachment

	// unfit is what is wrong with keys that only Attach and Check mind: a DEL must not fail over them.
	unfit error
}

// ParseConfig reads a network configuration. The error has the CNI code for it.
func ParseConfig(text []byte) (Config, error) {
	c := Config{RunDir: DefaultRunDir, SysctlRoot: "/proc/sys"}
	var keys map[string]json.RawMessage
	if err := unmarshal(text, &keys); err != nil {
		return c, fail(types.ErrDecodingFailure, "the network configuration is not a JSON object: %v", err)
	}
	for _, f := range []struct {
		key, want string
		to        any
	}{
		{"cniVersion", `a version such as "1.0.0"`, &c.CNIVersion},
		{"name", "the network's name", &c.Name},
		{"runDir", `a directory such as "/run/tweed"`, &c.RunDir},
		{"sysctlRoot", `a directory such as "/proc/sys"`, &c.SysctlRoot},
		{"dns", "an object with nameservers, domain, search, options", &c.DNS},
		{"prevResult", "an object", &c.PrevResult},
		{"args", "an object", &c.Args},
		{"runtimeConfig", "an object", &c.RuntimeConfig},
		{validKey, "a list of objects with containerID and ifname", &c.Valid},
	} {
		if v, ok := keys[f.key]; ok && unmarshal(v, f.to) != nil {
			return c, fail(types.ErrInvalidNetworkConfig, "network configuration: %s is %s; it must be %s", f.key, v, f.want)
		}
	}
	for _, f := range []struct{ key, dir string }{{"runDir", c.RunDir}, {"sysctlRoot", c.SysctlRoot}} {
		if !filepath.IsAbs(f.dir) {
			return c, fail(types.ErrInvalidNetworkConfig,
				"network configuration: %s is %q; it must be an absolute path", f.key, f.dir)
		}
	}
	if _, ok := keys[validKey]; ok && c.Valid == nil { // null: a list without anything in it
		c.Valid = []types.GCAttachment{}
	}
	c.unfit = unfitKeys(keys)
	return c, nil
}

// validKey is where the runtime puts what GC is to leave alone (CNI spec, section 2, "GC").
const validKey = "cni.dev/valid-attachments"

// unfitKeys names the first key that the plugin does not know or cannot follow.
func unfitKeys(keys map[string]json.RawMessage) error {
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		v := string(keys[key])
		switch key {
		case "cniVersion", "cniVersions", "name", "type", "runDir", "sysctlRoot", "dns", "prevResult", "args",
			"capabilities", "runtimeConfig", "disableCheck", "disableGC", "loadOnlyInlinedPlugins":
		case "ipam":
			var ipam types.IPAM
			if json.Unmarshal(keys[key], &ipam) != nil || !ipam.IsEmpty() {
				return fail(types.ErrUnsupportedField,
					"network configuration: ipam is %s, but tweed hands out the addresses itself; remove it", v)
			}
		case "ipMasq":
			if v != "true" {
				return fail(types.ErrUnsupportedField, "network configuration: ipMasq is %s, but the tweed daemon "+
					"masquerades what leaves the pod network; remove it", v)
			}
		default:
			if !strings.HasPrefix(key, "cni.dev/") { // the runtime's own (CNI spec, section 1)
				return fail(types.ErrInvalidNetworkConfig,
					"network configuration: %s is %s, but there is no such key; those of tweed-cni are runDir and sysctlRoot",
					key, v)
			}
		}
	}
	return nil
}

// fail makes an error with a code of the CNI spec (section 5, "Error").
func fail(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

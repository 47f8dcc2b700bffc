package overlay

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

func TestConfigThatCannotBeUsed(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		// No JSON, or not of the right form.
		{"", `the file is empty; at its smallest it is {"Network": "10.244.0.0/16"}`},
		{" \n", `the file is empty; at its smallest it is {"Network": "10.244.0.0/16"}`},
		{"{\n\"Network\": \"10.244.0.", "line 2: the text ends in the middle; was it cut off?"},
		{`{"Network": "10.244.0.0/16"`, "line 1: the text ends in the middle; was it cut off?"},
		{"{\n\"Network\": \"10.244.0.0/16\",\n}",
			"line 3 is not JSON: invalid character '}' looking for beginning of object key string"},
		{`{"Network": "10.244.0.0/16"} {}`, "line 1 is not JSON: invalid character '{' after top-level value"},
		{`["10.244.0.0/16"]`, `["10.244.0.0/16"]: want an object, { ... }`},
		{`null`, `null: want an object, { ... }`},
		{`{"Network": "10.244.0.0/16", "Backend": "vxlan"}`, `Backend "vxlan": want an object, { ... }`},
		{`{"Network": "10.244.0.0/16", "Backend": null}`, `Backend null: want an object, { ... }`},

		// Keys.
		{`{"network": "10.244.0.0/16"}`, "network: unknown key; did you mean Network? Upper and lower case matter"},
		{`{"Network": "10.244.0.0/16", "SubnetLenn": 24}`, "SubnetLenn: unknown key; did you mean SubnetLen?"},
		{`{"Network": "10.244.0.0/16", "Colour": "blue"}`, "Colour: unknown key; known are Backend, EnableIPv4, EnableIPv6, " +
			"IPv6Network, IPv6SubnetLen, IPv6SubnetMax, IPv6SubnetMin, Network, NonMasqueradeCIDRs, PacketFilter, " +
			"PodSpoofing, Reserved, SubnetLen, SubnetMax, SubnetMin, SubnetSource, Underlay"},
		{`{"Network": "10.244.0.0/16", "Backend": {"Vni": 1}}`,
			"Backend.Vni: unknown key; did you mean VNI? Upper and lower case matter"},
		{`{"Network": "10.244.0.0/16", "Network": "10.244.0.0/16"}`,
			`Network "10.244.0.0/16": the key is there twice; remove one`},
		{`{"Network": "10.244.0.0/16", "\u004eetwork": "10.244.0.0/16"}`,
			`Network "10.244.0.0/16": the key is there twice; remove one`},
		{`{"Network": "10.244.0.0/16", "Backend": {"VNI": 1, "VNI": 2}}`, "Backend.VNI 1: the key is there twice; remove one"},
		{`{"Network": "10.244.0.0/16", "Backend": {}, "Backend": {}}`, "Backend: the key is there twice; remove one"},

		// Networks.
		{`{}`, `Network: missing; give the pods' IPv4 network, such as "10.244.0.0/16", or set "EnableIPv4": false`},
		{`{"Network": 10}`, `Network 10: want an IPv4 prefix, such as "10.244.0.0/16"`},
		{`{"Network": null}`, `Network null: want an IPv4 prefix, such as "10.244.0.0/16"`},
		{`{"Network": "10.244.0.0"}`, `Network "10.244.0.0": want an IPv4 prefix, such as "10.244.0.0/16"`},
		{`{"Network": "fd00:10::/48"}`, `Network "fd00:10::/48": want an IPv4 prefix, such as "10.244.0.0/16"`},
		{`{"Network": "10.244.3.0/16"}`, `Network "10.244.3.0/16": host bits set; did you mean 10.244.0.0/16?`},
		{`{"Network": "224.0.0.0/8"}`,
			`Network "224.0.0.0/8": holds multicast addresses (224.0.0.0/4); choose a private range`},
		{`{"Network": "127.0.0.0/8"}`,
			`Network "127.0.0.0/8": holds loopback addresses (127.0.0.0/8); choose a private range`},
		{`{"Network": "169.254.0.0/16"}`,
			`Network "169.254.0.0/16": holds link-local addresses (169.254.0.0/16); choose a private range`},
		{`{"Network": "10.0.0.0/31"}`, `Network "10.0.0.0/31": too small, want at most /30`},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "10.244.0.0/16"}`,
			`IPv6Network "10.244.0.0/16": want an IPv6 prefix, such as "fd00:10:244::/48"`},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "::ffff:10.244.0.0/112"}`,
			`IPv6Network "::ffff:10.244.0.0/112": want an IPv6 prefix, such as "fd00:10:244::/48"`},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fe80::/64"}`,
			`IPv6Network "fe80::/64": holds link-local addresses (fe80::/10); choose a private range`},

		// Families that contradict each other.
		{`{"Network": "10.244.0.0/16", "EnableIPv4": "true"}`, `EnableIPv4 "true": want true or false, without quotes`},
		{`{"EnableIPv4": false}`, "EnableIPv4 false: neither IPv4 nor IPv6 is enabled; pods need addresses of one at least"},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48", "Network": "10.244.0.0/16", "SubnetLen": 24}`,
			`Network "10.244.0.0/16": means nothing without IPv4; set "EnableIPv4": true, or remove the key
SubnetLen 24: means nothing without IPv4; set "EnableIPv4": true, or remove the key`},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true}`, `IPv6Network: missing; give the pods' IPv6 network, ` +
			`such as "fd00:10:244::/48", or set "EnableIPv6": false`},
		{`{"Network": "10.244.0.0/16", "IPv6Network": "fd00::/48"}`,
			`IPv6Network "fd00::/48": means nothing without IPv6; set "EnableIPv6": true, or remove the key`},

		// Nodes' subnets.
		{`{"Network": "10.244.0.0/16", "SubnetLen": 31}`, "SubnetLen 31: want a whole number from 1 to 30, without quotes"},
		{`{"Network": "10.244.0.0/16", "SubnetLen": "24"}`, `SubnetLen "24": want a whole number from 1 to 30, without quotes`},
		{`{"Network": "10.244.0.0/16", "SubnetLen": 24.5}`, `SubnetLen 24.5: want a whole number from 1 to 30, without quotes`},
		{`{"Network": "10.244.0.0/16", "SubnetLen": 8}`, "SubnetLen 8: want 16 to 30 for nodes' subnets of 10.244.0.0/16"},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48", "IPv6SubnetLen": 127}`,
			"IPv6SubnetLen 127: want a whole number from 1 to 126, without quotes"},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48", "IPv6SubnetLen": 32}`,
			"IPv6SubnetLen 32: want 48 to 126 for nodes' subnets of fd00::/48"},
		{`{"Network": "10.244.0.0/16", "SubnetMin": "fd00::"}`,
			`SubnetMin "fd00::": want the first address of a node's subnet, IPv4, such as "10.244.1.0"`},
		{`{"Network": "10.244.0.0/16", "SubnetMin": "10.245.0.0"}`,
			`SubnetMin "10.245.0.0": outside the network 10.244.0.0/16`},
		{`{"Network": "10.244.0.0/16", "SubnetMin": "10.244.9.9"}`,
			`SubnetMin "10.244.9.9": not the first address of a /24; did you mean 10.244.9.0`},
		{`{"Network": "10.244.0.0/16", "SubnetMin": "10.244.9.0", "SubnetMax": "10.244.3.0"}`,
			`SubnetMin "10.244.9.0": comes after the last subnet, 10.244.3.0/24`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48", "IPv6SubnetMax": "fd01::"}`,
			`IPv6SubnetMax "fd01::": outside the network fd00::/48`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48", "IPv6SubnetMin": "fd00::%eth0"}`,
			`IPv6SubnetMin "fd00::%eth0": want the first address of a node's subnet, IPv6, such as "fd00:10:244:1::"`},
		{`{"Network": "10.244.0.0/16", "Reserved": "10.244.0.0/24"}`,
			`Reserved "10.244.0.0/24": want a list of prefixes, such as ["10.244.0.0/24"]`},
		{`{"Network": "10.244.0.0/16", "Reserved": null}`, `Reserved null: want a list of prefixes, such as ["10.244.0.0/24"]`},
		{`{"Network": "10.244.0.0/16", "Reserved": ["10.244.0.0/24", 7]}`,
			`Reserved ["10.244.0.0/24",7]: number 2, 7: want a prefix, such as "10.244.0.0/24"`},
		{`{"Network": "10.244.0.0/16", "Reserved": ["10.244.0.1/24"]}`,
			`Reserved ["10.244.0.1/24"]: number 1, "10.244.0.1/24": host bits set; did you mean 10.244.0.0/24?`},
		{`{"Network": "10.244.0.0/16", "Reserved": ["fd00::/64"]}`,
			`Reserved ["fd00::/64"]: fd00::/64 is not inside the pod network [10.244.0.0/16]`},
		{`{"Network": "10.244.0.0/16", "Reserved": ["10.244.0.0/16"]}`,
			`Reserved [10.244.0.0/16]: leaves no subnet between 10.244.0.0/24 and 10.244.255.0/24`},

		// Underlay and backend.
		{`{"Network": "10.244.0.0/16", "Underlay": "IPv6"}`, `Underlay "IPv6": want "ipv4" or "ipv6"`},
		{`{"Network": "10.244.0.0/16", "PacketFilter": "nft"}`, `PacketFilter "nft": want "iptables" or "nftables"`},
		{`{"Network": "10.244.0.0/16", "PodSpoofing": true}`, "PodSpoofing true: " + wantSpoofing},
		{`{"Network": "10.244.0.0/16", "PodSpoofing": ["lab"]}`, `PodSpoofing ["lab"]: ` + wantSpoofing},
		{`{"Network": "10.244.0.0/16", "PodSpoofing": {"allow": []}}`, "PodSpoofing: " + wantSpoofing},
		{`{"Network": "10.244.0.0/16", "PodSpoofing": {"allow": ["lab"], "deny": ["x"]}}`, "PodSpoofing: " + wantSpoofing},
		{`{"Network": "10.244.0.0/16", "PodSpoofing": {"allow": ["Lab"]}}`,
			`PodSpoofing: "Lab" is no name of a namespace: a namespace has up to 63 of a-z, 0-9 and -`},
		{`{"Network": "10.244.0.0/16", "NonMasqueradeCIDRs": "10.0.0.0/8"}`,
			`NonMasqueradeCIDRs "10.0.0.0/8": want a list of prefixes, such as ["10.0.0.0/8"]`},
		{`{"Network": "10.244.0.0/16", "NonMasqueradeCIDRs": ["10.0.0.0/8", "10.0.0.1"]}`,
			`NonMasqueradeCIDRs ["10.0.0.0/8","10.0.0.1"]: number 2, "10.0.0.1": want a prefix, such as "10.0.0.0/8"`},
		{`{"Network": "10.244.0.0/16", "NonMasqueradeCIDRs": ["fd00::/8"]}`,
			`NonMasqueradeCIDRs ["fd00::/8"]: fd00::/8 means nothing without IPv6 in the pod network; remove it, or set ` +
				`"EnableIPv6": true`},
		{`{"Network": "10.244.0.0/16", "SubnetSource": "Lease"}`,
			`SubnetSource "Lease": want "auto", "node-spec" or "lease"`},
		{`{"Network": "10.244.0.0/16", "SubnetSource": ""}`, `SubnetSource "": want "auto", "node-spec" or "lease"`},
		{`{"Network": "10.244.0.0/16", "SubnetSource": null}`, `SubnetSource null: want "auto", "node-spec" or "lease"`},
		{`{"Network": "10.244.0.0/16", "subnetSource": "lease"}`,
			"subnetSource: unknown key; did you mean SubnetSource? Upper and lower case matter"},
		{`{"Network": "10.244.0.0/16", "Backend": {"Type": "VXLAN"}}`, `Backend.Type "VXLAN": want "vxlan" or "host-gw"`},
		{`{"Network": "10.244.0.0/16", "Backend": {"VNI": 1, "Port": 8472, "DirectRouting": true, "Type": "host-gw"}}`,
			`Backend.VNI 1: means nothing with "host-gw", which has no tunnel; remove the key, or set Backend.Type to "vxlan"
Backend.Port 8472: means nothing with "host-gw", which has no tunnel; remove the key, or set Backend.Type to "vxlan"
Backend.DirectRouting true: means nothing with "host-gw", which has no tunnel; remove the key, ` +
				`or set Backend.Type to "vxlan"`},
		{`{"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw", "ChecksumOffload": "auto"}}`,
			`Backend.ChecksumOffload "auto": means nothing with "host-gw", which has no tunnel; remove the key, ` +
				`or set Backend.Type to "vxlan"`},
		{`{"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw", "MTU": 575}}`,
			"Backend.MTU 575: too small for this pod network; want at least 576"},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48", "Backend": {"Type": "host-gw", "MTU": 1279}}`,
			"Backend.MTU 1279: too small for this pod network; want at least 1280"},
		{`{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}`, `Backend.Type "wireguard": a backend of flannel ` +
			`that is not here: nothing is encrypted here; use "vxlan", over an encrypted underlay`},
		{`{"Network": "10.244.0.0/16", "Backend": {"VNI": 0}}`,
			"Backend.VNI 0: want a whole number from 1 to 16777215, without quotes"},
		{`{"Network": "10.244.0.0/16", "Backend": {"VNI": 16777216}}`,
			"Backend.VNI 16777216: want a whole number from 1 to 16777215, without quotes"},
		{`{"Network": "10.244.0.0/16", "Backend": {"VNI": 99999999999999999999}}`,
			"Backend.VNI 99999999999999999999: want a whole number from 1 to 16777215, without quotes"},
		{`{"Network": "10.244.0.0/16", "Backend": {"Port": 65536}}`,
			"Backend.Port 65536: want a whole number from 1 to 65535, without quotes"},
		{`{"Network": "10.244.0.0/16", "Backend": {"MTU": 600}}`,
			"Backend.MTU 600: too small for this pod network; want at least 626"},
		{`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48", "Backend": {"MTU": 1300}}`,
			"Backend.MTU 1300: too small for this pod network; want at least 1350"},
		{`{"Network": "10.244.0.0/16", "Backend": {"Guard": false, "AcceptPeers": true}}`,
			`Backend.AcceptPeers true: would accept what anybody sends; set Backend.Guard to true, or remove the key`},
		{`{"Network": "10.244.0.0/16", "Backend": {"DirectRouting": "true"}}`,
			`Backend.DirectRouting "true": want true or false, without quotes`},
		{`{"Network": "10.244.0.0/16", "Backend": {"ChecksumOffload": "on"}}`,
			`Backend.ChecksumOffload "on": want "auto" or "off"`},
		{`{"Network": "10.244.0.0/16", "EnableNFTables": true}`, "EnableNFTables: a key of flannel that has no meaning here: " +
			`write "PacketFilter": "nftables" for true; remove the key`},
		{`{"Network": "10.244.0.0/16", "Backend": {"ListenPort": 51820}}`,
			"Backend.ListenPort: a key of flannel that has no meaning here: the tunnel's UDP port is Port"},

		// Several at once, in the order of the text.
		{`{"Backend": {"Port": 0, "Learning": true, "Type": 7}, "Network": ["` + strings.Repeat("x", 70) + `"]}`,
			`Backend.Port 0: want a whole number from 1 to 65535, without quotes
Backend.Learning: a key of flannel that has no meaning here: addresses are never learned, ` +
				`each comes from a lease; remove the key
Backend.Type 7: want "vxlan" or "host-gw"
Network ["` + strings.Repeat("x", 58) + `...: want an IPv4 prefix, such as "10.244.0.0/16"`},
	} {
		_, err := ParseConfig([]byte(c.text))
		if err == nil {
			t.Errorf("%s\naccepted, want\n%s", c.text, c.want)
		} else if err.Error() != c.want {
			t.Errorf("%s\n%v\nwant\n%s", c.text, err, c.want)
		}
	}
}

func TestSmallestConfigIsCompletedByDefaults(t *testing.T) {
	c, err := ParseConfig([]byte(smallestConfig))
	if err != nil {
		t.Fatal(err)
	}
	want := BackendConfig{Type: "vxlan", VNI: 1, Port: 8472, ChecksumOffload: "auto", Guard: true}
	if c.Backend != want {
		t.Errorf("backend is %+v", c.Backend)
	}
	if len(c.Network) != 1 || c.Network[0].Len != 24 || c.Network[0].Count() != 256 || c.Underlay != 0 ||
		c.SubnetSource != subnet.OriginAuto || c.PacketFilter != masq.IPTables || c.NonMasquerade != nil ||
		c.Spoofing.All || c.Spoofing.Namespaces != nil {
		t.Errorf("%+v", c)
	}
}

func TestEveryKeyReachesItsPlace(t *testing.T) {
	c, err := ParseConfig([]byte(`{
		"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0",
		"EnableIPv4": true, "EnableIPv6": true,
		"IPv6Network": "fc00::/7", "IPv6SubnetLen": 80, "IPv6SubnetMin": "fc00:1::", "IPv6SubnetMax": "fc00:2::",
		"Reserved": ["10.11.0.0/16", "fc00:1:1::/48", "10.12.0.0/16"],
		"Underlay": "ipv6",
		"SubnetSource": "lease", "PacketFilter": "nftables", "NonMasqueradeCIDRs": ["192.0.2.0/24", "::/0"],
		"PodSpoofing": {"allow": ["metallb-system", "lab", "lab"]},
		"Backend": {
			"Type": "vxlan", "VNI": 16777215, "Port": 4789, "MTU": 9000, "DirectRouting": true, "ChecksumOffload": "off",
			"Guard": true, "AcceptPeers": true
		}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	want := subnet.Network{{
		Prefix: netip.MustParsePrefix("10.0.0.0/8"), Len: 20,
		Min: netip.MustParsePrefix("10.10.0.0/20"), Max: netip.MustParsePrefix("10.99.0.0/20"),
		Reserved: []netip.Prefix{netip.MustParsePrefix("10.11.0.0/16"), netip.MustParsePrefix("10.12.0.0/16")},
	}, {
		Prefix: netip.MustParsePrefix("fc00::/7"), Len: 80,
		Min: netip.MustParsePrefix("fc00:1::/80"), Max: netip.MustParsePrefix("fc00:2::/80"),
		Reserved: []netip.Prefix{netip.MustParsePrefix("fc00:1:1::/48")},
	}}
	same := func(a, b subnet.Range) bool {
		return a.Prefix == b.Prefix && a.Len == b.Len && a.Min == b.Min && a.Max == b.Max &&
			slices.Equal(a.Reserved, b.Reserved)
	}
	if !slices.EqualFunc(c.Network, want, same) {
		t.Errorf("network is %+v\nwant %+v", c.Network, want)
	}
	backend := BackendConfig{Type: "vxlan", VNI: 16777215, Port: 4789, MTU: 9000, DirectRouting: true,
		ChecksumOffload: "off", Guard: true, AcceptPeers: true}
	if c.Backend != backend || c.Underlay != 6 || c.SubnetSource != subnet.OriginLease {
		t.Errorf("backend is %+v, underlay %d, subnets by %s", c.Backend, c.Underlay, c.SubnetSource)
	}
	exceptions := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::/0")}
	if c.PacketFilter != masq.NFTables || !slices.Equal(c.NonMasquerade, exceptions) {
		t.Errorf("packet filter by %s, without masquerading %v", c.PacketFilter, c.NonMasquerade)
	}
	if s := c.Spoofing; s.All || !slices.Equal(s.Namespaces, []string{"lab", "metallb-system"}) {
		t.Errorf("spoofing is %+v", s)
	}
}

func TestConfigFileThatIsMissingOrBroken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net-conf.json")
	_, err := LoadConfig(path)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) ||
		!strings.Contains(err.Error(), `{"Network": "10.244.0.0/16"}`) {
		t.Errorf("missing: %v", err)
	}
	if err := os.WriteFile(path, []byte(`{"Network": 7}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err == nil || !strings.HasPrefix(err.Error(), path+": Network 7: want") {
		t.Errorf("broken: %v", err)
	}
	if err := os.WriteFile(path, []byte(smallestConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err != nil {
		t.Error(err)
	}
}

func TestNodeAddressInsideThePodNetwork(t *testing.T) {
	c, err := ParseConfig([]byte(`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48"}`))
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]string{
		"10.245.0.1": "", "192.0.2.1": "", "fd00:0:1::1": "",
		"10.244.255.255": "address 10.244.255.255 of this node is inside the pod network 10.244.0.0/16; " +
			"set Network in net-conf.json to a range that no node has an address of",
		"fd00::9": "address fd00::9 of this node is inside the pod network fd00::/48; " +
			"set IPv6Network in net-conf.json to a range that no node has an address of",
	} {
		got := ""
		if err := c.CheckAddrs([]netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr(addr)}); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", addr, got, want)
		}
	}
}

// documented returns the JSON examples of docs/configuration.md.
func documented(t testing.TB) (examples []string) {
	t.Helper()
	text, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	for i, part := range strings.Split(string(text), "```") {
		if body, ok := strings.CutPrefix(part, "json\n"); ok && i%2 == 1 {
			examples = append(examples, body)
		}
	}
	return examples
}

func TestExampleOfTheDocumentationIsRefused(t *testing.T) {
	examples := documented(t)
	if len(examples) < 4 {
		t.Fatalf("found %d examples", len(examples))
	}
	for _, e := range examples {
		if _, err := ParseConfig([]byte(e)); err != nil {
			t.Errorf("%s%v", e, err)
		}
	}
}

func TestKeyThatTheDocumentationForgets(t *testing.T) {
	text, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	d := newDraft()
	for key := range d.keys() {
		if !strings.Contains(string(text), "`"+key+"`") {
			t.Errorf("%s is not described", key)
		}
	}
	for key := range d.backendKeys() {
		if !strings.Contains(string(text), "`Backend."+key+"`") {
			t.Errorf("Backend.%s is not described", key)
		}
	}
	for _, refused := range []map[string]string{flannelKeys(), flannelBackendKeys(), flannelBackends()} {
		for key := range refused {
			if !strings.Contains(string(text), "`"+key+"`") {
				t.Errorf("what became of flannel's %s is not described", key)
			}
		}
	}
}

// Whatever is accepted can be relied on, and whatever is refused is refused with words.
func FuzzParseConfig(f *testing.F) {
	for _, e := range documented(f) {
		f.Add([]byte(e))
	}
	f.Add([]byte(`{"` + strings.Repeat("x", 1000) + `": {}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := ParseConfig(text)
		if err != nil {
			unfit := func(r rune) bool { return r < ' ' }
			for line := range strings.Lines(err.Error()) {
				line = strings.TrimSuffix(line, "\n")
				if strings.TrimSpace(line) == "" || len(line) > 600 || strings.ContainsFunc(line, unfit) {
					t.Errorf("unfit to print: %q", line)
				}
			}
			return
		}
		b := c.Backend
		if len(c.Network) == 0 || b.Type != "vxlan" && (b.Type != "host-gw" || b.DirectRouting) || b.VNI == 0 ||
			b.VNI >= 1<<24 || b.Port == 0 || c.SubnetSource == "" || b.ChecksumOffload == "" {
			t.Errorf("accepted: %+v", c)
		}
		for _, r := range c.Network {
			if r.Count() == 0 {
				t.Errorf("%s has no subnet", r.Prefix)
			}
			for p := range r.Free(0, nil) {
				if err := r.Check(p); err != nil {
					t.Error(err)
				}
				break
			}
		}
	})
}

package podnet

import (
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// FuzzPlainJSON holds what is read without encoding/json to what that reads.
func FuzzPlainJSON(f *testing.F) {
	for _, seed := range []string{
		`{"cniVersion":"1.0.0","name":"tweed","runtimeConfig":{"portMappings":[{"hostPort":80}],"a":"}\""},"x":-1.5e3}`,
		" {\n} ", `{"a":"\u0041","a\"":[1,{"b":[]}]}`, `{"a":1,"a":2}`, `[]`, `{"a":[`, `"a"`, `{"é":"é"}`, `null`, ``,
		`{"version":1,"converged":true,"node":"n1","subnets":["10.244.1.0/24"],"gateways":["10.244.1.1"],"mtu":1430}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var want map[string]json.RawMessage
		err := json.Unmarshal(text, &want)
		found := members(text)
		if found != nil && (err != nil || !reflect.DeepEqual(found, want)) {
			t.Errorf("members %q, want %q, %v", found, want, err)
		}
		for _, value := range found {
			if s, ok := plainString(value); ok {
				var want string
				if err := json.Unmarshal(value, &want); err != nil || s != want {
					t.Errorf("%s is read as %q: %v", value, s, err)
				}
			}
		}
		var plain, info NodeInfo
		if plain.plain(text) {
			if err := json.Unmarshal(text, &info); err != nil || !reflect.DeepEqual(plain, info) {
				t.Errorf("read as %+v, want %+v, %v", plain, info, err)
			}
		}
	})
}

// TestNodeInfoIsReadTheLongWay finds a field that the short way does not know. It would work, and cost each ADD a part of
// a millisecond.
func TestNodeInfoIsReadTheLongWay(t *testing.T) {
	info := NodeInfo{
		Converged: true, Node: "n1", Networks: prefixes("10.244.0.0/16", "fd00:10:244::/48"),
		Subnets: prefixes(subnet4, subnet6), Gateways: []netip.Addr{netip.MustParseAddr("10.244.3.1")},
		Bridge: "tweed0", Device: "tweed.1", MTU: 1430, PacketFilter: "nftables",
		Spoofing: Spoofing{Namespaces: []string{"metallb-system"}},
	}
	dir := t.TempDir()
	if err := info.Write(dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(nodeInfoPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	var plain, want NodeInfo
	if err := json.Unmarshal(text, &want); err != nil || !plain.plain(text) || !reflect.DeepEqual(plain, want) {
		t.Errorf("read as %+v, want %+v, %v", plain, want, err)
	}
	for i := range reflect.TypeFor[NodeInfo]().NumField() {
		if reflect.ValueOf(want).Field(i).IsZero() {
			t.Errorf("the test leaves out %s", reflect.TypeFor[NodeInfo]().Field(i).Name)
		}
	}
}

func TestResultIsPrintedOtherwise(t *testing.T) {
	address := net.IPNet{IP: net.ParseIP("10.244.3.2"), Mask: net.CIDRMask(24, 32)}
	good := func() *types100.Result {
		return &types100.Result{
			CNIVersion: "1.1.0",
			Interfaces: []*types100.Interface{{Name: "tweed1", Mac: "0a:00:00:00:00:01", Mtu: 1430},
				{Name: "eth0", Mac: "0a:00:00:00:00:02", Mtu: 1430, Sandbox: "/run/netns/a"}},
			IPs:    []*types100.IPConfig{{Interface: types100.Int(1), Address: address, Gateway: net.ParseIP("10.244.3.1")}},
			Routes: []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, GW: net.ParseIP("10.244.3.1")}},
		}
	}
	for name, c := range map[string]struct {
		version string
		change  func(*types100.Result)
		plain   bool
	}{
		"as Attach makes it": {"1.1.0", func(*types100.Result) {}, true},
		"the version before": {"1.0.0", func(*types100.Result) {}, true},
		"an older version":   {"0.4.0", func(*types100.Result) {}, false},
		"a quote in a path":  {"1.1.0", func(r *types100.Result) { r.Interfaces[1].Sandbox = `/run/"a"` }, false},
		"name servers":       {"1.1.0", func(r *types100.Result) { r.DNS.Nameservers = []string{"10.96.0.10"} }, false},
		"no gateway":         {"1.1.0", func(r *types100.Result) { r.IPs[0].Gateway = nil }, false},
		"a route's table":    {"1.1.0", func(r *types100.Result) { r.Routes[0].Table = types100.Int(7) }, false},
		"no routes":          {"1.1.0", func(r *types100.Result) { r.Routes = nil }, false},
		"a virtual function": {"1.1.0", func(r *types100.Result) { r.Interfaces[0].PciID = "0000:00:1f.6" }, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := good()
			c.change(r)
			if text := plainResult(r, c.version); (text != nil) != c.plain {
				t.Errorf("printed the short way: %s", text)
			}
			if got, want := printed(t, r, c.version, PrintResult), printed(t, r, c.version, longWay); !reflect.DeepEqual(got, want) {
				t.Errorf("printed as\n%v, want\n%v", got, want)
			}
		})
	}
}

func longWay(r *types100.Result, version string) error { return types.PrintResult(r, version) }

// printed is what write puts on stdout, read again.
func printed(t *testing.T, r *types100.Result, version string, write func(*types100.Result, string) error) (read any) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	defer func(was *os.File) { os.Stdout = was }(os.Stdout)
	os.Stdout = out
	if err := write(r, version); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(io.NewSectionReader(out, 0, 1<<20))
	if err != nil || json.Unmarshal(text, &read) != nil {
		t.Fatalf("%v: %q", err, text)
	}
	return read
}

func TestRecordIsWrittenOtherwise(t *testing.T) {
	full := func() record {
		return record{
			Network: "tweed", Container: "c1", Interface: "eth0", Veth: "tweed0123456789", Index: 7, MAC: podMAC(prefixes(subnet4)),
			Addrs: prefixes("10.244.3.2/24", "fd00:10:244:3::2/64"), Apart: prefixes("10.244.3.2/24"), Namespace: "default",
			Delegates: []json.RawMessage{},
		}
	}
	plainly := map[string]func(*record){
		"all of it": func(*record) {}, "no address yet": func(r *record) { r.Addrs, r.Apart, r.Index = nil, nil, 0 },
		"no namespace": func(r *record) { r.Namespace = "" },
	}
	declined := map[string]func(*record){
		"a delegate": func(r *record) { r.Delegates = []json.RawMessage{json.RawMessage(`{"type":"portmap"}`)} },
		"no list":    func(r *record) { r.Delegates = nil },
		"an escape":  func(r *record) { r.Network = `"` },
	}
	for what, change := range plainly {
		r := full()
		change(&r)
		want, err := json.Marshal(r)
		if text := r.plain(); err != nil || string(text) != string(want) {
			t.Errorf("%s: %s, want %s, %v", what, text, want, err)
		}
	}
	for what, change := range declined {
		r := full()
		change(&r)
		if text := r.plain(); text != nil {
			t.Errorf("%s: %s", what, text)
		}
	}
	for i := range reflect.TypeFor[record]().NumField() {
		f := reflect.TypeFor[record]().Field(i)
		if f.IsExported() && reflect.ValueOf(full()).Field(i).IsZero() {
			t.Errorf("the test leaves out %s", f.Name)
		}
	}
}

package podnet

import (
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
)

func nodeInfo() NodeInfo {
	return NodeInfo{
		Converged: true, Node: "n1", Networks: prefixes("10.244.0.0/16", "fd00:10:244::/48"),
		Subnets:  prefixes("10.244.3.0/24", "fd00:10:244:3::/64"),
		Gateways: []netip.Addr{netip.MustParseAddr("10.244.3.1"), netip.MustParseAddr("fd00:10:244:3::1")},
		Bridge:   "tweed0", Device: "tweed.1", MTU: 1430,
	}
}

func TestNodeInfoSaysTheSameAsBefore(t *testing.T) {
	dir := t.TempDir() + "/new"
	inode := func() os.FileInfo {
		if err := nodeInfo().Write(dir); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(nodeInfoPath(dir))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	if first, second := inode(), inode(); !os.SameFile(first, second) {
		t.Error("written twice")
	}
	got, err := ReadNodeInfo(dir)
	want := nodeInfo()
	want.Version, want.BootID = got.Version, got.BootID
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, %v", got, err)
	}
	changed := nodeInfo()
	changed.MTU = 1400
	if err := changed.Write(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadNodeInfo(dir); got.MTU != 1400 || err != nil {
		t.Errorf("after a change: %+v, %v", got, err)
	}
	if left := names(t, dir); len(left) != 1 {
		t.Errorf("files: %v", left)
	}
}

func TestNodeInfoIsNotToBeUsed(t *testing.T) {
	for _, tt := range []struct {
		name, text, want string
		absent           bool
	}{
		{"another boot", `{"version":1,"bootID":"x"}`, "has not run on this node since boot", true},
		{"another version", `{"version":2,"bootID":"x"}`, "version 2", false},
		{"empty", ``, "cannot be read", false},
		{"wrong type", `{"version":1,"mtu":"big"}`, "cannot be read", false},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(nodeInfoPath(dir), []byte(tt.text), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := ReadNodeInfo(dir)
		if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, ErrAbsent) != tt.absent {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if _, err := ReadNodeInfo(t.TempDir()); !errors.Is(err, ErrAbsent) {
		t.Errorf("missing: %v", err)
	}
}

// TestRunDirectoryOutlivesTheBoot is what a node has whose /run is not in memory, after a loss of power.
func TestRunDirectoryOutlivesTheBoot(t *testing.T) {
	s, l := newStore(t)
	last := nodeInfo()
	last.BootID = "the last one"
	if err := last.Write(s.runDir); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"a", "b", "c"} {
		attach(t, s, l, c, "10.244.3.0/24", "fd00:10:244:3::/64")
	}
	if _, _, err := s.create(recordOf("d")); err != nil {
		t.Fatal(err)
	}
	spoilt := s.addr(netip.MustParseAddr("10.244.3.9")) // and its other names are lost
	if err := errors.Join(os.Truncate(s.pod(vethName("b", "eth0")), 0), os.WriteFile(spoilt, nil, 0o644)); err != nil {
		t.Fatal(err)
	}

	last.MTU = 1400
	if err := last.Write(s.runDir); err != nil {
		t.Fatal(err)
	}
	if got := append(names(t, s.addrDir()), names(t, s.podDir())...); len(got) != 7+4 {
		t.Errorf("in the same boot: %v", got)
	}
	if err := nodeInfo().Write(s.runDir); err != nil {
		t.Fatal(err)
	}
	if got := append(names(t, s.addrDir()), names(t, s.podDir())...); len(got) != 0 {
		t.Errorf("in the next boot: %v", got)
	}
	if got := attach(t, s, l, "e", "10.244.3.0/24"); got[0].Addr() != netip.MustParseAddr("10.244.3.5") {
		t.Errorf("the first pod of the next boot gets %v, which another pod may have had a moment ago", got)
	}
}

package lab

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// handmade is a lab of one node whose two pods are connected by hand, each at one end of a veth pair.
func handmade(t *testing.T) (*Lab, Options) {
	t.Helper()
	l := newLab(t)
	o := Options{Nodes: 1, Pods: 2, Underlay: "ipv4"}
	upTo(t, l, "n1", o)
	l.afterStep = nil
	one, two := l.netns("n1", "pod1"), l.netns("n1", "pod2")
	for _, c := range [][]string{
		{"", "netns add " + one, "netns add " + two},
		{one, "link set lo up", "link add eth0 type veth peer name eth0 netns " + two, "link set eth0 up",
			"addr add 10.244.0.2/24 dev eth0", "addr add fd00:10:244::3/64 dev eth0 nodad"},
		{two, "link set lo up", "link set eth0 up",
			"addr add 10.244.0.3/24 dev eth0", "addr add fd00:10:244::4/64 dev eth0 nodad"},
	} {
		if err := l.ip(t.Context(), c[0], c[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	return l, o
}

// proveSoon is prove with less patience.
func proveSoon(t *testing.T, l *Lab, o Options) proof {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	p, err := l.prove(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAllPathsWork(t *testing.T) {
	l, o := handmade(t)
	if p := proveSoon(t, l, o); p.paths != 4 || p.err() != nil {
		t.Errorf("%d paths, %v; want 4", p.paths, p.err())
	}
}

func TestPathIsTranslated(t *testing.T) {
	l, o := handmade(t)
	err := inNetns(l.netns("n1", "pod2"), exec.Command("nft", "add table ip t; "+
		"add chain ip t c { type nat hook input priority 100; }; add rule ip t c snat to 10.244.0.77").Run)
	if err != nil {
		t.Fatal(err)
	}
	p := proveSoon(t, l, o)
	if p.err() == nil || len(p.failed) != 1 || !strings.Contains(p.err().Error(),
		"n1/pod1 (10.244.0.2) -> n1/pod2 (10.244.0.3): arrives as 10.244.0.77 instead of with its own address") {
		t.Errorf("got %v", p.err())
	}
}

func TestPathIsBlocked(t *testing.T) {
	l, o := handmade(t)
	if err := l.ip(t.Context(), l.netns("n1", "pod1"), "route add blackhole fd00:10:244::4"); err != nil {
		t.Fatal(err)
	}
	p := proveSoon(t, l, o)
	if p.err() == nil || !strings.Contains(p.err().Error(), "n1/pod1 (fd00:10:244::3) -> n1/pod2 (fd00:10:244::4): ") {
		t.Errorf("got %v", p.err())
	}
	for _, f := range p.failed {
		if f.from.addr.Is4() {
			t.Errorf("%v -> %v: %v", f.from, f.to, f.err)
		}
	}
}

func TestPathOpensLate(t *testing.T) {
	l, o := handmade(t)
	if err := l.ip(t.Context(), l.netns("n1", "pod1"), "route add blackhole 10.244.0.3"); err != nil {
		t.Fatal(err)
	}
	opened := time.AfterFunc(4*pollEvery, func() { // some rounds fail first
		if err := l.ip(context.Background(), l.netns("n1", "pod1"), "route del blackhole 10.244.0.3"); err != nil {
			t.Error(err)
		}
	})
	defer opened.Stop()
	if p, err := l.prove(t.Context(), o); err != nil || p.err() != nil {
		t.Errorf("got %v, %v", err, p.err())
	}
}

func TestPodHasOneFamilyOnly(t *testing.T) {
	l, o := handmade(t)
	if err := l.ip(t.Context(), l.netns("n1", "pod2"), "addr flush dev eth0 scope global"); err != nil {
		t.Fatal(err)
	}
	_, err := l.prove(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "n1/pod2: expected one IPv4 and one IPv6 address") {
		t.Errorf("got %v", err)
	}
}

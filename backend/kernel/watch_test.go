package kernel

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
)

// addPod hangs a namespace on the bridge, as the plugin does: a veth with our group.
func addPod(t *testing.T, h *realHost, n int) *netnstest.NS {
	t.Helper()
	pod := netnstest.New(t)
	h.ns.Run(t, fmt.Sprintf("ip link add veth%d group 116 type veth peer name eth0 netns %s", n, pod.Path()))
	h.ns.Run(t, fmt.Sprintf("ip link set veth%d master tweed0 up", n))
	for _, c := range []string{
		"ip link set eth0 up", fmt.Sprintf("ip addr add 10.244.3.%d/24 dev eth0", n),
		fmt.Sprintf("ip addr add fd00:10:244:3::%d/64 dev eth0 nodad", n),
		"ip route add default via 10.244.3.1", "ip route add default via fd00:10:244:3::1",
	} {
		pod.Run(t, c)
	}
	return pod
}

func TestPodsAndTheirTrafficRingNoBell(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	r := watch(t, h, func(dev string) bool { return dev == "eth0" })
	a, _ := addPod(t, h, 10), addPod(t, h, 11)
	eventually(t, a, "ping -c 1 -W 1 10.244.3.11")
	eventually(t, a, "ping -c 1 -W 1 fd00:10:244:3::11")
	eventually(t, a, "ping -c 1 -W 1 10.244.3.1")
	a.Run(t, "ip neigh flush all")
	eventually(t, a, "ping -c 1 -W 1 10.244.3.1")
	h.ns.Run(t, "ip neigh flush all")
	eventually(t, h.ns, "ping -c 1 -W 1 10.244.3.10")
	h.ns.Run(t, "ip link del veth11")
	if r.quiet() {
		t.Error("rang for pods")
	}
	settled(t, h, sample())
	// Nor do others' links, routes and addresses.
	h.ns.Run(t, "ip link add other type bridge")
	h.ns.Run(t, "ip link set other up")
	h.ns.Run(t, "ip addr add 203.0.113.1/24 dev other")
	h.ns.Run(t, "ip route add 203.0.114.0/24 dev other")
	h.ns.Run(t, "ip rule add pref 77 from 203.0.113.0/24 lookup 77")
	if r.quiet() {
		t.Error("rang for strangers")
	}
	h.ns.Run(t, "ip route replace default dev other") // perhaps it is to be the uplink from now on
	r.await(t, "another default route")
}

func TestEventThatSaysNothingNewRingsNoBell(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	h.ns.Run(t, "ip addr add 2001:db8::99/64 dev eth0 nodad valid_lft 1000 preferred_lft 1000")
	r := watch(t, h, func(dev string) bool { return dev == "eth0" })
	h.ns.Run(t, "ip addr replace 2001:db8::99/64 dev eth0 nodad valid_lft 2000 preferred_lft 2000")
	h.ns.Run(t, "ip addr replace 2001:db8::99/64 dev eth0 nodad valid_lft 3000 preferred_lft 3000")
	h.ns.Run(t, "ip link set eth0 txqueuelen 777")
	h.ns.Run(t, "ip link set tweed.1 txqueuelen 777")
	if r.quiet() {
		t.Error("rang for a lifetime and queue lengths")
	}
	h.ns.Run(t, "ip link set eth0 mtu 1400")
	r.await(t, "the uplink's MTU")
	r.quiet()
	h.ns.Run(t, "ip addr del 2001:db8::99/64 dev eth0")
	r.await(t, "an address of the uplink")
	r.quiet()
	h.ns.Run(t, "ip link set tweed0 type bridge nf_call_iptables 0")
	r.await(t, "an option of the bridge")
}

func TestChangeOfThePacketFilterRings(t *testing.T) {
	h := newRealHost(t)
	filterPass(t, h, dualStackFilter(t))
	r := watch(t, h, func(string) bool { return false })
	h.ns.Run(t, "iptables -t nat -F TWEED-POSTRTG")
	r.await(t, "a chain of ours emptied")
	filterPass(t, h, dualStackFilter(t))
}

// More notifications than the socket holds are lost; the loss itself must ring, and what was remembered is read anew.
func TestLostNotificationsRing(t *testing.T) {
	h := newRealHost(t)
	r := rings{make(chan struct{}, 1000)}
	resets := 0
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.ns.Do(t, func() {
		s, err := subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR)
		if err == nil {
			err = s.conn.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
			})
		}
		if err != nil {
			t.Errorf("subscribing: %v", err)
			return
		}
		var batch strings.Builder
		for n := range 200 {
			fmt.Fprintf(&batch, "addr add 203.0.113.%d/32 dev wire\n", n)
		}
		runBatch(t, h.ns, "ip", batch.String())
		done := make(chan error)
		go func() {
			heard := func(netlinkMessage) bool { return false }
			done <- h.listen(ctx, s, heard, func() { resets++ }, func() { r.bell <- struct{}{} })
		}()
		select {
		case <-r.bell:
		case <-time.After(5 * time.Second):
			t.Error("no ring for what was lost")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("listening: %v", err)
		}
	})
	if resets == 0 {
		t.Error("nothing was read anew")
	}
}

// What could not be made because of a stranger can be made as soon as the stranger leaves.
func TestStrangerLeavesAndNothingRings(t *testing.T) {
	h := newRealHost(t)
	h.ns.Run(t, "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0")
	h.ns.Run(t, "ip link add tweed0 type bridge")
	want := sample()
	if have, err := h.Observe(t.Context(), want); err != nil || len(have.Strangers) != 2 {
		t.Fatalf("strangers are %v, %v", have.Strangers, err)
	}
	r := watch(t, h, func(string) bool { return false })
	h.ns.Run(t, "ip link del flannel.1")
	r.await(t, "a VXLAN device with our VNI and port that is deleted")
	r.quiet()
	h.ns.Run(t, "ip link set tweed0 name other")
	r.await(t, "a device with our name that is renamed")
	r.quiet()

	pass(t, h, want)
	for _, c := range []struct {
		ours backend.Object
		gone string
	}{
		{bridgeRoute("10.244.3.0/24", "10.244.3.1"), "ip route del 10.244.3.0/24"},
		{bridgeRoute("fd00:10:244:3::/64", ""), "ip -6 route del fd00:10:244:3::/64"},
		{policy("10.244.3.0/24", 100), "ip rule del from 10.244.3.0/24"},
	} {
		h.byHand(backend.Op{Do: backend.Delete, What: c.ours, Was: c.ours})
		h.addStranger(c.ours)
		if have, err := h.Observe(t.Context(), want); err != nil || len(have.Strangers) != 1 {
			t.Fatalf("%s: strangers are %v, %v", c.gone, have.Strangers, err)
		}
		r.quiet()
		h.ns.Run(t, c.gone)
		r.await(t, c.gone)
		r.quiet()
		pass(t, h, want)
	}
}

func TestOffloadIsSwitchedAndNothingRings(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	r := watch(t, h, func(string) bool { return false })
	for range 2 {
		for _, how := range []string{"off", "on"} {
			h.ns.Run(t, "ethtool -K tweed.1 tx "+how)
			r.await(t, "checksums switched "+how)
			r.quiet()
		}
	}
}

// The bridge command says of what it makes that it need not be asked for (NOARP), as the kernel does of its own.
func TestForwardingEntryIsChangedByHandAndNothingRings(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	r := watch(t, h, func(string) bool { return false })
	for _, c := range []string{
		"bridge fdb replace 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.99 self permanent",
		"bridge fdb add 0e:00:00:00:00:08 dev tweed.1 dst 192.0.2.99 self permanent",
	} {
		h.ns.Run(t, c)
		r.await(t, c)
		r.quiet()
	}
}

// Twenty pods a second that come or go would otherwise be five passes a second, each of which reads everything.
func TestPodThatComesOrGoesRings(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	r := watch(t, h, func(dev string) bool { return dev == "eth0" })
	for _, what := range []string{
		"ip link add pod1 group 116 mtu 1450 type veth peer name inside", "ip link set pod1 master tweed0 up",
		"ip link set inside up", "bridge link set dev pod1 hairpin on",
		"bridge fdb add 0a:58:0a:f4:03:05 dev pod1 master static",
		"ip neigh add 10.244.3.5 lladdr 0a:58:0a:f4:03:05 dev tweed0", "ip link del pod1",
	} {
		h.ns.Run(t, what)
		if r.quiet() {
			t.Errorf("it rings after: %s", what)
		}
	}
	h.ns.Run(t, "ip link set tweed0 mtu 1400")
	r.await(t, "a change of the bridge itself")
}

// A storm that overruns the socket of a Watch costs it neither its ears nor its memory.
func TestOverrunWatchHearsOn(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	var hold sync.Mutex // while a ring waits for it, nobody receives
	rung := make(chan struct{}, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- h.Watch(ctx, func(dev string) bool { return dev == "eth0" }, func() {
			rung <- struct{}{}
			hold.Lock()
			defer hold.Unlock()
		})
	}()
	r := rings{rung}
	r.await(t, "the start")
	r.quiet()

	hold.Lock()
	h.ns.Run(t, "ip link set eth0 mtu 1400")
	r.await(t, "the uplink's MTU")
	var storm strings.Builder
	for n := range 15000 {
		fmt.Fprintf(&storm, "route add 10.%d.%d.%d/32 dev wire proto 116\n", 100+n>>16, n>>8&255, n&255)
	}
	runBatch(t, h.ns, "ip", storm.String())
	h.ns.Run(t, "ip link set eth0 mtu 1300") // is lost
	hold.Unlock()
	r.await(t, "what was lost")
	r.quiet()
	h.ns.Run(t, "ip route flush proto 116 dev wire")
	r.await(t, "routes of ours")
	for r.quiet() {
	}
	h.ns.Run(t, "ip link set eth0 txqueuelen 777")
	if r.quiet() {
		t.Error("rang for a queue length: it does not remember the MTU that it did not hear of")
	}
	h.ns.Run(t, "ip link set eth0 mtu 1500")
	r.await(t, "the uplink's MTU after the storm")
	pass(t, h, sample())
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWatchThatCannotReadHearsEverythingUntilItCan(t *testing.T) {
	h := newRealHost(t)
	pass(t, h, sample())
	d := spoil(h.Kernel)
	d.begin(func(_ int, c call) fate {
		if c.isDump() {
			return fate{refused: unix.EBUSY}
		}
		return fate{}
	})
	r := watch(t, h, func(string) bool { return false })
	h.ns.Run(t, "ip link set eth0 txqueuelen 700")
	r.await(t, "what cannot be told to be of no interest")
	r.quiet()
	d.end()
	deadline := time.Now().Add(20 * time.Second)
	for n := 701; ; n++ {
		h.ns.Run(t, fmt.Sprintf("ip link set eth0 txqueuelen %d", n))
		if !r.quiet() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it has not read again")
		}
	}
	h.ns.Run(t, "ip link set tweed.1 mtu 1400")
	r.await(t, "a change that matters")
}

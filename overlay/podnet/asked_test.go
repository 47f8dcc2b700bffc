package podnet

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
)

func TestPodHasOtherAttributesThanItAskedFor(t *testing.T) {
	const mac = "c2:11:22:33:44:55"
	for name, tt := range map[string]struct {
		capabilities wishes
		args         string // of the configuration
		env          [][2]string
		addrs, mac   string
	}{
		"ips and mac": {capabilities: wishes{"ips": []string{"10.244.3.77", "fd00:10:244:3::77/64"}, "mac": mac},
			addrs: "10.244.3.77/24 fd00:10:244:3::77/64", mac: mac},
		"IPv4 alone": {capabilities: wishes{"ips": []string{"10.244.3.77/24"}},
			addrs: "10.244.3.77/24 fd00:10:244:3::3/64", mac: "0a:58:0a:f4:03:4d"},
		"IPv6 alone, beyond what is handed out": {capabilities: wishes{"ips": []string{"fd00:10:244:3:a::7/128"}},
			addrs: "10.244.3.2/24 fd00:10:244:3:a::7/64", mac: "0a:58:0a:f4:03:02"},
		"mac alone":      {capabilities: wishes{"mac": "C2-11-22-33-44-55"}, mac: mac},
		"mac of its own": {capabilities: wishes{"mac": "0a:58:0a:f4:03:02"}, mac: "0a:58:0a:f4:03:02"},
		"nothing":        {capabilities: wishes{"ips": []string{}, "mac": ""}, mac: "0a:58:0a:f4:03:02"},
		"args": {args: `{"cni": {"ips": ["10.244.3.77"], "mac": "` + mac + `"}, "other": 1}`,
			addrs: "10.244.3.77/24 fd00:10:244:3::3/64", mac: mac},
		"args for others": {args: `{"cni": ["10.244.3.77"]}`, mac: "0a:58:0a:f4:03:02"},
		"CNI_ARGS": {
			env:   [][2]string{{"K8S_POD_NAME", "web"}, {"IP", "10.244.3.77/24,fd00:10:244:3::77"}, {"MAC", mac}},
			addrs: "10.244.3.77/24 fd00:10:244:3::77/64", mac: mac},
		"unknown ones in CNI_ARGS": {env: [][2]string{{"IgnoreUnknown", "1"}, {"COLOUR", "red"}, {"IP", "10.244.3.77"}},
			addrs: "10.244.3.77/24 fd00:10:244:3::3/64", mac: "0a:58:0a:f4:03:4d"},
		"all at once": {capabilities: wishes{"ips": []string{"10.244.3.77"}},
			args:  `{"cni": {"ips": ["10.244.3.78"], "mac": "` + mac + `"}}`,
			env:   [][2]string{{"IP", "10.244.3.79"}, {"MAC", "c2:11:22:33:44:56"}},
			addrs: "10.244.3.77/24 fd00:10:244:3::3/64", mac: mac},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			pod := netnstest.New(t)
			a := n.wishing("one", pod, tt.capabilities)
			a.rt.Args = tt.env
			if tt.args != "" {
				a.list = n.conflist("1.1.0", `"args": `+tt.args)
			}
			r := a.mustAdd()
			if tt.addrs == "" {
				tt.addrs = "10.244.3.2/24 fd00:10:244:3::3/64"
			}
			if got := fmt.Sprint(r.IPs[0].Address.String(), " ", r.IPs[1].Address.String()); got != tt.addrs {
				t.Errorf("addresses: %s, want %s", got, tt.addrs)
			}
			if got := r.Interfaces[1].Mac; got != tt.mac || !strings.Contains(pod.Run(t, "ip link show eth0"), tt.mac) {
				t.Errorf("MAC: %s, want %s", got, tt.mac)
			}
			for _, ip := range r.IPs {
				reach(t, n.NS, ip.Address.IP.String())
			}
			if err := a.check(); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			if err := a.del(); err != nil {
				t.Errorf("DEL: %v", err)
			}
			n.wantNothing("DEL")
		})
	}
}

func TestAskedForWhatNoPodCanHave(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	for _, tt := range []struct {
		key, value string
		says       []string
	}{
		{"ips", `["10.244.4.7"]`, []string{"10.244.4.7", "none of this node's subnets", subnet4, subnet6}},
		{"ips", `["10.244.3.0"]`, []string{"10.244.3.0 is the subnet's own"}},
		{"ips", `["10.244.3.1/24"]`, []string{"10.244.3.1 is the gateway's"}},
		{"ips", `["10.244.3.255"]`, []string{"10.244.3.255 is the subnet's broadcast"}},
		{"ips", `["fd00:10:244:3::"]`, []string{"fd00:10:244:3:: is the subnet's own"}},
		{"ips", `["fd00:10:244:3::1"]`, []string{"fd00:10:244:3::1 is the gateway's"}},
		{"ips", `["fd00:10:244:3::2"]`, []string{"fd00:10:244:3::2 is the VXLAN device's"}},
		{"ips", `["10.244.3.7/16"]`, []string{"10.244.3.7/16 is not of the length", subnet4, "10.244.3.7/24"}},
		{"ips", `["10.244.3.7", "10.244.3.8"]`, []string{"10.244.3.7 and 10.244.3.8 are both of subnet " + subnet4}},
		{"ips", `["10.244.3.7", "10.244.3.7/24"]`, []string{"10.244.3.7 and 10.244.3.7"}},
		{"ips", `["::ffff:10.244.3.7"]`, []string{"::ffff:10.244.3.7 is in none"}},
		{"ips", `["fd00:10:244:3::7%eth0"]`, []string{`"fd00:10:244:3::7%eth0" is no address`}},
		{"ips", `["10.244.3"]`, []string{`"10.244.3" is no address`}},
		{"ips", `[""]`, []string{`"" is no address`}},
		{"ips", `"10.244.3.7"`, []string{`"10.244.3.7" must be a list`}},
		{"mac", `"c2:11:22:33:44"`, []string{`"c2:11:22:33:44" is no MAC`}},
		{"mac", `"01:00:5e:00:00:01"`, []string{"01:00:5e:00:00:01 is a group's"}},
		{"mac", `"00:00:00:00:00:00"`, []string{"00:00:00:00:00:00 is no interface's"}},
		{"mac", `"0e:00:00:00:00:01"`, []string{"0e:00:00:00:00:01 is the MAC of the node's bridge tweed0"}},
		{"mac", `7`, []string{`7 must be a MAC`}},
	} {
		head := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "tweed", "type": "tweed-cni", "runDir": %q, `, n.runDir)
		for at, conf := range map[string]string{
			"runtimeConfig." + tt.key: `"runtimeConfig": {"` + tt.key + `": ` + tt.value + `}}`,
			"args.cni." + tt.key:      `"args": {"cni": {"` + tt.key + `": ` + tt.value + `}}}`,
		} {
			err := n.call("ADD", head+conf, "CNI_NETNS="+pod.Path())
			wantCode(t, at+" "+tt.value, err, 7, append(tt.says, at)...)
		}
		if err := n.call("DEL", head+`"runtimeConfig": {"`+tt.key+`": `+tt.value+`}}`); err != nil {
			t.Errorf("DEL with %s: %v", tt.value, err)
		}
	}
	for args, says := range map[string]string{
		"IP":                          `"IP" is not of the form KEY=value`,
		"IP=10.244.4.7":               "CNI_ARGS: IP: 10.244.4.7 is in none",
		"IP=10.244.3.7,10.244.3.8/24": "CNI_ARGS: IP: 10.244.3.7 and 10.244.3.8",
		"IP=x":                        `CNI_ARGS: IP: "x" is no address`,
		"MAC=x":                       `CNI_ARGS: MAC: "x" is no MAC`,
		"COLOUR=red":                  `COLOUR is "red"`,
		"IgnoreUnknown=x":             `IgnoreUnknown is "x"`,
	} {
		conf := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "tweed", "type": "tweed-cni", "runDir": %q}`, n.runDir)
		wantCode(t, args, n.call("ADD", conf, "CNI_NETNS="+pod.Path(), "CNI_ARGS="+args), 4, "CNI_ARGS", says)
		if err := n.call("DEL", conf, "CNI_ARGS="+args); err != nil {
			t.Errorf("DEL with %s: %v", args, err)
		}
	}
	n.wantNothing("refused wishes")
}

func TestAskedForWhatAnotherPodHas(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.mustAdd("auto", netnstest.New(t)) // 10.244.3.2, fd00:10:244:3::3
	const mac = "c2:11:22:33:44:55"
	first := n.wishing("first", netnstest.New(t), wishes{"ips": []string{"10.244.3.77"}, "mac": mac})
	first.mustAdd()
	for _, tt := range []struct {
		w    wishes
		says []string
	}{
		{wishes{"ips": []string{"10.244.3.77"}}, []string{"runtimeConfig.ips: 10.244.3.77 is taken", "first, "}},
		{wishes{"ips": []string{"fd00:10:244:3::3"}}, []string{"fd00:10:244:3::3 is taken", "container auto"}},
		{wishes{"mac": mac}, []string{"runtimeConfig.mac: " + mac + " is that of container first"}},
		{wishes{"mac": "0a:58:0a:f4:03:02"}, []string{"runtimeConfig.mac: 0a:58:0a:f4:03:02", "10.244.3.2", "auto"}},
	} {
		_, err := n.wishing("second", netnstest.New(t), tt.w).add()
		wantCode(t, fmt.Sprint(tt.w), err, 11, tt.says...)
	}
	if left := names(t, filepath.Join(n.runDir, "pods")); len(left) != 2 {
		t.Errorf("records: %v", left)
	}
	// A pod that comes back after its node has lost the DEL has what it had.
	n.Run(t, "ip link del "+vethName("first", "eth0"))
	second := n.wishing("second", netnstest.New(t), wishes{"mac": mac})
	if r := second.mustAdd(); r.Interfaces[1].Mac != mac {
		t.Errorf("second: %v", r)
	}
	third := n.wishing("third", netnstest.New(t), wishes{"ips": []string{"10.244.3.77"}})
	third.mustAdd()
	n.Run(t, "ip link del "+vethName("third", "eth0"))
	fourth := n.wishing("fourth", netnstest.New(t), wishes{"ips": []string{"10.244.3.77"}})
	if r := fourth.mustAdd(); r.IPs[0].Address.IP.String() != "10.244.3.77" {
		t.Errorf("fourth: %v", r)
	}
}

// asking is recordOf for a container that minds.
func asking(container string, ips []netip.Prefix, mac string) record {
	r := recordOf(container)
	r.asked = asked{ips: ips, ipField: "runtimeConfig.ips", macField: "runtimeConfig.mac"}
	if mac != "" {
		m, err := backend.ParseMAC(mac)
		if err != nil {
			panic(err)
		}
		r.asked.mac = m
	}
	return r
}

func TestTwoPodsGetOneMAC(t *testing.T) {
	for name, tt := range map[string]struct {
		subnets []netip.Prefix
		asks    record
	}{
		"of an address to come":                 {prefixes("10.1.2.0/24"), asking("a", nil, "0a:58:0a:01:02:03")},
		"of an IPv6 address to come":            {prefixes("fd00::/64"), asking("a", nil, "0a:58:00:00:00:05")},
		"an IPv6 address with the same low end": {prefixes("fd00::/64"), asking("a", prefixes("fd00::1:0:0:5/64"), "")},
	} {
		s, l := newStore(t)
		h, err := s.take(tt.asks, tt.subnets)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		l.set(h, 7)
		if err := h.save(); err != nil {
			t.Fatal(err)
		}
		h.release()
		for i := range 10 {
			other, err := s.take(recordOf(strconv.Itoa(i)), tt.subnets)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if other.MAC == h.MAC {
				t.Errorf("%s: %v and %v both have %s", name, h.Addrs, other.Addrs, h.MAC)
			}
			other.release()
		}
		if h, err = s.find("a", "eth0"); err != nil || h == nil {
			t.Fatal(h, err)
		}
		if _, err := h.free(); err != nil {
			t.Error(err)
		}
		if _, err := s.sweep(); err != nil { // the others have no veth
			t.Error(err)
		}
		if left := append(names(t, s.addrDir()), names(t, s.podDir())...); len(left) > 0 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
}

func TestManyPodsAskForTheSameAtOnce(t *testing.T) {
	for what, ask := range map[string]func(i int) record{
		"address": func(i int) record { return asking(fmt.Sprint("c", i), prefixes("10.1.2.7/24"), "") },
		"MAC":     func(i int) record { return asking(fmt.Sprint("c", i), nil, "c2:11:22:33:44:55") },
	} {
		s, l := newStore(t)
		var pods sync.WaitGroup
		var served atomic.Int32
		for i := range 16 {
			pods.Go(func() {
				h, err := s.take(ask(i), prefixes("10.1.2.0/24"))
				if err != nil {
					if !strings.Contains(err.Error(), "container c") {
						t.Errorf("%s: %v", what, err)
					}
					return
				}
				served.Add(1)
				l.set(h, i+1)
				if err := h.save(); err != nil {
					t.Error(err)
				}
				h.release()
			})
		}
		pods.Wait()
		if served.Load() != 1 {
			t.Errorf("%s: %d pods have it", what, served.Load())
		}
		if left := names(t, s.podDir()); len(left) != 1 {
			t.Errorf("%s: records: %v", what, left)
		}
	}
}

func TestHolderOfAnAddressCannotBeTold(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/24")
	if err := os.Truncate(s.addr(netip.MustParseAddr("10.1.2.2")), 0); err != nil {
		t.Fatal(err)
	}
	_, err := s.take(asking("b", prefixes("10.1.2.2/24"), ""), prefixes("10.1.2.0/24"))
	wantCode(t, "take", err, 11, "10.1.2.2", "cannot be read")
}

func FuzzAskedNeverPanics(f *testing.F) {
	for _, seed := range []string{"IP=10.1.2.3/24;MAC=c2:11:22:33:44:55", "IgnoreUnknown=1;A=B", ";;=", "IP=fd00::1%x"} {
		f.Add(seed, `["10.1.2.3", "fd00::9/64"]`, `{"cni": {"ips": ["10.1.2.3"], "mac": "x"}}`)
	}
	subnets := prefixes("10.1.2.0/24", "fd00::/64")
	f.Fuzz(func(t *testing.T, env, ips, args string) {
		c := Config{Args: json.RawMessage(args), RuntimeConfig: map[string]json.RawMessage{"ips": json.RawMessage(ips)}}
		a, err := c.asked(Pod{Args: env})
		if err != nil {
			return
		}
		wanted, err := a.fit(subnets)
		if err == nil && len(wanted) != len(a.ips) {
			t.Errorf("%v gives %v", a.ips, wanted)
		}
		for subnet, ip := range wanted {
			if !subnet.Contains(ip) || ip == subnet.Addr() || ip == subnet.Addr().Next() || ip.Zone() != "" {
				t.Errorf("%s of %s", ip, subnet)
			}
		}
	})
}

package podnet

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// living is a host of which the test says which veths it has.
type living struct {
	sync.Mutex
	veths map[string]int
}

func (l *living) set(h *hold, index int) {
	l.Lock()
	defer l.Unlock()
	h.Index = index
	l.veths[h.Veth] = index
}

func (l *living) kill(veth string) {
	l.Lock()
	defer l.Unlock()
	delete(l.veths, veth)
}

func newStore(t testing.TB) (*store, *living) {
	l := &living{veths: map[string]int{}}
	return &store{runDir: t.TempDir(), alive: func(veth string, index int) (bool, error) {
		l.Lock()
		defer l.Unlock()
		have, ok := l.veths[veth]
		return ok && (index == 0 || index == have), nil
	}}, l
}

func recordOf(container string) record {
	return record{Container: container, Interface: "eth0", Veth: vethName(container, "eth0")}
}

// attach takes addresses for a container and leaves it with a veth, as a finished ADD does.
func attach(t testing.TB, s *store, l *living, container string, subnets ...string) []netip.Prefix {
	t.Helper()
	h, err := s.take(recordOf(container), prefixes(subnets...))
	if err != nil {
		t.Fatal(err)
	}
	l.set(h, 7)
	if err := h.save(); err != nil {
		t.Fatal(err)
	}
	h.release()
	return h.Addrs
}

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	out, err := list(dir)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFreedAddressIsNotReusedAtOnce(t *testing.T) {
	s, l := newStore(t)
	first := attach(t, s, l, "a", "10.1.2.0/24", "fd00::/64")
	if want := fmt.Sprint(prefixes("10.1.2.2/24", "fd00::3/64")); fmt.Sprint(first) != want {
		t.Errorf("the first pod got %v, want %v", first, want)
	}
	h, err := s.find("a", "eth0")
	if err != nil || h == nil {
		t.Fatal(h, err)
	}
	if freed, err := h.free(); err != nil || len(freed) != 2 {
		t.Fatalf("freed %v, %v", freed, err)
	}
	if got := attach(t, s, l, "b", "10.1.2.0/24"); got[0].Addr() != netip.MustParseAddr("10.1.2.3") {
		t.Errorf("the next pod got %v", got)
	}
}

func TestSmallestSubnetServesOnePod(t *testing.T) {
	for subnet, want := range map[string]string{"10.1.2.4/30": "10.1.2.6", "fd00::8/126": "fd00::b"} {
		s, l := newStore(t)
		if got := attach(t, s, l, "a", subnet); got[0].Addr().String() != want {
			t.Errorf("%s: got %v, want %s", subnet, got, want)
		}
		_, err := s.take(recordOf("b"), prefixes(subnet))
		if err == nil || !strings.Contains(err.Error(), subnet+" is used up: all 1 addresses") {
			t.Errorf("%s: a second pod: %v", subnet, err)
		}
		if left := names(t, s.podDir()); len(left) != 1 {
			t.Errorf("%s: the refused pod left %v", subnet, left)
		}
	}
}

func TestReservedAddressIsHandedOut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var subnet netip.Prefix
		reserved := map[netip.Addr]bool{}
		if rapid.Bool().Draw(t, "ipv4") {
			b := [4]byte{10, rapid.Byte().Draw(t, "b"), rapid.Byte().Draw(t, "c"), rapid.Byte().Draw(t, "d")}
			subnet = netip.PrefixFrom(netip.AddrFrom4(b), rapid.IntRange(16, 30).Draw(t, "bits")).Masked()
		} else {
			b := [16]byte{0: 0xfd, 14: rapid.Byte().Draw(t, "n"), 15: rapid.Byte().Draw(t, "o")}
			subnet = netip.PrefixFrom(netip.AddrFrom16(b), rapid.IntRange(48, 126).Draw(t, "bits")).Masked()
			reserved[subnet.Addr().Next().Next()] = true
		}
		reserved[subnet.Addr()], reserved[subnet.Addr().Next()] = true, true
		first, last := podRange(subnet)
		if first.Is4() {
			if reserved[last.Next()] = true; subnet.Contains(last.Next().Next()) {
				t.Fatalf("%s: more than the last address is left out behind %s", subnet, last)
			}
		}
		if reserved[first] || reserved[last] || last.Less(first) || !subnet.Contains(first) || !subnet.Contains(last) {
			t.Fatalf("%s: from %s to %s", subnet, first, last)
		}
	})
}

func TestFullSubnetHoldsTheDead(t *testing.T) {
	s, l := newStore(t)
	for i := range 253 {
		attach(t, s, l, fmt.Sprint("c", i), "10.1.2.0/24")
	}
	if _, err := s.take(recordOf("new"), prefixes("10.1.2.0/24")); err == nil || !strings.Contains(err.Error(), "253") {
		t.Fatalf("with all pods alive: %v", err)
	}
	l.kill(vethName("c100", "eth0"))
	if got := attach(t, s, l, "new", "10.1.2.0/24"); got[0].Addr() != netip.MustParseAddr("10.1.2.102") {
		t.Errorf("got %v, want the address of the one that is gone", got)
	}
}

// TestFullSubnetHoldsTheDying has the kernel take its time over a pod that has just gone.
func TestFullSubnetHoldsTheDying(t *testing.T) {
	s, l := newStore(t)
	for i := range 5 {
		attach(t, s, l, fmt.Sprint("c", i), "10.1.2.0/29")
	}
	waits := 0
	s.wait = func() bool {
		if waits++; waits == 3 {
			l.kill(vethName("c3", "eth0"))
		}
		return waits < 5
	}
	if got := attach(t, s, l, "new", "10.1.2.0/29"); got[0].Addr() != netip.MustParseAddr("10.1.2.5") || waits != 3 {
		t.Errorf("got %v after waiting %d times", got, waits)
	}
	if _, err := s.take(recordOf("newer"), prefixes("10.1.2.0/29")); err == nil || waits != 5 {
		t.Errorf("with all pods alive: %v after waiting %d times", err, waits)
	}
}

func TestSecondFamilyIsUsedUp(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/24", "fd00::/126")
	if _, err := s.take(recordOf("b"), prefixes("10.1.2.0/24", "fd00::/126")); err == nil {
		t.Fatal("no error")
	}
	if left := names(t, s.addrDir()); len(left) != 2 {
		t.Errorf("taken afterwards: %v", left)
	}
}

func TestSweepMeetsAnAddAtWork(t *testing.T) {
	s, _ := newStore(t)
	h, err := s.take(recordOf("a"), prefixes("10.1.2.0/24", "fd00::/64"))
	if err != nil {
		t.Fatal(err)
	}
	if freed, err := s.sweep(); len(freed) != 0 || err != nil {
		t.Errorf("while the ADD is at work: freed %v, %v", freed, err)
	}
	h.release() // as if killed: there is no veth
	if freed, err := s.sweep(); len(freed) != 2 || err != nil {
		t.Errorf("after the ADD was killed: freed %v, %v", freed, err)
	}
	if left := append(names(t, s.addrDir()), names(t, s.podDir())...); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestAddIsKilledBeforeItNotesItsAddress(t *testing.T) {
	s, _ := newStore(t)
	if err := os.MkdirAll(s.podDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.addrDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	h, err := s.claim(recordOf("a"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.pick(netip.MustParsePrefix("10.1.2.0/24")); err != nil {
		t.Fatal(err)
	}
	h.release()
	if freed, err := s.sweep(); len(freed) != 1 || err != nil {
		t.Errorf("freed %v, %v", freed, err)
	}
	if left := append(names(t, s.addrDir()), names(t, s.podDir())...); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestAddIsKilledBeforeItsFileIsInPlace(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/24")
	h, tmp, err := s.create(recordOf("b"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(tmp); err != nil {
		t.Errorf("swept while the ADD was at work: %v", err)
	}
	h.release()
	if _, err := s.sweep(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, s.podDir()); len(got) != 1 {
		t.Errorf("left: %v", got)
	}
}

func TestVethIsAnotherOneOfTheSameName(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/24")
	l.veths[vethName("a", "eth0")] = 8
	if freed, err := s.sweep(); len(freed) != 1 || err != nil {
		t.Errorf("freed %v, %v", freed, err)
	}
}

func TestFileOfAnAddressIsEmpty(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/29")
	file := s.addr(netip.MustParseAddr("10.1.2.3"))
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"10.1.2.4", "10.1.2.5", "10.1.2.6"} {
		if got := attach(t, s, l, want, "10.1.2.0/29"); got[0].Addr().String() != want {
			t.Errorf("got %v, want %s", got, want)
		}
	}
	if _, err := s.sweep(); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("sweep: %v", err)
	}
	_, err := s.take(recordOf("b"), prefixes("10.1.2.0/29"))
	if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "all 5 addresses") {
		t.Errorf("with the rest taken: %v", err)
	}
}

func TestFileOfAnAddressIsNone(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/29")
	for addr, make := range map[string]func(path string) error{
		"10.1.2.3": func(path string) error { return os.Symlink("/etc/hostname", path) },
		"10.1.2.4": func(path string) error { return os.Symlink("nowhere", path) },
		"10.1.2.5": func(path string) error { return os.Mkdir(path, 0o755) },
	} {
		if err := make(s.addr(netip.MustParseAddr(addr))); err != nil {
			t.Fatal(err)
		}
	}
	if got := attach(t, s, l, "b", "10.1.2.0/29"); got[0].Addr() != netip.MustParseAddr("10.1.2.6") {
		t.Errorf("got %v", got)
	}
	_, err := s.take(recordOf("c"), prefixes("10.1.2.0/29"))
	for _, says := range []string{"10.1.2.3: too many levels", "10.1.2.4: too many levels",
		"10.1.2.5: is a directory", "all 5 addresses"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("with the rest taken: %v, without %q", err, says)
		}
	}
}

func TestRecordIsAnothers(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/24")
	theirs, err := json.Marshal(record{Container: "b", Interface: "eth0", Veth: vethName("b", "eth0"), Index: 3})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.pod(vethName("a", "eth0")), theirs, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.take(recordOf("a"), prefixes("10.1.2.0/24")); err == nil || !strings.Contains(err.Error(), "already has") {
		t.Errorf("a second ADD: %v", err)
	}
	if freed, err := s.sweep(); len(freed) != 0 || err != nil {
		t.Errorf("pod alive: freed %v, %v", freed, err)
	}
	l.kill(vethName("a", "eth0"))
	if freed, err := s.sweep(); len(freed) != 1 || err != nil {
		t.Errorf("pod gone: freed %v, %v", freed, err)
	}
}

func TestRecordCannotBeRead(t *testing.T) {
	s, l := newStore(t)
	for _, text := range []string{"", "{", `"x"`, "{}", "\x00\x00\x00"} {
		attach(t, s, l, "a", "10.1.2.0/24", "fd00::/64")
		if err := os.WriteFile(s.pod(vethName("a", "eth0")), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if freed, err := s.sweep(); len(freed) != 0 || err != nil {
			t.Errorf("%q, pod alive: freed %v, %v", text, freed, err)
		}
		if used, err := FormerSubnets(s.runDir, nil); len(used) != 0 || err != nil {
			t.Errorf("%q: in use: %v, %v", text, used, err)
		}
		l.kill(vethName("a", "eth0"))
		if freed, err := s.sweep(); len(freed) != 2 || err != nil {
			t.Errorf("%q, pod gone: freed %v, %v", text, freed, err)
		}
	}
}

// FuzzRecordOfALivingPod writes something else into a pod's file. Its addresses stay taken for as long as its veth is
// there, unless it is well said that the veth was another of that name; and when that is gone they are free.
func FuzzRecordOfALivingPod(f *testing.F) {
	veth := vethName("a", "eth0")
	for _, text := range []string{"", "{", "{}", `"x"`, `{"veth":"` + veth + `"}`, `{"veth":"tweed0123456789","ifindex":3}`,
		`{"veth":"` + veth + `","ifindex":7,"addresses":["10.1.2.9/24"]}`, `{"veth":"` + veth + `","ifindex":3}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, l := newStore(t)
		attach(t, s, l, "a", "10.1.2.0/24", "fd00::/64")
		attach(t, s, l, "b", "10.1.2.0/24", "fd00::/64")
		if err := os.WriteFile(s.pod(veth), text, 0o644); err != nil {
			t.Fatal(err)
		}
		rec, _ := readRecord(bytes.NewReader(text))
		other := rec.Veth == veth && rec.Index != 0 && rec.Index != 7
		if freed, err := s.sweep(); err != nil || len(freed) != 0 && !other {
			t.Errorf("pod alive: freed %v, %v", freed, err)
		}
		l.kill(veth)
		if _, err := s.sweep(); err != nil {
			t.Errorf("pod gone: %v", err)
		}
		if left := append(names(t, s.addrDir()), names(t, s.podDir())...); len(left) != 3 {
			t.Errorf("left: %v, want what the other pod has", left)
		}
	})
}

func TestNameOfARecordIsRemovedByHand(t *testing.T) {
	s, l := newStore(t)
	attach(t, s, l, "a", "10.1.2.0/24", "fd00::/64")
	for _, a := range []string{"fd00::3"} {
		if err := os.Remove(s.addr(netip.MustParseAddr(a))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(s.pod(vethName("a", "eth0"))); err != nil {
		t.Fatal(err)
	}
	if freed, err := s.sweep(); len(freed) != 0 || err != nil {
		t.Errorf("pod alive: freed %v, %v", freed, err)
	}
	l.kill(vethName("a", "eth0"))
	if freed, err := s.sweep(); len(freed) != 1 || err != nil {
		t.Errorf("pod gone: freed %v, %v", freed, err)
	}
}

func TestPointerIsGarbage(t *testing.T) {
	for _, text := range []string{"", "x", "10.9.9.9", "10.1.2.255", "10.1.2.1", "fd00::5"} {
		s, l := newStore(t)
		if err := os.WriteFile(s.last(netip.MustParsePrefix("10.1.2.0/24")), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := attach(t, s, l, "a", "10.1.2.0/24"); got[0].Addr().String() != "10.1.2.2" {
			t.Errorf("%q: got %v", text, got)
		}
	}
}

func TestTwoAddsWantTheSameContainer(t *testing.T) {
	s, l := newStore(t)
	first, err := s.take(recordOf("a"), prefixes("10.1.2.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error)
	go func() {
		_, err := s.take(recordOf("a"), prefixes("10.1.2.0/24"))
		second <- err
	}()
	l.set(first, 7)
	if err := first.save(); err != nil {
		t.Fatal(err)
	}
	first.release()
	if err := <-second; err == nil || !strings.Contains(err.Error(), "already has interface eth0") {
		t.Errorf("the second: %v", err)
	}
	if left := names(t, s.addrDir()); len(left) != 1 {
		t.Errorf("taken: %v", left)
	}
}

func TestFileIsReplacedWhileADelWaits(t *testing.T) {
	s, _ := newStore(t)
	first, err := s.take(recordOf("a"), prefixes("10.1.2.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	info, err := first.file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	waiter := make(chan *hold)
	go func() {
		h, err := s.find("a", "eth0")
		if err != nil {
			t.Error(err)
		}
		waiter <- h
	}()
	waiting := regexp.MustCompile(fmt.Sprintf(`-> FLOCK .*:%d `, info.Sys().(*syscall.Stat_t).Ino))
	await(t, "the DEL to wait", func() bool {
		locks, err := os.ReadFile("/proc/locks")
		return err != nil || waiting.Match(locks)
	})
	// The name goes to another file before the lock does.
	if err := os.Remove(s.pod(first.Veth)); err != nil {
		t.Fatal(err)
	}
	second, err := s.take(recordOf("a"), prefixes("10.1.2.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	first.release()
	second.release()
	if h := <-waiter; h == nil || !h.named(s.pod(first.Veth)) {
		t.Errorf("the DEL has locked a file that is not in place any more")
	} else {
		h.release()
	}
}

func TestPodsComeAndGoDuringSweeps(t *testing.T) {
	s, l := newStore(t)
	var holders sync.Map
	var pods, sweeper sync.WaitGroup
	stop := make(chan struct{})
	sweeper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := s.sweep(); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range 8 {
		pods.Go(func() {
			for j := range 50 {
				name := fmt.Sprintf("c%d-%d", i, j)
				h, err := s.take(recordOf(name), prefixes("10.1.2.0/28", "fd00::/124"))
				if err != nil {
					t.Error(err)
					return
				}
				for _, a := range h.Addrs {
					if other, taken := holders.LoadOrStore(a, name); taken {
						t.Errorf("%s is %s's and %v's", a, name, other)
					}
				}
				l.set(h, j+1)
				if err := h.save(); err != nil {
					t.Error(err)
				}
				h.release()
				if h, err = s.hold(s.pod(h.Veth), unix.LOCK_EX); err != nil {
					t.Errorf("a living pod's record: %v", err)
					return
				}
				for _, a := range h.Addrs {
					holders.Delete(a)
				}
				l.kill(h.Veth)
				if freed, err := h.free(); err != nil || len(freed) != 2 {
					t.Errorf("freed %v, %v", freed, err)
				}
			}
		})
	}
	pods.Wait()
	close(stop)
	sweeper.Wait()
	if left := append(names(t, s.addrDir()), names(t, s.podDir())...); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestSubnetHasChangedUnderLivingPods(t *testing.T) {
	s, l := newStore(t)
	if used, err := FormerSubnets(s.runDir, nil); len(used) != 0 || err != nil {
		t.Errorf("before the first pod: %v, %v", used, err)
	}
	attach(t, s, l, "a", "10.1.2.0/24", "fd00::/64")
	attach(t, s, l, "b", "10.1.3.0/24", "fd00::/64")
	used, err := FormerSubnets(s.runDir, nil)
	if want := fmt.Sprint(prefixes("10.1.2.0/24", "10.1.3.0/24", "fd00::/64")); err != nil || fmt.Sprint(used) != want {
		t.Errorf("in use: %v, %v", used, err)
	}
	former, err := FormerSubnets(s.runDir, prefixes("10.1.3.0/24", "fd00::/64"))
	if want := fmt.Sprint(prefixes("10.1.2.0/24")); err != nil || fmt.Sprint(former) != want {
		t.Errorf("former: %v, %v", former, err)
	}
}

func TestMACOfAPod(t *testing.T) {
	for _, tt := range []struct {
		addrs []netip.Prefix
		want  string
	}{
		{prefixes("10.244.3.2/24"), "0a:58:0a:f4:03:02"},
		{prefixes("10.244.3.2/24", "fd00::1:2:3/64"), "0a:58:0a:f4:03:02"},
		{prefixes("fd00::1:2:3/64", "10.244.3.2/24"), "0a:58:0a:f4:03:02"},
		{prefixes("fd00::1:2:3/64"), "0a:58:00:02:00:03"},
	} {
		if got := podMAC(tt.addrs); got.String() != tt.want {
			t.Errorf("%v: %s, want %s", tt.addrs, got, tt.want)
		}
	}
}

package overlay

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/overlay/podnet"
)

// remains is a Fake on which pods come to be attached.
type remains struct {
	*kernel.Fake
	looks int
	// from is the look from which on there is a pod; 0 stands for never.
	from int
}

func (r *remains) ObserveAll(ctx context.Context) (backend.State, error) {
	r.looks++
	have, err := r.Fake.ObserveAll(ctx)
	if r.from > 0 && r.looks >= r.from {
		have.Links["tweedab"] = backend.Link{Name: "tweedab", Type: backend.KindVeth}
	}
	return have, err
}

// A record is what a node has published.
type record struct {
	published string
	refused   error
}

func (r *record) Published(context.Context) (string, error) { return r.published, nil }

func (r *record) Withdraw(context.Context) error {
	if r.refused == nil {
		r.published = ""
	}
	return r.refused
}

// leaving is a cleanup of a node whose daemon made a pass and ended.
func leaving(t *testing.T) (c *Cleanup, r *remains, told *[]string) {
	t.Helper()
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	n.step(t)
	n.step(t)
	told = &[]string{}
	r = &remains{Fake: n.kern}
	return &Cleanup{
		Remains: r, CNI: n.cni, PluginDir: t.TempDir(), Record: &record{published: "unpublish"},
		Say: func(command string) { *told = append(*told, command) },
	}, r, told
}

func TestCleanupStopsAtWhatCannotBeRemoved(t *testing.T) {
	c, r, told := leaving(t)
	r.Fail(func(op backend.Op) error {
		if l, ok := op.What.(backend.Link); ok && l.Name == BridgeName {
			return errors.New("busy")
		}
		return nil
	})
	c.Record = &record{published: "unpublish", refused: errors.New("forbidden")}
	_, err := c.Run(t.Context())
	if err == nil || err.Error() != "ip link del tweed0: busy\nunpublish: forbidden" {
		t.Errorf("it ends with %v", err)
	}
	r.Fail(nil)
	have, _ := r.Fake.ObserveAll(t.Context())
	rules, _ := r.ObserveAllFilters(t.Context())
	if len(have.Links) != 1 || rules.Len() > 0 || exists(c.CNI.RunDir) {
		t.Errorf("left: %v, %v; done: %v", have.Links, rules, *told)
	}
	*told = nil
	c.Record = &record{published: "unpublish"}
	if _, err := c.Run(t.Context()); err != nil || !slices.Equal(*told, []string{"ip link del tweed0", "unpublish"}) {
		t.Errorf("another try: %v, %v", err, *told)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// The filter must not go while there is something that its rules are for.
func TestFilterGoesBeforeTheDevices(t *testing.T) {
	c, _, told := leaving(t)
	if _, err := c.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	device := slices.Index(*told, "ip link del tweed0")
	filter := slices.IndexFunc(*told, func(line string) bool { return strings.Contains(line, "tables ") })
	if device < 0 || filter < device {
		t.Errorf("done in this order:\n%s", strings.Join(*told, "\n"))
	}
}

func TestPodIsAttachedDuringTheCleanup(t *testing.T) {
	c, r, told := leaving(t)
	r.from = 2
	_, err := c.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "pods are attached to this node (1, by tweedab)") {
		t.Errorf("it ends with %v", err)
	}
	if slices.ContainsFunc(*told, func(line string) bool { return strings.HasPrefix(line, "ip ") }) || exists(
		filepath.Join(c.CNI.Dir, ConflistName)) {
		t.Errorf("done: %v; want the files without which no more pods come, and no more", *told)
	}
}

// A daemon that waited for the lock must not run with one that is not there any more, beside one that made it anew.
func TestCleanupTakesTheLockFromAWaitingDaemon(t *testing.T) {
	dir := t.TempDir()
	first, err := lock(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	waits, got := make(chan struct{}), make(chan error, 1)
	go func() {
		unlock, err := lock(t.Context(), dir, slog.New(notify{waits}))
		if unlock != nil {
			defer unlock()
		}
		_, err2 := os.Lstat(lockPath(dir))
		got <- errors.Join(err, err2)
	}()
	<-waits
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	first()
	if err := <-got; err != nil {
		t.Errorf("the daemon has a lock that nobody sees: %v", err)
	}
}

// Where what a further plugin did for a pod cannot be taken back, the record of it is needed for another try.
func TestRecordIsLostBeforeItsPluginIsDone(t *testing.T) {
	c, _, _ := leaving(t)
	attached(t, c.CNI.RunDir, "10.244.1.5/24")
	pod := filepath.Join(c.CNI.RunDir, "pods", "tweed0123456789")
	text := `{"container":"c","interface":"eth0","veth":"tweed0123456789","ifindex":7,"addresses":["10.244.1.5/24"],` +
		`"delegates":[{"cniVersion":"1.0.0","name":"tweed","type":"nosuchplugin"}]}`
	if err := os.WriteFile(pod, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := c.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "nosuchplugin") || !exists(pod) {
		t.Errorf("it ends with %v; the record is there: %v", err, exists(pod))
	}
	c.Force = true
	if _, err := c.Run(t.Context()); err == nil || exists(c.CNI.RunDir) {
		t.Errorf("by force it ends with %v; the run directory is there: %v", err, exists(c.CNI.RunDir))
	}
}

func TestFileThatTellsNotWhoseItIsKeepsTheDirectory(t *testing.T) {
	c, _, _ := leaving(t)
	addrs := filepath.Join(c.CNI.RunDir, "addrs")
	err := errors.Join(os.MkdirAll(addrs, 0o755), os.WriteFile(filepath.Join(addrs, "10.244.1.9"), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Run(t.Context()); err != nil || exists(c.CNI.RunDir) {
		t.Errorf("it ends with %v; the run directory is there: %v", err, exists(c.CNI.RunDir))
	}
}

// --run-dir may be wrong.
func TestRunDirectoryIsSomebodyElses(t *testing.T) {
	c, _, told := leaving(t)
	theirs := filepath.Join(c.CNI.RunDir, "containerd", "containerd.sock")
	if err := errors.Join(os.Mkdir(filepath.Dir(theirs), 0o755), os.WriteFile(theirs, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Run(t.Context()); err != nil || !exists(theirs) {
		t.Errorf("it ends with %v; the file is there: %v; done: %v", err, exists(theirs), *told)
	}
	if left, others, err := podnet.Files(c.CNI.RunDir); err != nil || len(left) > 0 || len(others) != 1 {
		t.Errorf("left: %v, %v, %v", left, others, err)
	}
}

// A daemon with another run directory has another lock.
func TestSomebodyPutsBackWhatIsRemoved(t *testing.T) {
	c, r, _ := leaving(t)
	c.Say = func(command string) {
		if command == "ip link del tweed0" {
			mac := backend.MAC{0x0e}
			again := backend.Link{Name: BridgeName, Type: backend.KindBridge, MAC: mac, MTU: 1450, Up: true}
			if err := r.ByHand(backend.Op{Do: backend.Add, What: again}); err != nil {
				t.Error(err)
			}
		}
	}
	_, err := c.Run(t.Context())
	if err == nil || err.Error() != "ip link del tweed0: somebody makes it anew each time it is removed" {
		t.Errorf("it ends with %v", err)
	}
}

func TestRefusalMakesTheRunDirectory(t *testing.T) {
	c, r, _ := leaving(t)
	r.from = 1
	if err := os.RemoveAll(c.CNI.RunDir); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Run(t.Context()); err == nil || exists(c.CNI.RunDir) {
		t.Errorf("it ends with %v; the run directory is there: %v", err, exists(c.CNI.RunDir))
	}
}

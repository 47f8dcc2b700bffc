package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/world"
)

// TestRunIsKilled kills runs in the middle of their start. Nothing may be left: no process, and no cgroup.
func TestRunIsKilled(t *testing.T) {
	for _, c := range []struct {
		run, when string
	}{
		{"^TestCluster$/^$", "daemons are started"},
		{"^TestMistakes$/^$", "they have registered"},
	} {
		t.Run(c.when, func(t *testing.T) { kill(t, c.run, c.when) })
	}
}

func kill(t *testing.T, run, when string) {
	t.Helper()
	id := fmt.Sprintf("TWEED_E2E_KILLED=%d-%d", os.Getpid(), time.Now().UnixNano())
	cmd := exec.Command("/proc/self/exe", "-test.run="+run)
	cmd.Env = append(world.Environ(), id)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []string
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		said = append(said, lines.Text())
		if strings.Contains(lines.Text(), when) {
			break
		}
	}
	living, err := world.Processes(id)
	if err != nil {
		t.Fatal(err)
	}
	if len(living) == 0 || len(cgroups(t)) == 0 {
		t.Errorf("the run has %d processes and %d cgroups before it is killed; it said\n%s", len(living), len(cgroups(t)),
			strings.Join(said, "\n"))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	cluster.Await(t, "the killed run to leave nothing", func() error {
		living, err := world.Processes(id)
		if left := append(living, cgroups(t)...); err == nil && len(left) > 0 {
			err = errors.New(strings.Join(left, "; "))
		}
		return err
	})
}

// cgroups lists those that runs have made below this one's own.
func cgroups(t *testing.T) (dirs []string) {
	t.Helper()
	all, err := world.Controllers()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		below, err := filepath.Glob(c.Dir() + "/tweed-e2e-*")
		if err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, below...)
	}
	return dirs
}

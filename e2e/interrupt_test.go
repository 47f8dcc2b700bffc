package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/world"
)

// TestRunIsKilled kills a run when its daemons have just started. Nothing may be left that lives.
func TestRunIsKilled(t *testing.T) {
	id := fmt.Sprintf("TWEED_E2E_KILLED=%d", os.Getpid())
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCluster$/^$")
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
		if strings.Contains(lines.Text(), "daemons are started") {
			break
		}
	}
	living, err := world.Processes(id)
	if err != nil {
		t.Fatal(err)
	}
	const atLeast = 2 + 2 + 3 // the run, outside and inside, the control plane and the daemons
	if len(living) < atLeast {
		t.Errorf("the run has %d processes before it is killed, want %d:\n%s\nit said\n%s", len(living), atLeast,
			strings.Join(living, "\n"), strings.Join(said, "\n"))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	cluster.Await(t, "the processes of the killed run to end", func() error {
		living, err := world.Processes(id)
		if err == nil && len(living) > 0 {
			err = errors.New(strings.Join(living, "; "))
		}
		return err
	})
}

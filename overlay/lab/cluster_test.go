package lab

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestScripts uses the lab's commands as a person does. A script may leave its lab up.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	build(t)
	for _, file := range files { // one after the other: there is one lab of this name
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			before := look(t)
			t.Run("script", func(t *testing.T) {
				testscript.Run(t, testscript.Params{
					Files: []string{file},
					Setup: func(env *testscript.Env) error {
						env.Setenv("PATH", binDir+":"+os.Getenv("PATH"))
						return nil
					},
				})
			})
			l := New(filepath.Join(binDir, "tweed"), writer{t})
			if _, err := l.Down(t.Context()); err != nil && !errors.Is(err, ErrNone) {
				t.Errorf("taking the lab down: %v", err)
			}
			checkLeft(t, before)
		})
	}
}

func TestDaemonCannotStart(t *testing.T) {
	l := newLab(t)
	l.afterStep = func(step string) error {
		if step != "n2" {
			return nil
		}
		return os.WriteFile(l.path("n2", "etc", "net-conf.json"), []byte(`{"Netwrk": 7}`), 0o644)
	}
	err := l.Up(t.Context(), twoNodes)
	for _, want := range []string{
		"the daemon of n2 ended (exit status 1)", "/run/lt/n2/tweed.log", "Netwrk", "`tweed lab down` removes it",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestDaemonIsNotReady(t *testing.T) {
	l := newLab(t)
	l.readyTimeout = 3 * time.Second
	l.afterStep = func(step string) error {
		if step != "n1" {
			return nil
		}
		return l.ip(t.Context(), l.netns("n1"), "link add tweed.1 type bridge")
	}
	err := l.Up(t.Context(), Options{Nodes: 1, Pods: 1, Underlay: "ipv4"})
	for _, want := range []string{"the daemon of n1 is not ready after 3s\n  n1: ", "tweed.1", "/run/lt/n1/tweed.log"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	status, err := l.Status(t.Context())
	if err != nil || status.Healthy() || status.Nodes[0].PID == 0 || status.Nodes[0].Ready {
		t.Errorf("status %+v, %v; want one node whose daemon runs and is not ready", status, err)
	}
}

// Package e2e watches a real cluster from outside.
package e2e

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"tweed.dev/tweed/e2e/build"
	"tweed.dev/tweed/e2e/jail"
	"tweed.dev/tweed/e2e/machine"
	"tweed.dev/tweed/e2e/world"
)

// programsVariable hands what was built on the outside to the run.
const programsVariable = "TWEED_E2E_PROGRAMS"

func TestMain(m *testing.M) {
	jail.Enter()
	machine.Enter()
	world.Enter()
	if world.Inside() {
		os.Exit(inside(m))
	}
	assignment := programsVariable + "=" + os.Getenv(programsVariable)
	if os.Getenv(programsVariable) == "" {
		var err error
		if assignment, err = buildAll(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			os.Exit(1)
		}
	}
	os.Exit(world.Run(assignment))
}

func buildAll() (assignment string, err error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	p, err := build.All(dir, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(p)
	return programsVariable + "=" + string(b), err
}

// inside runs the tests and holds them to leave nothing behind, not even in a world that ends with them.
func inside(m *testing.M) int {
	if err := world.Settle(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	flag.Parse()
	status := m.Run()
	left, err := world.Leftovers()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: looking for what the tests left:", err)
		return 1
	}
	if len(left) > 0 {
		fmt.Fprintln(os.Stderr, "e2e: the tests left behind:\n ", strings.Join(left, "\n  "))
		return 1
	}
	return status
}

func programs(t testing.TB) (p build.Programs) {
	t.Helper()
	if err := json.Unmarshal([]byte(os.Getenv(programsVariable)), &p); err != nil {
		t.Fatalf("%s: %v", programsVariable, err)
	}
	return p
}

// A stage is what the steps of a test share.
type stage interface {
	Progress(format string, args ...any)
	// Dump prints what a person would look at.
	Dump(testing.TB)
}

// step runs one step of a test, which leaves the stage as it was.
func step(t *testing.T, s stage, name string, f func(*testing.T)) {
	t.Run(name, func(t *testing.T) {
		s.Progress("%s", name)
		defer explain(t, s)
		f(t)
	})
}

// explain prints what a person would look at, if t failed.
func explain(t *testing.T, s stage) {
	if t.Failed() {
		s.Progress("%s FAILED", t.Name())
		s.Dump(t)
	}
}

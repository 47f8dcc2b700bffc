package main

import (
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

type inNamespaces struct{ m *testing.M }

func (i inNamespaces) Run() int { return netnstest.Run(i.m.Run) }

func TestMain(m *testing.M) {
	testscript.Main(inNamespaces{m}, map[string]func(){"tweed": main, "forge": forge})
}

// TestScripts runs testdata/*.txtar. Each script has a node of its own: a network namespace with nothing but lo.
func TestScripts(t *testing.T) {
	plugins := t.TempDir()
	build := exec.Command("go", "build", "-o", plugins, "../tweed-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building tweed-cni: %v\n%s", err, out)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			ns := netnstest.New(env.T().(testing.TB))
			env.Setenv("NODE_NS", ns.Path())
			env.Setenv("PLUGIN_DIR", plugins)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"node": onNode, "exits": exits, "await": await,
		},
	})
}

// onNode runs a command in the script's network namespace: node ip link.
func onNode(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("nsenter", node(ts, args)...)
	if neg && err == nil {
		ts.Fatalf("%v succeeded", args)
	}
	if !neg && err != nil {
		ts.Fatalf("%v: %v", args, err)
	}
}

// exits checks the exit status of a command on the node: exits 2 tweed plan.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec("nsenter", node(ts, args[1:])...)
	got := 0
	if e, ok := err.(interface{ ExitCode() int }); ok {
		got = e.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%v exits %d, want %d", args[1:], got, want)
	}
}

// await repeats a command on the node until it succeeds; ! await until it fails.
func await(ts *testscript.TestScript, neg bool, args []string) {
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := ts.Exec("nsenter", node(ts, args)...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v: still %v after 30 s", args, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func node(ts *testscript.TestScript, args []string) []string {
	return append([]string{"--net=" + ts.Getenv("NODE_NS"), "--"}, args...)
}

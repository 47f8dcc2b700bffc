package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
)

// isolated runs a shell script that writes to out, in mount and process namespaces of its own, with memory mounted at
// $WORK: however it ends, killed included, no mount and no process outlives it. program is what it needs.
func isolated(ctx context.Context, script, program, out string, env ...string) error {
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("images need Debian's package %s: %w", program, err)
	}
	return beside(out, func(work string) error {
		cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
			"sh", "-euc", "mount -t tmpfs -o mode=755 work \"$WORK\"\n"+script)
		cmd.Env = append(append(os.Environ(), "OUT="+out, "WORK="+work, "TMPDIR="+work), env...)
		return run(cmd)
	})
}

// run starts a program, waits for it, and says in its error what it printed. The program does not outlive this one.
func run(cmd *exec.Cmd) error {
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig follows the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, output.Bytes())
	}
	return nil
}

// beside makes a directory for the time that out is being made. In the cache, one that was left by a killed process is
// found by its name.
func beside(out string, do func(dir string) error) error {
	dir := out + ".d"
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return do(dir)
}

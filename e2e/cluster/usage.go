package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A Usage is what a process takes of the machine.
type Usage struct {
	// Resident and Peak are its memory now, and when it was most, in bytes.
	Resident, Peak int64
	// CPU is the processor time it had so far, to a hundredth of a second.
	CPU time.Duration
}

// Usage reads what the kernel says of the process.
func (p *Process) Usage(t testing.TB) (u Usage) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d", p.cmd.Process.Pid)
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		t.Fatalf("%s: %v", p.Name, err)
	}
	for line := range strings.Lines(string(status)) {
		var kB int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kB); n == 1 {
			u.Resident = kB << 10
		}
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kB); n == 1 {
			u.Peak = kB << 10
		}
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		t.Fatalf("%s: %v", p.Name, err)
	}
	// proc_pid_stat(5): utime and stime are fields 14 and 15, in ticks of 10 ms; the second, a name, ends with ")".
	var user, system int64
	_, after, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(after)
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatalf("%s: %s: %v", p.Name, stat, err)
	}
	u.CPU = time.Duration(user+system) * 10 * time.Millisecond
	return u
}

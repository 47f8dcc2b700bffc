package cluster

import (
	"testing"
	"time"
)

// patience is for two slow cores that somebody else uses too.
const patience = 60 * time.Second

// Await calls check until it has nothing to say, and ends the test if that takes too long. It logs what was remarkably
// slow, with what check said last.
func Await(t testing.TB, what string, check func() error) {
	t.Helper()
	AwaitLong(t, what, patience, check)
}

// AwaitLong is Await for what takes its time by design.
func AwaitLong(t testing.TB, what string, patience time.Duration, check func() error) {
	t.Helper()
	begun := time.Now()
	for last := error(nil); ; {
		err := check()
		took := time.Since(begun).Round(time.Millisecond)
		if err == nil {
			if took > patience/6 {
				t.Logf("%s took %v; before that: %v", what, took, last)
			}
			return
		}
		if took > patience {
			t.Fatalf("waited %v for %s: %v", took, what, err)
		}
		last = err
		time.Sleep(25 * time.Millisecond)
	}
}

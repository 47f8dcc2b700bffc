package subnet

import (
	"os"
	"regexp"
	"slices"
	"testing"
)

// TestKindOfProblemIsNotListed reads the constants.
func TestKindOfProblemIsNotListed(t *testing.T) {
	text, err := os.ReadFile("lease.go")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^\tKind\w+ += "(\w+)"`).FindAllSubmatch(text, -1)
	for _, m := range found {
		if !slices.Contains(Kinds(), string(m[1])) {
			t.Errorf("Kinds lacks %q", m[1])
		}
	}
	if len(found) != len(Kinds()) {
		t.Errorf("%d constants, and Kinds has %d", len(found), len(Kinds()))
	}
}

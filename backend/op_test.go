package backend

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"testing"
)

// TestKindIsNotListed reads what Kind methods say, here and in the packet filter's packages.
func TestKindIsNotListed(t *testing.T) {
	said := map[string]bool{}
	for _, dir := range []string{".", "masq", "spoof"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`\) Kind\(\) string { return "(.*)" }`).FindAllSubmatch(text, -1) {
				said[string(m[1])] = true
			}
		}
	}
	for kind := range said {
		if !slices.Contains(Kinds(), kind) {
			t.Errorf("an object says that its kind is %q, and Kinds lacks it", kind)
		}
	}
	if len(said) != len(Kinds()) {
		t.Errorf("objects say %v, Kinds %v", said, Kinds())
	}
}

// TestStatesDifferUnseen puts one object of each sort into an empty state.
func TestStatesDifferUnseen(t *testing.T) {
	for i := range reflect.TypeFor[State]().NumField() {
		var s State
		field := reflect.ValueOf(&s).Elem().Field(i)
		if field.Kind() != reflect.Map { // Version
			continue
		}
		m := reflect.MakeMap(field.Type())
		m.SetMapIndex(reflect.Zero(field.Type().Key()), reflect.Zero(field.Type().Elem()))
		field.Set(m)
		if same := s; s.Equal(State{}) || (State{}).Equal(s) || !s.Equal(same) {
			t.Errorf("Equal does not look at %s", reflect.TypeFor[State]().Field(i).Name)
		}
	}
}

package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// rivals says which files a container runtime would take in place of ours: it takes the first by name.
func (c CNIConf) rivals() (problems []string) {
	files, err := os.ReadDir(c.Dir) // sorted by name
	if err != nil {
		return nil // there is no file, or writing ours says why not
	}
	for _, f := range files {
		if f.Name() >= ConflistName {
			break
		}
		if f.IsDir() || !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(f.Name())) {
			continue
		}
		path := filepath.Join(c.Dir, f.Name())
		problems = append(problems, fmt.Sprintf("%s sorts before %s, and a container runtime takes the first: pods on this "+
			"node are attached by that and not by tweed; if that network is no longer wanted, remove its program and the "+
			"file, then restart the pods", path, ConflistName))
	}
	return problems
}

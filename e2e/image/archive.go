package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime"
)

// A picture is an image to write: its names, the tars that it consists of, the lowest first, and how it starts.
type picture struct {
	Names  []string
	Layers []string
	Config settings
}

// settings is the part of an image's configuration that we set, with the names of the OCI image specification.
type settings struct {
	Env        []string `json:",omitempty"`
	Entrypoint []string `json:",omitempty"`
	Cmd        []string `json:",omitempty"`
}

// A manifest is an image's entry in manifest.json of a docker-archive.
type manifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// writeArchive writes a docker-archive of images. A layer of several is in it once.
func writeArchive(out string, pictures []picture) error {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	a := archive{Writer: tar.NewWriter(f), digests: map[string]string{}}
	var manifests []manifest
	for _, p := range pictures {
		m, err := a.add(p)
		if err != nil {
			return err
		}
		manifests = append(manifests, m)
	}
	b, err := json.Marshal(manifests)
	if err != nil {
		return err
	}
	if err := a.addBytes("manifest.json", b); err != nil {
		return err
	}
	return errors.Join(a.Close(), f.Close())
}

type archive struct {
	*tar.Writer
	digests map[string]string // of the layers that are in it, by their paths
}

func (a archive) add(p picture) (manifest, error) {
	var config struct {
		Architecture string   `json:"architecture"`
		OS           string   `json:"os"`
		Config       settings `json:"config"`
		RootFS       struct {
			Type    string   `json:"type"`
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	config.Architecture, config.OS, config.Config, config.RootFS.Type = runtime.GOARCH, "linux", p.Config, "layers"
	m := manifest{RepoTags: p.Names}
	for _, path := range p.Layers {
		digest, err := a.addLayer(path)
		if err != nil {
			return manifest{}, err
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, "sha256:"+digest)
		m.Layers = append(m.Layers, digest+".tar")
	}
	b, err := json.Marshal(config)
	if err != nil {
		return manifest{}, err
	}
	digest := sha256.Sum256(b)
	m.Config = hex.EncodeToString(digest[:]) + ".json"
	return m, a.addBytes(m.Config, b)
}

func (a archive) addLayer(path string) (digest string, err error) {
	if known := a.digests[path]; known != "" {
		return known, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, f)
	if err != nil {
		return "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	digest = hex.EncodeToString(hash.Sum(nil))
	a.digests[path] = digest
	return digest, a.addStream(digest+".tar", size, f)
}

func (a archive) addBytes(name string, b []byte) error {
	return a.addStream(name, int64(len(b)), bytes.NewReader(b))
}

func (a archive) addStream(name string, size int64, from io.Reader) error {
	if err := a.WriteHeader(&tar.Header{Name: name, Mode: 0o444, Size: size}); err != nil {
		return err
	}
	_, err := io.Copy(a, from)
	return err
}

// An entry is one file of a layer: a directory, a link, or a copy of a file of this machine.
type entry struct {
	Name string
	Mode int64
	Copy string // path of the file to copy
	Link string // symbolic link's target
}

// writeLayer writes a layer that is the same bits for the same entries.
func writeLayer(out string, entries []entry) error {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	t := tar.NewWriter(f)
	for _, e := range entries {
		if err := writeEntry(t, e); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), f.Close())
}

func writeEntry(t *tar.Writer, e entry) error {
	switch {
	case e.Link != "":
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: e.Name, Linkname: e.Link, Mode: 0o777})
	case e.Copy == "":
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: e.Name, Mode: e.Mode})
	}
	b, err := os.ReadFile(e.Copy)
	if err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: e.Name, Mode: e.Mode, Size: int64(len(b))}
	if err := t.WriteHeader(header); err != nil {
		return err
	}
	_, err = t.Write(b)
	return err
}

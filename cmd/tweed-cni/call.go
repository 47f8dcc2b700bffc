package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/overlay/podnet"
)

// What a runtime calls for is found out here and not by the skeleton that comes with the CNI spec: to set that one up,
// which compiles regular expressions each time, takes a twentieth of an ADD, and it does not say what to do about an
// error.

// versions are those of the CNI spec that the plugin speaks, oldest first.
func versions() []string { return []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} }

// A verb is an operation of the CNI spec (section 2).
type verb struct {
	since string   // the oldest of versions that has it
	needs []string // what has to be in the environment
	do    func(podnet.Config, podnet.Pod) error
}

func verbNamed(name string) (verb, bool) {
	switch name {
	case "ADD":
		return verb{"0.3.0", []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"}, add}, true
	case "DEL":
		return verb{"0.3.0", []string{"CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"}, podnet.Detach}, true
	case "CHECK":
		return verb{"0.4.0", []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"}, podnet.Check}, true
	case "STATUS":
		status := func(conf podnet.Config, _ podnet.Pod) error { return podnet.Status(conf) }
		return verb{"1.1.0", []string{"CNI_PATH"}, status}, true
	case "GC":
		collect := func(conf podnet.Config, pod podnet.Pod) error { return podnet.Collect(conf, pod.Path) }
		return verb{"1.1.0", []string{"CNI_PATH"}, collect}, true
	}
	return verb{}, false
}

// serve does what CNI_COMMAND in the environment names. The error has its code of the CNI spec (section 5, "Error").
func serve() *types.Error {
	name := os.Getenv("CNI_COMMAND")
	if name == "VERSION" {
		return printVersions()
	}
	v, ok := verbNamed(name)
	if !ok {
		return refuse(types.ErrInvalidEnvironmentVariables,
			"CNI_COMMAND is %q; it must be ADD, DEL, CHECK, STATUS, GC or VERSION", name)
	}
	args := os.Getenv("CNI_ARGS")
	pod := podnet.Pod{Container: os.Getenv("CNI_CONTAINERID"), NetNS: os.Getenv("CNI_NETNS"),
		Interface: os.Getenv("CNI_IFNAME"), Path: os.Getenv("CNI_PATH"), Args: args, Namespace: podnet.NamespaceOf(args)}
	if err := v.fits(name, pod); err != nil {
		return err
	}
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return refuse(types.ErrIOFailure, "reading the network configuration from stdin: %v", err)
	}
	conf, err := podnet.ParseConfig(text)
	if err != nil {
		return coded(err)
	}
	if err := v.follows(name, conf); err != nil {
		return err
	}
	if err := v.do(conf, pod); err != nil {
		return coded(err)
	}
	return nil
}

// fits checks the environment.
func (v verb) fits(name string, pod podnet.Pod) *types.Error {
	for _, key := range v.needs {
		if os.Getenv(key) == "" {
			return refuse(types.ErrInvalidEnvironmentVariables, "%s is missing from the environment; the runtime must set it "+
				"for %s", key, name)
		}
	}
	if !slices.Contains(v.needs, "CNI_IFNAME") {
		return nil
	}
	if !isName(pod.Container) {
		return refuse(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID is %q; %s", pod.Container, nameRule)
	}
	if why := unfitInterface(pod.Interface); why != "" {
		return refuse(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME is %q; an interface's name %s", pod.Interface, why)
	}
	return nil
}

// follows checks what the CNI spec wants of any network configuration (section 1).
func (v verb) follows(name string, conf podnet.Config) *types.Error {
	if conf.Name == "" {
		return refuse(types.ErrInvalidNetworkConfig, "network configuration: name is missing; give the network one")
	}
	if !isName(conf.Name) {
		return refuse(types.ErrInvalidNetworkConfig, "network configuration: name is %q; %s", conf.Name, nameRule)
	}
	all := versions()
	at := slices.Index(all, conf.CNIVersion)
	if at < 0 {
		return refuse(types.ErrIncompatibleCNIVersion, "network configuration: cniVersion is %q; tweed-cni speaks %s",
			conf.CNIVersion, strings.Join(all, ", "))
	}
	if at < slices.Index(all, v.since) {
		return refuse(types.ErrIncompatibleCNIVersion, "network configuration: cniVersion is %q, which has no %s; it needs %s",
			conf.CNIVersion, name, v.since)
	}
	return nil
}

const nameRule = "it must begin with a letter or a digit, and go on with those, dots, underscores and hyphens"

// isName reports whether the CNI spec allows a name for networks and containers.
func isName(name string) bool {
	for i, c := range []byte(name) {
		letter := '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || c != '-' && c != '_' && c != '.') {
			return false
		}
	}
	return name != ""
}

// unfitInterface says what the kernel minds about an interface's name (dev_valid_name, net/core/dev.c); "" where it
// takes it.
func unfitInterface(name string) string {
	switch {
	case len(name) >= unix.IFNAMSIZ:
		return fmt.Sprintf("is too long with %d bytes, of which it may have %d", len(name), unix.IFNAMSIZ-1)
	case name == "." || name == "..":
		return "must not be a directory's"
	case strings.ContainsFunc(name, func(c rune) bool { return c == '/' || c == ':' || unicode.IsSpace(c) }):
		return "must not contain /, : or spaces"
	}
	return ""
}

// printVersions answers VERSION, in the version of the CNI spec that it was asked in (section 5, "Version") or the newest.
// A person who types the command need not type a configuration.
func printVersions() *types.Error {
	all := versions()
	answer := all[len(all)-1]
	if info, err := os.Stdin.Stat(); err == nil && info.Mode()&os.ModeCharDevice == 0 {
		text, _ := io.ReadAll(os.Stdin) // what cannot be read asks in no version
		if conf, err := podnet.ParseConfig(text); err == nil && slices.Contains(all, conf.CNIVersion) {
			answer = conf.CNIVersion
		}
	}
	_, err := fmt.Printf(`{"cniVersion":%q,"supportedVersions":["%s"]}`+"\n", answer, strings.Join(all, `","`))
	if err != nil {
		return refuse(types.ErrIOFailure, "printing the versions: %v", err)
	}
	return nil
}

func refuse(code uint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// coded gives an error the code of an internal one, unless it has its own.
func coded(err error) *types.Error {
	var failure *types.Error
	if !errors.As(err, &failure) {
		failure = refuse(types.ErrInternal, "%v", err)
	}
	return failure
}

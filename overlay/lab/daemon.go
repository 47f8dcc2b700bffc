package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	daemonAddr  = "127.0.0.1:9479" // where the daemon answers, inside its node
	stopTimeout = 10 * time.Second
	// pollEvery is how often what cannot be awaited is looked at.
	pollEvery = 50 * time.Millisecond
)

// netConf is the network of every lab.
func netConf(underlay string) string {
	return fmt.Sprintf(`{
  "Network": "10.244.0.0/16",
  "IPv6Network": "fd00:10:244::/48",
  "EnableIPv6": true,
  "IPv6SubnetLen": 64,
  "Underlay": %q
}
`, underlay)
}

// makeNodeDir makes what the node has instead of the host's /run/tweed, /etc/cni/net.d, /etc/tweed and
// /run/xtables.lock.
func (l *Lab) makeNodeDir(node, underlay string) error {
	for _, dir := range []string{"run", "cni", "etc"} {
		if err := os.MkdirAll(l.path(node, dir), 0o755); err != nil {
			return err
		}
	}
	// With the flags' defaults in a file, commands typed on a node need none.
	flags := fmt.Sprintf("node-name = %s\nleases = %s\n", node, l.path("leases"))
	return errors.Join(
		os.WriteFile(l.path(node, "etc", "net-conf.json"), []byte(netConf(underlay)), 0o644),
		os.WriteFile(l.path(node, "etc", "flags"), []byte(flags), 0o644),
		os.WriteFile(l.path(node, "xtables.lock"), nil, 0o600))
}

// startDaemon starts the node's daemon, which outlives this process, and waits until it is ready.
func (l *Lab) startDaemon(ctx context.Context, node string) error {
	log, err := os.OpenFile(l.path(node, "tweed.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(l.Tweed, "run", "--leases", l.path("leases"), "--node-name", node)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := l.onNode(node, cmd.Start); err != nil {
		return fmt.Errorf("starting the daemon of %s: %w", node, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if p, ok := findProcess(cmd.Process.Pid); ok {
		if err := writeFile(l.path(node, "tweed.pid"), fmt.Sprintf("%d %s\n", p.pid, p.start)); err != nil {
			return err
		}
	}
	return l.awaitReady(ctx, node, ended)
}

// awaitReady waits until the node's daemon says that it is ready.
func (l *Lab) awaitReady(ctx context.Context, node string, ended <-chan error) error {
	deadline := time.NewTimer(l.readyTimeout)
	defer deadline.Stop()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if l.ready(ctx, node) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			why := "without an error"
			if err != nil {
				why = err.Error()
			}
			return fmt.Errorf("the daemon of %s ended (%s)%s", node, why, l.why(ctx, node))
		case <-deadline.C:
			return fmt.Errorf("the daemon of %s is not ready after %v%s", node, l.readyTimeout, l.why(ctx, node))
		}
	}
}

// ready reports whether the daemon says that it is, and has written what container runtimes wait for.
func (l *Lab) ready(ctx context.Context, node string) bool {
	return exists(l.path(node, "cni", conflist)) && l.get(ctx, node, "/readyz", nil) == nil
}

// why gathers what there is to say about a daemon that is not ready: its problems and the end of its log.
func (l *Lab) why(ctx context.Context, node string) string {
	var text strings.Builder
	var report struct {
		Problems []struct{ Node, Text string }
	}
	if err := l.get(ctx, node, "/report", &report); err == nil {
		for _, p := range report.Problems {
			fmt.Fprintf(&text, "\n  %s: %s", p.Node, p.Text)
		}
	}
	log, err := os.ReadFile(l.path(node, "tweed.log"))
	if err != nil {
		return text.String()
	}
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	fmt.Fprintf(&text, "\nthe end of %s:", l.path(node, "tweed.log"))
	for _, line := range lines[max(0, len(lines)-10):] {
		text.WriteString("\n  " + line)
	}
	return text.String()
}

// get asks the node's daemon and decodes its answer into v, if v is not nil. Any status but 200 is an error.
func (l *Lab) get(ctx context.Context, node, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			err = inNetns(l.netns(node), func() error {
				conn, err = new(net.Dialer).DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+daemonAddr+path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the daemon of %s answers %s to %s", node, resp.Status, path)
	}
	if v == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(v)
}

// daemon finds the node's running daemon.
func (l *Lab) daemon(node string) (process, bool) {
	b, err := os.ReadFile(l.path(node, "tweed.pid"))
	if err != nil {
		return process{}, false
	}
	var was process
	if _, err := fmt.Sscan(string(b), &was.pid, &was.start); err != nil {
		return process{}, false
	}
	now, ok := findProcess(was.pid)
	return now, ok && now == was && now.inNamespace(l.netns(node))
}

// Restart stops a node's daemon, starts it again and waits until it is ready. A daemon that is not running is started.
func (l *Lab) Restart(ctx context.Context, node string) error {
	if err := needRoot(); err != nil {
		return err
	}
	r, err := l.readRecord()
	if err != nil {
		return err
	}
	if err := r.checkNode(node); err != nil {
		return err
	}
	if _, err := os.Stat(l.path(node, "run")); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s was never completed; `tweed lab down` removes the lab", node)
	}
	l.began = time.Now()
	if err := l.stopDaemon(ctx, node); err != nil {
		return err
	}
	if err := l.startDaemon(ctx, node); err != nil {
		return err
	}
	p, _ := l.daemon(node)
	l.say("%s: the daemon is ready, pid %d", node, p.pid)
	return nil
}

func (l *Lab) stopDaemon(ctx context.Context, node string) error {
	p, ok := l.daemon(node)
	if !ok {
		l.say("%s: the daemon was not running", node)
		return nil
	}
	stopping, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	err := p.signal(stopping, unix.SIGTERM)
	if err == nil {
		l.say("%s: the daemon has stopped, pid %d", node, p.pid)
		return nil
	}
	if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the daemon of %s, pid %d, has not ended %v after SIGTERM; `kill -9 %d` ends it, "+
			"then restart again%s", node, p.pid, stopTimeout, p.pid, l.why(ctx, node))
	}
	return err
}

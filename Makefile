# Run as root: tests and the lab make network namespaces.

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unreleased)

# Programs, tests and the image are compiled in one way, so that each package is compiled once.
export CGO_ENABLED := 0
build unit fuzz lint: export GOFLAGS := -trimpath

# What tests and the lab call, by the names of Debian's packages.
PACKAGES := buildah busybox-static ca-certificates conntrack containerd containernetworking-plugins crun curl ethtool gcc \
            iproute2 ipset iptables iputils-ping libc6-dev mmdebstrap nftables podman procps runc util-linux

.PHONY: all build test unit fuzz e2e conformance manifests lab lint bench packages clean

all: build

build: ## bin/tweed and bin/tweed-cni
	go build -ldflags "-s -w -X main.version=$(VERSION)" -o bin/ ./cmd/tweed ./cmd/tweed-cni

test: packages build unit fuzz e2e ## everything that proves this checkout

unit: ## unit, property, script and kernel tests
	go mod download # tests run where there is no network
	cd overlay/podnet/testdata/libcni-1.1.2 && go mod download && go vet .
	go vet ./...
	go test -p 1 -timeout 30m ./... # one package after the other, or compiling the next takes the processor from daemons
	cd manifests && go vet ./... && go test ./...

FUZZTIME ?= 10s

# A target that is written but not listed (behind a build tag, or in another module) would never run.
fuzz: ## each parser on made-up input, for FUZZTIME
	@set -e; list=$$(go test -list '^Fuzz' ./...); \
	targets=$$(echo "$$list" | awk '/^Fuzz/ { f[++n] = $$1 } $$1 == "ok" { for (; n; n--) print $$2 "/" f[n] }'); \
	if [ $$(echo "$$targets" | wc -l) -ne $$(grep -rh --include='*_test.go' '^func Fuzz' . | wc -l) ]; then \
		echo "there are fuzz targets that this does not run; it runs" $$targets; exit 1; \
	fi; \
	for t in $$targets; do \
		echo "fuzz $$t"; \
		go test -run '^$$' -fuzz "^$${t##*/}$$" -fuzztime $(FUZZTIME) $${t%/*} || failed="$$failed $$t"; \
	done; \
	if [ "$$failed" ]; then \
		echo "failed:$$failed; new inputs that fail:"; git ls-files -o '*/testdata/fuzz/*'; exit 1; \
	fi

e2e: ## a real API server, and nodes in network namespaces
	cd e2e && go vet ./... && go test ./faults && go test -count=1 -timeout 75m -v .

conformance: packages ## Kubernetes' own network tests, all that can run here; writes docs/conformance.md
	cd e2e && go test -count=1 -timeout 120m -v -run '^TestConformance' . -args -wide

manifests: ## what is made from manifests/base: tweed.yaml and the chart's template
	cd manifests && go run .

lab: packages build ## a small cluster on this machine, to play with
	bin/tweed lab up

lint:
	gofmt -l $$(git ls-files '*.go') | (! grep .)
	go vet ./...
	go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 run ./...

# What has to be right again within a second, under pods that talk.
REPAIRS := DriftThatTheKernelTellsOf UnderlayGoesAndComesBack OwnAddressMovesToAnother AddressOnLoMovesToAnother \
           UplinkIsReplaced UnderlayIsNarrowedUnderALargeTransfer PeerChangesWhatItPublishes \
           NodesChangeTheirTunnelOneByOne NetConfIsFollowedUnderTraffic BackendChangesItsType

bench: packages build ## figures: ratios of medians beside a floor
	go test -run '^$$' -bench . -benchtime 20x ./backend/... ./subnet/...
	go test -v -run '^$$' -bench . -benchtime 1x ./overlay/... # each takes its rounds in turns with the floor's
	go test -count=1 -v -parallel 1 -run "^Test($$(echo $(REPAIRS) | tr ' ' '|'))$$" ./cmd/tweed -args -goals # within a second
	cd e2e && go test -run '^$$' -bench '^BenchmarkCost$$' -benchtime 1x -timeout 30m . # with a real API server

packages: # only what is missing, so that a second run needs no network
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "installing" $$missing; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi

clean:
	rm -rf bin e2e/.bin

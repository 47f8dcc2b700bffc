# The image of tweed's daemon, which also carries the CNI plugins that it puts on the node. docker buildx build and
# buildah build take it alike. See docs/image.md.
ARG GO_IMAGE=golang:1.26.8-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

# Go compiles for another architecture as fast as for its own, so this stage is of the builder's.
FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=unreleased
ENV CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOFLAGS="-trimpath -buildvcs=false"
RUN set -eu; \
    ours="-s -w -X main.version=$VERSION"; \
    plugins=github.com/containernetworking/plugins; \
    theirs="-s -w -X $plugins/pkg/utils/buildversion.BuildVersion=$(go list -m -f '{{.Version}}' $plugins)"; \
    go build -ldflags "$ours" -o /out/bin/tweed ./cmd/tweed; \
    go build -ldflags "$ours" -o /out/lib/tweed/cni/tweed-cni ./cmd/tweed-cni; \
    for plugin in main/loopback meta/bandwidth meta/portmap; do \
        go build -ldflags "$theirs" -o /out/lib/tweed/cni/ $plugins/plugins/$plugin; \
    done

# iptables in both modes, nft for portmap's rules on nodes with nft alone, the libraries that they are linked with, and
# all of iptables' modules: it cannot print a chain in which somebody else's rule needs a module that is missing.
FROM ${BASE_IMAGE} AS files
RUN { command -v iptables-legacy && command -v nft; } || \
    { apt-get update && apt-get install -y --no-install-recommends iptables nftables; }
RUN set -eu; \
    put() { for f; do d=$(realpath "$(dirname "$f")"); mkdir -p "/out$d"; cp -L "$f" "/out$d"; done; }; \
    modules=$(dirname "$(find /usr/lib -name libxt_comment.so)"); \
    set -- /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi /usr/sbin/nft \
        "$modules"/libxt_*.so "$modules"/libip*.so; \
    put "$@" $(ldd "$@" | grep -o '/[^ :]* (0x' | cut -d ' ' -f 1 | sort -u) /etc/protocols; \
    for name in iptables ip6tables; do \
        for use in '' -save -restore; do \
            ln -s xtables-nft-multi /out/usr/sbin/$name$use; \
            ln -s xtables-nft-multi /out/usr/sbin/$name-nft$use; \
            ln -s xtables-legacy-multi /out/usr/sbin/$name-legacy$use; \
        done; \
    done; \
    for dir in lib lib64; do \
        if [ -L /$dir ] && [ -d /out/usr/$dir ]; then ln -s usr/$dir /out/$dir; fi; \
    done
COPY --from=build /out /out/usr
ARG SOURCE_DATE_EPOCH=0
RUN find /out -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

FROM scratch
ARG VERSION=unreleased
LABEL org.opencontainers.image.title="tweed" \
      org.opencontainers.image.description="A pod network for Kubernetes" \
      org.opencontainers.image.url="https://tweed.dev" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
ENV PATH=/usr/sbin:/usr/bin
COPY --from=files /out /
ENTRYPOINT ["/usr/bin/tweed"]

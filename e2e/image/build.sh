# Builds $SOURCE and writes it to $OUT. buildah keeps its storage in memory that goes with this process, and so does
# what it notes of blobs in /var/lib/containers.
mkdir -p /var/lib/containers
mount -t tmpfs blobs /var/lib/containers
storage="--root $WORK/storage --runroot $WORK/run --storage-driver overlay"
buildah $storage build --isolation chroot --pull-never --layers=false --identity-label=false --timestamp 0 \
    --build-arg GO_IMAGE="$BASE" --build-arg BASE_IMAGE="$BASE" --build-arg VERSION="$VERSION" \
    --build-arg TARGETOS=linux --build-arg TARGETARCH="$ARCH" \
    --volume "$GO_ROOT:/usr/local/go:ro" --volume "$GO_MODULES:/go/pkg/mod:ro" \
    --volume "$GO_CACHE:/root/.cache/go-build" \
    --tag "$IMAGE" "$SOURCE"
buildah $storage push --quiet "$IMAGE" "docker-archive:$OUT:$IMAGE"

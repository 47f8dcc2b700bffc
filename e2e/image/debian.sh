# Writes a root file system of $VARIANT and $PACKAGES to $OUT, and afterwards takes $WITHOUT out of it.
cd "$WORK"
export SOURCE_DATE_EPOCH=0
mmdebstrap --quiet --mode=root --variant="$VARIANT" --include="$PACKAGES" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='cd "$1" && for path in $WITHOUT; do rm -r $path; done' \
    --format=tar "$SUITE" "$OUT" "$SOURCES"

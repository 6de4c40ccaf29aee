#!/usr/bin/env bash
# images-check.sh DIR [runtime-cpu|train|runtime-gpu]...: builds the Dockerfile's images without Docker, by Debian's
# buildah, and checks them: who runs, what is written, labels, sizes, and that no build tools are left. Debian's own Python
# stands in for python:3.11-slim. Needs root, buildah and mmdebstrap; everything is kept below DIR.
#
#   PIP_VOLUMES   files and folders of this machine that pip needs in the build, for example "/etc/pip.conf /opt/wheels"
#   DEMO          a folder with model.topt and regions.parquet (make demo), which are predicted in runtime-cpu
#   ENCODER       the bundle of a small text encoder; without it, encoding is not checked
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in buildah mmdebstrap; do
    command -v $tool >/dev/null || { echo "images are not checked: $tool is not installed (apt install $tool)"; exit 0; }
done
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- runtime-cpu train
demo=$(cd "${DEMO:-demo}" && pwd)
BASE=docker.io/library/python:3.11-slim
declare -A LIMIT_MB=([runtime-cpu]=350 [train]=3000 [runtime-gpu]=4000)

echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$dir/policy.json"
echo 'unqualified-search-registries = ["docker.io"]' >"$dir/registries.conf"
export CONTAINERS_REGISTRIES_CONF=$dir/registries.conf BUILDAH_ISOLATION=chroot TMPDIR=$dir

# overlay where this kernel mounts it below DIR; vfs copies the whole image for every line of the Dockerfile.
driver() {
    mkdir -p "$dir/probe"/{lower,upper,work,merged}
    if mount -t overlay probe -o "lowerdir=$dir/probe/lower,upperdir=$dir/probe/upper,workdir=$dir/probe/work" \
        "$dir/probe/merged" 2>/dev/null; then
        umount "$dir/probe/merged"
        echo overlay
    else
        echo vfs
    fi
    rm -rf "$dir/probe"
}
storage=(--root "$dir/storage" --runroot "$dir/run" --storage-driver "$(driver)")

fail() { echo "images-check: $*" >&2; exit 1; }
build() { buildah "${storage[@]}" "$@"; }

base() {
    build inspect --type image $BASE >/dev/null 2>&1 && return
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$dir/base.tar"
    container=$(build from scratch)
    build add --quiet "$container" "$dir/base.tar" / >/dev/null
    # As in the image that it stands in for: pip may install, and Python is called python, too.
    build run "$container" -- sh -c 'rm /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python'
    build commit --quiet --rm --signature-policy "$dir/policy.json" "$container" $BASE >/dev/null
    rm "$dir/base.tar"
}

megabytes() {
    du -s --block-size=1MB "$1" | cut -f1
}

base-megabytes() {
    container=$(build from --pull-never $BASE)
    megabytes "$(build mount "$container")"
    build rm "$container" >/dev/null
}

# As the image says: its own user, folder and environment, with /data and /tmp mounted.
run() {
    build run --volume "$data:/data" --volume "$tmp:/tmp" "$container" -- "$@"
}

# The same on a root that nothing can write to, as `docker run --read-only` has it; buildah has no word for that.
run-read-only() {
    # shellcheck disable=SC2016 # the inner shell expands them
    unshare --mount --pid --fork bash -euc '
        root=$1 data=$2 tmp=$3
        shift 3
        mount --bind "$root" "$root"
        mount --bind "$data" "$root/data"
        mount --bind "$tmp" "$root/tmp"
        mount --bind /dev "$root/dev"
        mount -t proc proc "$root/proc"
        mount -o remount,bind,ro "$root"
        exec env -i PATH="$PATH" chroot --userspec=10001:10001 "$root" sh -c "cd /data && exec \"\$@\"" sh "$@"
    ' bash "$mount" "$data" "$tmp" "$@"
}

check() {
    target=$1
    container=$(build from --pull-never "localhost/topt:$target")
    mount=$(build mount "$container")
    config=$(build inspect --type image --format '{{.OCIv1.Config.User}} {{.OCIv1.Config.Labels}}' "localhost/topt:$target")
    [[ $config == "10001:10001 "* ]] || fail "$target runs as '${config%% *}', and not as 10001:10001"
    [[ $config == *org.opencontainers.image.licenses* ]] || fail "$target has no labels: $config"
    for tool in gcc cc make git; do
        [ ! -e "$mount/usr/bin/$tool" ] || fail "$target holds $tool"
    done
    size=$(($(megabytes "$mount") - base_mb))
    [ "$size" -le "${LIMIT_MB[$target]}" ] || fail "$target adds $size MB to its base; ${LIMIT_MB[$target]} are allowed"
    # Folders that everyone may write to are /tmp and its like, in which nobody can touch what is another's.
    find "$mount" -xdev -path "$mount/data" -prune -o \
        -user 10001 -print -o -type d -perm -o+w ! -perm -1000 -print >"$dir/writable"
    [ ! -s "$dir/writable" ] || fail "$target: its user can write to $(head -3 "$dir/writable")"
    data=$(mktemp -d "$dir/data.XXXX") tmp=$(mktemp -d "$dir/tmp.XXXX")
    chmod 777 "$data" "$tmp"
    touch "$dir/before"
    "run-$target"
    find "$mount" -xdev -newer "$dir/before" ! -type d ! -path "$mount/etc/*" ! -path "$mount/run/*" >"$dir/written"
    [ ! -s "$dir/written" ] || fail "$target wrote into its root: $(head -3 "$dir/written")"
    build rm "$container" >/dev/null
    rm -rf "$data" "$tmp"
    echo "$target: $size MB on top of its base of $base_mb MB, runs as 10001, writes to its mounted folders alone"
}

run-runtime-cpu() {
    cp -r "$demo/model.topt" "$demo/regions.parquet" "$demo/mobility.parquet" "$data"
    chmod -R go+rX "$data"
    run topt-run predict regions.parquet --out out.parquet
    [ -s "$data/out.parquet" ] || fail "no predictions"
    run-read-only topt-run selftest model.topt
    run-read-only topt-run predict regions.parquet --out again.parquet
    cmp "$data/out.parquet" "$data/again.parquet" || fail "other predictions where the root is read-only"
    run-read-only sh -c 'touch /opt/x 2>/dev/null' && fail "the root is not read-only"
    if [ -d "${ENCODER:-}" ]; then
        cp -r "$ENCODER" "$data/encoder.topt"
        chmod -R go+rX "$data"
        run topt-run encode regions.parquet --bundle encoder.topt --out prompts.parquet
        [ -s "$data/prompts.parquet" ] || fail "no prompts"
        run-read-only topt-run selftest encoder.topt
    fi
}

run-runtime-gpu() {
    run topt-run --help >/dev/null
    echo "runtime-gpu: built; not run, for a container is given no GPU here"
}

run-train() {
    run topt-deploy sample --out city
    run topt-deploy train city --preset kernels
    run sh -c "cd city && topt-deploy export --format onnx"
    [ -s "$data/city/model.topt/manifest.json" ] || fail "no bundle"
}

base
base_mb=$(base-megabytes)
volumes=()
for place in ${PIP_VOLUMES:-}; do volumes+=(--volume "$place:$place:ro"); done
for target; do
    build build --quiet --layers --pull-never --signature-policy "$dir/policy.json" "${volumes[@]}" \
        ${PIP_EXTRA_INDEX_URL:+--build-arg "PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL"} \
        --target "$target" --tag "localhost/topt:$target" . >/dev/null
    check "$target"
done

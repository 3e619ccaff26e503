#!/usr/bin/env bash
# A folder with torch 2.9 and torch_xla 2.9, for XLA on the CPU; its path is all that goes to standard output:
#
#     echo "$(tools/xla-packages.sh)" >~/venv/lib/python3.11/site-packages/xla.pth
#
# The newest torch_xla works with torch 2.9 alone, whose only build on PyPI wants 5 GB of CUDA libraries at import.
# Small libraries of their names take their place, which say that there is no device; all else works. On a machine
# with TPUs, `pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'` is what you want instead.
#
# It takes a minute or two the first time, and 2.2 GB; it asks for 4 GB free. It is kept in IDIST_CACHE (default:
# ~/.cache/idist).
#
#     PYTHON=~/venv/bin/python tools/xla-packages.sh     # for another Python than the one on PATH
#
# Needs Linux on x86-64, pip and gcc.
set -euo pipefail

VERSION=2.9.0
# What the two import, and nothing else that they would bring along.
REQUIRED=(absl-py filelock fsspec jinja2 networkx numpy pyyaml requests setuptools sympy typing-extensions)
PYTHON=${PYTHON:-python}
CACHE=${IDIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/idist}
NEEDED_MB=4000 # 1 GB of wheels, and what is in them

fail() {
    printf 'xla-packages: %s\n' "$@" >&2
    exit 1
}

for program in "$PYTHON" gcc readelf; do
    command -v "$program" >/dev/null || fail "there is no $program here. On Debian and Ubuntu: apt-get install gcc"
done
kept=$CACHE/torch_xla$VERSION-$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)')
if [[ -d $kept ]]; then
    echo "$kept"
    exit
fi

mkdir -p "$CACHE"
free_mb=$(df --output=avail -BM "$CACHE" | tail -n 1 | tr -dc '0-9')
((free_mb >= NEEDED_MB)) ||
    fail "$CACHE has $free_mb MB free, and it takes $NEEDED_MB MB; IDIST_CACHE can name a folder on another disk"
echo "xla-packages: torch and torch_xla $VERSION, 2.2 GB, go to $kept, with $free_mb MB free there" >&2

work=$(mktemp -d "$CACHE/making-XXXXXXXX")
trap 'rm -rf "$work"' EXIT

# into_packages ARGUMENTS...: pip installs there, with its temporary files on the same disk.
into_packages() {
    TMPDIR=$work "$PYTHON" -m pip install --no-cache-dir --target "$work/packages" "$@" >"$work/log" 2>&1 ||
        fail "$(tail -n 20 "$work/log")" "torch and torch_xla $VERSION cannot be installed; pip says why above."
}

into_packages --no-deps "torch==$VERSION" "torch_xla==$VERSION"
into_packages "${REQUIRED[@]}"
# pip leaves torch out of that, and each process of the tests would do it anew where Python is told not to keep it.
"$PYTHON" -m compileall -q -j 0 "$work/packages/torch" "$work/packages/torch_xla"

# What torch wants of CUDA's libraries, one function a line: its version, most often the name of the library, and its
# name. Those of some libraries have no version; then it does not matter in which of them the loader finds them.
libraries=$work/packages/torch/lib
readelf --wide --dyn-syms "$libraries"/*.so | awk '
    $7 == "UND" && split($8, part, "@") == 2           { print part[2], part[1] }
    $7 == "UND" && $8 ~ /^(nccl|cu[A-Z]|cusparse)[^@]*$/ { print "none", $8 }' | sort -u >"$work/functions"

# stand_in NAME: a library of this name whose functions all say that there is no device, error 100.
stand_in() {
    local version=$1
    if [[ $1 == libnvshmem_host* ]]; then version=NVSHMEM; fi
    awk -v version="$version" '
        $1 == version || $1 == "none" { print ".globl " $2 "\n.type " $2 ", @function\n" $2 ":" }
        END { print "mov $100, %eax\nret\n.section .note.GNU-stack" }' "$work/functions" >"$work/$1.s"
    echo "$version { *; };" >"$work/$1.versions"
    gcc -shared -nostdlib -Wl,-soname,"$1" -Wl,--version-script,"$work/$1.versions" "$work/$1.s" -o "$libraries/$1"
}

readelf --wide --dynamic "$libraries"/*.so | sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nv\|nccl\).*\)\]$/\1/p' | sort -u |
    while read -r name; do stand_in "$name"; done
PYTHONPATH=$work/packages "$PYTHON" -c 'import torch_xla' ||
    fail "torch_xla $VERSION cannot be imported; Python says why above."

mv "$work/packages" "$kept"
echo "$kept"

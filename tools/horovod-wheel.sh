#!/usr/bin/env bash
# A wheel of Horovod for the torch of this Python; its path is all that goes to standard output:
#
#     pip install numpy "$(tools/horovod-wheel.sh)"      # numpy, which Horovod needs and does not ask for
#
# It is built from Horovod's own, unmodified source in some four minutes, the first time. It is kept in IDIST_CACHE
# (default: ~/.cache/idist), one for each combination of what it depends on.
#
#     PYTHON=~/venv/bin/python tools/horovod-wheel.sh    # for another Python than the one on PATH
#     HOROVOD_GPU_OPERATIONS=NCCL tools/horovod-wheel.sh # for CUDA devices; needs nvcc, and the headers of NCCL
#
# Every HOROVOD_ variable of https://horovod.readthedocs.io/en/stable/install.html counts.
# Needs a C++ compiler and make. JOBS says how many of it run at once (default: one a processor, each takes 2 GB).
set -euo pipefail

VERSION=0.28.1
PYTHON=${PYTHON:-python}
JOBS=${JOBS:-$(nproc)}
CACHE=${IDIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/idist}

fail() {
    printf 'horovod-wheel: %s\n' "$@" >&2
    exit 1
}

for program in "$PYTHON" c++ make; do
    command -v "$program" >/dev/null || fail "there is no $program here. On Debian and Ubuntu: apt-get install g++ make"
done
built_for=$("$PYTHON" -c 'import sys, torch; print(f"torch{torch.__version__}-{sys.implementation.cache_tag}")') ||
    fail "$PYTHON has no torch: install the one that Horovod is to be built for first"

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_CPU_OPERATIONS=${HOROVOD_CPU_OPERATIONS:-GLOO}
if [[ -z ${HOROVOD_WITH_MPI:-} ]]; then export HOROVOD_WITHOUT_MPI=1; fi

# Horovod compiles for the processor that it is built on, with these of its instructions.
processor=$(uname -m)-$(grep --max-count=1 --only-matching --word-regexp -E 'avx|f16c|fma' /proc/cpuinfo | sort -u | tr -d '\n')
options=$(env | grep '^HOROVOD_' | sort | sha256sum | head -c 8)
kept=$CACHE/horovod$VERSION-$built_for-$processor-$options
if compgen -G "$kept/*.whl"; then exit; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The headers of torch are C++17. Horovod asks for C++14 after all flags that one can pass, so what CMake takes for
# the flag of C++14 has to change, in a file that it reads at the start, and once more at the end of every project().
# The flags leave debug information out: a third of the time, a twentieth of the size.
cat >"$work/cxx17.cmake" <<'END'
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_FILE}")
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++17")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG")
END

# What builds it goes to a folder of its own, and so is out of the way when it is done. CMake 4 refuses the project.
{
    "$PYTHON" -m pip install --target "$work/tools" setuptools wheel packaging cloudpickle psutil pyyaml cffi 'cmake<4'
    PATH=$work/tools/bin:$PATH PYTHONPATH=$work/tools MAKEFLAGS=-j$JOBS CMAKE_TOOLCHAIN_FILE=$work/cxx17.cmake \
        "$PYTHON" -m pip wheel --no-build-isolation --no-deps --no-binary horovod --no-cache-dir \
        --wheel-dir "$work/wheel" "horovod==$VERSION"
} >"$work/log" 2>&1 || fail "$(tail -n 40 "$work/log")" "Horovod could not be built; above are the last lines of its log."

mkdir -p "$kept"
mv "$work/wheel"/*.whl "$kept"
compgen -G "$kept/*.whl"

#!/usr/bin/env bash
# Runs the tests that tools/setup.sh has built; arguments go to pytest.
# JOBS: how many processes pytest shares the files of tests out to (the CPUs').
set -uo pipefail
cd "$(dirname "$0")/.." || exit
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXT_BUILD_DIR="$build"
export TORCH_EXT_SIM_LIBRARY="$build/tests/libtorch_ext_sim.so"
status=0
jobs=${JOBS:-$(nproc)}
ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$jobs" || status=1
# By files, in the order of tests/conftest.py. Groups (xdist_group) would not do:
# pytest 9.2 does not hand the names that pytest-xdist 3.8 makes for them on.
side_by_side=()
[ "$jobs" = 1 ] || side_by_side=(-n "$jobs" --dist loadfile --no-loadscope-reorder)
python -m pytest ${side_by_side[@]+"${side_by_side[@]}"} "$@" || status=1
exit $status

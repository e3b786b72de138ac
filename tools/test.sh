#!/usr/bin/env bash
# Runs the tests that tools/setup.sh has built; arguments go to pytest.
# JOBS: how many processes pytest shares the tests out to (1).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXT_BUILD_DIR="$build"
export TORCH_EXT_SIM_LIBRARY="$build/tests/libtorch_ext_sim.so"
status=0
ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$(nproc)" || status=1
side_by_side=()
[ "${JOBS:-1}" = 1 ] || side_by_side=(-n "$JOBS" --dist loadgroup --no-loadscope-reorder)
python -m pytest ${side_by_side[@]+"${side_by_side[@]}"} "$@" || status=1
exit $status

#!/usr/bin/env bash
# Runs the tests that tools/setup.sh has built; arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXT_BUILD_DIR="$build"
export TORCH_EXT_SIM_LIBRARY="$build/tests/libtorch_ext_sim.so"
status=0
ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$(nproc)" || status=1
python -m pytest "$@" || status=1
exit $status

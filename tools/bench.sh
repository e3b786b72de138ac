#!/usr/bin/env bash
# Runs every C++ benchmark that tools/setup.sh has built.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
for program in "$build"/benchmarks/*_bench; do "$program" "$@"; done

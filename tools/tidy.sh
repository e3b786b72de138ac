#!/usr/bin/env bash
# clang-tidy over the core (or the files named), after tools/setup.sh tests.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
if ! command -v clang-tidy >/dev/null; then
  echo "[tidy] clang-tidy is missing. Type: sudo apt-get install clang-tidy" >&2
  exit 1
fi
[ $# -gt 0 ] || mapfile -t files < <(find csrc -name '*.cpp' -not -path '*/bindings/*' | sort)
[ $# -eq 0 ] || files=("$@")
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" clang-tidy --quiet -p "$build"

#!/usr/bin/env bash
# clang-format and ruff over all files, tools/prose.py over pages and comments,
# clang's analysis of locks over the core; --fix rewrites the sources.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
# One version, or two machines disagree about the same line.
.venv/bin/python -m pip install --quiet --disable-pip-version-check clang-format==14.0.6 clang-tidy==20.1.0 ruff
mapfile -t sources < <(find include csrc tests benchmarks examples -name '*.h' -o -name '*.cpp')

# csrc/base/mutex.h says who needs which lock. About a minute of computing, so
# not again while no source has changed.
check_locks() {
  local stamp
  stamp=build/.locks-$(find csrc include tools/lint.sh -type f | sort | xargs sha256sum | sha256sum | cut -c1-16)
  [ ! -e "$stamp" ] || return 0
  .venv/bin/python -c 'import json
for source in json.load(open("csrc/sources.json"))["core"]: print("csrc/" + source)' |
    xargs -n 1 -P "$(nproc)" sh -c '.venv/bin/clang-tidy --quiet \
      --checks="-*,clang-diagnostic-thread-safety*,misc-static-assert" "$@" -- -std=c++20 \
      -Iinclude -Icsrc -isystem .deps/usr/include -Wthread-safety -Wthread-safety-beta' _ \
      2> >(grep -v ' generated\.$' >&2)
  rm -f build/.locks-*
  mkdir -p build
  touch "$stamp"
}

if [ "${1:-}" = --fix ]; then
  clang-format -i "${sources[@]}"
  ruff format . && ruff check --fix .
else
  clang-format --dry-run --Werror "${sources[@]}"
  ruff format --check . && ruff check .
  .venv/bin/python tools/prose.py
  check_locks
fi

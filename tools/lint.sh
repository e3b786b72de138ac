#!/usr/bin/env bash
# clang-format and ruff over all files, tools/prose.py over pages and comments,
# clang's analysis of locks over csrc; --fix rewrites the sources.
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
  # Those of the layers above have torch's headers, and so that torch's path.
  local torch python
  torch=$(.venv/bin/python -c 'import torch; print(torch.__path__[0])')
  python=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
  .venv/bin/python -c 'import json
sources = json.load(open("csrc/sources.json"))
for source in {file: 0 for layer in sources.values() for file in layer}: print("csrc/" + source)' |
    xargs -n 1 -P "$(nproc)" sh -c '.venv/bin/clang-tidy --quiet --header-filter="csrc/|torch_ext/" \
      --checks="-*,clang-diagnostic-thread-safety*,misc-static-assert" "$3" -- -std=c++20 \
      -Iinclude -Icsrc -isystem .deps/usr/include -isystem "$1/include" \
      -isystem "$1/include/torch/csrc/api/include" -isystem "$2" -DTORCH_EXTENSION_NAME=_C \
      -Wthread-safety -Wthread-safety-beta' _ "$torch" "$python" \
      2> >(grep -v ' generated\.$' >&2)
  rm -f build/.locks-*
  mkdir -p build
  touch "$stamp"
}

if [ "${1:-}" = --fix ]; then
  clang-format -i "${sources[@]}"
  ruff format .
  ruff check --fix .
else
  clang-format --dry-run --Werror "${sources[@]}"
  ruff format --check .
  ruff check .
  .venv/bin/python tools/prose.py
  check_locks
fi

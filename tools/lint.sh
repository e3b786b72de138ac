#!/usr/bin/env bash
# clang-format and ruff over all files, tools/prose.py over pages and comments;
# --fix rewrites the sources.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
# One version, or two machines disagree about the same line.
.venv/bin/python -m pip install --quiet --disable-pip-version-check clang-format==14.0.6 ruff
mapfile -t sources < <(find include csrc tests benchmarks examples -name '*.h' -o -name '*.cpp')
if [ "${1:-}" = --fix ]; then
  clang-format -i "${sources[@]}"
  ruff format . && ruff check --fix .
else
  clang-format --dry-run --Werror "${sources[@]}"
  ruff format --check . && ruff check .
  .venv/bin/python tools/prose.py
fi

#!/usr/bin/env bash
# Unpacks Debian packages into .deps, without root; the build looks there
# after the system.
#   tools/deps.sh [PACKAGE ...]   default: the missing ones that can be used so
set -euo pipefail
cd "$(dirname "$0")/.."

provides() {
  case $1 in
    nlohmann-json3-dev) echo nlohmann/json.hpp ;;
    libxxhash-dev) echo xxhash.h ;;
    liburing-dev) echo liburing.h ;;
    libgtest-dev) echo gtest/gtest.h ;;
    libbenchmark-dev) echo benchmark/benchmark.h ;;
    *) echo "[deps] $1 is not used from .deps" >&2; exit 1 ;;
  esac
}

[ $# -gt 0 ] || set -- nlohmann-json3-dev libxxhash-dev liburing-dev libgtest-dev
missing=()
for package in "$@"; do
  header=$(provides "$package")
  [ -f "/usr/include/$header" ] || [ -f ".deps/usr/include/$header" ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "[deps] nothing is missing" >&2
  exit 0
fi

# libbenchmark-dev holds a link to the library of another package.
for package in "${missing[@]}"; do
  [ "$package" = libbenchmark-dev ] || continue
  mapfile -t -O "${#missing[@]}" missing < <(apt-cache depends libbenchmark-dev 2>/dev/null |
    sed -n 's/.*Depends: \(libbenchmark[^ ]*\)$/\1/p')
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ! command -v apt-get >/dev/null || ! (cd "$scratch" && apt-get -qq download "${missing[@]}" >&2); then
  echo "[deps] cannot download. Type: sudo apt-get update && sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
mkdir -p .deps
for archive in "$scratch"/*.deb; do dpkg -x "$archive" .deps; done
echo "[deps] unpacked into .deps: ${missing[*]}" >&2

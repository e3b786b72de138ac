#!/usr/bin/env bash
# Makes a clean Debian or Ubuntu machine ready, and does next to nothing when
# it is: system packages, .venv with torch, the build.
#   tools/setup.sh packages   the system packages alone, and ccache
#   tools/setup.sh python     and .venv
#   tools/setup.sh package    and the Python package, built in place
#   tools/setup.sh tests      and the C++ tests
#   tools/setup.sh benchmarks and the C++ benchmarks
# PYTHON: the interpreter to start from; if it has torch, that torch is used.
# TORCH_VERSION: the torch to install, whatever PYTHON has.
set -euo pipefail
cd "$(dirname "$0")/.."
goal=${1:-package}
say() { printf '[setup] %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

python=${PYTHON:-python3}
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
torch=torch==${TORCH_VERSION:-2.11.0}
cmake_minimum=3.25

compiles() { "${CXX:-c++}" -std=c++20 -isystem .deps/usr/include -fsyntax-only -x c++ - <<<"$1" 2>/dev/null; }
has_header() { compiles $'#if !__has_include(<'"$1"$'>)\n#error\n#endif'; }
has_python_header() {
  local folder
  folder=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))') && [ -f "$folder/Python.h" ]
}

uses_uv() { [ -z "${PYTHON:-}" ] && command -v uv >/dev/null; }

# Prints the Debian packages that are missing; with "hard", only those that
# cannot be unpacked into .deps.
missing_packages() {
  command -v "${CXX:-c++}" >/dev/null && compiles '#include <span>' || echo g++
  command -v make >/dev/null || echo make
  # The tests of the repository ask a checkout for its files.
  [ "$goal" != tests ] || [ ! -e .git ] || command -v git >/dev/null || echo git
  if command -v "$python" >/dev/null; then
    uses_uv || "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    has_python_header || echo python3-dev
  else
    echo python3 python3-venv python3-dev
  fi
  [ "${1:-}" != hard ] || return 0
  has_header nlohmann/json.hpp || echo nlohmann-json3-dev
  has_header xxhash.h || echo libxxhash-dev
  if [ -z "${skip_optional:-}" ]; then
    has_header libaio.h || echo libaio-dev
    has_header liburing.h || echo liburing-dev
    [ "$goal" != packages ] || command -v ccache >/dev/null || echo ccache
  fi
  [ "$goal" = package ] || has_header gtest/gtest.h || echo libgtest-dev
  [ "$goal" != benchmarks ] || has_header benchmark/benchmark.h || echo libbenchmark-dev
}

apt_install() {
  command -v apt-get >/dev/null || return 1
  local as=()
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    as=(sudo -n)
  fi
  say "installing $*"
  "${as[@]}" apt-get -qq update >&2 || true
  "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "$@" >&2
}

setup_packages() {
  local missing
  mapfile -t missing < <(missing_packages | xargs -r -n1)
  [ ${#missing[@]} -gt 0 ] || return 0
  apt_install "${missing[@]}" || true
  mapfile -t missing < <(missing_packages | xargs -r -n1)
  [ ${#missing[@]} -gt 0 ] || return 0
  local hard
  mapfile -t hard < <(missing_packages hard | xargs -r -n1)
  [ ${#hard[@]} -eq 0 ] || fail "missing and cannot be installed from here. Type: sudo apt-get install ${missing[*]}"
  # Without libaio the library makes the system calls itself; without liburing
  # it has no io_uring engine; without ccache all is built again.
  skip_optional=1
  mapfile -t missing < <(missing_packages | xargs -r -n1)
  [ ${#missing[@]} -eq 0 ] || tools/deps.sh "${missing[@]}"
}

pip_install() {
  if uses_uv; then
    # As pip does: each process compiles torch again where Python may not write.
    uv pip install --quiet --compile-bytecode --python .venv/bin/python "$@"
  else
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
  fi
}

setup_python() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than Python 3.10: set PYTHON"
  local parent='' wanted=("setuptools>=77,<82" ninja numpy "pytest>=8" pytest-timeout pytest-xdist hypothesis rich matplotlib safetensors)
  if [ -z "${TORCH_VERSION:-}" ] && [ -n "${PYTHON:-}" ] && "$python" -c 'import torch' 2>/dev/null; then
    parent=$("$python" -c 'import site; print("\n".join(site.getsitepackages()))')
    torch='torch>=2.11'
  fi
  wanted+=("$torch")
  newer_cmake || wanted+=("cmake>=$cmake_minimum")
  local stamp
  stamp=.venv/.ready-$(printf '%s\n' "$("$python" -c 'import sys; print(sys.executable, sys.version)')" "$parent" "${wanted[@]}" | sha256sum | cut -c1-16)
  if is_of_another_python; then
    say ".venv was made by another Python than $python: making it again"
    rm -rf .venv
  fi
  [ ! -e "$stamp" ] || return 0
  # Without pip it was left half made, for example where the registry was not reached.
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    say "making .venv with $python"
    rm -rf .venv
    if uses_uv; then
      uv venv --quiet --seed --python "$python" .venv
    else
      "$python" -m venv .venv
    fi
  fi
  local link
  link=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_ext_parent.pth
  rm -f "$link"
  [ -z "$parent" ] || printf '%s\n' "$parent" >"$link"
  say "installing ${wanted[*]} (torch is large: minutes the first time)"
  pip_install "${wanted[@]}" || fail "pip could not install ${wanted[*]}: see above"
  touch "$stamp"
}

# Whether PYTHON asks for another interpreter than the one .venv came from.
is_of_another_python() {
  local identity='import sys; print(sys.base_prefix, sys.version)' there
  [ -n "${PYTHON:-}" ] && there=$(.venv/bin/python -c "$identity" 2>/dev/null) || return 1
  [ "$there" != "$("$python" -c "$identity")" ]
}

newer_cmake() {
  command -v cmake >/dev/null || return 1
  local version
  version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
  [ "$(printf '%s\n' "$cmake_minimum" "$version" | sort -V | head -n 1)" = "$cmake_minimum" ]
}

# Where it is installed; CMake asks for it when a build folder is new.
use_ccache() {
  command -v ccache >/dev/null && [ -z "${CMAKE_CXX_COMPILER_LAUNCHER+set}" ] || return 0
  # Paths below here count as relative, so that copies of the tree share what they built.
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1
}

setup_build() {
  export PATH="$PWD/.venv/bin:$PATH" TORCH_EXT_BUILD_DIR="$build"
  use_ccache
  local arguments=()
  [ "$goal" = package ] || arguments+=(-DTORCH_EXT_TESTS=ON)
  [ "$goal" != benchmarks ] || arguments+=(-DTORCH_EXT_BENCHMARKS=ON)
  local stamp
  stamp=$build/.installed-$({ cat setup.py pyproject.toml; echo "${arguments[@]}"; readlink -f .venv/bin/python; } | sha256sum | cut -c1-16)
  if [ -e "$stamp" ] && [ -e torch_ext/lib ]; then
    cmake --build "$build" --parallel "$(nproc)" >"$build/log" 2>&1 || { cat "$build/log" >&2; exit 1; }
    cmake --install "$build" --prefix "$PWD/torch_ext" >"$build/log"
  else
    say "building"
    CMAKE_ARGS="${arguments[*]} ${CMAKE_ARGS:-}" pip_install --no-build-isolation --no-deps -e .
    touch "$stamp"
  fi
}

case $goal in packages | python | package | tests | benchmarks) ;; *) fail "unknown goal: $goal" ;; esac
setup_packages
[ "$goal" = packages ] || setup_python
case $goal in packages | python) ;; *) setup_build ;; esac

#!/usr/bin/env bash
# Builds, imports and tests a copy of the tree with another torch, in an
# environment of its own: build/torch-VERSION, which later runs use again.
#   tools/test_torch.sh             the newest torch that the registry gives
#   tools/test_torch.sh VERSION     that one
#   tools/test_torch.sh --bits ...  only the tests of equal bits, not all
# What follows goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '[torch] %s\n' "$*" >&2; }

bits=
if [ "${1:-}" = --bits ]; then
  bits=1
  shift
fi
version=
case ${1:--} in
  -*) ;;
  *)
    version=$1
    shift
    ;;
esac
python=${PYTHON:-python3}

# A dry run of pip, in a small environment: the system's Python may have none.
newest() {
  local pip=build/ask
  [ -x $pip/bin/pip ] || "$python" -m venv $pip
  $pip/bin/python -m pip install --quiet --disable-pip-version-check --dry-run \
    --no-deps --ignore-installed --report - torch |
    $pip/bin/python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
}

if [ -z "$version" ]; then
  tools/setup.sh packages
  version=$(newest)
  say "the newest is $version"
fi
copy=build/torch-$version
mkdir -p "$copy"
# What git has, with its times, so that only what changed is built again.
find "$copy" -mindepth 1 -maxdepth 1 ! -name .venv ! -name build ! -name .deps ! -name torch_ext \
  -exec rm -rf {} +
find "$copy/torch_ext" -name '*.py' -delete 2>/dev/null || true
PYTHONPATH=tests/repo "$python" -c 'import tree; print(*tree.files(), sep="\0", end="\0")' |
  tar --create --null --files-from=- | tar --extract --directory "$copy"

unset TORCH_EXT_BUILD_DIR
export TORCH_VERSION=$version
cd "$copy"
if [ -n "$bits" ]; then
  tools/setup.sh package
  tests=(tests/python/test_optim.py tests/python/test_optim_formats.py
    tests/python/test_generic.py tests/python/test_swap.py tests/python/test_model_bits.py
    tests/python/test_model_hold.py tests/python/test_model_checkpoint.py)
else
  tools/setup.sh tests
  tests=(tests/python tests/io)
fi
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXT_BUILD_DIR="$PWD/build/release"
export TORCH_EXT_SIM_LIBRARY="$TORCH_EXT_BUILD_DIR/tests/libtorch_ext_sim.so"
found=$(python -c 'import torch, torch_ext._native; print(torch.__version__)')
[ "${found%%+*}" = "$version" ] || { say "wanted torch $version, found $found"; exit 1; }
say "torch $found: built and imported"
status=0
if [ -z "$bits" ]; then
  ctest --test-dir build/release -R tensor --output-on-failure --no-tests=error || status=1
fi
python -m pytest "${tests[@]}" "$@" || status=1
if [ -n "$bits" ]; then  # Otherwise tests of the packages do it.
  load='import sys, torch_ext; print(torch_ext.build(build_directory="build/load").__file__)'
  for time in first second; do
    say "torch_ext.build(), for the $time time: $(python -c "$load")" || status=1
  done
fi
[ $status != 0 ] || say "torch $found: all passed"
exit $status

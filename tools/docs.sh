#!/usr/bin/env bash
# Builds the site into build/docs, after tools/setup.sh package: the reference
# of Python is taken from the module. Warnings are errors.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
rm -rf build/docs
.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going -j auto \
  -d build/doctrees -c docs/site . build/docs "$@"
# The pages keep their places in the tree, so that their links hold.
printf '<meta http-equiv="refresh" content="0; url=docs/index.html">\n' >build/docs/index.html
printf '[docs] build/docs/index.html\n' >&2

#!/usr/bin/env bash
# Runs all benchmarks that tools/setup.sh has made ready, one after the other,
# and prints their tables. Arguments go to each of the Python ones. JSON lands
# in OUTPUT, build/bench if that is not set.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
build=${TORCH_EXT_BUILD_DIR:-$PWD/build/release}
output=${OUTPUT:-$PWD/build/bench}
python=$PWD/.venv/bin/python
status=0
mkdir -p "$output"
rm -f "$output"/*.json

run() {
  printf '=== %s\n' "$*" >&2
  "$@" >/dev/null || { status=1; printf '=== FAILED: %s\n' "$*" >&2; }
}

repetitions=7
programs="io files small latency commit model optimizer ranks zero_step cuda"
for argument in "$@"; do
  case $argument in
    -h | --help)
      for name in $programs; do "$python" "benchmarks/$name.py" --help; done
      exit ;;
    --quick) repetitions=1 ;;
  esac
done

commit=$(git -c safe.directory='*' rev-parse --short=10 HEAD 2>/dev/null)
for program in "$build"/benchmarks/*_bench; do
  run "$program" --benchmark_repetitions=$repetitions --benchmark_context=commit="${commit:-unknown}" \
    --benchmark_out="$output/$(basename "$program" _bench).json"
done
for name in $programs; do run "$python" "benchmarks/$name.py" --output "$output" "$@"; done
"$python" benchmarks/report.py "$output" || status=1
"$python" benchmarks/picture.py "$output" "$output/ratios.png" || status=1
printf 'Picture: %s\n' "$output/ratios.png" >&2
exit $status

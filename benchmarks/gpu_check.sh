#!/usr/bin/env bash
# Everything worth knowing from one visit to a GPU machine, most important first, in at most ten minutes: import, an op
# on a side stream, the cuda tests, compute-sanitizer over our kernels, then ceilings and the benchmark registry.
#   [OUT=FILE.json|DIRECTORY] benchmarks/gpu_check.sh [--no-bench] [--no-sanitizer]
# Needs a GPU, pytest, and pydit importable: installed, or a plain checkout with a built pydit/_C*.so. OUT defaults to
# benchmarks/results/<gpu>-<date>.json; each step's log lies in a directory beside it. A step that exceeds its budget
# is ended and the next one starts. Exit code 1 when a step failed or ran out of time.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
[ -n "$gpu" ] || { echo "gpu_check: expected a GPU, got none (nvidia-smi)" >&2; exit 2; }
OUT=${OUT:-benchmarks/results}
[[ $OUT == *.json ]] || OUT=$OUT/$gpu-$(date +%F).json
LOGS=${OUT%.json}.logs
mkdir -p "$LOGS" || exit 2
STEPS=$LOGS/steps.tsv
: >"$STEPS"
status=0

# step NAME BUDGET COMMAND...: runs it with its output in NAME.log; records state and seconds.
step() {
  local name=$1 budget=$2 begin=$SECONDS code state
  shift 2
  printf '\n== %s (at %ss, budget %ss)\n' "$name" "$SECONDS" "$budget"
  timeout -k 5 "$budget" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  case $code in 0) state=passed ;; 124 | 137) state="out of time" ;; *) state="failed ($code)" ;; esac
  [ $code = 0 ] || status=1
  tail -n 12 "$LOGS/$name.log"
  printf '%s\t%s\t%s\n' "$name" "$state" "$((SECONDS - begin))" >>"$STEPS"
}
skip() { printf '%s\tnot run: %s\t0\n' "$1" "$2" >>"$STEPS"; }

step machine 15 nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader
step import 60 "$PYTHON" -c 'import pydit, torch; print(torch.__version__, pydit.backend_info())'
step side_stream 60 "$PYTHON" -m benchmarks.side_stream
step tests 120 "$PYTHON" -m pytest tests/ops -q -m "not slow" -k "cuda" -p no:cacheprovider
for tool in memcheck racecheck; do
  if [[ " $* " == *" --no-sanitizer "* ]]; then skip $tool "--no-sanitizer"
  elif ! command -v compute-sanitizer >/dev/null; then skip $tool "no compute-sanitizer on PATH"
  else # only our kernels are instrumented; torch's would take the whole budget
    step $tool 75 compute-sanitizer --tool $tool --kernel-name kns=pydit --error-exitcode 9 "$PYTHON" -m pytest tests/ops \
      -q -x -p no:cacheprovider -k "cuda and (values or layouts or in_place or strided or split)"
  fi
done
if [[ " $* " == *" --no-bench "* ]]; then skip bench "--no-bench"
else step bench 180 "$PYTHON" -m benchmarks.runner --size full --seconds 140 --json "$OUT"
fi

"$PYTHON" -m benchmarks.steps "$STEPS" "$OUT" || status=1
exit $status

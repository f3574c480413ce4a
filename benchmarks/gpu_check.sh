#!/usr/bin/env bash
# Everything worth knowing from one visit to a GPU machine in at most ten minutes: import, an op on a side stream, the
# cuda tests and compute-sanitizer over our kernels side by side, then ceilings and the benchmark registry.
#   [VARIABLE=VALUE ...] benchmarks/gpu_check.sh [--no-bench] [--no-tests] [--no-sanitizer]
# OUT      results file or its directory (default: benchmarks/results); beside FILE.json lie all logs, FILE.logs.tar.gz.
#          Where FILE.json is there already, a benchmark takes FILE-2.json
# MODULES  which files of benchmarks/cases, in this order, one process each: what hangs or faults in one spares the rest
# WITHOUT  peers left out (parts of their names); by default those that take long to build, to run or much memory
# FILTER   only cases whose name contains this text, or one of several that spaces separate
# T        seconds for a module (70); the one with most cases gets 40 more
# CASE     seconds for a case (25): one that hangs or faults is left without a figure, and its module goes on after it
# LIMIT    seconds for everything (570)
# COMMIT   what the results are of, where the checkout came without its history
# Needs a GPU, pytest, hypothesis, and pydit importable: installed, or a plain checkout with a module, pydit/_C*.so or
# the one that PYDIT_EXTENSION names. Whole blocks, collecting and the tests of models need diffusers. pytest-xdist and
# pytest-timeout are used where they are installed, and worth it: with them a kernel that hangs or faults costs one
# test. A step that exceeds its budget is ended and the next one starts; where torch or the kernels cannot use the GPU,
# no other is begun. Exit code 1 when a step failed or ran out of time.
#
# A machine without compiler takes a module built elsewhere for its Python; -lineinfo names lines in sanitizer reports:
#   cmake -S . -B build/gpu -G Ninja -DPYDIT_SIM=off -DPYDIT_CUDA=on -DCMAKE_CUDA_FLAGS=-lineinfo \
#     -DPython_EXECUTABLE=PYTHON -Dpybind11_DIR=$(PYTHON -m pybind11 --cmakedir)
#   cmake --build build/gpu && export PYDIT_EXTENSION=$(echo $PWD/build/gpu/_C*.so)
# A second visit races the compiled peers too, on one model's shapes, and the table of README shows these rows where the
# commit is the same; a third takes the compiler's search for products, and whole models:
#   OUT=compiled.json WITHOUT=math,pairwise,max-autotune T=150 CASE=60 \
#     FILTER="/1x7401x /1x6889+512x /7401x3072/ /60x512x" benchmarks/gpu_check.sh --no-tests
#   OUT=searched.json WITHOUT=math MODULES=linear T=260 CASE=120 FILTER=/1x6889+512x benchmarks/gpu_check.sh --no-tests
#   python -m benchmarks.layers --plan ppcl-qwen-image-10b --seconds 120 --json layers.json
#   python -m benchmarks.model --plan ppcl-qwen-image-10b --seconds 180 --json model.json
# and of the other families, with these two commands: --config flux.1-dev --plan ppcl-flux.1-8b, --config sd3.5-large
# --plan ppcl-sd3.5-large-5b, --config sd3.5-medium --plan dense.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
PYTHON=${PYTHON:-python3}
MODULES=${MODULES-modulate attention linear qk_norm_rope second_moments attention_backward hsic_matrix whole_block collect}
WITHOUT=${WITHOUT-compile,flex,math,pairwise} FILTER=${FILTER-} T=${T:-70} CASE=${CASE:-25} LIMIT=${LIMIT:-570}
export COMMIT=${COMMIT-}
# Where it fails it says so on its standard output.
gpu=$(timeout -k 5 60 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) || gpu=
gpu=$(head -1 <<<"$gpu" | tr 'A-Z /' 'a-z--')
[ -n "$gpu" ] || { echo "gpu_check: expected a GPU, got none (nvidia-smi)" >&2; exit 2; }
OUT=${OUT:-benchmarks/results}
[[ $OUT == *.json ]] || OUT=$OUT/$gpu-$(date +%F).json
if [[ " $* " != *" --no-bench "* ]]; then # without, the steps join the file
  first=${OUT%.json} number=1
  while [ -e "$OUT" ]; do OUT=$first-$((++number)).json; done
fi
LOGS=${OUT%.json}.logs
mkdir -p "$LOGS" && rm -f "$LOGS"/* || exit 2
STEPS=$LOGS/steps.tsv
: >"$STEPS"

record() { printf '%s\t%s\t%s\n' "$1" "$2" "${3:-0}" >>"$STEPS"; }

# step NAME BUDGET COMMAND...: runs it with its output in NAME.log; records state and seconds. May run in the background.
step() {
  local name=$1 budget=$2 begin=$SECONDS code state
  shift 2
  printf '== %s begins (at %ss, budget %ss)\n' "$name" "$begin" "$budget"
  timeout -k 5 "$budget" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  case $code in 0) state=passed ;; 124 | 137) state="out of time" ;; *) state="failed ($code)" ;; esac
  printf '\n== %s: %s after %ss\n%s\n' "$name" "$state" "$((SECONDS - begin))" "$(tail -n 12 "$LOGS/$name.log")"
  record "$name" "$state" "$((SECONDS - begin))"
}

# tests NAME PATH...: the quick tests of these paths that need a GPU, on all processes at once.
tests() {
  local name=$1
  shift
  step "$name" 170 "$PYTHON" -m pytest "$@" -m "cuda and not slow" -q -p no:cacheprovider \
    --continue-on-collection-errors $parallel
}
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
parallel=
has xdist && parallel="-n 8"
has pytest_timeout && parallel+=" --timeout 60 --timeout-method thread"

step machine 15 nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader
step import 60 "$PYTHON" -c 'import sys, pydit, torch
print(torch.__version__, pydit.backend_info())
torch.cuda.init()  # raises where torch cannot use the GPU
# Without kernels that run there every test below would be skipped, and pass, or be one of torch, and figures too.
sys.exit(pydit.backend_info()["default_backend"]["cuda"] != "cuda")'
step needs 30 "$PYTHON" -c 'import importlib.util, sys
missing = [name for name in ("pytest", "hypothesis", "diffusers") if importlib.util.find_spec(name) is None]
sys.exit(f"not installed: {missing}" if missing else 0)'
if grep -q $'^import\tfailed' "$STEPS"; then
  record side_stream "not run: import failed"
  set -- --no-tests --no-bench
else
  step side_stream 60 "$PYTHON" -m benchmarks.side_stream
fi

if [[ " $* " == *" --no-tests "* ]]; then
  for name in tests other_tests memcheck racecheck; do record $name "not run: --no-tests"; done
else
  tests tests tests/ops &
  tests other_tests tests/stats tests/models tests/inference tests/package/test_processes.py &
  KINDS="values or layouts or in_place or strided or split or gradients or blocks_alone or more_"
  for tool in memcheck racecheck; do
    if [[ " $* " == *" --no-sanitizer "* ]]; then record $tool "not run: --no-sanitizer"
    elif ! command -v compute-sanitizer >/dev/null; then record $tool "not run: no compute-sanitizer on PATH"
    else # only our kernels are instrumented, torch's would take the whole budget; torch's cache would hide what is out of
      # bounds by less than its blocks; its probes of the driver are no errors
      step $tool 170 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --kernel-name kns=pydit \
        --error-exitcode 9 --report-api-errors no --launch-timeout 0 --target-processes all \
        "$PYTHON" -m pytest tests/ops -q -p no:cacheprovider -m cuda -k "($KINDS) and not any_ and not mismatches" &
    fi
  done
fi
wait # nothing is timed beside the tests

parts=()
[[ " $* " == *" --no-bench "* ]] && record bench "not run: --no-bench" && MODULES=
for module in $MODULES; do
  part=$LOGS/$module.json try=1 over=$((SECONDS + T))
  [ "$module" = linear ] && over=$((over + 40))
  ((over <= LIMIT)) || over=$LIMIT
  while :; do
    name=bench_$module budget=$((over - SECONDS))
    ((try == 1)) || name+=_$try
    ((budget >= 30)) || { record "$name" "out of time"; break; }
    step "$name" "$budget" "$PYTHON" -m benchmarks.runner --size full --module "$module" --resume \
      --seconds $((budget - 15)) --case-seconds "$CASE" --without "$WITHOUT" --filter "$FILTER" --json "$part"
    # a part that names a case as running is of a process that ended in it
    grep -qs '"running": "' "$part" && ((try++ < 6)) || break
  done
  [ -e "$part" ] && parts+=("$part")
done

"$PYTHON" -m benchmarks.steps "$STEPS" "$OUT" ${parts[@]+"${parts[@]}"}
status=$?
awk -F'\t' '$2 !~ /^(passed|not run: )/ { bad = 1 } END { exit bad }' "$STEPS" || status=1
# One file of logs, as few files come back from some machines.
tar -czf "${OUT%.json}.logs.tar.gz" -C "$(dirname "$LOGS")" "$(basename "$LOGS")" && rm -r "$LOGS"
exit $status

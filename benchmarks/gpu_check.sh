#!/usr/bin/env bash
# Everything worth knowing from one visit to a GPU machine, most important first: import, an op on a side stream, the
# cuda tests, compute-sanitizer over the kernel tests, then ceilings and the benchmark registry with peers.
#   OUT=results_dir benchmarks/gpu_check.sh [--no-bench] [--no-sanitizer]
# Needs pydit importable with its CUDA kernels (pip install . or PYTHONPATH), pytest, and a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT"
status=0
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader
step "import and an op on a side stream"
python3 - <<'PY' || status=1
import torch, pydit
print(pydit.backend_info())
x = torch.randn(4, 4096, 3072, device="cuda", dtype=torch.bfloat16)
m = torch.randn(4, 3072, device="cuda", dtype=torch.bfloat16)
want = pydit.ops.ada_layer_norm(x, m, m)
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    torch.cuda._sleep(20_000_000)     # the op must queue behind this, on this stream
    late = torch.randn_like(x)
    got = pydit.ops.ada_layer_norm(late, m, m)
    assert not stream.query(), "the op waited for the host or ran on another stream"
stream.synchronize()
assert torch.equal(got, pydit.ops.ada_layer_norm(late, m, m)) and not torch.equal(got, want)
print(pydit.report())
PY
step "cuda tests"
python3 -m pytest tests/ops -q -k "cuda or gradcheck or bad" -p no:cacheprovider 2>&1 | tee "$OUT/pytest.log" | tail -15
[ "${PIPESTATUS[0]}" = 0 ] || status=1
if [[ " $* " != *" --no-sanitizer "* ]]; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool"
    compute-sanitizer --tool $tool --error-exitcode 9 python3 -m pytest tests/ops -q -p no:cacheprovider \
      -k "cuda and (values or layouts or in_place or strided or split)" >"$OUT/$tool.log" 2>&1 || status=1
    tail -4 "$OUT/$tool.log"
  done
fi
if [[ " $* " != *" --no-bench "* ]]; then
  step "ceilings and benchmark registry"
  python3 -m benchmarks.runner --json "$OUT/bench.json" 2>&1 | tee "$OUT/bench.log" || status=1
fi
step "done, status $status"
exit $status

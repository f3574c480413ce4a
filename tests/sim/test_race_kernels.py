"""The project's kernels in a race build of the extension: the op tests stay silent, and bytes match the kernels' model.

The build goes to ``build/race`` and is reused. To run any test under the detector by hand:
``PYDIT_EXTENSION=build/race/_C<suffix> PYDIT_BACKEND=sim pytest tests/ops -k sim``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.cases.attention_backward import hopper_kernels
from benchmarks.cases.hsic_matrix import contract_bytes, gram_work
from benchmarks.cases.linear import hopper_bytes as linear_bytes
from benchmarks.cases.second_moments import hopper_bytes, portable_work
from build_tools import cmake

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")]

COUNT = """
import json
from benchmarks import registry
from pydit import backend
module, _ = backend.extension()
assert module.sim.race_build
from benchmarks.cases.attention import joint_attention
more = [joint_attention("counted", 1, image, text, 1, dim, "bf16", None) for image, text, dim in %s]
for case in more or registry.cases("small"):
    inputs = case.make("cpu")
    before = module.sim.total_counters()
    case.run(*inputs)
    found = {name: total - before[name] for name, total in module.sim.total_counters().items()}
    beyond = case.beyond and [case.beyond.bytes, case.beyond.flops]
    print(json.dumps([case.name, case.work.bytes, case.work.flops, beyond, found]))
"""


@pytest.fixture(scope="module")
def environment():
    folder = Path(os.environ.get("PYDIT_RACE_BUILD", cmake.BUILD / "race"))
    # What compiles fast: observed, a kernel is hardly slower at -O1, and the binding takes no time.
    definitions = {"PYDIT_CUDA": "off", "PYDIT_SIM_RACE": "on", "PYDIT_SIM_KERNEL_FLAGS": "-O1",
                   "CMAKE_BUILD_TYPE": "RelWithDebInfo", "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O0 -g1"}
    try:
        cmake.build(folder, "_C", definitions)
    except cmake.MissingTool as error:
        pytest.skip(str(error))
    extension = cmake.extension(folder)
    return {**os.environ, "PYDIT_EXTENSION": str(extension), "PYDIT_BACKEND": "sim"}


# Every op with late copies and with early ones, each with one of its dtypes. Left out: what asks the same shapes once
# more for other numbers, which no race depends on, tests that choose the other copies themselves, and the second time
# drawn shapes, strides and the largest shapes: the detector holds an asynchronous copy for one by its engine until it is
# waited for, late or early.
@pytest.mark.parametrize(("seed", "copies", "left_out"), [
    (0, "lazy", "dtype1 or eager"),
    (1, "eager", "dtype0 or lazy or any_ or multiprocessors or super or cut_tiles or layouts or expanded")])
def test_kernels_are_free_of_races(environment, seed, copies, left_out):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=slow",
               "tests/ops", "-m", "not again", "-k",
               "sim and (values or layouts or split or expanded or gradients) and not (run_to_run or any_shape or extreme) "
               f"and not ({left_out}) and not (offset or opcheck)"]
    settings = {"PYDIT_SIM_SEED": str(seed), "PYDIT_SIM_ASYNC": copies}
    done = subprocess.run(command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True,
                          timeout=600)
    line = " ".join(f"{name}={value}" for name, value in settings.items())
    assert done.returncode == 0, (f"PYDIT_EXTENSION={environment['PYDIT_EXTENSION']} PYDIT_BACKEND=sim {line} "
                                  f"{' '.join(command)}\n{done.stdout[-4000:]}")
    assert " passed" in done.stdout


def counts(environment, arch, attention=()):
    """By case: bytes, FLOPs, beyond, counters. Of the small cases, or of attention with (image, text, dim)."""
    done = subprocess.run([sys.executable, "-c", COUNT % list(attention)], cwd=ROOT, env={**environment, "PYDIT_SIM_ARCH": arch},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


def test_counts_match_the_models_of_the_benchmarks(environment):
    """A kernel that reads a tensor once more than its case says, or multiplies more, fails. Of some cases the model is
    that of their kernels, below; a block is those of other cases, and products of the library, which is not observed."""
    elsewhere = {"collect_xx", "collect_xx_xy", "hsic_matrix", "second_moments"}
    for name, (size, flops, beyond, found) in counts(environment, "80").items():
        assert found["bank_conflicts"] <= 0.05 * found["shared_requests"], (name, found)
        op = name.split("/")[0]
        assert (beyond is None) == (op in elsewhere or op.startswith("block_")), name
        if beyond is None:
            continue
        assert found["global_loaded"] + found["global_stored"] == pytest.approx(size + beyond[0], rel=0.001), name
        if found["tensor_ops"]:
            assert 2 * found["tensor_ops"] == flops + beyond[1], name


BACKWARD = """
import json
from benchmarks.cases.attention_backward import joint_attention_backward
from pydit import backend
module, _ = backend.extension()
for shape in %s:
    case = joint_attention_backward("counted", *shape)
    inputs = case.make("cpu")
    before = module.sim.total_counters()
    case.run(*inputs)
    found = {name: total - before[name] for name, total in module.sim.total_counters().items()}
    print(json.dumps([backend.report()["joint_attention_backward"]["reason"], found]))
"""


def test_the_hopper_backward_reads_and_multiplies_as_its_model_says(environment):
    """Its three launches together; and what its head says of 6889 + 512 tokens."""
    shapes = [(1, 100, 40, 1, 64, "bf16", None), (1, 200, 140, 2, 128, "bf16", None), (2, 70, 40, 1, 128, "fp16", (40, 9)),
              (2, 90, 140, 1, 64, "bf16", (140, 0))]
    done = subprocess.run([sys.executable, "-c", BACKWARD % shapes], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "PYDIT_SIM_ARCH": "90a"})
    assert done.returncode == 0, done.stderr
    for (batch, image, text, heads, dim, _, lens), line in zip(shapes, done.stdout.splitlines(), strict=True):
        reason, found = json.loads(line)
        model = hopper_kernels(image, text, lens or (text,) * batch, lens is not None, heads, dim)
        zeros = 0 if lens is None else sum(n == 0 for n in lens)
        assert "the Hopper kernel" in reason
        assert found["global_loaded"] + found["global_stored"] == pytest.approx(model.bytes, rel=0.001 if not zeros else 0.01)
        assert 2 * found["tensor_ops"] == model.flops and found["bank_conflicts"] == 0
    full = hopper_kernels(6889, 512, (512,), False, 24, 128)
    queries = 24 * 58 * 2 * 2 * 128 * 7401  # of 58 tiles of keys
    sums = 24 * 58 * 116 * 64 * 128 * 4
    assert queries / 1e9 == pytest.approx(5.3, rel=0.01) and sums / 1e9 == pytest.approx(5.3, rel=0.01)
    assert full.bytes == pytest.approx(queries + sums, rel=0.05)


MOMENTS = """
import json, torch
from pydit import backend
from pydit.ops.second_moments import add_second_moments, zeros
module, _ = backend.extension()
for n, d, d_y in %s:
    x, y = torch.randn(n, d).bfloat16(), torch.randn(n, d_y).bfloat16() if d_y else None
    add_second_moments(x, y, zeros(d, d_y, torch.device("cpu")))
    print(json.dumps(module.sim.counters()))
"""


def test_the_portable_second_moments_read_and_multiply_as_their_model_says(environment):
    """With and without a second matrix, as the cases of ``collect`` ask for them; four multiprocessors."""
    shapes = [(300, 136, 0), (40, 104, 0), (520, 392, 0), (300, 136, 72), (600, 72, 264)]
    done = subprocess.run([sys.executable, "-c", MOMENTS % shapes], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "PYDIT_SIM_ARCH": "80", "PYDIT_SIM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for shape, line in zip(shapes, done.stdout.splitlines(), strict=True):
        found, model = json.loads(line), portable_work(*shape, 4)
        assert found["global_loaded"] + found["global_stored"] == pytest.approx(model.bytes, rel=0.001)
        assert 2 * found["tensor_ops"] == model.flops
    full = portable_work(7401, 3072, 0, 132)
    assert full.bytes / 1e6 == pytest.approx(1.1e3 + 113, rel=0.05) and full.flops / 1e9 == pytest.approx(72.8, rel=0.01)


CLUSTERS = """
import json, os
import torch
from pydit import backend, ops
from pydit.ops.second_moments import add_second_moments, zeros
module, _ = backend.extension()
x = [torch.randn(1, s, 72).bfloat16() for s in (300, 9)]
weight = [torch.randn(264, 72).bfloat16() for _ in x]
for os.environ["PYDIT_CLUSTER"] in ("1", "2"):
    ops.joint_linear(*x, *weight)
    print(json.dumps([backend.report()["joint_linear"]["reason"], module.sim.counters()]))
x, weight = torch.randn(1, 768, 328).bfloat16(), torch.randn(264, 328).bfloat16()
for cluster, parts in %s:
    os.environ.update(PYDIT_CLUSTER=str(cluster), PYDIT_PARTS=str(parts))
    ops.joint_linear(x, x[:, :256], weight, weight)
    print(json.dumps(module.sim.counters()))
for n, d in %s:
    for os.environ["PYDIT_CLUSTER"] in ("1", "2", "auto"):
        add_second_moments(torch.randn(n, d).bfloat16(), None, zeros(d, 0, torch.device("cpu")))
        print(json.dumps([backend.report()["second_moments"]["reason"], module.sim.counters()]))
"""


def test_clusters_read_as_their_models_say(environment):
    """Blocks alone and in clusters: bytes by the models that the kernels' heads scale up. One thread of the simulator:
    polling is counted too."""
    shapes, cut = [(520, 392), (40, 104)], [(cluster, parts) for cluster in (1, 2) for parts in (1, 2, 3, 5)]
    done = subprocess.run([sys.executable, "-c", CLUSTERS % (cut, shapes)], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "PYDIT_SIM_ARCH": "90a", "PYDIT_SIM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for cluster in (1, 2):
        reason, counts = lines.pop(0)
        assert ("clusters of two" in reason) == (cluster == 2) and "the Hopper kernel" in reason
        assert counts["global_loaded"] + counts["global_stored"] == linear_bytes(1, (300, 9), 72, 264, cluster, 2)
    for cluster, parts in cut:
        counts = lines.pop(0)
        model = linear_bytes(1, (768, 256), 328, 264, cluster, 2, parts, 4)
        assert counts["global_loaded"] + counts["global_stored"] == pytest.approx(model, rel=0.001 if parts > 1 else 0)
        assert counts["bank_conflicts"] == 0
    for i, (n, d) in enumerate(shapes):
        alone, pairs, auto = lines[3 * i:3 * i + 3]
        for cluster, (reason, counts) in ((1, alone), (2, pairs)):
            assert ("clusters of two" in reason) == (cluster == 2) and "the Hopper kernel" in reason
            assert counts["global_loaded"] + counts["global_stored"] == pytest.approx(hopper_bytes(n, d, cluster, 4), rel=0.01)
            assert counts["bank_conflicts"] == 0
        assert auto == (pairs, alone)[i]  # the kernel takes what reads less, and says so
    assert linear_bytes(1, (6889, 512), 3072, 9216, 1, 2) / 1e9 == pytest.approx(4.92 + 0.136, rel=0.005)
    assert linear_bytes(1, (6889, 512), 3072, 9216, 2, 2) / 1e9 == pytest.approx(3.28 + 0.136, rel=0.005)
    assert hopper_bytes(7401, 3072, 1, 132) / 1e6 == pytest.approx(985 + 131, rel=0.005)
    assert hopper_bytes(7401, 3072, 2, 132) / 1e6 == pytest.approx(716 + 132, rel=0.005)


GRAM = """
import json, os
import torch
from pydit import backend, ops
module, _ = backend.extension()
for os.environ["PYDIT_SIM_ARCH"] in ("80", "90a"):
    backend.configure_sim()
    for n, layers, d in %s:
        ops.hsic_matrix([torch.randn(n, d).bfloat16() for _ in range(layers)])
        kernels = [module.sim.counters(name) for name in ("hsic_gram_sm90" if os.environ["PYDIT_SIM_ARCH"] == "90a"
                                                          else "gram_kernel", "contract_kernel")]
        print(json.dumps([backend.report()["hsic_matrix"]["reason"], *kernels]))
"""


def test_gram_kernels_read_and_multiply_as_their_model_says(environment):
    """Both gram kernels at sizes with whole and with ragged super tiles, and what their heads scale up."""
    shapes, two_sets = [(256, 1, 16), (300, 2, 72), (130, 1, 72)], (34, 66, 8)
    done = subprocess.run([sys.executable, "-c", GRAM % [*shapes, two_sets]], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for arch in (7, 3):  # more layers than the Hopper kernel takes
        assert lines.pop(arch)[2]["global_loaded"] == contract_bytes(34, 66)
    for hopper in (False, True):
        for n, layers, d in shapes:
            reason, gram, contract = lines.pop(0)
            assert ("the Hopper kernel (TMA" in reason) == hopper
            model = gram_work(n, layers, d, hopper)
            assert gram["global_loaded"] + gram["global_stored"] == model.bytes and 2 * gram["tensor_ops"] == model.flops
            assert gram["bank_conflicts"] == contract["bank_conflicts"] == 0
            assert contract["global_loaded"] == contract_bytes(n, layers)
            jobs = layers * (-(-n // 256)) ** 2
            assert gram["warpgroups"] == (2 * min(jobs, 4) if hopper else 0)  # four multiprocessors
    rows = 2 * 3072 * 60  # bytes of a row of all layers
    assert gram_work(512, 60, 3072, False).bytes == pytest.approx(rows * 2048 + 60 * 10 * (48 * 8192 + 65536), rel=0.01)
    work = gram_work(512, 60, 3072, True)
    assert work.flops / 1e9 == pytest.approx(54.4, rel=0.001)
    assert rows * (2 * 256 + 2 * 384) / 1e6 == pytest.approx(472, rel=0.001)
    assert work.bytes / 1e6 == pytest.approx(472 + 35 + 18, rel=0.01)  # and K, and the shifts


STAYING = """
import json, os
import torch
from pydit import backend, ops
module, _ = backend.extension()
q, text = torch.randn(1, 300, 2, 64).bfloat16(), torch.randn(1, 20, 2, 64).bfloat16()
x, weight = torch.randn(1, 384, 64).bfloat16(), torch.randn(264, 64).bfloat16()
calls = {"attention": lambda: ops.joint_attention(q, q, q, text, text, text),
         "moments": lambda: ops.second_moments(torch.randn(1100, 128, generator=torch.Generator().manual_seed(0)).bfloat16()),
         "linear": lambda: (ops.linear_gelu(x, weight, None),),
         "gram": lambda: (ops.hsic_matrix([q[:, :, 0].flatten(0, 1)] * 2),)}
expected, os.environ["PYDIT_PARTS"] = {}, "1"
for os.environ["PYDIT_SM_MARGIN"] in ("0", "1", "9"):
    backend.configure_sim()
    found = {}
    for name, call in calls.items():
        outputs = [value for value in call() if isinstance(value, torch.Tensor)]
        found[name] = module.sim.counters("hsic_gram_sm90" if name == "gram" else "")["warpgroups"]
        for a, b in zip(outputs, expected.setdefault(name, outputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5) if name == "moments" else torch.testing.assert_close(
                a, b, rtol=0, atol=0)
    print(json.dumps(found))
"""


def test_blocks_that_stay_leave_room_for_others(environment):
    """PYDIT_SM_MARGIN: as many multiprocessors fewer of the simulator's four, one at least, and the same results."""
    done = subprocess.run([sys.executable, "-c", STAYING], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "PYDIT_SIM_ARCH": "90a", "PYDIT_CLUSTER": "1"})
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for name, each in {"attention": 3, "moments": 2, "linear": 2, "gram": 2}.items():
        assert [counts[name] for counts in found] == [4 * each, 3 * each, each], name


def test_the_hopper_kernel_is_built_and_reads_as_its_model_says(environment):
    """Its warpgroups, and the bytes at 6889 + 512: counted at two sizes, which gives what a token costs and what a
    token costs each tile of queries, and scaled. At D = 128 its tiles have as many queries as the portable kernel's,
    so it reads keys and values as often."""
    small, large, narrow = counts(environment, "90a", [(200, 40, 128), (390, 128, 128), (200, 40, 64)]).values()
    measured = [row[3]["global_loaded"] + row[3]["global_stored"] for row in (small, large)]
    for count, (size, _, beyond, found) in zip(measured, (small, large), strict=True):
        assert count == pytest.approx(size + beyond[0], rel=0.05) and found["bank_conflicts"] == 0
    # Tiles have 128 queries, two warpgroups of 64, or at D = 64 192, three; a block per tile, four multiprocessors.
    assert [row[3]["warpgroups"] for row in (small, large, narrow)] == [2 * 3, 2 * 4, 3 * 3]
    (tiles, tokens), (more_tiles, more_tokens) = (2 + 1, 240), (4 + 1, 518)
    per_tile = (measured[1] / more_tokens - measured[0] / tokens) / (more_tiles - tiles)
    per_token = measured[0] / tokens - per_tile * tiles
    full = registry.find("joint_attention/qwen-image/1x6889+512x24x128/bf16")[0]
    scaled = 24 * (6889 + 512) * (per_tile * (54 + 4) + per_token)
    assert scaled == pytest.approx(full.work.bytes + full.beyond.bytes, rel=0.05)
    assert scaled / 1e9 == pytest.approx(5.3 + 0.18, rel=0.05)  # what the kernel's head says

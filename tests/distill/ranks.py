"""What one of two processes runs, forked from a server that has imported everything; a parent process kills some."""

import contextlib
import dataclasses
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from torch.distributed.tensor import DTensor

from pydit import files
from pydit.distill import DistillConfig, activations, distill, distributed, full_weights, shards
from pydit.errors import FormatError
from pydit.inference.pipeline import load_pipeline
from pydit.inference.sharded import load_sharded
from pydit.models import get_adapter
from pydit.weights import SafetensorsReader
from tests.distill import tiny

STEPS = DistillConfig(layers_steps=4, layers_lr=1e-3, output_steps=3, output_lr=1e-3, output_trainable="all",
                      boundary_weight=0.1, split_batches=True, log_every=1)
CACHED = dataclasses.replace(STEPS, shard="all", cache_batches=4, output_cache_batches=0)  # no batch comes twice
SHARDED = dataclasses.replace(STEPS, shard="student")
LOST = 7  # exit code of a process whose peer has gone


def three(start=0):
    """Batches of three rows: one for the first process, two for the second."""
    return tiny.stream(start, size=3)


def train(out, name, config):
    """Train from the start, or from the checkpoint in ``<out>/<name>``; the main process keeps what came of it."""
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, three, config, progress=False)
    weights = full_weights(student)
    if dist.get_rank() == 0:
        files.save_safetensors(f"{out}/{name}.safetensors", weights)
        files.write_json(f"{out}/{name}.json", {
            "losses": [row["loss"] for row in result.history], "norms": [row["gradient_norm"] for row in result.history],
            "resumed": result.resumed_from})


def saved(config, out, name, **fields):
    """The configuration with a checkpoint after every step."""
    return dataclasses.replace(config, checkpoint_dir=f"{out}/{name}", save_every=1, **fields)


def kept(config, out):
    return dataclasses.replace(config, cache_dir=f"{out}/kept")


def hang(out, rank):
    Path(f"{out}/hanging-{rank}").touch()
    time.sleep(60)


def one_is_killed(rank, out):
    """The second process, half through writing activations of the fourth batch, which the first one keeps."""
    write = activations.files.save_safetensors

    def waiting(path, *rest):
        if rank == 1 and path.name == "batch-00000003.1-of-2.safetensors":
            with files.replace_file(path) as temporary:
                temporary.write_bytes(b"\x10" * 1000)
                hang(out, rank)
        write(path, *rest)

    activations.files.save_safetensors = waiting
    train(out, "cached", saved(kept(CACHED, out), out, "cached"))


def all_are_killed(rank, out):
    """In the sixth write of a checkpoint: the shards of both are there, but the directory has no name yet."""
    put, writes = shards.files.put_directory, []

    def waiting(temporary, path):
        writes.append(path)
        if len(writes) == 6:
            hang(out, rank)
        put(temporary, path)

    shards.files.put_directory = waiting
    train(out, "sharded", saved(SHARDED, out, "sharded"))


def go_on(rank, out):
    """Resume what was killed, and what one process had begun; run the same unbroken. Then read pipelines."""
    train(out, "cached", saved(kept(CACHED, out), out, "cached", resume=True))
    train(out, "sharded", saved(SHARDED, out, "sharded", resume=True))
    train(out, "unbroken", SHARDED)
    for name, config in (("one-then-whole", STEPS), ("one-then-sharded", SHARDED)):
        train(out, name, saved(config, out, name, resume=True))
    load_in_shards(rank, out)


def live(act, rank, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/{act}-store", rank=rank, world_size=2)
    try:
        globals()[act](rank, out)
    except RuntimeError:
        raise SystemExit(LOST) from None
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def velocity(transformer, dtype):
    """A forward of the demo's pipelines."""
    generator = torch.Generator().manual_seed(0)
    channels, text = transformer.config.in_channels, transformer.config.joint_attention_dim
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, channels, generator=generator).to(dtype), timestep=torch.tensor([0.5]).to(dtype),
            encoder_hidden_states=torch.randn(1, 4, text, generator=generator).to(dtype),
            img_shapes=[[(1, 4, 4)]], return_dict=False)[0]


def load_in_shards(rank, out):
    """Read pipelines, counting the bytes; a big one under a limit on memory; one that is broken."""
    read, taken = SafetensorsReader._read, []

    def counting(reader, key, first, last):
        found = read(reader, key, first, last)
        taken.append(found.numel() * found.element_size())
        return found

    SafetensorsReader._read = counting
    for name, dtype in (("teacher", torch.bfloat16), ("shorter", torch.float32), ("thinned", torch.float32)):
        taken.clear()
        model = load_pipeline(f"{out}/{name}", dtype=dtype, shard=True).transformer
        files.write_json(f"{out}/{name}-{rank}.json", {
            "read": sum(taken), "class": type(model).__name__, "plan": model.plan.to_dict() if hasattr(model, "plan") else None,
            "sharded": all(isinstance(p, DTensor) for p in model.parameters())})
        weights = {**full_weights(model), "velocity": velocity(model, dtype)}
        if rank == 0:
            files.save_safetensors(f"{out}/{name}.safetensors", weights)
    for family in ("flux.1", "sd3.5"):
        model = load_sharded(f"{out}/{family}/transformer", get_adapter(family).stock_class(), dtype=torch.bfloat16,
                             device="cpu")
        state = {name: distributed.whole(tensor) for name, tensor in model.state_dict().items()}
        if rank == 0:
            files.save_safetensors(f"{out}/{family}.safetensors", state)
    try:
        load_pipeline(f"{out}/broken", shard=True)
    except FormatError as error:
        files.write_json(f"{out}/broken-{rank}.json", str(error))
    size = sum(path.stat().st_size for path in Path(f"{out}/big/transformer").glob("*.safetensors"))
    status = Path("/proc/self/status").read_text().splitlines()
    used = int(next(line for line in status if line.startswith("VmData")).split()[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 3 * size // 4, before[1]))
    try:
        fits = bool(bytearray(size))
    except MemoryError:
        fits = False
    model = load_sharded(f"{out}/big/transformer", QwenImageTransformer2DModel, dtype=torch.float32, device="cpu")
    files.write_json(f"{out}/big-{rank}.json", {
        "loaded": all(isinstance(p, DTensor) for p in model.parameters()), "whole": fits})
    resource.setrlimit(resource.RLIMIT_DATA, before)

"""What one of two processes runs, forked from a server that has imported everything; a parent process kills some."""

import contextlib
import dataclasses
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pydit import files
from pydit.distill import DistillConfig, activations, distill, full_weights, shards
from tests.distill import tiny

STEPS = DistillConfig(layers_steps=6, layers_lr=1e-3, output_steps=3, output_lr=1e-3, output_trainable="all",
                      boundary_weight=0.1, split_batches=True, log_every=1)
CACHED = dataclasses.replace(STEPS, shard="all", cache_batches=4, output_cache_batches=0)
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
            with files._replace_file(path) as temporary:
                temporary.write_bytes(b"\x10" * 1000)
                hang(out, rank)
        write(path, *rest)

    activations.files.save_safetensors = waiting
    train(out, "cached", saved(kept(CACHED, out), out, "cached"))


def all_are_killed(rank, out):
    """In the eighth write of a checkpoint: the shards of both are there, but the directory has no name yet."""
    put, writes = shards.files.put_directory, []

    def waiting(temporary, path):
        writes.append(path)
        if len(writes) == 8:
            hang(out, rank)
        put(temporary, path)

    shards.files.put_directory = waiting
    train(out, "sharded", saved(SHARDED, out, "sharded"))


def go_on(rank, out):
    """Resume what was killed, and what one process had begun; run the same unbroken."""
    train(out, "cached", saved(kept(CACHED, out), out, "cached", resume=True))
    train(out, "cached-whole", CACHED)
    train(out, "sharded", saved(SHARDED, out, "sharded", resume=True))
    train(out, "sharded-whole", SHARDED)
    for name, config in (("one-then-whole", STEPS), ("one-then-sharded", SHARDED)):
        train(out, name, saved(config, out, name, resume=True))


def live(act, rank, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/{act}-store", rank=rank, world_size=2)
    try:
        globals()[act](rank, out)
    except RuntimeError:
        raise SystemExit(LOST) from None
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()

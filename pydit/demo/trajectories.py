"""The teacher's own samples, step by step, as training data: the states that it is asked about when it draws.

Noised training images are not what a sampler meets: guidance leads it elsewhere, and every step starts from the error
of those before. The states are recorded with what the teacher said at each, so that a student learns from them without
a forward pass of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pydit.demo import data, world
from pydit.demo.render import SIZE


def record(pipe, count: int, *, seed: int, steps: int = data.STEPS, guidance: float = data.GUIDANCE,
           batch_size: int = 64, progress: bool = True) -> dict[str, torch.Tensor]:
    """Draw ``count`` training prompts, balanced over categories, and keep what the transformer saw and said.

    Parameters
    ----------
    guidance : classifier-free guidance scale, above 1.

    Returns
    -------
    dict with ``prompts`` int64 [N] (numbers in ``world.all_prompts()``), ``timesteps`` float [steps], ``states`` float
    [N, steps, 36, C] and ``velocities`` float [N, steps, 2, 36, C], with the prompt and with the empty one.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    indices = world.sample_indices(count, split="train", generator=generator)
    texts = [world.all_prompts()[index].text for index in indices.tolist()]
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def keep(module, args, kwargs, output):
        seen.append((kwargs["hidden_states"].clone(), kwargs["timestep"].clone(), output[0].clone()))

    pipe.set_progress_bar_config(disable=True)
    states, velocities = [], []
    bar = tqdm(total=count, desc="record", unit="sample", disable=not progress)
    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        for start in range(0, count, batch_size):
            chosen = texts[start:start + batch_size]
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + row) for row in range(len(chosen))]
            with torch.inference_mode():
                pipe(prompt=chosen, negative_prompt=[""] * len(chosen), true_cfg_scale=guidance, height=SIZE,
                     width=SIZE, num_inference_steps=steps, generator=generators, output_type="latent")
            states.append(torch.stack([state for state, _, _ in seen[::2]], dim=1))
            told = torch.stack([velocity for _, _, velocity in seen], dim=1)
            velocities.append(told.unflatten(1, (steps, 2)))
            timesteps = torch.stack([timestep[0] for _, timestep, _ in seen[::2]])
            seen.clear()
            bar.update(len(chosen))
    finally:
        handle.remove()
        bar.close()
    return {"prompts": indices, "timesteps": timesteps, "states": torch.cat(states),
            "velocities": torch.cat(velocities)}


def make_batches(pipe, recorded: dict[str, torch.Tensor], *, batch_size: int, seed: int,
                 start_step: int = 0) -> Iterator[tuple[dict, torch.Tensor]]:
    """An infinite stream of pairs for ``DistillConfig.guidance``: rows 2 i and 2 i + 1 are one state, the second
    without its prompt.

    Parameters
    ----------
    recorded : of :func:`record`.
    batch_size : rows, even; half as many states.
    seed, start_step : batch b of a seed is always the same, so ``start_step`` resumes a stream exactly.

    Yields
    ------
    (batch, target) : keyword arguments of the transformer, and the teacher's velocity [B, 36, C].
    """
    table: dict[str, torch.Tensor] = {}
    device, pairs = pipe.transformer.device, batch_size // 2
    samples, steps = recorded["states"].shape[:2]
    prompts = world.all_prompts()
    step = start_step
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(samples, (pairs,), generator=generator)
        times = torch.randint(steps, (pairs,), generator=generator)
        texts = [text for index in recorded["prompts"][rows].tolist() for text in (prompts[index].text, "")]
        embeds, mask = data.look_up(pipe, table, texts)
        batch = {
            "hidden_states": recorded["states"][rows, times].repeat_interleave(2, dim=0).to(device),
            "timestep": recorded["timesteps"][times].repeat_interleave(2).to(device),
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [data.IMG_SHAPES] * (2 * pairs),
        }
        yield batch, recorded["velocities"][rows, times].flatten(0, 1).to(device)
        step += 1

"""Prompts and images of the demo world as inputs of its pipeline: embeddings, training batches, generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from pydit.data.batches import require_options
from pydit.demo import world
from pydit.demo.render import SIZE
from pydit.errors import UserError
from pydit.inference.sampling import require_drawn, with_transformer

GRID = 6  # latent tokens per side: 48 pixels, VAE factor 4, 2x2 packing
IMG_SHAPES = [(1, GRID, GRID)]
TEXT_TOKENS = 8  # of the longest prompts
# Of the sampler, for teacher and student alike; chosen on prompts of another seed (CONTRIBUTING).
STEPS, GUIDANCE = 18, 2.5
# How often the teacher's training drew each category, in the order of world.CATEGORIES: the hard ones more often.
CATEGORY_WEIGHTS = (0.4, 1.0, 1.0, 0.4, 2.5, 1.5, 2.0)
DRAWN = 32  # images that a model draws at a time where it learns from its own states


@torch.no_grad()
def encode_prompts(pipe, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text embeddings as the pipeline computes them.

    Returns
    -------
    (embeds float [B, S, J], mask bool [B, S] or None when no row is padded)
    """
    embeds, mask = pipe.encode_prompt(prompt=list(texts), device=pipe.transformer.device)
    return embeds, None if mask is None or bool(mask.all()) else mask.bool()


@torch.no_grad()
def encode_images(pipe, images: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, 48, 48] in [-1, 1] -> latent tokens [N, 36, 4 * latent channels], packed as the pipeline packs.

    The demo's VAE has latents_mean 0 and latents_std 1, so its latents are the transformer's.
    """
    mean = pipe.vae.encode(images[:, :, None].to(pipe.vae.dtype)).latent_dist.mean[:, :, 0]
    return pack(mean)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[N, Z, 12, 12] -> tokens [N, 36, 4 Z] (channel-major 2x2 patches, as QwenImagePipeline._pack_latents)."""
    n, z, height, width = latents.shape
    patches = latents.view(n, z, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, height * width // 4, 4 * z)


def make_batches(pipe, prompts: Sequence[world.Prompt] | None = None, *, batch_size: int, seed: int,
                 start_step: int = 0, images: int | None = None, prompt_dropout: float = 0.0,
                 pairs: bool = False, weights: Sequence[float] | None = None,
                 drawn_by: nn.Module | None = None) -> Iterator[tuple[dict, torch.Tensor | None]]:
    """An infinite stream of inputs for ``transformer.forward`` with their flow-matching targets.

    Rendered images are encoded, noised to a random sigma (uniform in (0, 1)) and paired with their prompt.

    Parameters
    ----------
    pipe : the demo's pipeline.
    prompts : prompts to draw from uniformly; None draws training prompts, balanced over categories.
    batch_size, seed : batch b of a seed is always the same, so ``start_step`` resumes a stream exactly.
    images : render and encode only this many, once, and draw every batch from them with fresh noise; encoding takes
        a fifth of a distillation step on a CPU. None renders new ones for every batch.
    prompt_dropout : share of samples whose prompt is empty, as guidance asks the model too.
    pairs : every noised image makes two rows, 2 i with its prompt and 2 i + 1 with the empty one, as
        ``DistillConfig.guidance`` wants them. Goes without ``prompt_dropout``.
    weights : of the categories, in the order of :data:`world.CATEGORIES`; None is the same for all.
    drawn_by : a transformer that draws the states itself: those of every step of images that the pipeline draws with it
        (``STEPS`` steps, guidance ``GUIDANCE``), in random order, in place of noised images. Of a student in training
        they are what it will meet (on-policy distillation: Agarwal et al. 2024). A batch then depends on the weights
        at the time, and a resumed stream goes on with those it finds. Goes without ``images``; there are no targets.

    Yields
    ------
    (batch, target) : keyword arguments of the transformer, and the velocity ``noise - x0`` [B, 36, 4 Z], of ``pairs``
        2 B rows; None of states that a model drew.
    """
    require_options(batch_size=batch_size, seed=seed, prompt_dropout=prompt_dropout, pairs=pairs)
    if drawn_by is not None and images is not None:
        raise UserError(f"images: expected None, because drawn_by draws its own, got {images!r}")
    if prompts is not None and weights is not None:
        raise UserError("weights: expected None, because the prompts are given, got some")
    device = pipe.transformer.device
    table: dict[str, torch.Tensor] = {}
    choices = None if prompts is None else torch.tensor([world.all_prompts().index(p) for p in prompts])

    def choose(count: int, generator: torch.Generator) -> torch.Tensor:
        if choices is not None:
            return choices[torch.randint(len(choices), (count,), generator=generator)]
        return world.sample_indices(count, split="train", generator=generator,
                                    **({} if weights is None else {"weights": tuple(weights)}))

    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of prompts and, for each, the latent tokens of a new image."""
        indices = choose(count, generator)
        return indices, encode_images(pipe, world.sample_images(indices, generator).to(device))

    kept = None
    if images is not None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 - 1)
        parts = [draw(min(256, images - start), generator) for start in range(0, images, 256)]
        kept = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    own = None if drawn_by is None else _OwnStates(pipe, drawn_by, choose, batch_size, seed)
    step = start_step
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = None
        if own is not None:
            indices, noisy, sigma = own.batch(step)
        else:
            if kept is None:
                indices, clean = draw(batch_size, generator)
            else:
                rows = torch.randint(len(kept[0]), (batch_size,), generator=generator)
                indices, clean = kept[0][rows], kept[1][rows.to(device)]
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            sigma = torch.rand(batch_size, generator=generator).clamp(1e-3).to(clean)
            noisy, target = torch.lerp(clean, noise, sigma[:, None, None]), noise - clean
        dropped = (torch.rand(batch_size, generator=generator) < prompt_dropout).tolist()
        texts = ["" if drop else world.all_prompts()[i].text for i, drop in zip(indices.tolist(), dropped, strict=True)]
        if pairs:
            noisy, sigma, target = (None if rows is None else rows.repeat_interleave(2, dim=0)
                                    for rows in (noisy, sigma, target))
            texts = [text for prompt in texts for text in (prompt, "")]
        embeds, mask = _lookup(pipe, table, texts)
        batch = {
            "hidden_states": noisy,
            "timestep": sigma,
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [IMG_SHAPES] * len(texts),
        }
        yield batch, target
        step += 1


class _OwnStates:
    """States that a model meets where it draws images itself, dealt out in batches."""

    def __init__(self, pipe, model: nn.Module, choose: Callable[[int, torch.Generator], torch.Tensor], batch_size: int,
                 seed: int) -> None:
        self._pipe = with_transformer(pipe, model)
        self._model, self._choose, self._batch_size, self._seed = model, choose, batch_size, seed
        self._images = max(DRAWN, -(-batch_size // STEPS))
        self._number: int | None = None  # of the images whose states are at hand

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices of prompts, latent tokens and sigma of batch ``step``."""
        number, place = divmod(step, self._images * STEPS // self._batch_size)
        if number != self._number:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 - 2 - number)
            self._indices = self._choose(self._images, generator)
            self._states, self._sigmas = self._draw(generator)
            self._order = torch.randperm(self._images * STEPS, generator=generator)
            self._number = number
        chosen = self._order[place * self._batch_size:(place + 1) * self._batch_size]
        step, image = chosen // self._images, chosen % self._images
        place = step.to(self._states.device), image.to(self._states.device)
        return self._indices[image], self._states[place], self._sigmas[place[0]]

    def _draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """States [steps, images, 36, 4 Z] and sigmas [steps] of new images."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module, args, kwargs):
            seen.append((kwargs["hidden_states"].clone(), kwargs["timestep"][0].clone()))

        texts = [world.all_prompts()[i].text for i in self._indices.tolist()]
        handle = self._model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._pipe(prompt=texts, negative_prompt=[""] * len(texts), true_cfg_scale=GUIDANCE, height=SIZE,
                       width=SIZE, num_inference_steps=STEPS, generator=generator, output_type="latent")
        finally:
            handle.remove()
        states, sigmas = zip(*seen[::2], strict=True)  # each step asks with the prompt and without it
        return torch.stack(states), torch.stack(sigmas)


def _lookup(pipe, table: dict[str, torch.Tensor], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of ``texts``, padded to the longest; each distinct prompt goes through the text encoder once."""
    missing = sorted(set(texts) - table.keys())
    if missing:
        embeds, mask = encode_prompts(pipe, missing)
        lengths = [embeds.shape[1]] * len(missing) if mask is None else mask.sum(1).tolist()
        table.update({text: row[:length] for text, row, length in zip(missing, embeds, lengths, strict=True)})
    rows = [table[text] for text in texts]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
    return embeds, None if bool(mask.all()) else mask


def generate(pipe, prompts: Sequence[str], *, seeds: Sequence[int], steps: int = STEPS, guidance: float = GUIDANCE,
             batch_size: int = 50, progress: bool = True) -> list[np.ndarray]:
    """Images of prompts through the stock pipeline.

    Parameters
    ----------
    prompts, seeds : one seed per prompt; an image depends on its prompt and seed, not on its batch.
    steps : denoising steps. guidance : classifier-free guidance scale; 1 runs one forward per step instead of two.

    Returns
    -------
    list of uint8 arrays [48, 48, 3]

    Raises
    ------
    UserError
        The numbers of prompts and seeds differ, or what was drawn is NaN.
    """
    from tqdm import tqdm

    if len(seeds) != len(prompts):
        raise UserError(f"seeds: expected one per prompt ({len(prompts)}), got {len(seeds)}")

    pipe.set_progress_bar_config(disable=True)
    images: list[np.ndarray] = []
    bar = tqdm(total=len(prompts), desc="generate", unit="image", disable=not progress)
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start:start + batch_size])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start:start + batch_size]]
        with torch.inference_mode():
            result = pipe(prompt=chosen, negative_prompt=[""] * len(chosen) if guidance > 1 else None,
                          true_cfg_scale=guidance, height=SIZE, width=SIZE, num_inference_steps=steps,
                          generator=generators, output_type="np").images
        require_drawn(result, guidance, pipe)
        images += list((result * 255).round().astype(np.uint8))
        bar.update(len(chosen))
    bar.close()
    return images

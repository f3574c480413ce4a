"""Trains the demo's teacher: the VAE, then the transformer with its token embedding, then the pipeline directory.

    python -m pydit.demo.train_teacher vae         --work DIR --steps 2600
    python -m pydit.demo.train_teacher transformer --work DIR --minutes 60
    python -m pydit.demo.train_teacher export      --work DIR --out pydit/demo/assets/teacher

To go on from the committed teacher: ``transformer --work NEW --start pydit/demo/assets/teacher --minutes 60``, then
``export --work NEW``, which takes the VAE of the committed teacher when NEW has none.

Runs on a CPU or a GPU. Every stage saves its state (safetensors and JSON) and continues from it; the learning rate is
a function of the share of the budget used, so a continued run with a larger budget anneals at its own end.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from pydit import files
from pydit.demo import teacher, world
from pydit.demo.data import CATEGORY_WEIGHTS, IMG_SHAPES, pack
from pydit.demo.latents import LatentBasis
from pydit.demo.training_forward import TrainingForward
from pydit.distill.muon import Muon
from pydit.errors import UserError
from pydit.inference.pipeline import load_pipeline
from pydit.models import get_adapter


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the transformer stage."""

    layers: int = 16
    heads: int = 3
    batch_size: int = 64
    learning_rate: float = 2e-3  # AdamW: embeddings, modulation, norms, biases
    muon_learning_rate: float = 0.02  # Muon: matrices of attention and MLP
    optimizer: str = "muon"  # or "adamw" for all
    warmup_steps: int = 200
    constant_share: float = 0.55  # of the budget; then linear to zero
    prompt_dropout: float = 0.08
    # Stochastic depth (Huang et al. 2016; for pruning: LayerDrop, Fan et al. 2020): every second block but the last is
    # skipped in this share of the steps. It gives 16 blocks some of the redundancy that a model of 60 has by itself.
    layer_drop: float = 0.9
    ema_decay: float = 0.999
    seed: int = 11


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pydit.demo.train_teacher", description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", choices=("vae", "transformer", "export"))
    parser.add_argument("--work", type=Path, required=True, help="directory of the training state")
    parser.add_argument("--steps", type=int, help="budget in optimiser steps, earlier runs included")
    parser.add_argument("--minutes", type=float, help="budget in minutes, earlier runs included")
    parser.add_argument("--out", type=Path, default=teacher.ASSETS, help="export: the pipeline directory to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="transformer: a pipeline to take the first weights from")
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--no-compile", action="store_true", help="transformer: do not use torch.compile")
    for name, default in asdict(Recipe()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    try:
        if args.stage == "export":
            print(f"wrote {export(args.work, args.out)}")
            return 0
        if (args.steps is None) == (args.minutes is None):
            raise UserError("--steps, --minutes: expected exactly one of them")
        budget = Budget(args.steps, args.minutes)
        if args.stage == "vae":
            train_vae(args.work, budget, device=args.device, save_seconds=args.save_seconds)
        else:
            recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
            train_transformer(args.work, budget, recipe, device=args.device, save_seconds=args.save_seconds,
                              compile=not args.no_compile, start=args.start)
    except (UserError, OSError) as error:
        parser.exit(2, f"train_teacher: error: {error}\n")
    return 0


class Budget:
    """A budget of steps or of minutes, across interrupted runs."""

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        self.steps, self.minutes, self.seconds_before = steps, minutes, 0.0
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Seconds trained so far, earlier runs included."""
        return self.seconds_before + time.monotonic() - self.started

    def share(self, step: int) -> float:
        """The share of the budget used, 0 to 1."""
        return min(1.0, step / self.steps if self.steps else self.seconds() / (60 * self.minutes))


def train_vae(work: Path, budget: Budget, *, device: str, save_seconds: float) -> None:
    """Train the decoder to undo the latent code (L1 + squared error, noisy codes) and the encoder to produce it."""
    from tqdm import tqdm

    vae = teacher.build_vae(seed=3).to(device)
    basis = LatentBasis.fit(teacher.LATENT_CHANNELS)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(4)
    step = _resume(work / "vae", budget, generator, {"model": vae}, [optimizer])
    bar = tqdm(desc="vae", unit="step", initial=step, total=budget.steps)
    saved = time.monotonic()
    while (share := budget.share(step)) < 1:
        _set_rates([optimizer], [3e-3], min(1.0, (step + 1) / 100) * max(0.02, 1 - share))
        images = world.sample_images(world.sample_indices(20, split="train", generator=generator), generator)
        code = basis.encode(images)[:, :, None]
        strength = 0.12 * torch.rand(len(code), 1, 1, 1, 1, generator=generator)
        noise = strength * torch.randn(code.shape, generator=generator)
        images, code, noise = images.to(device), code.to(device), noise.to(device)
        difference = vae.decode(code + noise, return_dict=False)[0][:, :, 0] - images
        loss = difference.abs().mean() + 2 * difference.square().mean()
        if step % 2 == 0:  # the encoder's task is the easier one
            posterior = vae.encode(images[:, :, None]).latent_dist
            loss = loss + (posterior.mean - code).square().mean() + 1e-3 * (posterior.logvar + 6).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(rmse=f"{difference.detach().square().mean().sqrt():.4f}")
        if time.monotonic() - saved > save_seconds:
            _save(work / "vae", step, budget, generator, {"model": vae}, [optimizer])
            saved = time.monotonic()
    _save(work / "vae", step, budget, generator, {"model": vae}, [optimizer])


class Student(torch.nn.Module):
    """What the transformer stage trains: the transformer and the token embedding of the text encoder."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.transformer = teacher.build_transformer(recipe.layers, recipe.heads)
        vocabulary = len(teacher.build_tokenizer())
        initial = torch.randn(vocabulary, teacher.TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
        self.embedding = torch.nn.Parameter(initial)

    @torch.no_grad()
    def take(self, pipe) -> None:
        """Copy the weights of a demo pipeline; UserError when its transformer is of another size."""
        try:
            self.transformer.load_state_dict(pipe.transformer.state_dict())
        except RuntimeError as error:
            raise UserError(f"--start: expected a transformer of the recipe's size, got another ({error})") from None
        self.embedding.copy_(pipe.text_encoder.model.language_model.embed_tokens.weight)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """What the text encoder returns for these token ids."""
        return F.rms_norm(self.embedding[ids], (teacher.TEXT_WIDTH,), eps=1e-6)


def prompt_table() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of every prompt and, last, of the empty prompt: int64 and bool [P + 1, T]."""
    tokenizer = teacher.build_tokenizer()
    prefix = len(tokenizer(teacher.PREFIX)["input_ids"])
    rows = [tokenizer(teacher.PREFIX + text + teacher.SUFFIX)["input_ids"][prefix:]
            for text in (*(p.text for p in world.all_prompts()), "")]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = True
    return ids, mask


def train_transformer(work: Path, budget: Budget, recipe: Recipe, *, device: str, save_seconds: float,
                      compile: bool = True, start: Path | None = None) -> None:
    """Flow matching on rendered images: predict ``noise - x0`` at a random sigma."""
    from tqdm import tqdm

    student = Student(recipe).to(device)
    if start is not None and not (work / "transformer.safetensors").exists():
        student.take(load_pipeline(start))
    average = Student(recipe).to(device).requires_grad_(False)
    average.load_state_dict(student.state_dict())
    basis = LatentBasis.fit(teacher.LATENT_CHANNELS)
    ids, mask = prompt_table()
    forward = TrainingForward(student.transformer, [IMG_SHAPES], text_tokens=ids.shape[1], compile=compile)
    matrices, others = _groups(student, recipe)
    optimizers = [torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.97), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(matrices, lr=recipe.muon_learning_rate))
    rates = [recipe.learning_rate, recipe.muon_learning_rate][:len(optimizers)]
    generator = torch.Generator().manual_seed(recipe.seed)
    modules = {"model": student, "average": average}
    step = _resume(work / "transformer", budget, generator, modules, optimizers)
    bar = tqdm(desc="transformer", unit="step", initial=step, total=budget.steps)
    saved, running = time.monotonic(), None
    while (share := budget.share(step)) < 1:
        rate = min(1.0, (step + 1) / recipe.warmup_steps)
        rate *= min(1.0, (1 - share) / (1 - recipe.constant_share))
        _set_rates(optimizers, rates, rate)
        indices = world.sample_indices(recipe.batch_size, split="train", generator=generator,
                                       weights=CATEGORY_WEIGHTS)
        clean = pack(basis.encode(world.sample_images(indices, generator)))
        dropped = torch.rand(len(indices), generator=generator) < recipe.prompt_dropout
        chosen = torch.where(dropped, len(ids) - 1, indices)
        sigma = sample_sigmas(len(indices), generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        noisy, target, sigma = noisy.to(device), (noise - clean).to(device), sigma.to(device)
        run = torch.rand(recipe.layers, generator=generator) >= _drop_probabilities(recipe)
        velocity = forward(noisy, sigma, student.text(ids[chosen].to(device)), mask[chosen].to(device), run)
        loss = (velocity - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(recipe.ema_decay, 1 - 1 / (step / 10 + 2))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
            running = loss.detach() if running is None else torch.lerp(running, loss.detach(), 0.02)
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running.item():.4f}", rate=f"{rate:.2f}", budget=f"{100 * share:.0f}%")
        if time.monotonic() - saved > save_seconds:
            _save(work / "transformer", step, budget, generator, modules, optimizers, recipe)
            saved = time.monotonic()
    _save(work / "transformer", step, budget, generator, modules, optimizers, recipe)


def _drop_probabilities(recipe: Recipe) -> torch.Tensor:
    """Of each block to be left out of a step: ``layer_drop`` for every second block but the last, else 0."""
    probabilities = torch.zeros(recipe.layers)
    probabilities[1:recipe.layers - 1:2] = recipe.layer_drop
    return probabilities


def sample_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sigmas in (0, 1): 70 % logit-normal around 0.57, where layout is decided, 30 % uniform."""
    middle = torch.sigmoid(torch.randn(count, generator=generator) + 0.3)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.3, uniform, middle)


def export(work: Path, out: Path) -> Path:
    """Assemble the averaged weights into a stock pipeline directory, stored in bfloat16 on a coarse grid."""
    tensors, _ = files.load_safetensors(work / "transformer.safetensors", what="--work")
    recipe = Recipe(**files.read_json(work / "transformer.json", what="--work")["recipe"])
    average = Student(recipe)
    average.load_state_dict(_part(tensors, "average"))
    if (work / "vae.safetensors").exists():
        vae_tensors, _ = files.load_safetensors(work / "vae.safetensors", what="--work")
        vae = teacher.build_vae()
        vae.load_state_dict(_part(vae_tensors, "model"))
    else:
        vae = teacher.load_teacher().vae
    tokenizer = teacher.build_tokenizer()
    encoder = teacher.build_text_encoder(len(tokenizer))
    encoder.model.language_model.embed_tokens.weight.data.copy_(average.embedding.data)
    pipe = teacher.assemble(average.transformer, vae, encoder, tokenizer)
    for model in (pipe.transformer, pipe.vae):
        round_to_grid(model)
    pipe.to(torch.bfloat16)
    with files.replace_directory(out) as new:
        pipe.save_pretrained(new)
        config = new / "text_encoder" / "config.json"  # transformers loads in this dtype
        files.write_json(config, {**files.read_json(config, what="--out"), "dtype": "float32"})
    return out


@torch.no_grad()
def round_to_grid(model: torch.nn.Module, share: float = 0.014) -> None:
    """Round every matrix and filter, in place, to multiples of a power of two of its own.

    What is left of a weight takes some 9 bits in a zip archive, where the last bits of a bfloat16 are noise that does
    not compress: the teacher is 2.7 MB smaller in a wheel for it.

    Parameters
    ----------
    share : largest root mean square of the rounding errors, relative to that of the tensor; the grid is the coarsest
        that should keep to it, so it is between half of this and this.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            spacing = share * 12 ** 0.5 * parameter.double().square().mean().sqrt()  # an even error: 1 / sqrt(12)
            step = torch.exp2(torch.log2(spacing).floor()) if spacing > 0 else spacing.new_ones(())
            parameter.copy_((parameter.double() / step).round() * step)


def _groups(student: Student, recipe: Recipe):
    """(matrices for Muon, everything else)."""
    if recipe.optimizer not in ("muon", "adamw"):
        raise UserError(f"--optimizer: expected muon or adamw, got {recipe.optimizer!r}")
    hidden = get_adapter(student.transformer).hidden_matrices(student.transformer) if recipe.optimizer == "muon" else {}
    chosen = {id(parameter) for parameter in hidden.values()}
    return list(hidden.values()), [p for p in student.parameters() if id(p) not in chosen]


def _set_rates(optimizers, rates, factor: float) -> None:
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


def _save(path: Path, step: int, budget: Budget, generator, modules: dict, optimizers,
          recipe: Recipe | None = None) -> None:
    """Write ``path``.safetensors, then ``path``.json; each is replaced whole."""
    tensors = {"generator": generator.get_state()}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    metadata = {"step": str(step), "seconds": str(budget.seconds())}
    files.save_safetensors(path.with_suffix(".safetensors"), tensors, metadata)
    files.write_json(path.with_suffix(".json"), {"step": step, "minutes": budget.seconds() / 60,
                                                 "recipe": None if recipe is None else asdict(recipe)})


def _part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of one module, without its name."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _resume(path: Path, budget: Budget, generator, modules: dict, optimizers) -> int:
    """Load what :func:`_save` wrote, if it exists; returns the step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".safetensors")
    if not file.exists():
        return 0
    tensors, metadata = files.load_safetensors(file, what="--work")
    try:
        for name, module in modules.items():
            module.load_state_dict(_part(tensors, name))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--work: expected a state of the same recipe in {file}, got another ({reason})") from None
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer{number}."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        if state:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    budget.seconds_before = float(metadata["seconds"])
    return int(metadata["step"])


if __name__ == "__main__":
    raise SystemExit(main())

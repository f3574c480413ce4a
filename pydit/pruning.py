"""Plan x model -> pruned model. Pure surgery on copies: the teacher passed in is only read.

What a plan adds to the teacher, the linear maps of thinned-out blocks, is fitted in :mod:`pydit.linear_maps`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pydit.arguments import integer
from pydit.errors import UserError
from pydit.inference import hooked, schedule
from pydit.linear_maps import fit_linear_maps
from pydit.models import ModelAdapter, get_adapter
from pydit.models.adapter import require_batches, require_plan
from pydit.models.by_source import chosen_layer, init_weights
from pydit.models.swapped import as_made
from pydit.plan import PruningPlan
from pydit.stats import checks
from pydit.stats.ridge import gated_ridge

INITS = ("first", "middle", "last", "average", "position-average", "probe")


def prune(transformer: nn.Module, plan: PruningPlan, *, init: str = "first",
          batches: Iterable[Mapping[str, Any]] | None = None, ridge: float = 1e-4, tokens_per_batch: int = 1024,
          seed: int = 0, dry_run: bool = False) -> nn.Module | str:
    """Build a pruned copy of a transformer in which one block stands for each interval of the plan.

    Parameters
    ----------
    transformer : diffusers transformer of a known family, not itself pruned. It is not changed. Of an accelerated one
        the student gets plain blocks.
    plan : PruningPlan for its family and depth.
    init : what the block that stands for layers ``start..end`` begins as:

        - ``"first"``: a copy of layer ``start`` (the paper), ``"middle"``: of layer ``(start + end) // 2`` (the
          authors' script), ``"last"``: of layer ``end``; ``"average"``: the mean of the parameters of all its layers,
          ``"position-average"``: the same with weights n, n - 1, ..., 1 from layer ``start`` on (Amber-Image's local
          weight averaging, uniform or by position);
        - ``"probe"``: a copy of layer ``start`` whose last linear layer, in each stream, is refitted so that the
          block's output comes closest to the output of layer ``end`` on ``batches``. A block adds
          ``gate * (W a + b)`` to a stream last, so with everything before held fixed, W and b are the solution of a
          least-squares problem (solved to rounding by conjugate gradients, with a ridge that pulls to the copied
          weights). Everything else an interval does, such as changing the attention, is beyond it: it is a starting
          point for distillation. A text output that the model does not read is left alone.
    batches : keyword-argument dicts for ``transformer.forward``, for ``init="probe"`` and for the linear maps of a plan
        that has any: these are fitted in closed form to the teacher's activations on all rows of all batches, padding
        left out, each map to its own target. They are kept in a list. Without batches the maps start as the identity
        and a warning says so.
    ridge : relative strength of the ridge of ``init="probe"`` and of the linear maps (which it pulls to the identity).
    tokens_per_batch : tokens per stream and batch that ``init="probe"`` fits to. The layer that is fitted has 4 C
        inputs, so aim for more tokens than that in total.
    seed : of the choice of those tokens.
    dry_run : return what would be done as text instead; nothing is built.

    Returns
    -------
    nn.Module
        A diffusers ModelMixin on the device and in the dtype of ``transformer``, all parameters trainable, with
        ``plan``, ``source``, ``replaced``, ``fits``, ``set_active`` (see
        :class:`pydit.models.pruned.PrunedModel`).

    Raises
    ------
    UserError
        An unknown family or init, a plan for another family or depth, a model that is already pruned, baked or
        quantized or carries LoRA layers or hooks of a cache, of offloading or casting, ``init="probe"`` without
        batches, an average of layers that differ in structure, or a ridge, number of tokens or seed that is none.

    Warns
    -----
    UserWarning
        A linear map without batches, or with fewer tokens than unknowns; likewise what ``init="probe"`` fits. A block
        that cannot keep its part of the teacher's IP-adapter.
    """
    adapter = get_adapter(transformer)
    require_plan(plan)
    if init not in INITS:
        raise UserError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    if isinstance(transformer, adapter.pruned_class()):
        raise UserError("transformer: expected an unpruned model, got a pruned one; prune its to_stock()")
    if schedule.is_baked(transformer):
        raise UserError("transformer: expected one with its modulation weights, got a baked schedule; pydit.restore it "
                        "before pruning")
    if getattr(transformer, "is_quantized", False) or getattr(transformer, "hf_quantizer", None) is not None:
        raise UserError("transformer: expected plain weights, got a quantized model; prune before quantizing")
    if getattr(transformer, "peft_config", None):
        raise UserError("transformer: expected plain weights, got a model with LoRA layers; fuse or unload them first")
    for name, child in transformer.named_children():  # a hook on the model itself moves it as a whole
        if hook := hooked.has_offloading(child):
            raise UserError(f"transformer: expected a model without hooks, whose copies would run this one, got {name} "
                            f"with {hook}; prune before offloading, casting or caching")
    if adapter.family == "flux.1":
        from pydit.models.flux_lora import require_config  # which needs diffusers

        require_config(transformer)
    plan.require_match(transformer)
    if init == "probe" and batches is None:
        raise UserError('batches: expected calibration batches for init="probe", got none')
    if batches is not None:
        require_batches(batches)
    ridge = checks.number("ridge", ridge, "a number >= 0", lambda x: x >= 0)
    tokens_per_batch = integer("tokens_per_batch", tokens_per_batch, expected="a whole number of 1 or more")
    seed = integer("seed", seed, -2**63, 2**63 - 1, expected="a whole number")
    if dry_run:
        return f"{plan.describe(transformer.config)}\ninit: {init}"

    layers = adapter.blocks(transformer)
    blocks = [initial_block(adapter, [layers[k] for k in source], init) for source in plan.source]
    batches = None if batches is None else list(batches)
    if init == "probe":
        _refit(adapter, transformer, plan, blocks, batches, ridge, tokens_per_batch, seed)
    adapted = [_has_ip_adapter(block) for block in blocks]
    originals = blocks
    if not plan.is_stock:  # thinning a block out takes it apart
        originals = [copy.deepcopy(block) if spec.text == "linear" else block
                     for block, spec in zip(blocks, plan.blocks, strict=True)]
        blocks = [adapter.new_block(block, spec) for block, spec in zip(blocks, plan.blocks, strict=True)]
    lost = [k for k, block in enumerate(blocks) if adapted[k] and not _has_ip_adapter(block)]
    if lost:
        warnings.warn(f"the teacher's IP-adapter is left out of blocks {lost} of the student, which are thinned out; "
                      "the others keep it", stacklevel=2)
    fits = fit_linear_maps(adapter, transformer, plan, blocks, originals, batches, ridge=ridge)
    others = {name: copy.deepcopy(child) for name, child in transformer.named_children()
              if name not in adapter.block_lists}
    student = adapter.pruned_class().from_teacher(transformer, plan, blocks, others, init=init)
    student.fits = fits
    return student.requires_grad_(True)


def initial_block(adapter: ModelAdapter, layers: Sequence[nn.Module], init: str) -> nn.Module:
    """What the block that stands for these layers of the teacher begins as; see :func:`prune`."""
    index = chosen_layer(len(layers), init)
    block = adapter.conform(as_made(copy.deepcopy(layers[index])), layers[-1])
    states = []
    if "average" in init and len(layers) > 1:
        for layer in layers:
            if _shapes(layer) != _shapes(block):
                layer = adapter.conform(as_made(copy.deepcopy(layer)), layers[-1])
            states.append(layer.state_dict())
    same = index == 0 or _shapes(layers[index]) == _shapes(layers[0]) \
        or _shapes(block) == _shapes(adapter.conform(as_made(copy.deepcopy(layers[0])), layers[-1]))
    if not same or any({name: t.shape for name, t in state.items()} != _shapes(block) for state in states):
        raise UserError(f'init: expected "first" for an interval whose layers differ in structure, got {init!r}')
    if states:
        block.load_state_dict({name: weighted_mean([state[name] for state in states], init) for name in states[0]})
    return block


def weighted_mean(tensors: Sequence[torch.Tensor], init: str) -> torch.Tensor:
    """Of one parameter of all layers of an interval, in float64, for an average init; in the first one's dtype."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    weights = init_weights(len(tensors), init)
    return sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)).to(tensors[0].dtype)


def _has_ip_adapter(block: nn.Module) -> bool:
    """Whether a processor of attention brings weights of its own."""
    return any(".processor." in name for name, _ in block.named_parameters())


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _refit(adapter: ModelAdapter, teacher: nn.Module, plan: PruningPlan, blocks: list[nn.Module],
           batches: list[Mapping[str, Any]], ridge: float, tokens_per_batch: int, seed: int) -> None:
    """Refit the last linear layers of every interval's block, one interval at a time to bound memory."""
    if not batches:
        raise UserError('batches: expected at least one calibration batch for init="probe", got none')
    few: list[str] = []
    for index, start, end in plan.replaced:
        if start == end or plan.blocks[index].form == "affine":
            continue  # the teacher's own layer, thinned out or replaced as a whole
        generator = torch.Generator().manual_seed(seed)
        rows: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {"image": [], "text": []}
        for batch in batches:
            capture = adapter.capture(teacher, batch, (start, end + 1))
            observed = _observe(adapter, blocks[index], *capture.states[start], capture.kwargs)
            mask = adapter.text_mask(capture.kwargs)
            for stream, target in zip(("image", "text"), capture.states[end + 1], strict=True):
                if stream not in observed:
                    continue
                inputs, gate, output, last = observed[stream]
                wanted = target.float() - (output - gate * last)  # what gate * (W a + b) has to be
                keep = torch.arange(target[..., 0].numel()) if stream == "image" or mask is None else \
                    mask.bool().flatten().nonzero().flatten().cpu()
                keep = keep[torch.randperm(len(keep), generator=generator)[:tokens_per_batch]].to(target.device)
                rows[stream].append(tuple(t.flatten(0, 1)[keep] for t in (inputs, gate, wanted)))
        linears = dict(adapter.last_linears(blocks[index]))
        if "text" in linears and end == plan.num_layers - 1 and not adapter.last_text_used:
            del linears["text"]
        for stream, linear in linears.items():
            inputs, gate, wanted = (torch.cat(parts) for parts in zip(*rows[stream], strict=True))
            if len(inputs):
                weight, bias = gated_ridge(inputs, gate, wanted, linear.weight, linear.bias, ridge=ridge)
                with torch.no_grad():
                    linear.weight.copy_(weight)
                    linear.bias.copy_(bias)
            if len(inputs) <= linear.in_features:
                few.append(f"{stream} of layers {start}-{end}: {linear.in_features + 1} for {len(inputs)}")
    if few:
        warnings.warn(f"{len(few)} of the layers that init=\"probe\" fits have more unknowns than tokens (the first, "
                      f"{few[0]}), so the weights they began with decide part of them; give more batches, or more "
                      "tokens_per_batch", UserWarning, stacklevel=3)


def _observe(adapter: ModelAdapter, block: nn.Module, image: torch.Tensor, text: torch.Tensor,
             kwargs: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Run a block -> per stream (input of its last linear, gate, output of the block, output of the last linear).

    All float32, [B, S, F] or [B, S, C]. The gate is the derivative of the block's output by the linear's output,
    which needs to know nothing about how the family computes it.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(stream: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            seen[stream] = args[0].detach(), output.detach().requires_grad_(True)
            return seen[stream][1]
        return hook

    handles = [linear.register_forward_hook(watch(stream)) for stream, linear in adapter.last_linears(block).items()]
    try:
        with torch.enable_grad():
            outputs = dict(zip(("image", "text"), adapter.call_block(block, image, text, kwargs), strict=True))
            outputs = {stream: output for stream, output in outputs.items() if stream in seen}
            gates = {stream: torch.autograd.grad(output.sum(), seen[stream][1], retain_graph=True)[0]
                     for stream, output in outputs.items()}
    finally:
        for handle in handles:
            handle.remove()
    return {stream: tuple(t.detach().float() for t in (seen[stream][0], gates[stream], outputs[stream],
                                                       seen[stream][1])) for stream in outputs}

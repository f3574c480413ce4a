"""Published and own layouts of pruned models, by name, as the fields of a :class:`pydit.plan.PruningPlan`."""

from __future__ import annotations

from typing import Any

# Depth lists of the PPCL authors' repository: its commented alternative (18 layers removed) and its default (25).
_PPCL_18 = ((5, 7), (8, 9), (11, 12), (16, 18), (19, 20), (22, 24), (25, 27), (42, 43), (45, 47), (48, 49), (52, 53),
            (54, 55), (56, 57))
_PPCL_25 = ((3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49), (52, 53),
            (54, 55), (56, 57))
_PPCL_TEXT = ((36, 37), (40, 41), (50, 59))
_EVERY_SECOND = tuple((layer, layer + 1) for layer in range(0, 60, 2))
_WHICH_30 = ("30 of 60 blocks; which 30 is not published, every second one is a placeholder for "
             "detect(method='amber')")
_OWN = "this project's own layout for a published size; a placeholder for detect"

# name -> (family, layers, fields of the plan, a note for `describe`)
PRESETS: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "ppcl-qwen-image-14b": ("qwen-image", 60, {"intervals": _PPCL_18}, ""),
    "ppcl-qwen-image-12b": ("qwen-image", 60, {"intervals": _PPCL_25}, ""),
    "ppcl-qwen-image-11b": ("qwen-image", 60, {"intervals": _PPCL_25, "text_linear": _PPCL_TEXT}, ""),
    "ppcl-qwen-image-10b": ("qwen-image", 60, {"intervals": _PPCL_25, "text_linear": _PPCL_TEXT,
                                               "linear_ffn": (2, 58, 59)}, ""),
    "amber-qwen-image-10b": ("qwen-image", 60, {"intervals": _EVERY_SECOND}, f"Amber-style: {_WHICH_30}"),
    "amber-qwen-image-6b": ("qwen-image", 60, {"intervals": _EVERY_SECOND, "single_stream": 20},
                            f"6.84 B, Amber-style: 10 dual-stream and 20 single-stream blocks; {_WHICH_30}"),
    # The paper's FLUX.1 model has 8 B parameters; its layers are not published. Ends of the stack stay whole.
    "ppcl-flux.1-8b": ("flux.1", 57, {"intervals": ((4, 5), (6, 7), (8, 9), (10, 11), (12, 13), *(
        (layer, layer + 1) for layer in range(23, 53, 2)))}, _OWN),
    # No size is published for SD3.5: a third of the blocks of the large model.
    "ppcl-sd3.5-large-5b": ("sd3.5", 38, {"intervals": tuple((layer, layer + 1) for layer in range(6, 32, 2))}, _OWN),
}

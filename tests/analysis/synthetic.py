"""Statistics of made-up layers whose redundancy is known."""

import torch

from pydit.analysis import ActivationStats

WIDTH = 8


def layers(kinds, seed=0):
    """One function per letter: "a" affine, "n" strongly nonlinear, "i" identity, "w" weakly nonlinear."""
    generator = torch.Generator().manual_seed(seed)
    functions = []
    for kind in kinds:
        weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
        bias = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        functions.append({
            "a": lambda x, w=weight, b=bias: x @ w.T + b,
            "n": lambda x, w=weight: (2.5 * (x - x.mean(0)) @ w.T).sin() * 1.7,
            "w": lambda x, w=weight: x + 0.2 * (x @ w.T).tanh(),
            "i": lambda x: x,
        }[kind])
    return functions


def states(functions, n, generator):
    """Random inputs [n, WIDTH] sent through the layers: L + 1 boundaries."""
    result = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)]
    for function in functions:
        result.append(function(result[-1]))
    return result


def stats(image, text=None, *, samples=6, rows=64, seed=0, last_text_used=True):
    """Statistics of layers given by kinds, image and text separately."""
    generator = torch.Generator().manual_seed(seed + 1)
    functions = {"image": layers(image), "text": layers(text or image, seed=7)}
    result = ActivationStats("qwen-image", len(image), WIDTH, last_text_used=last_text_used)
    result.add_probe_rows({stream: states(f, 4000, generator) for stream, f in functions.items()})
    for _ in range(samples):
        result.add_sample({stream: torch.stack(states(f, rows, generator)) for stream, f in functions.items()},
                          {stream: torch.arange(rows) % 4 for stream in functions})
        result.images_seen += 4
    return result

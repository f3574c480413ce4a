"""What a failed capture of a CUDA graph leaves behind. Of torch alone, as benchmarks also run without diffusers."""

from __future__ import annotations

import contextlib

import torch


def clean_up_after_capture(stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """What torch leaves undone where a capture into ``pool`` failed: see torch's CUDAGraph::capture_end.

    Its stream stays the current one, and what follows would not wait for what came before; its allocator goes on
    recording to the pool; and random numbers from the device raise for the rest of the process, as the default
    generator takes itself to be in the capture.
    """
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # raises where that is over
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # the same seed and offset, in no capture

"""Checks on a GPU that pydit imports and that an op runs on torch's current stream, without waiting for the host."""

from __future__ import annotations

import torch

import pydit


def main() -> None:
    print(pydit.backend_info())
    x = torch.randn(4, 4096, 3072, device="cuda", dtype=torch.bfloat16)
    m = torch.randn(4, 3072, device="cuda", dtype=torch.bfloat16)
    want = pydit.ops.ada_layer_norm(x, m, m)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pydit.ops.ada_layer_norm(x + 1, m, m)  # loads the kernels and takes memory, which may wait
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # the op must queue behind this, on this stream
        late = x + 1
        got = pydit.ops.ada_layer_norm(late, m, m)
        if stream.query():
            raise SystemExit("ada_layer_norm: expected to queue behind the stream, got a wait or another stream")
    stream.synchronize()
    again = pydit.ops.ada_layer_norm(late, m, m)
    if not torch.equal(got, again) or torch.equal(got, want):
        raise SystemExit("ada_layer_norm: expected the result of its inputs on a side stream, got another one")
    path = pydit.report()["ada_layer_norm"]
    print(path)
    if path["path"] != "cuda":
        raise SystemExit(f"ada_layer_norm: expected the CUDA kernel, got the {path['path']} ({path['reason']})")


if __name__ == "__main__":
    main()

"""The torch peers of `ufbert bench layer`: the dense layer in PyTorch, run by an interpreter that has torch and numpy.

Of ufbert it imports only `worker.py`, from the same folder. Its name is `torch`, `torch-bf16` or `torch-int8`.

What was chosen for it: inference mode; functional calls instead of modules; with bfloat16, both products and the GELU
between them in bfloat16 and the residual in float32; int8 is torch's dynamic quantisation (weights int8, rows quantised
at every call), with the backend that it picks for this processor.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

from worker import Answers, Worker, end_without, serve

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    end_without(error)


def linear_layer(w_in: Tensor, bias: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> x + the dense layer, from w_in (f, d), bias (f) and w_out (d, f) of one type."""
    if w_in.dtype == torch.float32:
        return lambda x: x + F.linear(F.gelu(F.linear(x, w_in, bias)), w_out)
    return lambda x: x + F.linear(F.gelu(F.linear(x.to(w_in.dtype), w_in, bias)), w_out).float()


def quantized_layer(w_in: Tensor, bias: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the same through torch's dynamic int8 quantisation."""
    f, d = w_in.shape
    model = nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d, bias=False))
    with torch.no_grad():
        for to, array in ((model[0].weight, w_in), (model[0].bias, bias), (model[2].weight, w_out)):
            to.copy_(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another library for this
        narrow = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
    return lambda x: x + narrow(x)


def start(folder: Path, name: str, threads: int) -> tuple[str, Answers]:
    """Get ready to compute the layers of a job folder: facts, and the answers of this process."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    weights = np.load(folder / "weights.npz")
    parts = (weights[part] for part in ("dense_in", "dense_bias", "dense_out"))
    dtype = torch.bfloat16 if name == "torch-bf16" else torch.float32
    make = quantized_layer if name == "torch-int8" else linear_layer
    layers = [
        make(*(torch.from_numpy(np.ascontiguousarray(part)).to(dtype) for part in (w_in, bias, w_out.T)))
        for w_in, bias, w_out in zip(*parts, strict=True)
    ]

    def chain(i: int, x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    calls = {name: {"chain": chain, "layer": lambda i, x: layers[i % len(layers)](x)}}
    engine = f", {torch.backends.quantized.engine}" if name == "torch-int8" else ""
    worker = Worker(folder, calls, torch.from_numpy)
    return f"torch {torch.__version__}{engine}", worker.answers()


if __name__ == "__main__":
    with torch.inference_mode():
        serve(start)

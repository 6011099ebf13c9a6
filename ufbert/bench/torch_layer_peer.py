"""The torch peers of `ufbert bench layer`: the dense layer in PyTorch, run by an interpreter that has torch and numpy.

Stands alone: it imports nothing of ufbert and ufbert never imports it. Arguments: the job folder, the kind (`torch`,
`torch-bf16` or `torch-int8`) and the number of threads; `ufbert.bench.layer_worker` describes the protocol.

What was chosen for it: inference mode; functional calls instead of modules; with bfloat16, both products and the GELU between
them in bfloat16 and the residual in float32; int8 is torch's dynamic quantisation (weights int8, rows quantised at every
call), with the backend that it picks for this processor.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    print(json.dumps({"missing": f"{sys.executable} cannot import {error.name}"}), flush=True)
    sys.exit(1)

MOST_BATCHES = 4096


def linear_layer(w_in: Tensor, bias: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    """x + the dense layer, from w_in (f, d), bias (f) and w_out (d, f) of one type."""
    if w_in.dtype == torch.float32:
        return lambda x: x + F.linear(F.gelu(F.linear(x, w_in, bias)), w_out)
    return lambda x: x + F.linear(F.gelu(F.linear(x.to(w_in.dtype), w_in, bias)), w_out).float()


def quantized_layer(w_in: Tensor, bias: Tensor, w_out: Tensor) -> Callable[[Tensor], Tensor]:
    """The same through torch's dynamic int8 quantisation."""
    (f, d), model = w_in.shape, nn.Sequential(nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1, bias=False))
    model[0] = nn.Linear(d, f)
    model[2] = nn.Linear(f, d, bias=False)
    with torch.no_grad():
        for to, array in ((model[0].weight, w_in), (model[0].bias, bias), (model[2].weight, w_out)):
            to.copy_(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another library for this
        narrow = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
    return lambda x: x + narrow(x)


class Peer:
    """The layers of a job folder, and batches of its inputs."""

    def __init__(self, folder: Path, kind: str) -> None:
        weights = np.load(folder / "weights.npz")
        parts = (weights[name] for name in ("dense_in", "dense_bias", "dense_out"))
        dtype = torch.bfloat16 if kind == "torch-bf16" else torch.float32
        make = quantized_layer if kind == "torch-int8" else linear_layer
        self.folder, self.name, self.inputs = folder, kind, np.load(folder / "inputs.npy", mmap_mode="r")
        self.layers = [
            make(*(torch.from_numpy(np.ascontiguousarray(part)).to(dtype) for part in (w_in, bias, w_out.T)))
            for w_in, bias, w_out in zip(*parts, strict=True)
        ]
        self.batches: list[Tensor] = []

    def load(self, rows: int) -> dict[str, Any]:
        self.batches = []
        count = min(len(self.inputs) // rows, MOST_BATCHES)
        self.batches = [torch.from_numpy(np.array(self.inputs[i * rows : (i + 1) * rows])) for i in range(count)]
        return {"batches": count}

    def chain(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def check(self, name: str, batches: int, sample: list[int]) -> dict[str, Any]:
        y = torch.cat([self.chain(batch) for batch in self.batches[:batches]])
        np.save(self.folder / f"{name}-found.npy", y[sample].numpy())
        return {"file": f"{name}-found.npy"}

    def time(self, name: str, what: str, first: int, calls: int) -> dict[str, Any]:
        batches, n, layers = self.batches, len(self.batches), self.layers
        start = time.perf_counter()
        if what == "chain":
            for i in range(first, first + calls):
                self.chain(batches[i % n])
        else:
            for i in range(first, first + calls):
                layers[i % len(layers)](batches[i % n])
        return {"seconds": time.perf_counter() - start}


def serve(folder: Path, kind: str, threads: int) -> None:
    """Get ready and answer requests until the input ends; what goes wrong is answered too, and ends the process."""
    try:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        peer = Peer(folder, kind)
        engine = f", {torch.backends.quantized.engine}" if kind == "torch-int8" else ""
        print(json.dumps({"ready": f"torch {torch.__version__}{engine}, {threads} threads"}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            do = {"load": peer.load, "check": peer.check, "time": peer.time}[asked.pop("do")]
            print(json.dumps(do(**asked)), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    with torch.inference_mode():
        serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

"""The peer of `ufbert bench train`: crammed BERT and UltraFastBERT in PyTorch, by an interpreter with torch and numpy.

Of ufbert it imports only `worker.py`, from the folder above. Its name begins with `torch`, with `torch-compile`, which puts
the loss through `torch.compile`, or with `float32` for the reference of others that compute in bfloat16.

What was chosen for it: one product for queries, keys and values and one for gate and value;
`scaled_dot_product_attention` with an additive mask made once per batch; AdamW with `fused=True`; gradients set to None
between steps; bfloat16 by autocast. On a CPU: as many threads as cores; denormals flushed; oneDNN as it comes; glibc told
to keep freed memory, as ours does. On a graphics card: all batches lie there before the first step. Rows arrive masked,
which costs it nothing; ours masks within the step.
"""

import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from worker import Answers, end_without, serve, step_answers

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    end_without(error)


def keep_freed_memory() -> None:
    """Keep freed memory, which spares page faults at every step, as ufbert does. Without glibc, do nothing."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # arenas, mmap, trim threshold
        mallopt(option, value)


def put(arrays: dict[str, np.ndarray], to: Tensor, *names: str) -> None:
    """Move arrays of those names, side by side, into a parameter; kernels are (in, out) in ufbert."""
    joined = np.concatenate([arrays.pop(name) for name in names], axis=-1)
    with torch.no_grad():
        to.copy_(torch.from_numpy(joined.T if names[0].endswith("kernel") else joined))


def put_norm(arrays: dict[str, np.ndarray], to: nn.LayerNorm, name: str) -> None:
    """Move a LayerNorm's two arrays."""
    put(arrays, to.weight, f"{name}.scale")
    put(arrays, to.bias, f"{name}.bias")


class Glu(nn.Module):
    """(GELU(x W_gate) * x W_value) W_out."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        d, hidden = model["d_model"], model["d_hidden"]
        self.gate_value, self.down = nn.Linear(d, 2 * hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)

    def load(self, arrays: dict[str, np.ndarray], at: str) -> None:
        """Take parameters from a flat dict with the names and layouts of ufbert."""
        put(arrays, self.gate_value.weight, f"{at}.glu.gate.kernel", f"{at}.glu.value.kernel")
        put(arrays, self.down.weight, f"{at}.glu.out.kernel")


class Dense(nn.Module):
    """GELU(x W_in) W_out."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        d, hidden = model["d_model"], model["d_hidden"]
        self.up, self.down = nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def load(self, arrays: dict[str, np.ndarray], at: str) -> None:
        """Take parameters over."""
        put(arrays, self.up.weight, f"{at}.dense.in.kernel")
        put(arrays, self.down.weight, f"{at}.dense.out.kernel")


class MaskedTrees(nn.Module):
    """UltraFastBERT's layer as its authors train it: every neuron's activation, times a mask of the path.

    The mask is made as theirs, level by level from the signs of all logits, by gather and scatter, without gradient.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.trees, self.depth = model["n_trees"], model["tree_depth"]
        self.nodes = 2 ** (self.depth + 1) - 1
        d, neurons = model["d_model"], self.trees * self.nodes
        self.up, self.down = nn.Linear(d, neurons), nn.Linear(neurons, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.up(x).flatten(0, -2)
        return self.down(F.gelu(logits) * self.mask(logits)).view_as(x)

    def mask(self, logits: Tensor) -> Tensor:
        """One where a neuron is on the row's path, else zero."""
        # Not under no_grad: what autocast has cast there, torch.compile takes for float32 in the backward pass.
        right = logits.detach().view(-1, self.trees, self.nodes) > 0
        mask = torch.zeros_like(right, dtype=logits.dtype)
        node = torch.zeros_like(right[..., :1], dtype=torch.long)
        mask.scatter_(2, node, 1.0)
        for _ in range(self.depth):
            node = 2 * node + 1 + right.gather(2, node)
            mask.scatter_(2, node, 1.0)
        return mask.view_as(logits)

    def load(self, arrays: dict[str, np.ndarray], at: str) -> None:
        """Take parameters from it; trees are (m, n, d) in ufbert."""
        with torch.no_grad():
            self.up.weight.copy_(torch.from_numpy(arrays.pop(f"{at}.tree.w_in")).flatten(0, 1))
            self.up.bias.copy_(torch.from_numpy(arrays.pop(f"{at}.tree.bias")).flatten())
            self.down.weight.copy_(torch.from_numpy(arrays.pop(f"{at}.tree.w_out")).flatten(0, 1).T)


class Block(nn.Module):
    """x + attention(norm x), then x + feedforward(norm x)."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        d, eps = model["d_model"], model["norm_eps"]
        self.heads = model["n_heads"]
        self.mixer_norm = nn.LayerNorm(d, eps=eps)
        self.query_key_value = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.feedforward_norm = nn.LayerNorm(d, eps=eps)
        self.feedforward = {"glu": Glu, "dense": Dense, "tree": MaskedTrees}[model["feedforward"][0]](model)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        parts = self.query_key_value(self.mixer_norm(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.feedforward(self.feedforward_norm(x))


class CrammedBert(nn.Module):
    """Ids to the mean masked-LM loss, logits at the masked positions only, through the token embedding."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        d, eps = model["d_model"], model["norm_eps"]
        self.tokens = nn.Embedding(model["vocab_size"], d, padding_idx=model["pad_id"])
        self.position_scale = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(d, eps=eps)
        self.layers = nn.ModuleList(Block(model) for _ in range(model["n_layers"]))
        self.final_norm = nn.LayerNorm(d, eps=eps)
        rate = torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        angle = torch.outer(torch.arange(model["max_len"]).float(), rate)
        self.register_buffer("sinusoid", torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d])

    def forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.position_scale * self.sinusoid[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask)
        picked = self.final_norm(x).flatten(0, 1)[positions]
        return F.cross_entropy(picked @ self.tokens.weight.T, labels)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Take parameters from a flat dict with the names and layouts of ufbert."""
        put(arrays, self.tokens.weight, "encoder.embeddings.tokens")
        put(arrays, self.position_scale, "encoder.embeddings.position_scale")
        put_norm(arrays, self.norm, "encoder.embeddings.norm")
        put_norm(arrays, self.final_norm, "encoder.final_norm")
        for i, layer in enumerate(self.layers):
            at = f"encoder.layer_{i:02d}"
            put_norm(arrays, layer.mixer_norm, f"{at}.mixer_norm")
            put_norm(arrays, layer.feedforward_norm, f"{at}.feedforward_norm")
            inputs = [f"{at}.attention.{part}.kernel" for part in ("query", "key", "value")]
            put(arrays, layer.query_key_value.weight, *inputs)
            put(arrays, layer.out.weight, f"{at}.attention.out.kernel")
            layer.feedforward.load(arrays, at)
        if arrays:
            raise ValueError(f"parameters that this model does not have: {', '.join(sorted(arrays))}")


def make_optimizer(model: CrammedBert, train: dict[str, Any], lr: float) -> torch.optim.Optimizer:
    """Return AdamW, with decay on all but norms and biases, and a learning rate of its own for the position scalar."""
    scalar = model.position_scale
    flat = [p for p in model.parameters() if p.ndim == 1 and p is not scalar]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": train["weight_decay"]},
        {"params": flat, "weight_decay": 0.0},
        {"params": [scalar], "weight_decay": train["weight_decay"], "lr": lr * train["position_scale_lr"]},
    ]
    betas = (train["adam_b1"], train["adam_b2"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=train["adam_eps"], fused=True)


class Trainer:
    """A training step on the job in a folder, and the model that it updates."""

    def __init__(self, folder: Path, name: str) -> None:
        began = time.perf_counter()
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        model, train = job["run"]["model"], job["run"]["train"]
        kind = name.split()[0]
        self.device = torch.device("cuda" if job["device"] == "gpu" else "cpu")
        self.clip_norm, self.documents = train["clip_norm"], job["run"]["data"]["document_attention"]
        self.dtype = torch.bfloat16 if model["dtype"] == "bfloat16" and kind != "float32" else torch.float32
        self.parts = 4 if kind == "float32" and self.device.type == "cuda" else 1
        self.batches = {
            name: torch.from_numpy(array).to(self.device)
            for name, array in np.load(folder / "batches.npz").items()
            if name != "rows"
        }
        self.model = CrammedBert(model)
        self.model.load(dict(np.load(folder / "params.npz")))
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, train, job["lr"])
        self.loss_of = self.model
        if kind == "torch-compile":
            self.loss_of = torch.compile(self.model)
            self.gradient(0)  # compiles forward and backward
            self.optimizer.zero_grad(set_to_none=True)
        self.start_seconds = time.perf_counter() - began

    def gradient(self, i: int) -> Tensor:
        """Add the gradient of batch i's mean loss, and return that loss.

        The reference takes it of parts of the rows, one after the other, to need less of a card's memory. Every row has
        equally many masked positions, so the mean of the parts' losses is the batch's.
        """
        total = torch.zeros((), device=self.device)
        names = ("ids", "segments", "positions", "labels")
        parts = (self.batches[name][i].chunk(self.parts) for name in names)
        for ids, segments, positions, labels in zip(*parts, strict=True):
            mask = None
            if self.documents:
                seen = segments[:, :, None] == segments[:, None, :]
                mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
                mask = mask.masked_fill_(~seen, -math.inf)[:, None]
            rows = torch.arange(len(ids), device=self.device)[:, None] * ids.shape[1]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.loss_of(ids, mask, (rows + positions).flatten(), labels.flatten())
            loss = loss * (len(ids) / len(self.batches["ids"][i]))
            loss.backward()
            total += loss.detach()
        return total

    def step(self, i: int) -> Tensor:
        """Train on batch i and return its mean loss before that."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradient(i)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        return loss

    def describe(self) -> dict[str, Any]:
        """Return the number of parameters, the seconds that the start took, and what is known of a graphics card."""
        parameters, memory, card = sum(p.numel() for p in self.model.parameters()), None, None
        if self.device.type == "cuda":
            memory, card = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        return {"parameters": parameters, "start_seconds": self.start_seconds, "memory": memory, "card": card}


def start(folder: Path, name: str, threads: int) -> tuple[str, Answers]:
    """Get ready to train: facts, and the answers of this process. Threads and memory are as they serve torch best."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    trainer = Trainer(folder, name)
    return f"torch {torch.__version__}", step_answers(trainer.step, trainer.describe)


if __name__ == "__main__":
    serve(start)

"""Write `*.npz` beside this file: small encoders written from scratch in PyTorch, with inputs, outputs and gradients.

The tests compare against these numbers without PyTorch. To regenerate, in a throw-away environment with torch and numpy:
`python tests/golden/make_golden.py`. The mathematics is restated here, not imported, so it checks the package's.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

D, HEADS, LAYERS, VOCAB, B, T = 16, 2, 2, 40, 3, 8


def weights(
    generator: torch.Generator, feedforward: str, trees: int, depth: int, hidden: int
) -> dict[str, torch.Tensor]:
    def draw(*shape: int, scale: float = 0.3, mean: float = 0.0) -> torch.Tensor:
        return (mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).float().double()

    nodes = trees * (2 ** (depth + 1) - 1)
    w = {
        "encoder.embedding.word_embedding.weight": draw(VOCAB, D),
        "encoder.embedding.pos_embedding.scale_factor": draw(1, mean=0.5),
        "encoder.embedding.norm.weight": draw(D, mean=1.0),
        "encoder.embedding.norm.bias": draw(D),
        "encoder.final_norm.weight": draw(D, mean=1.0),
        "encoder.final_norm.bias": draw(D),
    }
    for i in range(LAYERS):
        name = f"encoder.layers.{i}"
        for norm in ("norm1", "norm2"):
            w[f"{name}.{norm}.weight"], w[f"{name}.{norm}.bias"] = draw(D, mean=1.0), draw(D)
        w[f"{name}.attn.self_attention.query_key_value.weight"] = draw(3 * D, D)
        w[f"{name}.attn.dense.weight"] = draw(D, D)
        if feedforward == "tree":
            w[f"{name}.ffn.linear_in.weight"], w[f"{name}.ffn.linear_in.bias"] = draw(nodes, D), draw(nodes)
            w[f"{name}.ffn.linear_out.weight"] = draw(D, nodes)
        else:
            w[f"{name}.ffn.dense_in.weight"] = draw(hidden * (2 if feedforward == "glu" else 1), D)
            w[f"{name}.ffn.dense_out.weight"] = draw(D, hidden)
    return w


def tree_layer(
    x: torch.Tensor, w_in: torch.Tensor, bias: torch.Tensor, w_out: torch.Tensor, trees: int
) -> torch.Tensor:
    """Row by row, tree by tree, node by node."""
    n = len(w_in) // trees
    rows = []
    for row in x.reshape(-1, D):
        y = torch.zeros(D, dtype=torch.float64)
        for tree in range(trees):
            node = 0
            while node < n:
                z = row @ w_in[tree * n + node] + bias[tree * n + node]
                y = y + F.gelu(z) * w_out[:, tree * n + node]
                node = 2 * node + 1 + int(z > 0)
        rows.append(y)
    return torch.stack(rows).reshape(x.shape)


def forward(w: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor | None, feedforward: str, trees: int):
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    rate = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * rate
    table = torch.stack([angle.sin(), angle.cos()], -1).reshape(T, D)
    words = F.embedding(ids, w["encoder.embedding.word_embedding.weight"], padding_idx=0)
    x = norm(words + w["encoder.embedding.pos_embedding.scale_factor"] * table, "encoder.embedding.norm")
    for i in range(LAYERS):
        name, k = f"encoder.layers.{i}", D // HEADS
        h = norm(x, f"{name}.norm1") @ w[f"{name}.attn.self_attention.query_key_value.weight"].T
        q, key, v = h.reshape(B, T, HEADS, 3, k).permute(3, 0, 2, 1, 4)
        scores = q @ key.transpose(-1, -2) / k**0.5
        if mask is not None:
            scores = scores + (1 - mask[:, None, None]) * -10000.0
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
        x = x + mixed @ w[f"{name}.attn.dense.weight"].T
        h = norm(x, f"{name}.norm2")
        if feedforward == "tree":
            ffn = [w[f"{name}.ffn.{part}"] for part in ("linear_in.weight", "linear_in.bias", "linear_out.weight")]
            x = x + tree_layer(h, *ffn, trees)
        else:
            h = h @ w[f"{name}.ffn.dense_in.weight"].T
            if feedforward == "glu":
                value, gate = h.chunk(2, -1)
                h = F.gelu(gate) * value
            else:
                h = F.gelu(h)
            x = x + h @ w[f"{name}.ffn.dense_out.weight"].T
    hidden = norm(x, "encoder.final_norm")
    return hidden, hidden @ w["encoder.embedding.word_embedding.weight"].T


def make(name: str, feedforward: str, trees: int = 1, depth: int = 0, hidden: int = 1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = weights(generator, feedforward, trees, depth, hidden)
    ids = torch.randint(1, VOCAB, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.float64)
    for row, length in enumerate((T, 5, 3)):
        ids[row, length:], mask[row, length:] = 0, 0
    labels = torch.randint(0, VOCAB, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) > 0.4] = -100
    states, logits = forward(w, ids, mask, feedforward, trees)
    for tensor in w.values():
        tensor.requires_grad_()
    _, free = forward(w, ids, None, feedforward, trees)
    loss = F.cross_entropy(free.reshape(-1, VOCAB), labels.reshape(-1))
    loss.backward()
    arrays = {
        "shape": np.array([D, HEADS, LAYERS, VOCAB, T, trees, depth, hidden]),
        "ids": ids, "mask": mask, "labels": labels, "hidden": states, "logits": logits, "loss": loss,
    }  # fmt: skip
    arrays |= {f"param.{name}": tensor for name, tensor in w.items()}
    arrays |= {f"grad.{name}": tensor.grad for name, tensor in w.items()}
    found = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()}
    np.savez_compressed(
        Path(__file__).with_name(f"{name}.npz"),
        **{k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in found.items()},
    )


if __name__ == "__main__":
    make("tree_1x4", "tree", trees=1, depth=4, seed=1)
    make("tree_3x2", "tree", trees=3, depth=2, seed=2)
    make("glu", "glu", hidden=12, seed=3)
    make("dense", "dense", hidden=20, seed=4)

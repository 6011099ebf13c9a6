"""Write `hf_*.npz`, `switch.npz` and `leaf_tree.npz` beside this file: small models written from scratch in PyTorch, float64.

Names are those of the libraries' checkpoints, so that the fixtures go through the import. To regenerate, in a throw-away
environment with torch and numpy: `python tests/golden/make_other_golden.py`. The mathematics is restated here from the papers.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

D, HEADS, LAYERS, VOCAB, B, T, WIDE = 16, 2, 2, 40, 3, 8, 24
COMMON = {"hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "initializer_range": 0.02}
COMMON |= {"num_attention_heads": HEADS, "intermediate_size": WIDE, "max_position_embeddings": 12, "pad_token_id": 0}
CONFIGS = {
    "hf_bert": COMMON
    | {"model_type": "bert", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "type_vocab_size": 2},
    "hf_fnet": COMMON
    | {"model_type": "fnet", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "type_vocab_size": 2},
    "hf_modernbert": COMMON
    | {"model_type": "modernbert", "norm_eps": 1e-5, "global_rope_theta": 1000.0, "global_attn_every_n_layers": 1},
}
CONFIGS["hf_bert_classifier"] = CONFIGS["hf_bert"] | {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}
CONFIGS["hf_fnet"] |= {"hidden_act": "gelu_new", "tpu_short_seq_length": T}
Weights = dict[str, torch.Tensor]


class Draw(dict):
    """Weights by name, drawn when first asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def get_weight(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self:
            mean = 1.0 if name.endswith("orm.weight") else 0.0
            drawn = mean + 0.3 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
            self[name] = drawn.float().double().requires_grad_()
        return self[name]


def norm(w: Draw, x: torch.Tensor, name: str, eps: float, *, bias: bool = True) -> torch.Tensor:
    shift = w.get_weight(f"{name}.bias", D) if bias else None
    return F.layer_norm(x, (D,), w.get_weight(f"{name}.weight", D), shift, eps)


def linear(w: Draw, x: torch.Tensor, name: str, out: int, *, bias: bool = True) -> torch.Tensor:
    y = x @ w.get_weight(f"{name}.weight", out, x.shape[-1]).T
    return y + w.get_weight(f"{name}.bias", out) if bias else y


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(b, t, d) in, heads side by side in d."""
    q, k, v = (x.reshape(B, T, HEADS, D // HEADS).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / (D // HEADS) ** 0.5
    scores = scores.masked_fill(mask[:, None, None] == 0, -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)


def bert_like(w: Draw, ids: torch.Tensor, types: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    root, fnet = kind.split("_")[1], kind == "hf_fnet"
    act = (lambda x: F.gelu(x, approximate="tanh")) if fnet else F.gelu
    words = w.get_weight(f"{root}.embeddings.word_embeddings.weight", VOCAB, D)
    x = F.embedding(ids, words, padding_idx=0)
    x = x + w.get_weight(f"{root}.embeddings.position_embeddings.weight", 12, D)[:T]
    x = x + w.get_weight(f"{root}.embeddings.token_type_embeddings.weight", 2, D)[types]
    x = norm(w, x, f"{root}.embeddings.LayerNorm", 1e-12)
    if fnet:
        x = linear(w, x, f"{root}.embeddings.projection", D)
    for i in range(LAYERS):
        name = f"{root}.encoder.layer.{i}"
        if fnet:
            row = torch.arange(T, dtype=torch.float64)[:, None] * torch.arange(T, dtype=torch.float64)
            column = torch.arange(D, dtype=torch.float64)[:, None] * torch.arange(D, dtype=torch.float64)
            row, column = 2 * torch.pi * row / T, 2 * torch.pi * column / D  # the transform, written out
            mixed = row.cos() @ x @ column.cos() - row.sin() @ x @ column.sin()
            x = norm(w, x + mixed, f"{name}.fourier.output.LayerNorm", 1e-12)
        else:
            parts = [linear(w, x, f"{name}.attention.self.{part}", D) for part in ("query", "key", "value")]
            mixed = linear(w, attend(*parts, mask), f"{name}.attention.output.dense", D)
            x = norm(w, x + mixed, f"{name}.attention.output.LayerNorm", 1e-12)
        hidden = act(linear(w, x, f"{name}.intermediate.dense", WIDE))
        x = norm(w, x + linear(w, hidden, f"{name}.output.dense", D), f"{name}.output.LayerNorm", 1e-12)
    if kind == "hf_bert_classifier":
        return linear(w, linear(w, x[:, 0], "bert.pooler.dense", D).tanh(), "classifier", 3)
    head = act(linear(w, x, "cls.predictions.transform.dense", D))
    head = norm(w, head, "cls.predictions.transform.LayerNorm", 1e-12)
    return head @ words.T + w.get_weight("cls.predictions.bias", VOCAB)


def modernbert(w: Draw, ids: torch.Tensor, types: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    words, k = w.get_weight("model.embeddings.tok_embeddings.weight", VOCAB, D), D // HEADS
    x = norm(w, F.embedding(ids, words, padding_idx=0), "model.embeddings.norm", 1e-5, bias=False)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 1000.0 ** (
        -torch.arange(k // 2, dtype=torch.float64) / (k // 2)
    )
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(B, T, HEADS, k)
        turned = torch.complex(x[..., : k // 2], x[..., k // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1).reshape(B, T, D)

    for i in range(LAYERS):
        name = f"model.layers.{i}"
        h = x if i == 0 else norm(w, x, f"{name}.attn_norm", 1e-5, bias=False)
        q, key, v = linear(w, h, f"{name}.attn.Wqkv", 3 * D, bias=False).chunk(3, -1)
        x = x + linear(w, attend(rotated(q), rotated(key), v, mask), f"{name}.attn.Wo", D, bias=False)
        h = norm(w, x, f"{name}.mlp_norm", 1e-5, bias=False)
        gate, value = linear(w, h, f"{name}.mlp.Wi", 2 * WIDE, bias=False).chunk(2, -1)
        x = x + linear(w, F.gelu(gate) * value, f"{name}.mlp.Wo", D, bias=False)
    x = norm(w, x, "model.final_norm", 1e-5, bias=False)
    head = norm(w, F.gelu(linear(w, x, "head.dense", D, bias=False)), "head.norm", 1e-5, bias=False)
    return head @ words.T + w.get_weight("decoder.bias", VOCAB)


def save(name: str, arrays: dict[str, torch.Tensor | np.ndarray]) -> None:
    found = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()}
    small = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in found.items()}
    np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **small)


def make_encoder(name: str, seed: int) -> None:
    w, g = Draw(seed), torch.Generator().manual_seed(seed)
    ids, types = (torch.randint(low, high, (B, T), generator=g) for low, high in ((1, VOCAB), (0, 2)))
    mask = torch.ones(B, T)
    for row, length in enumerate((T, 5, 3)):
        ids[row, length:], mask[row, length:] = 0, 0
    labels = torch.where(
        (torch.rand(B, T, generator=g) < 0.5) & (mask > 0), torch.randint(0, VOCAB, (B, T), generator=g), -100
    )
    if name == "hf_bert_classifier":
        labels = torch.tensor([2, 0, 1])
    logits = (modernbert if name == "hf_modernbert" else bert_like)(w, ids, types, mask, name)
    loss = F.cross_entropy(logits.reshape(labels.numel(), -1), labels.reshape(-1))
    loss.backward()
    arrays = {"ids": ids, "types": types, "mask": mask, "labels": labels, "logits": logits, "loss": loss}
    arrays |= {"config": np.array(json.dumps(CONFIGS[name]))}
    arrays |= {f"param.{k}": v for k, v in w.items()} | {f"grad.{k}": v.grad for k, v in w.items()}
    save(name, arrays)


def make_switch(seed: int = 7, tokens: int = 20, experts: int = 3, limit: int = 6) -> None:
    """Token by token; experts that are full turn tokens away."""
    w, g = Draw(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=g, dtype=torch.float64).requires_grad_()
    router = w.get_weight("router", D, experts)
    w_in, w_out = w.get_weight("w_in", experts, D, WIDE), w.get_weight("w_out", experts, WIDE, D)
    p = (x @ router).softmax(-1)
    taken, rows = [0] * experts, []
    for i in range(tokens):
        e = int(p[i].argmax())
        taken[e] += 1
        rows.append(p[i, e] * (x[i] @ w_in[e]).relu() @ w_out[e] if taken[e] <= limit else 0 * x[i])
    y = torch.stack(rows)
    balance = experts * sum(taken[e] / tokens * p[:, e].mean() for e in range(experts))
    z = (x @ router).logsumexp(-1).square().mean()
    (y.square().mean() + balance + z).backward()
    arrays = {"x": x, "y": y, "balance": balance, "z": z, "taken": np.array(taken), "grad.x": x.grad}
    save("switch", arrays | {f"param.{k}": v for k, v in w.items()} | {f"grad.{k}": v.grad for k, v in w.items()})


def make_leaf_tree(seed: int = 8, rows: int = 11, depth: int = 3, width: int = 4, out: int = 5) -> None:
    """Leaf by leaf, turn by turn."""
    w, g, leaves = Draw(seed), torch.Generator().manual_seed(seed), 2**depth
    x = torch.randn(rows, D, generator=g, dtype=torch.float64)
    node_w, node_b = w.get_weight("node_weights", leaves - 1, D), w.get_weight("node_biases", leaves - 1, 1)
    w1, b1 = w.get_weight("w1s", leaves, D, width), w.get_weight("b1s", leaves, width)
    w2, b2 = w.get_weight("w2s", leaves, width, out), w.get_weight("b2s", leaves, out)
    p = torch.sigmoid(x @ node_w.T + node_b[:, 0])
    soft, hard = 0.0, torch.zeros(rows, out, dtype=torch.float64)
    for leaf in range(leaves):
        weight, node, turns = 1.0, 0, f"{leaf:0{depth}b}"
        for turn in turns:
            weight = weight * (p[:, node] if turn == "1" else 1 - p[:, node])
            node = 2 * node + 1 + int(turn)
        y = (x @ w1[leaf] + b1[leaf]).relu() @ w2[leaf] + b2[leaf]
        soft = soft + weight[:, None] * y
        for row in range(rows):
            node = 0
            for _ in range(depth):
                node = 2 * node + 1 + int(p[row, node] >= 0.5)
            hard[row] += y[row].detach() * (node - (leaves - 1) == leaf)
    entropy = (-p * p.log() - (1 - p) * (1 - p).log()).mean(0)
    loss = soft.square().mean() + 0.3 * entropy.mean()
    loss.backward()
    arrays = {"x": x, "soft": soft, "hard": hard, "entropy": entropy, "loss": loss}
    arrays |= {f"param.{k}": v for k, v in w.items()} | {f"grad.{k}": v.grad for k, v in w.items()}
    save("leaf_tree", arrays | {"param.depth": np.array(depth)})


if __name__ == "__main__":
    make_encoder("hf_bert", 4)
    make_encoder("hf_bert_classifier", 9)
    make_encoder("hf_fnet", 5)
    make_encoder("hf_modernbert", 6)
    make_switch()
    make_leaf_tree()

"""The peer of `ufbert bench finetune`: BERT or crammed BERT under a classifier, in PyTorch.

Like `torch_peer.py`, which lies beside it and is all that it imports: run by an interpreter that has torch and numpy, with
the job folder as argument, one JSON line a message. A second argument names the order of the batches: `random` (rows at
random, a batch padded to its longest row) or `bucketed` (the batches of ufbert).

What was chosen for it is what was chosen there. Besides: rows were tokenised and lie padded, so that a batch is one slice; the
mask is one row a text, and none where no row is padded; there are no token types to look up, since all are the first.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_peer import CrammedBert, check_empty, put, put_norm, serve


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + GELU feedforward(x)), with biases."""

    def __init__(self, d: int, heads: int, hidden: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mixer_norm = nn.LayerNorm(d, eps=eps)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.feedforward_norm = nn.LayerNorm(d, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        parts = self.query_key_value(x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        x = self.mixer_norm(x + F.dropout(self.out(mixed.transpose(1, 2).reshape(b, t, d)), rate))
        return self.feedforward_norm(x + F.dropout(self.down(F.gelu(self.up(x))), rate))

    def load(self, arrays: dict[str, np.ndarray], at: str) -> None:
        """Take parameters over from a flat dict of the names and layouts of ufbert."""
        for part in ("weight", "bias"):
            end = {"weight": "kernel", "bias": "bias"}[part]
            inputs = [f"{at}.attention.{name}.{end}" for name in ("query", "key", "value")]
            put(arrays, getattr(self.query_key_value, part), *inputs)
            put(arrays, getattr(self.out, part), f"{at}.attention.out.{end}")
            put(arrays, getattr(self.up, part), f"{at}.dense.in.{end}")
            put(arrays, getattr(self.down, part), f"{at}.dense.out.{end}")
        put_norm(arrays, self.mixer_norm, f"{at}.mixer_norm")
        put_norm(arrays, self.feedforward_norm, f"{at}.feedforward_norm")


class Bert(nn.Module):
    """Ids of single texts to hidden states: learned positions, token types, post-norm blocks."""

    def __init__(self, model: dict[str, Any], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        d, eps = model["d_model"], model["norm_eps"]
        self.tokens = nn.Embedding(model["vocab_size"], d, padding_idx=model["pad_id"])
        self.positions, self.types = nn.Embedding(model["max_len"], d), nn.Embedding(model["n_token_types"], d)
        self.norm = nn.LayerNorm(d, eps=eps)
        size = (d, model["n_heads"], model["d_hidden"], eps, dropout)
        self.layers = nn.ModuleList(PostNormBlock(*size) for _ in range(model["n_layers"]))

    def encode(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states of the last layer (b, t, d)."""
        x = self.tokens(ids) + (self.positions.weight[: ids.shape[1]] + self.types.weight[0])
        x = F.dropout(self.norm(x), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Take parameters over from a flat dict of the names and layouts of ufbert."""
        for name in ("tokens", "positions", "types"):
            put(arrays, getattr(self, name).weight, f"encoder.embeddings.{name}")
        put_norm(arrays, self.norm, "encoder.embeddings.norm")
        for i, layer in enumerate(self.layers):
            layer.load(arrays, f"encoder.layer_{i:02d}")
        check_empty(arrays)


class Classifier(nn.Module):
    """An encoder under BERT's pooler, dropout and a linear layer; ids to the mean cross entropy."""

    def __init__(self, encoder: Bert | CrammedBert, dropout: float, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, dropout
        d, width = arrays["classifier.pooler.dense.kernel"].shape
        self.pooler, self.out = nn.Linear(d, width), nn.Linear(width, len(arrays["classifier.out.bias"]))
        for layer, name in ((self.pooler, "classifier.pooler.dense"), (self.out, "classifier.out")):
            put(arrays, layer.weight, f"{name}.kernel")
            put(arrays, layer.bias, f"{name}.bias")
        encoder.load(arrays)

    def forward(self, ids: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
        pooled = torch.tanh(self.pooler(self.encoder.encode(ids, mask)[:, 0]))
        return F.cross_entropy(self.out(F.dropout(pooled, self.dropout, self.training)), labels)


class Tuner:
    """A classifier in training on the batches of a job folder, in one of its orders."""

    def __init__(self, folder: Path, order: str) -> None:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        arrays, tune = dict(np.load(folder / "batches.npz")), job["tune"]
        self.ids, self.labels = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("ids", "labels"))
        self.real = torch.arange(self.ids.shape[1]) < torch.from_numpy(arrays["tokens"])[:, None]
        self.picks, self.lengths = torch.from_numpy(arrays[f"{order}_picks"]), arrays[f"{order}_lengths"].tolist()
        self.checked = job["checked"]
        encoder = {"bert": Bert, "crammed": CrammedBert}[job["kind"]](job["model"], tune["dropout"])
        self.model = Classifier(encoder, tune["dropout"], dict(np.load(folder / "params.npz")))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=tune["lr"], betas=(tune["adam_b1"], tune["adam_b2"]), eps=tune["adam_eps"],
            weight_decay=0.0, fused=True,
        )  # fmt: skip

    def update(self, i: int) -> Tensor:
        """One update from batch i, without dropout if it is one of those whose losses are checked; the loss before it."""
        picks, length = self.picks[i], self.lengths[i]
        real, mask = self.real[picks, :length], None
        if not real.all():
            mask = torch.zeros(real.shape).masked_fill_(~real, -math.inf)[:, None, None]
        if self.model.training != (i >= self.checked):
            self.model.train(i >= self.checked)
        loss = self.model(self.ids[picks, :length], mask, self.labels[picks])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


if __name__ == "__main__":
    serve(lambda: Tuner(Path(sys.argv[1]), sys.argv[2]).update)

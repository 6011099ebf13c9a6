"""Our process of `ufbert bench encoder`: `python -m ufbert.bench.encoder_ours FOLDER ufbert THREADS NAME ...`.

A NAME is a model and a type, `tree-int8` say, and the model's folder lies in FOLDER. Besides the messages of
`ufbert.bench.worker` it answers

- `{"do": "machine"}`: as `ufbert.bench.layer_ours`;
- `{"do": "gate", "name": n, "shape": s, "batch": i}`: how far the engine is from the training graph on that batch, the
  first unless it is given: `error`, the largest absolute difference over tokens whose routing decisions are clear; `size`,
  the largest absolute answer; `relative`, the median over all tokens
  of the difference over their length; `unclear`, the share of tokens with a decision that is not clear; `changed`, the
  share of tokens, mean over layers, that go another way than by float32 weights; `leaves`, the leaves in use, over
  those that even turns would use;
- `{"do": "parts", "name": n, "shape": s}`: seconds of a call by part, each computed alone;
- `{"do": "load_time", "name": n}`: seconds from a model folder to the first answer, bytes of the packed weights, and
  the `memory` that the process has more of after it.
"""

import gc
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ufbert import nn
from ufbert.bench.encoder_job import parse_shape, relative_error
from ufbert.bench.layer_ours import measure_machine
from ufbert.bench.report import type_of
from ufbert.bench.worker import Answers, Call, Worker, serve
from ufbert.config import ModelConfig
from ufbert.cost.speeds import least_seconds
from ufbert.data.encode import Encoded
from ufbert.hub.folder import load_model
from ufbert.inference.engine import Engine
from ufbert.ops import native
from ufbert.ops.mixing import fourier_mix
from ufbert.runtime.device import use_device
from ufbert.runtime.memory import give_back_freed_memory

CLEAR = 1e-5
"""A logit nearer to zero than this may turn either way in float32."""


class OurEncoders(Worker):
    """Answers for our engines."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        models = {entry.split("-")[0] for entry in names}
        self.models = {name: load_model(folder / name, lazily=name == "static") for name in models}
        self.engines = {entry: Engine(self.models[entry.split("-")[0]], type_of(entry)) for entry in names}
        calls: dict[str, dict[str, Call]] = {
            entry: {"call": lambda i, rows, e=engine: e.hidden(fitted(rows, e.config))}
            for entry, engine in self.engines.items()
        }
        super().__init__(folder, calls, partial(encoded, next(iter(self.engines.values())).config))

    def gate(self, name: str, shape: str, batch: int = 0) -> dict[str, Any]:
        """Compare an engine with the training graph."""
        model, engine, size = self.models[name.split("-")[0]], self.engines[name], parse_shape(shape).batch
        rows = encoded(engine.config, np.load(self.folder / f"{shape}.npy")[batch * size : (batch + 1) * size])
        hidden = np.concatenate(engine.hidden(rows))
        config = replace(engine.config, tree_backend="gather")
        params = jax.tree.map(jnp.asarray, model.params)
        wanted = np.asarray(training_graph(params, config, np.asarray(rows.ids, np.int32))).reshape(hidden.shape)
        error = np.abs(hidden - wanted).max(axis=1)
        ((_, arranged),) = engine.batches(rows)
        trees = jax.tree.map(np.asarray, engine.routing(model, arranged))
        clear = np.all([np.ones(len(error), bool), *(tree.margins[: len(error)] > CLEAR for tree in trees)], axis=0)
        visits = [tree.visits[:, config.nodes_per_tree // 2 :] for tree in trees]
        leaves = 2**config.tree_depth  # of one tree
        even = leaves * (1 - (1 - 1 / leaves) ** len(error))
        changed = [float(tree.changed) for tree in trees]
        return {
            "error": float(error[clear].max(initial=0.0)),
            "size": float(np.abs(wanted).max()),
            "relative": relative_error(hidden, wanted),
            "unclear": float(1 - clear.mean()),
            "changed": float(np.mean(changed)) if changed else 0.0,
            "leaves": float(min((layer > 0).sum() / len(layer) for layer in visits) / even) if visits else 1.0,
        }

    def parts(self, name: str, shape: str) -> dict[str, Any]:
        """Time the parts of a call."""
        engine, (batch, tokens) = self.engines[name], parse_shape(shape)
        config = engine.config
        layers = [engine.params["encoder"][f"layer_{i:02d}"] for i in range(config.n_layers)]
        functions = {"projections": projections_part, "attention": attention_part}
        if config.only_len:
            functions = {"Fourier mixing": fourier_part}
        functions["trees" if "tree" in config.feedforward else "feedforward"] = feedforward_part
        functions["LayerNorms"] = norms_part
        x = jax.random.normal(jax.random.key(0), (batch, tokens, config.d_model))
        timed = {part: jax.jit(partial(function, config, layers)) for part, function in functions.items()}
        return {"parts": {part: least_seconds(function, x, 0.3) for part, function in timed.items()}}

    def load_time(self, name: str) -> dict[str, Any]:
        """Time a first answer in this process, which has compiled it before."""
        gc.collect()
        give_back_freed_memory()
        before, start = private_memory(), time.perf_counter()
        engine = Engine(load_model(self.folder / name.split("-")[0], lazily=True), type_of(name))
        engine.hidden(encoded(engine.config, np.full((1, engine.config.only_len or 16), 7)))
        seconds = time.perf_counter() - start
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
        return {"seconds": seconds, "bytes": weights, "memory": private_memory() - before}


@partial(jax.jit, static_argnums=1)
def training_graph(params: Any, config: ModelConfig, ids: Array) -> Array:
    """Compute the hidden states (b, t, d) of ids (b, t) as training does."""
    return nn.encode(params, config, ids)[0]


def fitted(rows: Encoded, config: ModelConfig) -> Encoded:
    """Return a batch as a model of this configuration takes it."""
    return rows._replace(only_len=config.only_len, max_len=config.max_len, pad_id=config.pad_id)


def encoded(config: ModelConfig, ids: np.ndarray) -> Encoded:
    """Return a batch as the engine takes it: lists of ids, as a tokenizer gives them."""
    lists = ids.tolist()
    return Encoded(lists, [[0] * len(row) for row in lists], config.max_len, config.only_len, config.pad_id, 0)


def projections_part(config: ModelConfig, layers: list[Any], x: Array) -> Array:
    """Compute the projections of attention in all layers."""
    x = x.reshape(-1, config.d_model)
    for layer in layers:
        three, out = layer["attention"]["qkv"], layer["attention"]["out"]
        qkv = native.linear(x, three["kernel"], three["bias"], 3 * config.d_model)
        x = native.linear(qkv[:, : config.d_model], out["kernel"], out["bias"], config.d_model)
    return x


def attention_part(config: ModelConfig, layers: list[Any], x: Array) -> Array:
    """Compute attention between queries, keys and values as often as there are layers."""
    qkv = jnp.tile(x.reshape(*x.shape[:2], 1, config.n_heads, -1), (1, 1, 3, 1, 1))
    narrow = layers[0]["attention"]["out"]["kernel"].weights.dtype != jnp.float32
    others = (native.attention(qkv * (1 + i), narrow=narrow) for i in range(1, len(layers)))
    return sum(others, start=native.attention(qkv, narrow=narrow))


def fourier_part(config: ModelConfig, layers: list[Any], x: Array) -> Array:
    """Compute Fourier mixing as often as there are layers."""
    for _ in layers:
        x = fourier_mix(x, ortho=True)
    return x


def feedforward_part(config: ModelConfig, layers: list[Any], x: Array) -> Array:
    """Compute the trees or the dense feedforwards of all layers."""
    x = x.reshape(-1, config.d_model)
    for layer in layers:
        if "tree" in layer:
            part = layer["tree"]
            x = native.tree_forward(x, part["w_in"], part["bias"], part["w_out"])
        else:
            part = layer["dense"]
            weights = (part["in"]["kernel"], part["in"]["bias"], part["out"]["kernel"], part["out"]["bias"])
            x = native.feed_forward(x, *weights, (config.d_hidden, config.d_model))
    return x


def norms_part(config: ModelConfig, layers: list[Any], x: Array) -> Array:
    """Compute the LayerNorms of all layers."""
    x = x.reshape(-1, config.d_model)
    for layer in layers:
        for part in (layer["mixer_norm"], layer["feedforward_norm"]):
            x = native.layer_norm(x, part["scale"], part["bias"], config.norm_eps)
    return x


def private_memory() -> int:
    """Return the bytes of memory that this process alone uses now; 0 if the system (Linux does) does not say."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    resident, shared = map(int, statm.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def start(folder: Path, _name: str, threads: int, *names: str) -> tuple[str, Answers]:
    """Get ready: facts, and the answers of this process."""
    use_device("cpu", threads=threads)
    facts = f"jax {jax.__version__}, {native.instruction_set()} kernels"
    ours = OurEncoders(folder, list(names))
    own = {"gate": ours.gate, "parts": ours.parts, "load_time": ours.load_time, "machine": measure_machine}
    return facts, ours.answers() | own


if __name__ == "__main__":
    serve(start)

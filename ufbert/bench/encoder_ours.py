"""Our process of `ufbert bench encoder`: `python -m ufbert.bench.encoder_ours FOLDER THREADS NAME ...`.

A NAME is a model and a type, `tree-int8` say. Besides what every contestant answers (`ufbert.bench.encoder_peer`) it answers

- `{"do": "machine"}`: `read` bytes/s and `float32` and `bfloat16` FLOP/s of this machine, measured now;
- `{"do": "gate", "name": n, "shape": s}`: how far the engine is from the training graph on the first batch: `error`, the
  largest absolute difference over tokens whose turns are clear; `relative`, the median over all tokens of the difference over
  their length; `unclear`, the share of tokens with a turn that is not clear; `changed`, the share of tokens, mean over layers,
  that go another way than by float32 weights; `leaves`, the leaves in use, over those that even turns would use;
- `{"do": "parts", "name": n, "shape": s}`: seconds of a call by part, each computed alone;
- `{"do": "load time", "name": n}`: seconds from a model folder to the first answer, bytes of the packed weights, and the
  `memory` that the process has more of after it.
"""

import gc
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ufbert import nn
from ufbert.bench.layer_gates import type_of
from ufbert.bench.layer_ours import read_bandwidth
from ufbert.cost.speeds import least_seconds, measured_flops
from ufbert.data.encode import Encoded
from ufbert.hub.folder import load_model
from ufbert.inference.engine import Engine
from ufbert.ops import native
from ufbert.ops.mixing import fourier_mix
from ufbert.runtime.memory import give_back_freed_memory

CLEAR = 1e-5
"""A logit nearer to zero than this may turn either way in float32."""


class Ours:
    """Answers messages."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.models = {name: load_model(folder / name) for name in {one.split("-")[0] for one in names}}
        self.engines = {one: Engine(self.models[one.split("-")[0]], type_of(one)) for one in names}
        self.rows: list[Encoded] = []

    def encoded(self, ids: np.ndarray, name: str) -> Encoded:
        """A batch as the engine takes it: lists of ids, as a tokenizer gives them."""
        config = self.models[name.split("-")[0]].config
        lists = ids.tolist()
        return Encoded(lists, [[0] * len(row) for row in lists], config.max_len, config.only_len, config.pad_id, 0)

    def load(self, shape: str) -> dict[str, Any]:
        """Have the batches of a shape."""
        batches = np.load(self.folder / f"{shape}.npy")
        self.rows = [self.encoded(ids, next(iter(self.engines))) for ids in batches]
        return {"batches": len(batches)}

    def time(self, name: str, what: str, first: int, calls: int) -> dict[str, Any]:
        """Time calls, from lists of ids to arrays of hidden states, each on another batch than the one before."""
        engine, rows, config = self.engines[name], self.rows, self.models[name.split("-")[0]].config
        rows = [one._replace(only_len=config.only_len) for one in rows]
        start = time.perf_counter()
        for i in range(first, first + calls):
            engine.hidden(rows[i % len(rows)])
        return {"seconds": time.perf_counter() - start}

    def check(self, name: str, shape: str) -> dict[str, Any]:
        """Write the hidden states of the first batch."""
        ids = np.load(self.folder / f"{shape}.npy")[0]
        np.save(self.folder / f"{name}-found.npy", np.stack(self.engines[name].hidden(self.encoded(ids, name))))
        return {"file": f"{name}-found.npy"}

    def gate(self, name: str, shape: str) -> dict[str, Any]:
        """How far from the training graph."""
        model, engine = self.models[name.split("-")[0]], self.engines[name]
        rows = self.encoded(np.load(self.folder / f"{shape}.npy")[0], name)
        found = np.concatenate(engine.hidden(rows))
        config = replace(engine.config, tree_backend="gather")
        graph = jax.jit(lambda params, ids: nn.encode(params, config, ids)[0])
        wanted = np.asarray(graph(model.params, np.asarray(rows.ids, np.int32))).reshape(found.shape)
        error = np.abs(found - wanted).max(axis=1)
        ((_, batch),) = engine.batches(rows)
        trees = jax.tree.map(np.asarray, engine.routing(model, batch))
        clear = np.all([np.ones(len(error), bool), *(tree.margins[: len(error)] > CLEAR for tree in trees)], axis=0)
        visits = [tree.visits[:, config.nodes_per_tree // 2 :] for tree in trees]
        leaves = 2**config.tree_depth
        even = leaves * (1 - (1 - 1 / leaves) ** len(error))
        changed = [float(tree.changed) for tree in trees]
        return {
            "error": float(error[clear].max()),
            "relative": float(np.median(np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1))),
            "unclear": float(1 - clear.mean()),
            "changed": float(np.mean(changed)) if changed else 0.0,
            "leaves": float(min((one > 0).sum() for one in visits) / even) if visits else 1.0,
        }

    def parts(self, name: str, shape: str) -> dict[str, Any]:
        """Seconds of a call by part."""
        engine, seconds = self.engines[name], {}
        batch, tokens = (int(part) for part in shape.split("x"))
        cfg, packed = engine.config, engine.params["encoder"]
        layers = [packed[f"layer_{i:02d}"] for i in range(cfg.n_layers)]
        x = jax.random.normal(jax.random.key(0), (batch * tokens, cfg.d_model))

        def timed(part: str, function: Callable[[Any], Any], argument: Any = x) -> None:
            seconds[part] = least_seconds(jax.jit(function), argument, 0.3)

        def linears(x: Any) -> Any:
            for layer in layers:
                three, out = layer["attention"]["qkv"], layer["attention"]["out"]
                qkv = native.linear(x, three["kernel"], three["bias"], 3 * cfg.d_model)
                x = native.linear(qkv[:, : cfg.d_model], out["kernel"], out["bias"], cfg.d_model)
            return x

        def attentions(x: Any) -> Any:
            qkv = jnp.tile(x.reshape(batch, tokens, 1, cfg.n_heads, -1), (1, 1, 3, 1, 1))
            return sum(native.attention(qkv * (1 + i)) for i in range(len(layers)))

        def feedforwards(x: Any) -> Any:
            for layer in layers:
                if "tree" in layer:
                    part = layer["tree"]
                    x = native.tree_forward(x, part["w_in"], part["bias"], part["w_out"])
                else:
                    part = layer["dense"]
                    hidden = jax.nn.gelu(
                        native.linear(x, part["in"]["kernel"], part["in"]["bias"], cfg.d_hidden), approximate=False
                    )
                    x = native.linear(hidden, part["out"]["kernel"], part["out"]["bias"], cfg.d_model)
            return x

        def norms(x: Any) -> Any:
            for layer in layers:
                for part in (layer["mixer_norm"], layer["feedforward_norm"]):
                    x = native.layer_norm(x, part["scale"], part["bias"], cfg.norm_eps)
            return x

        def transforms(x: Any) -> Any:
            x = x.reshape(batch, tokens, -1)
            for _ in layers:
                x = fourier_mix(x, ortho=True)
            return x

        if cfg.only_len:
            timed("Fourier mixing", transforms)
        else:
            timed("projections", linears)
            timed("attention", attentions)
        timed("trees" if "tree" in cfg.feedforward else "feedforward", feedforwards)
        timed("LayerNorms", norms)
        return {"parts": seconds}

    def load_time(self, name: str) -> dict[str, Any]:
        """Seconds to a first answer in this process, which has compiled it before; bytes of the weights and of memory."""
        gc.collect()
        give_back_freed_memory()
        before, start = private_memory(), time.perf_counter()
        engine = Engine(load_model(self.folder / name.split("-")[0], lazily=True), type_of(name))
        engine.hidden(self.encoded(np.full((1, engine.config.only_len or 16), 7), name))
        seconds = time.perf_counter() - start
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
        return {"seconds": seconds, "bytes": weights, "memory": private_memory() - before}

    def machine(self) -> dict[str, Any]:
        """What this machine can do."""
        return {"read": read_bandwidth(), **{kind: measured_flops(dtype=kind) for kind in ("float32", "bfloat16")}}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message."""
        arguments = {key: value for key, value in message.items() if key != "do"}
        return getattr(self, message["do"].replace(" ", "_"))(**arguments)


def private_memory() -> int:
    """Bytes of memory that this process alone uses now; 0 where the system (Linux does) does not say."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    resident, shared = map(int, statm.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    from ufbert.bench.layer_process import serve
    from ufbert.runtime.device import use_device

    use_device("cpu", threads=int(sys.argv[2]))
    said = f"jax {importlib.metadata.version('jax')}, {native.instruction_set()} kernels, {sys.argv[2]} threads"
    serve(said, Ours(Path(sys.argv[1]), sys.argv[3:]).answer)

"""A model's int8 child, rounded by what that does to text, and how far each layer's hidden states move."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.data.encode import Encoded
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, flatten, unflatten
from ufbert.hub.quantized import Quantization, QuantizedTensor
from ufbert.inference import packed
from ufbert.inference.engine import Engine
from ufbert.ops.rounding import input_rounding, rounded_columns
from ufbert.ops.routed_tree import folded

SAMPLE = 512
"""Tokens whose inputs of all linear layers are kept."""
AT_ONCE = 32
"""Texts that are computed together."""
HURTS = 2.0
"""A layer hurts if its rounding alone moves the last hidden states more than so many times the median of all layers."""


class Observed(NamedTuple):
    """The input of a linear layer on text."""

    x: Float[Array, "n d"]
    low: Float[Array, ""]
    high: Float[Array, ""]


@dataclass(frozen=True)
class LayerError:
    """How far rounding moves hidden states on the calibration text: the root mean square of the difference over that of the
    hidden states."""

    name: str
    """`embeddings`, or `layer_00` and so on."""
    hidden: float
    """Those that the part gives, with all parts rounded up to it."""
    alone: float
    """Those of the last layer, with only this part rounded."""


def quantized(model: ModelFolder, how: Quantization, rows: Encoded) -> ModelFolder:
    """Round the weights of a model of float32 weights, chosen on encoded texts.

    Sums of leaves and the nodes above them (`leaf_ancestors`) are rounded as leaves that have nothing above. Raises UserError
    for a model that is quantised already, for weights that are no finite numbers, and for layers that it does not have.
    """
    if model.quantized is not None:
        raise UserError("The model is quantised already; start from the one that it was made of.")
    absent = [i for i in how.wide if not 0 <= i < model.config.n_layers]
    if absent:
        raise UserError(f"There is no layer {absent[0]} to keep wide; the layers are 0 to {model.config.n_layers - 1}.")
    model = _folded(model)
    flat: dict[str, Any] = {**flatten(model.params)}
    bad = [path for path, array in flat.items() if not np.isfinite(array).all()]
    if bad:
        raise UserError(f"{bad[0]} has numbers that are not finite; take another model folder.")
    observed = observe(model.params, model.config, rows)
    inputs = _input_roundings(observed, flat) if how.activations == "static" else {}
    for path, array in flat.items():
        side = how.side(path, array.shape)
        if side is not None:
            seen = observed.get(path.removesuffix(".kernel"))
            x = seen.x if seen is not None and path.endswith(".kernel") else None
            turned = array if side == "columns" else array.swapaxes(-1, -2)
            whole, factor = map(np.asarray, rounded_columns(jnp.asarray(turned), x))
            whole = np.ascontiguousarray(whole if side == "columns" else whole.swapaxes(-1, -2))
            flat[path] = QuantizedTensor(whole, factor, side, inputs.get(path, np.zeros(0, np.float32)))
    params = unflatten(flat)
    if "masked_lm" in model.params:
        params.setdefault("masked_lm", {})
    return replace(model, params=params, quantized=how)


def observe(params: nn.Params, config: ModelConfig, rows: Encoded) -> dict[str, Observed]:
    """Compute the inputs of all linear layers of the encoder on texts, by path: some rows, and the range of all."""
    parts: list[dict[str, Observed]] = []
    config = replace(config, dtype="float32", tree_backend="auto")
    rng, batches = np.random.default_rng(0), list(_batches(rows))
    for ids, segments, types in batches:
        real = np.flatnonzero(segments)
        picks = rng.choice(real, max(1, SAMPLE // len(batches)))
        parts.append(_observe_batch(params, config, ids, segments, types, picks))
    names = parts[0] if parts else {}
    return {
        name: Observed(
            jnp.concatenate([part[name].x for part in parts]),
            jnp.stack([part[name].low for part in parts]).min(),
            jnp.stack([part[name].high for part in parts]).max(),
        )
        for name in names
    }


@partial(jax.jit, static_argnames="config")
def _observe_batch(
    params: nn.Params,
    config: ModelConfig,
    ids: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    types: Int[Array, "b t"],
    picks: Int[Array, " k"],
) -> dict[str, Observed]:
    real = (segments != 0)[..., None]
    return {
        name: Observed(x.reshape(-1, x.shape[-1])[picks], jnp.where(real, x, 0).min(), jnp.where(real, x, 0).max())
        for name, x in nn.linear_inputs(params, config, ids, segments, types).items()
    }


def _batches(rows: Encoded) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield ids, segments and types of all texts in batches of one shape; the last is filled up with padding."""
    length = rows.only_len or max(map(len, rows.ids))
    for at in range(0, len(rows.ids), AT_ONCE):
        batch = rows.pad(range(at, min(at + AT_ONCE, len(rows.ids))), length)
        short = min(AT_ONCE, len(rows.ids)) - len(batch.ids)
        yield (
            np.pad(batch.ids, ((0, short), (0, 0)), constant_values=rows.pad_id),
            np.pad(batch.segment_ids, ((0, short), (0, 0))),
            np.pad(batch.type_ids, ((0, short), (0, 0))),
        )


def _input_roundings(observed: Mapping[str, Observed], flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Choose step and zero for every linear layer; layers of one part that read the same rows share them."""
    groups: list[list[str]] = []
    for name in observed:
        parent = name.rpartition(".")[0]
        group = next(
            (g for g in groups if g[0].rpartition(".")[0] == parent and _same(observed[g[0]], observed[name])), None
        )
        group.append(name) if group else groups.append([name])
    roundings = {}
    for group in groups:
        kernels = jnp.concatenate([jnp.asarray(flat[f"{name}.kernel"]) for name in group], axis=1)
        rounding = np.asarray(input_rounding(*observed[group[0]], kernels))
        roundings |= {f"{name}.kernel": rounding for name in group}
    return roundings


def _same(one: Observed, other: Observed) -> bool:
    return one.x.shape == other.x.shape and np.array_equal(one.x, other.x)


def _folded(model: ModelFolder) -> ModelFolder:
    """Add the weights of nodes above leaves to the leaves'."""
    if "routed_tree" not in model.config.feedforward or model.config.leaf_ancestors == "none":
        return model
    encoder = dict(model.params["encoder"])
    for name, layer in model.params["encoder"].items():
        if name.startswith("layer_") and "routed_tree" in layer:
            tree = {key: part for key, part in layer["routed_tree"].items() if not key.startswith("above_")}
            tree |= {f"leaf_{side}": folded(layer["routed_tree"], side) for side in ("in", "out")}
            encoder[name] = {**layer, "routed_tree": tree}
    config = replace(model.config, leaf_ancestors="none")
    return replace(model, config=config, params={**model.params, "encoder": encoder})


def layer_errors(model: ModelFolder, child: ModelFolder, rows: Encoded) -> list[LayerError]:
    """Measure how far the rounding of each part moves hidden states, by the engine. Raises UserError without its kernels."""
    exact, narrow = Engine(model, "float32"), Engine(child, "int8")
    batches = [batch[:4] for _, batch in exact.batches(rows)]
    full, rounded = exact.params["encoder"], narrow.params["encoder"]
    wanted = _hidden(full, exact.config, batches)
    cumulative = _distances(_hidden(rounded, narrow.config, batches), wanted)
    names = ["embeddings", *(f"layer_{i:02d}" for i in range(model.config.n_layers))]
    errors = []
    for at, name in enumerate(names):
        alone = _distances(_hidden({**full, name: rounded[name]}, narrow.config, batches), wanted)[-1]
        errors.append(LayerError(name, cumulative[at], alone))
    return errors


def _hidden(encoder: Mapping[str, Any], config: ModelConfig, batches: list[Any]) -> list[list[np.ndarray]]:
    """Compute the hidden states of real tokens after the embeddings and each layer, by batch."""
    states = []
    for batch in batches:
        last, _, outputs = packed.forward(encoder, config, *map(jnp.asarray, batch))
        real = np.asarray(batch[1]) != 0
        states.append([np.asarray(x)[real] for x in (*outputs[:-1], last)])
    return states


def _distances(states: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> list[float]:
    off = [[np.square(x - y).sum() for x, y in zip(*pair, strict=True)] for pair in zip(states, wanted, strict=True)]
    size = [[np.square(y).sum() for y in each] for each in wanted]
    return [float(d) for d in np.sqrt(np.sum(off, axis=0) / np.maximum(np.sum(size, axis=0), 1e-30))]


def hurting(errors: list[LayerError]) -> tuple[int, ...]:
    """Return the numbers of the layers whose rounding hurts."""
    layers = [error.alone for error in errors if error.name != "embeddings"]
    return tuple(i for i, alone in enumerate(layers) if alone > HURTS * float(np.median(layers)))


def widened(child: ModelFolder, model: ModelFolder, layers: tuple[int, ...]) -> ModelFolder:
    """Give some layers of a quantised child their float32 weights back."""
    assert child.quantized is not None
    how = replace(child.quantized, wide=tuple(sorted({*child.quantized.wide, *layers})))
    kept = {f"layer_{i:02d}": _folded(model).params["encoder"][f"layer_{i:02d}"] for i in how.wide}
    return replace(child, quantized=how, params={**child.params, "encoder": {**child.params["encoder"], **kept}})

"""Start a run from a model folder: what it keeps of the model, what is new, and which options contradict it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Key
from tokenizers import Tokenizer

from ufbert import nn
from ufbert.config import DataConfig, ModelConfig, RunConfig, Scale
from ufbert.config.presets import nearest_scale, scaled, with_recipe
from ufbert.errors import UserError
from ufbert.hub.download import model_folder
from ufbert.hub.folder import ModelFolder, flatten, folder_sha256, load_model
from ufbert.hub.tensors import first_few
from ufbert.hub.vocabulary import read_for_training
from ufbert.options.given import Given, over
from ufbert.options.train import StartOptions

LR_SHARE = 0.25
"""Peak learning rate of a run that starts from a model, over that of a run of its recipe from random weights. A cautious
choice: a new optimizer's first updates have full size, however small the gradient. docs/training.md has what was measured."""

FREE = {
    "dropout", "dtype", "tree_backend", "attention_impl", "pooling", "pooler", "pooler_width", "tree_balance",
    "leaf_training", "leaf_hardening", "leaf_hardening_ramp", "leaf_temperature", "leaf_leak", "capacity_factor",
    "router_balance", "router_z", "router_jitter",
}  # fmt: skip
"""Fields of ModelConfig that change neither the parameters that are trained nor what they compute in inference."""

local_folder = cache(model_folder)
"""The folder of a place; a name of the hub is looked up once a process, so that all parts are of one revision."""


def read_start(place: str) -> ModelFolder:
    """Read the configuration and the tokenizer of a model folder, or one of the hub; its weights are not read yet."""
    return load_model(local_folder(place), lazily=True)


def started_run(options: StartOptions, model: ModelFolder, given: Given) -> tuple[RunConfig, Scale]:
    """Return the configuration of a run that starts from `model`, and the scale whose training settings it takes.

    The architecture is the model's, and the training that of the recipe at the scale nearest in width, at `LR_SHARE` of its
    peak rate. No short pieces come first: they teach attention to look nearby, which a trained model knows. Raises UserError if
    an option that was given contradicts the model.
    """
    place, config = options.init_from, model.config
    if "config" in given:
        raise UserError(
            f"--config={options.config} and --init-from={place}: a run starts from a preset or from a model; leave one out."
        )
    if options.scale != "auto":
        raise UserError(f"--scale={options.scale} and --init-from={place}: the size is the model's; leave --scale out.")
    for name, value in given.items():
        field = name.removeprefix("model.")
        if field != name and not _is_free(field, value, model):
            raise UserError(
                f"--{name.replace('_', '-')}={_shown(value)} contradicts {place}, whose architecture a run with --init-from "
                f"keeps ({name} is {_shown(getattr(config, field))}); leave the option out."
            )
    scale = nearest_scale(config.d_model)
    train = with_recipe(scaled(RunConfig(), scale), options.recipe, scale).train
    data = DataConfig(seq_len=config.only_len or min(DataConfig().seq_len, config.max_len))
    run = RunConfig(config, replace(train, peak_lr=LR_SHARE * train.peak_lr), data)
    return over(run, given), scale


def _is_free(field: str, value: Any, model: ModelFolder) -> bool:
    """Tell if a field may have this value: it is the model's own, or says nothing about what the model has learnt."""
    config = model.config
    if field in FREE or value == getattr(config, field):
        return True
    if field in ("mixer", "feedforward"):  # shorter and longer ways to say the same
        return tuple(value[i % len(value)] for i in range(config.n_layers)) == tuple(
            layer[field == "feedforward"] for layer in config.layers
        )
    if field == "max_len":  # sinusoids and rotations have no end; a table has, and Fourier mixers know one length
        return config.positions != "learned" and not config.only_len
    return field in ("head_transform", "head_bias", "tie_head") and "masked_lm" not in model.heads


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parts_line(options: StartOptions, model: ModelFolder, run: RunConfig) -> str:
    """Say what a run keeps of its model, what is new and what is left out."""
    has_head = "masked_lm" in model.heads
    # A head without any of these is the embedding alone.
    has_weights = run.model.head_transform or run.model.head_bias or not run.model.tie_head
    parts = [f"starts with the encoder{' and the masked-LM head' if has_head else ''}"]
    parts.append(f"new: the optimizer's state{' and the masked-LM head' if has_weights and not has_head else ''}")
    others = [head for head in model.heads if head != "masked_lm"]
    if others:
        parts.append(f"left out: its {' and its '.join(others)}")
    if options.recipe != "crammed":
        parts.append(
            f"of --recipe {options.recipe} only the training part applies, for the architecture is the model's"
        )
    return "; ".join(parts)


def start_sha256(place: str) -> str:
    """Hash the files of the model folder that a run starts from. Raises UserError if they cannot be read."""
    return folder_sha256(local_folder(place))


def start_tokenizer(place: str, given: str) -> Tokenizer:
    """Read the tokenizer of a model folder for training, or the one `given`, which must have the same vocabulary.

    Raises UserError if it has not.
    """
    own = read_for_training(local_folder(place) / "tokenizer.json")
    if not given:
        return own
    other = read_for_training(given)
    mine, theirs = own.get_vocab(), other.get_vocab()
    if mine != theirs:
        pieces = sorted(piece for piece, _ in mine.items() ^ theirs.items())
        raise UserError(
            f"--tokenizer {given} has another vocabulary than {place}, whose embeddings belong to its own: they differ in "
            f"{first_few(list(dict.fromkeys(map(repr, pieces))))}. Leave --tokenizer out."
        )
    return other


def start_params(place: str, sha256: str, config: ModelConfig, key: Key[jax.Array, ""]) -> Mapping[str, Any]:
    """Read the parameters that a run starts from: the encoder and the masked-LM head, which is drawn if there is none.

    Raises UserError if the folder cannot be read, is not the one of this hash, or has weights that are not finite.
    """
    model = load_model(local_folder(place))
    if folder_sha256(local_folder(place)) != sha256:
        raise UserError(
            f"{place} has changed since the run was started from it (its files had the SHA-256 {sha256}); put them back, or "
            "start a new run."
        )
    head = model.params["masked_lm"] if "masked_lm" in model.heads else nn.init(config, key)["masked_lm"]
    params = {"encoder": model.params["encoder"], "masked_lm": head}
    bad = [path for path, array in flatten(params).items() if not jnp.isfinite(array).all()]
    if bad:
        raise UserError(f"{place} has weights that are no finite numbers: {first_few(bad)}. Take another model.")
    return params

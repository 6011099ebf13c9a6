"""The Python interface for notebooks. Every function imports what it needs when it is called."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufbert.config import RunConfig, Scale
from ufbert.runtime.files import expand_home

if TYPE_CHECKING:
    from ufbert.hub.folder import ModelFolder


def preset(name: str, scale: Scale = "base", **model_fields: Any) -> RunConfig:
    """A preset by name (`ufbert presets` lists them), at a scale, with fields of its model replaced.

    Raises UserError for an unknown name, scale or impossible combination.
    """
    from ufbert.config.presets import load_preset, scaled

    config = scaled(load_preset(name), scale)
    return replace(config, model=replace(config.model, **model_fields))


def init(config: RunConfig, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters of a masked language model: a nested dict of float32 arrays."""
    import jax

    from ufbert import nn

    return nn.init(config.model, jax.random.key(seed))


def apply(params: Mapping[str, Any], config: RunConfig, ids: Any, segment_ids: Any = None) -> tuple[Any, Any]:
    """Hidden states (b, t, d) and token logits (b, t, v) of ids (b, t); `segment_ids` is 0 on padding."""
    from ufbert import nn

    hidden, _ = nn.encode(params, config.model, ids, segment_ids)
    return hidden, nn.masked_lm_logits(params, config.model, hidden)


def load(folder: str | Path) -> "ModelFolder":
    """A model folder: its `.config`, `.params`, `.tokenizer` and, if fine-tuned, `.task`. Raises UserError."""
    from ufbert.hub.folder import load_model

    return load_model(folder)


def save(folder: str | Path, model: "ModelFolder") -> None:
    """Write a model folder, whole or not at all. Raises UserError if the disk refuses."""
    from ufbert.hub.folder import save_model

    save_model(folder, model)


def pretrain(out: str | Path, budget: str, **options: Any) -> dict[str, Any]:
    """Pretrain into a new run folder and return its summary.

    `options` are those of `train.py` by name: `config`, `scale`, `corpus`, `seed`, `device`, `tokenizer`, and `model`,
    `train`, `data` as dicts of fields (`train={"peak_lr": 1e-3}`). Raises UserError as the command does.
    """
    from ufbert.__main__ import STARTED
    from ufbert.pretrain.run import pretrain_command

    return pretrain_command(_arguments({"out": out, "budget": budget, **options}), STARTED)


def finetune(model: str | Path, tasks: str, glue_source: str, out: str | Path, **options: Any) -> dict[str, Any]:
    """Fine-tune a model folder on GLUE tasks and return the results; options are those of `finetune.py` by name."""
    from ufbert.glue.command import finetune_command

    return finetune_command(
        _arguments({"model": model, "tasks": tasks, "glue_source": glue_source, "out": out, **options})
    )


def _arguments(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Options as command-line arguments, so that the command and the notebook share one set of checks."""
    args: list[str] = []
    for name, value in options.items():
        flag = f"--{prefix}{name}".replace("_", "-")
        if isinstance(value, Mapping):
            args += _arguments(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            args.append(flag if value else f"--{prefix}no-{name}".replace("_", "-"))
        elif isinstance(value, tuple | list):
            args += [flag, *(expand_home(str(part)) for part in value)]
        else:
            args += [flag, expand_home(str(value))]
    return args

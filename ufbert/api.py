"""The Python interface for notebooks. Every function imports what it needs when it is called."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufbert.config import ModelConfig, RunConfig, Scale
from ufbert.options.finetune import FinetuneOptions
from ufbert.options.given import Given, from_given, named_values
from ufbert.options.train import PlanOptions, PrepareOptions, TrainOptions
from ufbert.runtime import console

if TYPE_CHECKING:
    from ufbert.hub.folder import ModelFolder


def preset(name: str, scale: Scale = "base", **model_fields: Any) -> RunConfig:
    """Load a preset by name (`ufbert presets` lists them), at a scale, with fields of its model replaced.

    Raises UserError for an unknown name, scale or impossible combination.
    """
    from ufbert.config.presets import load_preset, scaled

    config = scaled(load_preset(name), scale)
    return replace(config, model=replace(config.model, **model_fields))


def init(config: RunConfig | ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Draw parameters of a masked language model: a nested dict of float32 arrays."""
    import jax

    from ufbert import nn

    return nn.init(_model(config), jax.random.key(seed))


def apply(
    params: Mapping[str, Any], config: RunConfig | ModelConfig, ids: Any, segment_ids: Any = None
) -> tuple[Any, Any]:
    """Compute hidden states (b, t, d) and token logits (b, t, v) of ids (b, t); `segment_ids` is 0 on padding.

    `config` is a preset's, or the `.config` of a model folder.
    """
    from ufbert import nn

    model = _model(config)
    hidden, _ = nn.encode(params, model, ids, segment_ids)
    return hidden, nn.masked_lm_logits(params, model, hidden)


def _model(config: RunConfig | ModelConfig) -> ModelConfig:
    return config.model if isinstance(config, RunConfig) else config


def load(folder: str | Path) -> "ModelFolder":
    """Load a model folder, `mini`, which comes with this package, or `hf:OWNER/NAME` of the Hugging Face hub.

    It has `.config`, `.params`, `.tokenizer` and, if fine-tuned, `.task`. Raises UserError.
    """
    from ufbert.hub.folder import load_model

    return load_model(folder)


def save(folder: str | Path, model: "ModelFolder") -> None:
    """Write a model folder, whole or not at all. Raises UserError if the disk refuses."""
    from ufbert.hub.folder import save_model

    save_model(folder, model)


def pretrain(out: str | Path, budget: str, **options: Any) -> dict[str, Any]:
    """Pretrain into a new run folder and return its summary.

    `options` are those of `train.py` by name: `config`, `scale`, `corpus`, `seed`, `device`, `tokenizer`, ..., and fields of
    `model`, `train` and `data` with a dot, `**{"train.peak_lr": 1e-3}`, or in dicts, `train={"peak_lr": 1e-3}`. Raises
    UserError as the command does.
    """
    from ufbert.pretrain.run import pretrain as work

    return _call(work, TrainOptions, {"out": out, "budget": budget, **options})


def plan(budget: str, **options: Any) -> dict[str, Any]:
    """Say what a budget buys on a device, before it is spent, and return the figures: seconds, bytes, tokens, FLOP.

    `options` are those of `ufbert plan` by name: `config`, `scale`, `device`, `price`, `check`, ... Raises UserError as the
    command does.
    """
    from ufbert.plan.run import plan as work

    return _call(work, PlanOptions, {"budget": budget, **options})


def prepare(budget: str, **options: Any) -> Path:
    """Prepare the text that `pretrain` with the same options will use, and return its folder.

    `options` are those of `ufbert prepare` by name; `device` is the one that will train, such as `h100`. Raises UserError as
    the command does.
    """
    from ufbert.plan.prepare import prepare as work

    return _call(work, PrepareOptions, {"budget": budget, **options})


def finetune(
    model: str | Path, tasks: str = "", glue_source: str | Path = "", out: str | Path = "", **options: Any
) -> dict[str, Any]:
    """Fine-tune a model folder on GLUE tasks or a task of your own and return the contents of `glue.json`.

    `options` are those of `finetune.py` by name; a task of your own is `train`, `dev`, `text` and `label`, without `tasks`
    and `glue_source`. Fields of `tune` as in `pretrain`. Raises UserError as the command does.
    """
    from ufbert.glue.run import finetune as work

    named = {name: value for name, value in (("tasks", tasks), ("glue_source", glue_source), ("out", out)) if value}
    return _call(work, FinetuneOptions, {"model": model, **named, **options}).to_json()


def _call[Options](work: Callable[[Options, Given], Any], cls: type[Options], named: Mapping[str, Any]) -> Any:
    """Call a verb's function with the options named. A path may be a Path, which is never taken for a model's name."""
    words = {name: os.path.join(".", value) if isinstance(value, Path) else value for name, value in named.items()}
    given = named_values(cls, words)
    console.PROGRESS.on_stdout = True
    try:
        return work(from_given(cls, given), given)
    finally:
        console.PROGRESS.on_stdout = False

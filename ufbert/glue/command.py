"""`finetune.py`, `ufbert finetune` and `ufbert glue-table`: the command line. Imports no jax."""

from dataclasses import fields, replace
from typing import Any

import tyro

from ufbert.config import FinetuneConfig
from ufbert.options.finetune import FinetuneOptions, GlueTableOptions

_OTHER = FinetuneConfig(
    epochs=6, batch_rows=17, lr=0.5, schedule="linear", warmup=0.2, dropout=0.2, pooling="mean", adam_b1=0.8, adam_b2=0.8,
    adam_eps=1e-5, weight_decay=0.5, clip_norm=2.0, max_len=127, early_stop=9, teacher_weight=0.5, temperature=3.0,
)  # fmt: skip
"""Differs from the defaults in every field: a field that two parses agree on was given."""


def finetune_command(args: list[str]) -> dict[str, Any]:
    from ufbert.glue.run import finetune

    options = tyro.cli(FinetuneOptions, args=args, prog="finetune.py")
    other = tyro.cli(FinetuneOptions, args=args, prog="finetune.py", default=replace(options, tune=_OTHER))
    named = [f.name for f in fields(FinetuneConfig) if getattr(options.tune, f.name) == getattr(other.tune, f.name)]
    return finetune(options, {f"tune.{name}": getattr(options.tune, name) for name in named}).to_json()


def glue_table_command(args: list[str]) -> None:
    from ufbert.glue.compare import compare

    compare(tyro.cli(tyro.conf.PositionalRequiredArgs[GlueTableOptions], args=args, prog="ufbert glue-table"))

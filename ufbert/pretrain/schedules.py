"""Schedules: learning rate, mask rate and batch size as functions of the share x of the training budget that is spent.

The training budget is all steps, or the time that is left once the end, with its evaluation and save, is reserved
(`Clock.fraction`).

The jitted step gets the values as arrays, so nothing recompiles.
"""

from typing import NamedTuple

from ufbert.config import PretrainConfig, RunConfig


def lr_share(config: PretrainConfig, x: float) -> float:
    """Return the learning rate over its peak.

    triangle: min(0.25 + x, 4 (1 - x)), crammed BERT's. stable: up linearly over `warmup`, level, down linearly over `decay`
    (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395).
    """
    if config.schedule == "triangle":
        return max(0.0, min(0.25 + x, 4.0 * (1.0 - x)))
    up = 1.0 if config.warmup == 0 else max(x, 1e-3 * config.warmup) / config.warmup
    down = 1.0 if config.decay == 0 else (1.0 - x) / config.decay
    return max(0.0, min(1.0, up, down))


def mask_rate(config: PretrainConfig, x: float) -> float:
    """Return the share of each row that is masked: stages of equal length."""
    stages = config.mask_rate
    return stages[min(len(stages) - 1, int(x * len(stages)))]


class Stage(NamedTuple):
    """A part of a run that has one compiled step."""

    length: int
    """Tokens of the pieces that rows are cut into."""
    next_token: bool
    """True while the next token is predicted, False while masked ones are."""


def stage(run: RunConfig, x: float) -> Stage:
    """Return the stage of a run: short pieces until `data.short_until`, next tokens until `train.next_token_until`."""
    length = run.data.short_len if x < run.data.short_until else run.data.seq_len
    return Stage(length, x < run.train.next_token_until)


def stages(run: RunConfig) -> list[Stage]:
    """Return every stage of a run, first things first."""
    starts = sorted({0.0, run.data.short_until, run.train.next_token_until})
    return list(dict.fromkeys(stage(run, x) for x in starts if x < 1.0))


def rows_per_step(config: PretrainConfig, x: float) -> int:
    """Return the batch size: linear from micro_rows to batch_rows at `ramp_until`, in whole micro-batches."""
    share = 1.0 if config.ramp_until <= 0 else min(1.0, x / config.ramp_until)
    target = config.micro_rows + share * (config.batch_rows - config.micro_rows)
    return max(1, round(target / config.micro_rows)) * config.micro_rows


def final_batch_rows(config: PretrainConfig, expected_rows: float) -> int:
    """Return the batch size at the end of a ramp that the preset leaves open: min(8192, expected rows / aim_updates), in whole
    micro-batches."""
    micro_rows = config.micro_rows
    return max(1, round(min(8192.0, expected_rows / config.aim_updates) / micro_rows)) * micro_rows


def n_checkpoints(config: PretrainConfig, seconds: float | None) -> int:
    """Return the number of checkpoints in a run, evenly spread over its budget of `seconds` (None: a budget of steps)."""
    return max(config.n_checkpoints, round((seconds or 0.0) / (60.0 * config.checkpoint_minutes)))

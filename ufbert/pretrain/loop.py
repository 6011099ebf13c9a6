"""The pretraining loop: the only place that decides when files are read and written.

Order of a session: (1) restore the newest checkpoint, or initialise; (2) evaluate, which also compiles; (3) until the
clock is done: dispatch update n, then read the numbers of update n - 1, evaluate and checkpoint when their share of the
budget comes; (4) last evaluation; (5) last save. The clock covers all of it.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ufbert import nn
from ufbert.checkpoint import checkpoint_steps, load_checkpoint, save_checkpoint
from ufbert.config import RunConfig
from ufbert.data.order import RowOrder
from ufbert.data.rows import PreparedData
from ufbert.data.tokenizer import special_ids
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.ops.fff import effective_share, usage_summary
from ufbert.ops.losses import Sums
from ufbert.pretrain.budget import Clock
from ufbert.pretrain.optim import rows_per_update, triangle
from ufbert.pretrain.step import TrainState, build_steps, init_state, mask_rows
from ufbert.writers import JsonlWriter, LiveLine, write_json


@dataclass(frozen=True)
class Heldout:
    """Held-out rows with fixed masks, cut into equal batches, and the loss of guessing by frequency on the same masks."""

    batches: np.ndarray
    """(batches, rows, seq_len) int32."""
    unigram_loss: float
    """-mean log p(token) over the hidden positions, p the add-one training frequencies, in nats."""


def evaluation_key(batch: int) -> jax.Array:
    """The masking key of a held-out batch: the same in every run and evaluation."""
    return jax.random.fold_in(jax.random.key(20231122), batch)


def heldout_of(run: RunConfig, data: PreparedData) -> Heldout:
    """The held-out batches of a run."""
    rows = data.heldout_sample(run.data.eval_rows)
    size = min(len(rows), run.train.micro_rows)
    batches = rows[: len(rows) // size * size].reshape(-1, size, rows.shape[1])
    log_p, special = data.unigram_log_probs(), special_ids(data.tokenizer)
    total = count = 0.0
    for i, batch in enumerate(batches):
        masked = mask_rows(run, special, jnp.asarray(batch), evaluation_key(i))
        weights = np.asarray(masked.weights, np.float64)
        total += float(-(log_p[np.asarray(masked.labels)] * weights).sum())
        count += float(weights.sum())
    return Heldout(batches, total / max(count, 1.0))


@dataclass
class _Session:
    """What a session carries between phases."""

    state: TrainState
    steps: Any
    metrics: JsonlWriter
    live: LiveLine
    save_seconds: float
    eval_seconds: float = 0.0
    update_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    def reserve(self) -> float:
        """Seconds to keep for the end: updates in flight, the last evaluation, the last checkpoint and model folder."""
        update = max(self.update_seconds, default=0.0)
        return 1.0 + 2.0 * update + 1.5 * self.eval_seconds + 2.0 * self.save_seconds


def train(
    run: RunConfig, data: PreparedData, clock: Clock, folder: Path, *, seed: int, restarts: int = 0
) -> dict[str, Any]:
    """Train to the end of the clock and return the run's summary, which is also in `folder/summary.json`.

    Continues from `folder/checkpoints` if there is one. Raises UserError if a checkpoint or the disk fails.
    """
    live = LiveLine()
    special = special_ids(data.tokenizer)
    steps, heldout = build_steps(run, special), heldout_of(run, data)
    key = jax.random.key(seed)
    init = jax.jit(lambda key: init_state(run, key))
    restored = load_checkpoint(folder / "checkpoints", jax.eval_shape(init, key))
    state = init(key) if restored is None else restored[1]
    start_step = int(state.step)
    if restored is not None:
        live.say(f"resumed from the checkpoint of step {start_step:,}; {clock.left(start_step)}")
    metrics = JsonlWriter(folder / "metrics.jsonl", keep_through_step=start_step if restarts else None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    session = _Session(state, steps, metrics, live, save_seconds=0.5 + size / 200e6)  # until a save is measured
    try:
        _evaluate(session, heldout, clock, record=restored is None)
        # The first update compiles, which costs about twice what compiling the evaluation just did: where that much is not
        # left, as after a late resume, it must not begin.
        clock.reserve(session.reserve() + 2.0 * session.eval_seconds)
        _updates(session, run, data, heldout, clock, folder, key)
        loss = _evaluate(session, heldout, clock)
        return _finish(session, run, data, heldout, clock, folder, loss, restarts)
    finally:
        metrics.close()


def _updates(
    session: _Session,
    run: RunConfig,
    data: PreparedData,
    heldout: Heldout,
    clock: Clock,
    folder: Path,
    key: jax.Array,
) -> None:
    """Phase 3: updates until the clock is done."""
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    cfg, order = run.train, RowOrder(len(data.train), seed, shuffled=run.data.order == "shuffled")
    n_checkpoints = cfg.n_checkpoints or max(10, round((clock.seconds or 0.0) / 900))
    step, position = int(session.state.step), int(session.state.rows_seen)
    fraction = clock.fraction(step)
    evals_done, saves_done = int(fraction * cfg.n_evals), int(fraction * n_checkpoints)
    pending: dict[str, Any] | None = None
    last, speed = time.monotonic(), 0.0
    while not clock.done(step):
        fraction = clock.fraction(step)
        if int(fraction * cfg.n_evals) > evals_done and fraction < 1.0:
            evals_done = int(fraction * cfg.n_evals)
            pending = _report(session, pending, clock)
            _evaluate(session, heldout, clock)
            last = time.monotonic()
        if int(fraction * n_checkpoints) > saves_done:
            saves_done = int(fraction * n_checkpoints)
            pending = _report(session, pending, clock)
            _checkpoint(session, folder)
            last = time.monotonic()
        clock.reserve(session.reserve())
        fraction, n_rows = clock.fraction(step), rows_per_update(cfg, clock.fraction(step))
        lr = cfg.peak_lr * triangle(fraction)
        step_key, picks = jax.random.fold_in(key, step + 1), order.take(position, n_rows)
        length = run.data.short_len if fraction < run.data.short_until else run.data.seq_len
        sums, norm = _one_update(session, data, picks, cfg.micro_rows, length, step_key, lr, fraction, clock)
        if sums is None:
            break
        step, position = step + 1, position + n_rows
        waited = pending is not None  # else nothing was in flight, and the dispatch alone says nothing about speed
        _report(session, pending, clock)
        now = time.monotonic()
        if waited:
            session.update_seconds.append(now - last)
            speed = n_rows * run.data.seq_len / max(now - last, 1e-9)
        pending = {
            "step": step,
            "sums": sums,
            "norm": norm,
            "lr": lr,
            "rows": n_rows,
            "length": length,
            "fraction": fraction,
        }
        pending |= {"tokens": position * run.data.seq_len, "tokens_per_second": speed}
        last = now
    _report(session, pending, clock)


def _one_update(
    session: _Session,
    data: PreparedData,
    picks: np.ndarray,
    micro_rows: int,
    length: int,
    key: jax.Array,
    lr: float,
    fraction: float,
    clock: Clock,
) -> tuple[Sums | None, Any]:
    """Dispatch one update; (None, None) if the clock ran out between its micro-batches, which are then dropped."""
    taken, progress = np.int32(len(picks)), np.float32(fraction)
    if taken == micro_rows:
        rows = data.train.take(picks).reshape(-1, length)
        session.state, sums, norm = session.steps.update(session.state, rows, key, lr, taken, progress)
        return sums, norm
    total = None
    for i in range(0, len(picks), micro_rows):
        if i and clock.done(int(session.state.step)):
            return None, None
        rows = data.train.take(picks[i : i + micro_rows]).reshape(-1, length)
        total = session.steps.gradient(session.state.params, rows, jax.random.fold_in(key, i), progress, total)
    session.state, sums, norm = session.steps.finish(session.state, total, lr, taken)
    return sums, norm


def _report(session: _Session, pending: dict[str, Any] | None, clock: Clock) -> None:
    """Read and write the numbers of an update that was dispatched earlier."""
    if pending is None:
        return
    sums: Sums = pending.pop("sums")
    count = max(float(sums.count), 1.0)
    record: dict[str, Any] = {
        **pending,
        "loss": float(sums.loss) / count,
        "accuracy": float(sums.correct) / count,
        "gradient_norm": float(pending.pop("norm")),
        "spent": round(clock.spent(), 3),
    }
    record.pop("norm", None)
    if float(sums.extra):
        record["extra_loss"] = float(sums.extra) / count
    session.metrics.write(record)
    session.live.show(
        f"{clock.left(record['step'])}  step {record['step']:,}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"loss {record['loss']:.3f}  lr {record['lr']:.2e}"
    )


def _evaluate(session: _Session, heldout: Heldout, clock: Clock, record: bool = True) -> float:
    """Held-out loss in nats; written to the metrics under `heldout_loss` if it is to be recorded."""
    began = time.monotonic()
    found = [
        session.steps.evaluate(session.state.params, rows, evaluation_key(i)) for i, rows in enumerate(heldout.batches)
    ]
    loss, count, correct = (
        sum(float(getattr(sums, name)) for sums, _ in found) for name in ("loss", "count", "correct")
    )
    session.eval_seconds = time.monotonic() - began
    step = int(session.state.step)
    loss, accuracy = loss / max(count, 1.0), correct / max(count, 1.0)
    if not record:
        return loss
    facts: dict[str, Any] = {"step": step, "heldout_loss": loss, "heldout_accuracy": accuracy}
    usage = _usage([aux for _, aux in found])
    session.metrics.write({**facts, "spent": round(clock.spent(), 3), **({"usage": usage} if usage else {})})
    session.live.say(
        f"step {step:,}: held-out loss {loss:.3f} nats ({heldout.unigram_loss - loss:+.3f} below word frequency), "
        f"accuracy {accuracy:.1%}"
    )
    return loss


def _usage(counts: list[nn.Aux]) -> dict[str, dict[str, float]]:
    """Per layer, how the parts of trees, leaf trees and switch layers were used on the held-out rows."""
    totals = {name: sum(np.asarray(aux[name], np.float64) for aux in counts) for name in counts[0] if "." in name}
    usage = {}
    for name, total in totals.items():
        layer, what = name.split(".")
        if what == "visits":
            usage[layer] = usage_summary(np.asarray(total))
        else:
            usage[layer] = {
                f"{what}_in_use": effective_share(np.asarray(total)),
                f"{what}_dead": float(np.sum(total == 0)),
            }
    return usage


def _checkpoint(session: _Session, folder: Path) -> None:
    began = time.monotonic()
    save_checkpoint(folder / "checkpoints", int(session.state.step), session.state)
    session.save_seconds = time.monotonic() - began


def _finish(
    session: _Session,
    run: RunConfig,
    data: PreparedData,
    heldout: Heldout,
    clock: Clock,
    folder: Path,
    loss: float,
    restarts: int,
) -> dict[str, Any]:
    """Phase 5: model folder, last checkpoint, summary."""
    save_model(folder / "model", ModelFolder(run.model, session.state.params, data.tokenizer))
    step, rows = int(session.state.step), int(session.state.rows_seen)
    if step not in checkpoint_steps(folder / "checkpoints"):
        _checkpoint(session, folder)
    summary = {
        "heldout_loss": loss,
        "unigram_loss": heldout.unigram_loss,
        "gain_over_unigram": heldout.unigram_loss - loss,
        "steps": step,
        "tokens": rows * run.data.seq_len,
        "passes": rows / len(data.train),
        "spent_seconds": round(clock.spent(), 2),
        "budget_seconds": clock.seconds,
        "restarts": restarts,
        "parameters": nn.count_params(run.model),
        "tree_backend": nn.tree_backend(run.model),
        "device": str(jax.devices()[0].device_kind),
    }
    write_json(folder / "summary.json", summary)
    return summary

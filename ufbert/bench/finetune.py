"""Fine-tuning speed on this CPU against peers that fine-tune the same model: what they get, and the report."""

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ufbert import nn
from ufbert.bench.architectures import peer_of
from ufbert.bench.contest import Race, compete
from ufbert.config import FinetuneConfig
from ufbert.config.stored import to_json
from ufbert.data.encode import Encoded, encode_texts
from ufbert.data.text_files import read_lines
from ufbert.errors import UserError
from ufbert.glue.batches import BatchRows, epoch_batches
from ufbert.hub.folder import ModelFolder, flatten

OURS = "bucketed"
"""The order in which ufbert fine-tunes."""


class Texts(NamedTuple):
    """Labelled single texts."""

    texts: list[str]
    labels: list[int]
    """Class numbers."""
    n_classes: int


class Plan(NamedTuple):
    """The batches of one order, one an update: checked ones, warm-up ones, then those of the blocks."""

    picks: np.ndarray
    """(updates, b) row numbers."""
    lengths: np.ndarray
    """(updates,) tokens that rows are padded to."""
    facts: dict[str, float]
    """`tokens_per_row`, padding included, over the blocks, and `tokens_per_row_of_an_epoch`."""


def read_rows(path: Path) -> Texts:
    """Rows of a TSV file in the form of SST-2: UTF-8, no quoting, a header with `sentence` and `label`; labels of any kind
    become class numbers in their sorted order.

    Raises UserError for a file that cannot be read or lacks a column, a row that is too short, or fewer than two labels.
    """
    rows = [(number, line.split("\t")) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    header = rows[0][1] if rows else []
    for name in ("sentence", "label"):
        if name not in header:
            raise UserError(f"{path} has no column {name!r} in its first line.")
    text, label = header.index("sentence"), header.index("label")
    for number, fields in rows:
        if len(fields) < len(header):
            raise UserError(f"{path}, line {number}: {len(fields)} columns, expected {len(header)}.")
    names = sorted({fields[label] for _, fields in rows[1:]})
    if len(names) < 2:
        raise UserError(f"{path} has rows of {len(names)} labels; there must be at least two.")
    classes = {name: number for number, name in enumerate(names)}
    return Texts(
        [fields[text] for _, fields in rows[1:]], [classes[fields[label]] for _, fields in rows[1:]], len(names)
    )


def race(
    folder: Path, model: ModelFolder, rows: Texts, tune: FinetuneConfig, peers: Mapping[str, Sequence[str]], size: Race
) -> dict[str, Any]:
    """Fine-tune `model` under a fresh classifier here and in each peer, in turns, and report speeds and ratios.

    `peers` maps a name to the command that starts it, which ends with the order of its batches (a key of `ORDERS`) and in
    which `{folder}` stands for the job folder. Raises UserError if there is no peer for the model, or too few rows for a
    batch; if a peer fails, or if its losses say that it does not train the same model, and then nothing has been timed.
    """
    encoded = encode_texts(model.tokenizer, rows.texts, None, model.config, tune.max_len)
    plans, warm = make_plans(encoded, size)
    write_job(folder, model, rows, encoded, tune, plans, size)
    worker = (sys.executable, "-m", "ufbert.bench.finetune_worker", "{folder}", OURS)
    report = compete(folder, worker, peers, size, warm)
    report["job"] |= {"model": to_json(model.config), "tune": to_json(tune), "training_rows": len(rows.texts)}
    orders = {name: command[-1] for name, command in {"ufbert": worker, **peers}.items()}
    for one in report["contestants"]:
        speed = size.updates * size.rows / statistics.median(one["block_seconds"])
        one |= {"rows_per_second": speed, "order": orders[one["name"]]} | plans[orders[one["name"]]].facts
    return report


def random_batches(rows: Encoded, batch_rows: int, seed: int, epoch: int) -> list[BatchRows]:
    """What is usually done ("dynamic padding"): rows at random, and each batch padded to its longest row, rounded up to a
    multiple of 8. The last, incomplete batch of the epoch is left out."""
    order = np.random.default_rng([seed, epoch]).permutation(len(rows.ids))
    batches = order[: len(order) // batch_rows * batch_rows].reshape(-1, batch_rows)
    longest = [max(len(rows.ids[i]) for i in picks) for picks in batches]
    return [
        BatchRows(picks, np.ones(batch_rows, np.float32), min(-(-length // 8) * 8, rows.max_len))
        for picks, length in zip(batches, longest, strict=True)
    ]


ORDERS: dict[str, Callable[[Encoded, int, int, int], list[BatchRows]]] = {
    "random": random_batches,
    "bucketed": epoch_batches,
}
"""(rows, rows of a batch, seed, epoch) -> the batches of an epoch."""


def make_plans(rows: Encoded, size: Race) -> tuple[dict[str, Plan], int]:
    """A plan for every order, equal in their checked batches, and how many batches warm up: enough for every length that
    the blocks of either order have. Raises UserError if the rows do not fill a batch."""
    if len(rows.ids) < size.rows:
        raise UserError(f"{len(rows.ids)} rows do not fill a batch of {size.rows}.")
    checked = list(itertools.islice(_whole_batches(random_batches, rows, size, size.seed + 1), size.checked))
    found = {}
    for name, make in ORDERS.items():
        wanted = size.updates * size.blocks
        per_epoch = sum(1 for one in make(rows, size.rows, size.seed, 0) if one.weights.all())
        epochs = per_epoch * -(-wanted // per_epoch)
        batches = list(itertools.islice(_whole_batches(make, rows, size, size.seed), epochs))
        found[name] = (batches, mixed_blocks(batches, size))
    warm = max(len({one.length for one in blocks}) for _, blocks in found.values())
    plans = {}
    for name, (batches, blocks) in found.items():
        shapes = list({one.length: one for one in blocks}.values())
        together = checked + [shapes[i % len(shapes)] for i in range(warm)] + blocks
        facts = {"tokens_per_row": _mean_length(blocks), "tokens_per_row_of_an_epoch": _mean_length(batches)}
        plans[name] = Plan(np.stack([one.picks for one in together]), np.array([one.length for one in together]), facts)
    return plans, warm


def mixed_blocks(batches: list[BatchRows], size: Race) -> list[BatchRows]:
    """The batches of all blocks, each block with nearly the mix of lengths that `batches` have: of these, in order of
    length, as many as are needed are taken at even distances, every `size.blocks` neighbours go one to each block, and a
    block trains on its own in a random order."""
    n, rng = size.updates * size.blocks, np.random.default_rng(size.seed)
    order = np.argsort([one.length for one in batches], kind="stable")
    taken = order[(2 * np.arange(n) + 1) * len(order) // (2 * n)].reshape(size.updates, size.blocks)
    dealt = rng.permuted(rng.permuted(taken, axis=1).T, axis=1)
    return [batches[i] for i in dealt.ravel()]


def _whole_batches(make: Callable[..., list[BatchRows]], rows: Encoded, size: Race, seed: int) -> Any:
    """Epoch after epoch, without end, the batches that no row only fills up."""
    for epoch in itertools.count():
        yield from (one for one in make(rows, size.rows, seed, epoch) if one.weights.all())


def _mean_length(batches: list[BatchRows]) -> float:
    return float(np.mean([one.length for one in batches]))


def write_job(
    folder: Path,
    model: ModelFolder,
    rows: Texts,
    encoded: Encoded,
    tune: FinetuneConfig,
    plans: dict[str, Plan],
    size: Race,
) -> None:
    """Write what every contestant starts from: `job.json`, `params.npz` and `batches.npz`.

    `batches.npz` holds all rows once, padded to the longest: `ids`, `tokens` (how many of a row are real) and `labels`; and
    of each order `ORDER_picks` and `ORDER_lengths`, one batch an update, of which the first `checked` are without dropout.
    """
    tokens = np.array([len(ids) for ids in encoded.ids])
    padded = encoded.pad(np.arange(len(tokens)), int(tokens.max()))
    batches: dict[str, Any] = {"ids": padded.ids, "tokens": tokens, "labels": np.array(rows.labels)}
    for name, plan in plans.items():
        batches |= {f"{name}_picks": plan.picks, f"{name}_lengths": plan.lengths}
    np.savez(folder / "batches.npz", **batches)
    flat: dict[str, Any] = flatten(start(model, rows.n_classes, size.seed))
    np.savez(folder / "params.npz", **flat)
    job: dict[str, Any] = {"kind": peer_of(model.config), "model": to_json(model.config), "tune": to_json(tune)}
    job |= {"checked": size.checked, "seed": size.seed, "max_len": encoded.max_len}
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")


def start(model: ModelFolder, n_classes: int, seed: int) -> dict[str, Any]:
    """The encoder under a fresh classifier, whose pooler is the model's, where it has one."""
    classifier = nn.init_classifier(model.config, jax.random.key(seed), n_classes)
    if "pooler" in model.params:
        classifier = {**classifier, "pooler": model.params["pooler"]}
    return {"encoder": model.params["encoder"], "classifier": classifier}

"""`finetune.py` and `ufbert finetune`: options to a sweep of tasks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ufbert.config import Device, FinetuneConfig, ProtocolName
from ufbert.data.encode import encode_texts
from ufbert.errors import UserError
from ufbert.glue.custom import OwnTask, read_own
from ufbert.glue.protocols import PROTOCOLS, Protocol, find_protocol
from ufbert.glue.rows import Rows, TaskData
from ufbert.glue.sources import choose_tasks, load_task, open_source
from ufbert.runtime.claim import claimed, claimed_new, new_folder
from ufbert.runtime.device import use_device


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a model folder on GLUE tasks, or on one of your own, score each on its dev set, and write tables, predictions
    and one model folder per task."""

    model: str
    """Model folder to start from."""
    glue_source: str = "hf"
    """hf (the hub's GLUE) or hf:NAME (another hub name or a local folder), tfds:PATH (a prepared tensorflow_datasets folder),
    dir:PATH (official TSV files: PATH/SST-2/train.tsv, ...)."""
    tasks: str = "all"
    """Comma-separated: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or a cut by its folder's name; all takes what the
    source has."""
    task_file: str = ""
    """Instead of GLUE: a .json or .py file that describes a task of your own."""
    train: str = ""
    """Instead of GLUE: training rows of your own task, .tsv, .csv or .jsonl."""
    dev: str = ""
    """Its dev rows."""
    test: str = ""
    """Its rows without labels, to predict; optional."""
    text: str = ""
    """Its text column."""
    pair: str = ""
    """Its column of second texts; optional."""
    label: str = ""
    """Its label column: classes, or numbers to predict."""
    labels: Literal["auto", "classes", "values"] = "auto"
    """What numbers in the label column are; auto takes them for values where one has a fraction or there are more than 20
    different ones, and says so."""
    protocol: ProtocolName = "auto"
    """crammed, small (crammed with a learning rate by width), bert (best of four learning rates), mnli-first; auto takes
    crammed from width 768 up and small below."""
    out: str = ""
    """Folder for the results; by default a new one under runs/."""
    resume: bool = False
    """Go on with the sweep in --out: tasks that are done are kept, and runs of a task too where they were not done at once."""
    seeds: str = ""
    """Comma-separated seeds; each is a run, and the median counts. By default the protocol's five, 0 to 4."""
    runs_at_once: int = 0
    """Runs of a task that are trained side by side; 0 for all."""
    keep: Literal["last", "best"] = "last"
    """Score and save the weights after the last epoch, or those of the best epoch on dev (which flatters the score)."""
    train_rows: int = 0
    """Use this many training rows, drawn with the first seed; 0 uses all."""
    skip_bad_rows: bool = False
    """Leave broken rows out and count them, instead of stopping at the first."""
    from_scratch: bool = False
    """Ignore the pretrained weights and start from a random initialisation of the same architecture, for comparison."""
    probe: bool = False
    """Leave the encoder as it is and train only the classifier, on features that are computed once."""
    teacher: str = ""
    """A fine-tuned model folder, or a folder of such by task (a sweep's), whose scores are learnt beside the labels."""
    device: Device = "auto"
    """cpu, gpu or tpu."""
    tune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Hyper-parameters, the same for every task; the protocol's unless given."""

    def __post_init__(self) -> None:
        if self.probe and self.from_scratch:
            raise UserError("--probe reads a pretrained encoder; it does not go with --from-scratch.")
        for name in ("runs_at_once", "train_rows"):
            if not 0 <= getattr(self, name) < 2**31:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie between 0 and 2^31 - 1."
                )
        if self.labels != "auto" and not (self.is_own and not self.task_file):
            raise UserError(
                "--labels is for a task of your own that --train and the like describe; a task file says it itself."
            )
        if self.is_own and self.protocol == "mnli-first":
            raise UserError("The protocol mnli-first is for GLUE's tasks.")

    @property
    def is_own(self) -> bool:
        """Whether the task is a person's own."""
        return any(getattr(self, name) for name in OWN)

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds asked for; () for the protocol's."""
        try:
            found = tuple(int(part) for part in self.seeds.split(",")) if self.seeds else ()
        except ValueError as error:
            raise UserError(f"--seeds {self.seeds[:60]!r} is not a list of whole numbers.") from error
        if len(set(found)) < len(found):
            raise UserError(f"--seeds {self.seeds} names a seed twice.")
        if wrong := [seed for seed in found if not 0 <= seed < 2**32]:
            raise UserError(f"--seeds names {wrong[0]}; a seed must lie between 0 and 4294967295.")
        return found


OWN = ("task_file", "train", "dev", "test", "text", "pair", "label")
"""Options that describe a task of one's own."""

FREE_ON_RESUME = ("out", "resume", "device")
"""Options that say nothing about the numbers, so a resumed sweep may change them."""


def finetune_command(args: list[str]) -> dict[str, Any]:
    """`ufbert finetune ARGS`; returns what `glue.json` in the output folder holds.

    All tasks, files and the model are checked before the first update. Raises UserError for any that is wrong.
    """
    import tyro

    def parse(default: Any) -> FinetuneOptions:
        return tyro.cli(FinetuneOptions, args=args, prog="finetune.py", **default)

    named = parse({})
    if named.resume and not named.out:
        raise UserError("--resume needs --out FOLDER, the sweep to go on with.")
    if not named.out:
        return _sweep(parse, named)
    with (claimed if named.resume else claimed_new)(Path(named.out)):
        return _sweep(parse, named)


def _sweep(parse: Callable[[Any], FinetuneOptions], named: FinetuneOptions) -> dict[str, Any]:
    """Check all there is to check, and tune, in the folder that is claimed for it or in a new one."""
    named.seed_list  # noqa: B018  (a wrong list is said before anything is read)
    absent, sets = _read_tasks(named)
    use_device(named.device)
    from ufbert.glue.sweep import sweep
    from ufbert.hub.folder import load_model

    model = load_model(named.model)
    base = (
        probing(find_protocol(named.protocol, model.config))
        if named.probe
        else find_protocol(named.protocol, model.config)
    )
    options = parse({"default": replace(named, tune=base.tune)})
    protocol = base.with_overrides(options.tune, options.seed_list or base.seeds)
    for data in sets:  # a row that has no room for text is said before anything is trained
        pair = None if data.train.pairs is None else data.train.pairs[:1]
        encode_texts(model.tokenizer, data.train.texts[:1], pair, model.config, options.tune.max_len)
    if options.train_rows:
        count, seed = options.train_rows, protocol.seeds[0]
        sets = [data._replace(train=subset(data.train, count, seed)) for data in sets]
    if absent:
        print(f"not in {options.glue_source}, left out: {', '.join(absent)}")
    if options.out:
        return sweep(options, protocol, model, sets)
    stem = (
        Path(options.model).resolve().parent.name if Path(options.model).name == "model" else Path(options.model).name
    )
    folder = new_folder(Path("runs"), f"glue-{stem}")
    with claimed_new(folder):
        return sweep(replace(options, out=str(folder)), protocol, model, sets)


def probing(protocol: Protocol) -> Protocol:
    """A protocol for a classifier on frozen features, which needs more and larger steps."""
    tune = replace(protocol.tune, epochs=20, lr=1e-3)
    return replace(protocol, name=f"{protocol.name}, probe", tune=tune, rates=())


def _read_tasks(options: FinetuneOptions) -> tuple[list[str], list[TaskData]]:
    """(Names of official tasks that the source lacks, rows of the tasks to run)."""
    if options.is_own:
        described = {name: getattr(options, name) for name in OWN}
        own = OwnTask(**described, regression={"auto": None, "classes": False, "values": True}[options.labels])
        return [], [read_own(own, options.skip_bad_rows, print)]
    source = open_source(options.glue_source, options.skip_bad_rows)
    chosen, absent = choose_tasks(source, options.tasks)
    if options.protocol == "mnli-first":
        first = [task for task in chosen if "mnli" in (task.name, task.cut_of)]
        if not first and any(task.name in PROTOCOLS["mnli-first"].mnli_first for task in chosen):
            raise UserError("The protocol mnli-first needs MNLI among the tasks, and its rows in the source.")
        chosen = [*first, *(task for task in chosen if task not in first)]
    return absent, [load_task(source, task) for task in chosen]


def subset(rows: Rows, count: int, seed: int) -> Rows:
    """`count` rows drawn without replacement. Raises UserError if there are fewer."""
    assert rows.labels is not None
    if count > len(rows.labels):
        raise UserError(f"--train-rows {count} is more than the {len(rows.labels)} rows there are.")
    picks = np.sort(np.random.default_rng(seed).permutation(len(rows.labels))[:count])
    pairs = None if rows.pairs is None else [rows.pairs[i] for i in picks]
    return Rows([rows.texts[i] for i in picks], pairs, [rows.labels[i] for i in picks], rows.skipped)

"""Options of `ufbert finetune` and `ufbert glue-table`. Imports no jax."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional

from ufbert.config import Device, FinetuneConfig, ProtocolName
from ufbert.errors import UserError
from ufbert.options.ending import EndOptions
from ufbert.options.given import seeds_of


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The rows of tasks: GLUE's, or a custom one."""

    glue_source: str = "hf"
    """hf (the hub's GLUE) or hf:NAME (another hub name or a local folder), tfds:PATH (a prepared tensorflow_datasets folder),
    dir:PATH (official TSV files: PATH/SST-2/train.tsv, ...)."""
    tasks: str = "all"
    """Comma-separated: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or a cut by its folder's name; all takes every task
    that the source has."""
    task_file: str = ""
    """Instead of GLUE: a .json or .py file that describes a custom task."""
    train: str = ""
    """Instead of GLUE: training rows of a custom task, .tsv, .csv or .jsonl."""
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
    """Meaning of numbers in the label column; auto takes them for values if one has a fraction or there are more than 20
    different ones, and prints its choice."""
    skip_bad_rows: bool = False
    """Leave broken rows out and count them, instead of stopping at the first."""

    def __post_init__(self) -> None:
        if self.task_file and any(getattr(self, name) for name in CUSTOM if name != "task_file"):
            raise UserError("A task file describes its task in full; leave out the other options that describe one.")
        if self.labels != "auto" and (self.task_file or not self.is_custom):
            raise UserError("--labels goes with --train and the like; a task file has a field `regression` instead.")

    @property
    def is_custom(self) -> bool:
        """True for a custom task, False for GLUE's."""
        return any(getattr(self, name) for name in CUSTOM)


CUSTOM = ("task_file", "train", "dev", "test", "text", "pair", "label")
"""Options that describe a custom task."""


@dataclass(frozen=True)
class FinetuneOptions(TaskOptions, EndOptions):
    """Fine-tune a model folder on GLUE tasks or on a custom task, score each on its dev set, and write tables, predictions
    and one model folder per task."""

    model: str
    """Model folder to start from; mini for the model that comes with ufbert, hf:OWNER/NAME[@REVISION] for one on the Hugging
    Face hub."""
    protocol: ProtocolName = "auto"
    """crammed, small (crammed with a learning rate by width), bert (best of four learning rates), mnli-first; auto takes
    crammed from width 768 up and small below."""
    out: str = ""
    """Folder for the results; by default a new one under runs/."""
    resume: bool = False
    """Go on with the sweep in --out. Finished tasks are kept, and finished runs of a task too if --runs-at-once split them."""
    seeds: str = ""
    """Comma-separated seeds; each is a run, and the median counts. By default the protocol's five, 0 to 4."""
    runs_at_once: int = 0
    """Runs of a task that are trained side by side; 0 for all."""
    keep: Literal["last", "best"] = "last"
    """Score and save the weights after the last epoch, or those of the best epoch on dev (which flatters the score)."""
    train_rows: int = 0
    """Use this many training rows, drawn with the first seed; 0 uses all."""
    from_scratch: bool = False
    """Ignore the pretrained weights and start from a random initialisation of the same architecture, for comparison."""
    probe: bool = False
    """Leave the encoder as it is and train only the classifier, on features that are computed once."""
    teacher: str = ""
    """A fine-tuned model folder (also hf:OWNER/NAME), or a folder of them by task (a sweep's), whose scores are learnt along
    with the labels."""
    device: Device = "auto"
    """cpu, gpu or tpu."""
    tune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Hyper-parameters, the same for every task; the protocol's unless given."""

    def __post_init__(self) -> None:
        if self.resume and not self.out:
            raise UserError("--resume needs --out FOLDER, the sweep to go on with.")
        if self.probe and self.from_scratch:
            raise UserError("--probe reads a pretrained encoder; it does not go with --from-scratch.")
        for name in ("runs_at_once", "train_rows"):
            if not 0 <= getattr(self, name) < 2**31:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is {getattr(self, name)}; it must lie between 0 and 2^31 - 1.")
        super().__post_init__()
        if self.is_custom and self.protocol == "mnli-first":
            raise UserError("The protocol mnli-first is for GLUE's tasks.")
        _ = self.seed_list  # refuses a wrong list before anything is read

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds as numbers; () for the protocol's. Raises UserError if they are no seeds."""
        return seeds_of(self.seeds)


FREE_ON_RESUME = ("out", "resume", "device", "when_done", "when_finished", "when_failed")
"""Options that do not change the scores, so that a resumed sweep may change them."""


@dataclass(frozen=True)
class GlueTableOptions:
    """Print GLUE sweeps side by side as Markdown: the median of each task, and its difference to the first sweep's with a 95
    % interval for the seeds and the finite dev set."""

    sweeps: Annotated[tuple[str, ...], Positional]
    """Two or more folders that `ufbert finetune` wrote, or their glue.json."""
    out: str = ""
    """Write the table to this file, too."""

"""Options of `ufbert compare`. Imports no jax."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from ufbert.config import Device, ProtocolName
from ufbert.config.checks import Positive, Size, check_kinds
from ufbert.errors import UserError
from ufbert.options.given import seeds_of
from ufbert.options.train import TextOptions


@dataclass(frozen=True, kw_only=True)
class CompareOptions(TextOptions):
    """Compare presets: pretrained on one text, with one tokenizer, at one scale and by one recipe, for equal time and for equal
    tokens; fine-tuned on GLUE by one protocol; and timed on this CPU. Options of `train` that stand here hold for all models.
    Every cell (a model and a seed, a model and a task, the timing) is measured once: the same command goes on with what is not
    finished, whatever has ended it. A cell that fails stops no other, is named in the report, and the command ends with status
    2."""

    presets: Annotated[tuple[str, ...], Positional] = ()
    """Models: presets by name or file, or words such as "narrow: --config=crammed_bert --model.d-hidden=64"."""
    sweep: str = ""
    """Also compare UltraFastBERTs of K trees, each as deep as the neurons of the 1x11 preset at the scale allow:
    comma-separated numbers of trees, as in 1,8,64,all. `all` is a dense layer of all neurons, in which a token skips none."""
    out: str = ""
    """Folder of the comparison."""
    budget: str = ""
    """Equal time: every model is trained so long, 20m or 1h. Without it no model is trained for equal time."""
    tokens: float = 0.0
    """Equal tokens: every model is trained on so many, such as 10e6; these models are fine-tuned and timed. By default as many
    as the first model is expected to read in --budget."""
    seeds: str = "0"
    """Comma-separated seeds of pretraining; differences are paired by seed."""
    first_seed_only: str = ""
    """Comma-separated models that are trained with the first seed only."""
    tasks: str = ""
    """Comma-separated GLUE tasks to fine-tune on, as in --tasks of `finetune`: SST-2,RTE,MNLI-devsplit. Without it none."""
    glue_dir: str = ""
    """Folder of GLUE's official TSV files: GLUE_DIR/SST-2/train.tsv, ... The same as --glue-source dir:GLUE_DIR."""
    glue_source: str = "hf"
    """Source of GLUE's rows, as in `finetune`."""
    glue_seeds: str = "0,1,2"
    """Comma-separated seeds of fine-tuning; the median counts."""
    one_seed_tasks: str = ""
    """Comma-separated tasks, such as the largest, that are fine-tuned with the first of these seeds only."""
    protocol: ProtocolName = "auto"
    """Protocol of fine-tuning, as in `finetune`."""
    speed: bool = True
    """Time the trained models on this CPU."""
    shapes: tuple[str, ...] = ("1x128", "8x128")
    """TEXTSxTOKENS of the calls that are timed."""
    blocks: Size = 9
    """Rounds of timing."""
    seconds_a_block: Positive = 0.3
    """Approximate length of a block of timing; never less than a call."""
    baseline: str = ""
    """The model that the others are compared with; by default the first."""
    price: float = 0.0
    """Price of an hour of this machine, in any currency; 0 leaves money out."""
    at_once: int = 1
    """Cells that run side by side and share the processor's cores; their seconds then say little, and the report says so.
    Models are always timed alone."""
    plan: bool = False
    """Only say what is to be done, and the hours and the money it will take."""
    report: bool = False
    """Only draw the tables and the page of what is there, of --out."""
    device: Device = "auto"
    """cpu, gpu or tpu, to train on."""

    def __post_init__(self) -> None:
        check_kinds(type(self), {"blocks": self.blocks, "seconds_a_block": self.seconds_a_block}, "--")
        if not self.out:
            raise UserError("A comparison needs --out FOLDER.")
        if self.init_from:
            raise UserError("--init-from does not go with compare, whose models all start from random weights.")
        if not self.report and not self.budget and not self.tokens:
            raise UserError(
                "A comparison needs --budget, the same time for all, or --tokens, the same tokens, or both."
            )
        if not 0 <= self.tokens <= 1e13:
            raise UserError(f"--tokens is {self.tokens:g}; it must lie between 0 and 1e13.")
        if not 1 <= self.at_once <= 256:
            raise UserError(f"--at-once is {self.at_once}; it must lie between 1 and 256.")
        if not 0 <= self.price < float("inf"):
            raise UserError(f"--price is {self.price}; it must be a finite number, 0 or more.")
        if self.glue_dir and self.glue_source != "hf":
            raise UserError("--glue-dir and --glue-source both name where GLUE's rows are; give one of the two.")
        if not seeds_of(self.glue_seeds):
            raise UserError("--glue-seeds is empty.")
        for shape in self.shapes:
            batch, _, tokens = shape.partition("x")
            if not (batch.isdecimal() and tokens.isdecimal() and int(batch) > 0 and int(tokens) > 0):
                raise UserError(f"{shape!r} is not a shape; 8x128 is one.")
        if self.speed and not self.shapes:
            raise UserError("Name at least one of --shapes, or give --no-speed.")
        _ = self.seed_list  # refuses a wrong list before anything is read

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds of pretraining as numbers. Raises UserError if they are no seeds."""
        return seeds_of(self.seeds) or (0,)

    @property
    def source(self) -> str:
        """The source of GLUE's rows, as `finetune` takes it."""
        return f"dir:{self.glue_dir}" if self.glue_dir else self.glue_source


def names_of(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]

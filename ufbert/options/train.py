"""Options of `ufbert train`, `ufbert prepare`, `ufbert plan` and `ufbert presets`. Imports no jax."""

from dataclasses import dataclass, field, replace

from ufbert.config import DataConfig, Device, ModelConfig, PretrainConfig, Recipe, RunConfig, Scale
from ufbert.errors import UserError, near_miss
from ufbert.options.ending import EndOptions
from ufbert.runtime.metrics import TRACKERS


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A preset at a scale, and every field of it."""

    config: str = "ultrafastbert_1x11"
    """Preset name (see `ufbert presets`) or the path of a preset file."""
    scale: Scale = "auto"
    """tiny 2x128, mini 4x256, small 4x512, base the preset's own size; auto picks one for the device and the budget."""
    recipe: Recipe = "crammed"
    """crammed: AdamW and a triangle, as published. modern: Muon, warm-up-stable-decay, masks from 30 to 15 %, rotary
    positions, and below base narrower feedforwards (docs/training.md)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    """The recipe."""
    data: DataConfig = field(default_factory=DataConfig)
    """The shape of the data."""

    @property
    def run(self) -> RunConfig:
        """The preset that these options amount to."""
        return RunConfig(self.model, self.train, self.data)


def with_run[Options: RunOptions](options: Options, run: RunConfig) -> Options:
    """Return `options` with another configuration."""
    return replace(options, model=run.model, train=run.train, data=run.data)


@dataclass(frozen=True, kw_only=True)
class StartOptions(RunOptions):
    """A preset to start from, or a model."""

    init_from: str = ""
    """Model folder, mini, which comes with ufbert, or hf:OWNER/NAME of the Hugging Face hub, to start from instead of random
    weights. Architecture and tokenizer are the model's, so --config, --scale and --model options that contradict it are
    refused; the peak learning rate is a quarter of the recipe's unless --train.peak-lr gives it."""

    @property
    def origin(self) -> str:
        """The model or the preset that the run starts from, as the options name it."""
        return self.init_from or self.config


@dataclass(frozen=True, kw_only=True)
class TextOptions(StartOptions):
    """A budget, and the text that it is spent on."""

    budget: str = "24h"
    """Time or steps of the run: 1d, 24h, 90m, 300s, 1d12h or 200steps. Time covers compilation, the last evaluation and the
    save."""
    corpus: str = "auto"
    """demo, text:PATH[,PATH], hf:NAME[:CONFIG[:FIELD]]; auto takes the demo text for at most 40 passes, else a hub corpus."""
    heldout: str = ""
    """A held-out text of its own, named as a corpus is; a million tokens of it are used. What equals or nearly equals one of
    its documents is left out of the corpus, as --data.drop-exact and --data.drop-near say. By default every 50th document of
    the corpus is held out."""
    tokenizer: str = ""
    """A tokenizer.json, or a vocab.txt of BERT's, to use instead of training one. With --init-from it must have the model's
    vocabulary."""
    prepared: str = ""
    """Folder that keeps prepared text for later runs; by default prepared/ under $UFBERT_CACHE or ~/.cache/ufbert."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(EndOptions, TextOptions):
    """Pretrain a masked language model within a budget, from raw text to a model folder."""

    out: str = ""
    """Run folder; by default a new one under runs/."""
    resume: bool = False
    """Go on with the run in --out, within what is left of its budget."""
    seed: int = 0
    """Seed of initialisation, row order and masking."""
    device: Device = "auto"
    """cpu, gpu or tpu; auto takes the best one there is, and stops if an accelerator lacks its jax extra."""
    distributed: str = ""
    """Train with several processes, on one machine or many that share their folders: auto (jax finds TPU pods, Slurm and
    Open MPI by itself) or HOST:PORT,INDEX,COUNT; give the same command to each, with --out."""
    max_hours_wall: float = 0.0
    """A second, absolute stop: hours by the calendar since the run was first started, preparation and pauses included;
    0 for none."""
    price: float = 0.0
    """Price of an hour of this machine, in any currency, for the report."""
    track: str = ""
    """Trackers that get the metrics, too, comma-separated: tensorboard (files in tensorboard/ of the run folder), trackio (a
    dashboard on this machine, without an account: `trackio show --project ufbert`). Each needs the extra of its name."""
    tensorboard: bool = False
    """The same as --track tensorboard."""
    reference: str = ""
    """A finished run folder; a run that falls far behind its curve is warned about. By default the packaged curve of the
    preset, where there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must lie between 0 and 4294967295.")
        for name in ("price", "max_hours_wall"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a finite number, 0 or more."
                )
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(f"--track {name}: there is no such tracker; {near_miss(name, TRACKERS)}")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers by name, each once."""
        names = [name.strip() for name in self.track.split(",") if name.strip()]
        return tuple(dict.fromkeys([*names, *(["tensorboard"] if self.tensorboard else [])]))


FREE_ON_RESUME = (
    "out", "resume", "device", "distributed", "prepared", "when_done", "when_finished", "when_failed", "max_hours_wall",
    "price", "track", "tensorboard", "reference",
)  # fmt: skip
"""Options that say nothing about the numbers, so a resumed run may change them."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(TextOptions):
    """Prepare the text of a training run ahead, on a cheap machine: read, clean and tokenise the corpus and pack its rows. Give
    the options that `train` will get, and in --device what it will run on; `train` then starts its clock at once."""

    device: str = "auto"
    """The device that will train, h100, h100-pcie, h200, a100, a100-40gb, rtx4090, a6000, 2080ti, tpu-v5e or cpu (a machine
    like this one), which decides what --scale auto takes and how much text the budget reads; auto is what this machine has. For
    any other, give --scale and --data.max-tokens to both commands."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(StartOptions):
    """Say what a training budget buys on a device: updates, tokens, memory at each batch size, where the time goes, and the
    money. The training step is compiled, not run; for the device in this machine, a short run then checks the prediction."""

    budget: str = "24h"
    """1d, 24h, 90m, 300s, 1d12h or 200steps."""
    device: str = "auto"
    """h100, h100-pcie, h200, a100, a100-40gb, rtx4090, a6000, 2080ti, tpu-v5e, cpu (this machine's), or auto: what there is."""
    price: float = 0.0
    """Price of an hour, in any currency; 0 leaves money out."""
    corpus_tokens: float = 0.0
    """Tokens of the corpus, to say how many passes the budget makes over it; 0 leaves that out."""
    check: bool = True
    """Train for some seconds on random rows and compare. Only for the device in this machine."""
    json: str = ""
    """Write the numbers to this file, too."""

    def __post_init__(self) -> None:
        if not (0 <= self.price < float("inf") and 0 <= self.corpus_tokens < float("inf")):
            raise UserError("--price and --corpus-tokens must not be negative or infinite.")


@dataclass(frozen=True)
class PresetsOptions:
    """List the presets: parameters as a masked language model, encoder FLOPs for one token of a row in training (forward
    and backward, masked-LM head included, by the tree backend of the device, as `ufbert plan` counts them) and in inference
    (forward, only what a token uses), feedforward neurons used of those there in a layer, and what the preset is."""

    device: str = "auto"
    """The device whose tree backend counts: a name that `ufbert plan --device` takes, or auto, what there is."""

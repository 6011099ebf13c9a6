"""`ufbert bench`: options to a table."""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ufbert.bench.architectures import ENCODERS, find_difference
from ufbert.bench.contest import Race
from ufbert.bench.report import show
from ufbert.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, Scale
from ufbert.config.presets import load_preset, scaled
from ufbert.errors import UserError
from ufbert.runtime.device import use_device

USAGE = """usage: ufbert bench KIND [OPTIONS]; `ufbert bench KIND --help` lists the options

  layer     speed of a tree layer's forward pass on this CPU, against dense layers of jax, NumPy and PyTorch
  encoder   speed of whole encoders on this CPU, against BERT in ONNX Runtime and PyTorch
  train     pretraining speed on this CPU, against a peer that trains the same model"""

PEER_SCRIPT = Path(__file__).parent / "torch_peer.py"


@dataclass(frozen=True)
class BenchTrainOptions:
    """Time training on this CPU against the same model in PyTorch: equal parameters, batches, optimizer, float32, cores.
    PyTorch trains trees as UltraFastBERT's authors do, by computing every neuron and masking.

    The losses of the first updates must agree with the peer's to 1e-4 before anything is timed. Then blocks of updates
    alternate between the processes, on new random rows in every round. Printed are median speeds, and the median and
    quartiles of the ratios of neighbouring blocks. The model must be like crammed_bert or ultrafastbert, trained with AdamW.
    """

    peer_python: str = ""
    """Interpreter of an environment with torch and numpy (torch 2.13 was tried); without it only `beside` is timed."""
    peer: Literal["torch", "torch-compile", "both"] = "torch"
    """Eager PyTorch, the same through torch.compile (which needs a C++ compiler), or both, each in a process of its own."""
    peer_script: str = ""
    """Script to run instead of the packaged peer; `ufbert/bench/worker.py` describes what it must answer."""
    beside: tuple[Literal["masked", "gather", "native", "dense"], ...] = ()
    """What of ours is timed, too: the same trees computed otherwise, or the same model with a GELU layer of 4 x width
    neurons (3,072 at base) for its feedforward."""
    config: str = "crammed_bert"
    """Preset name (see `ufbert presets`) or the path of a preset file."""
    scale: Scale = "mini"
    """tiny 2x128, mini 4x256, small 4x512, base (or auto) the preset's own size."""
    rows: int = 32
    """Rows of an update, in one micro-batch, on every side."""
    checked: int = 5
    """Updates whose losses must agree first."""
    updates: int = 5
    """Updates in a block."""
    blocks: int = 12
    """Rounds of blocks."""
    seed: int = 0
    """Seed of parameters, rows and masking."""
    json: str = ""
    """File that gets everything measured, as JSON."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    """The recipe."""
    data: DataConfig = field(default_factory=DataConfig)
    """The shape of the data."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must lie between 0 and 4294967295.")
        for name in ("rows", "checked", "updates", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def run(self) -> RunConfig:
        """The preset that these options amount to, computing in float32."""
        return RunConfig(replace(self.model, dtype="float32"), self.train, self.data)


def parse(args: list[str]) -> BenchTrainOptions:
    """Options over the preset they name. Raises UserError if no peer could train the model."""
    import tyro

    def read(default: BenchTrainOptions) -> BenchTrainOptions:
        return tyro.cli(BenchTrainOptions, args=args, default=default, prog="ufbert bench train")

    named = read(BenchTrainOptions())
    run = scaled(load_preset(named.config), "base" if named.scale == "auto" else named.scale)
    options = read(replace(named, model=run.model, train=run.train, data=run.data))
    if not options.peer_python and not options.beside:
        raise UserError(
            "Name the interpreter that has torch, with --peer-python PATH, or something of ours, with --beside."
        )
    if options.peer_python:
        check_peer_is_equal(options.run)
    trees = sorted({"masked", "gather", "native"} & set(options.beside))
    if trees and "tree" not in options.model.feedforward:
        raise UserError(f"--beside {trees[0]} is another way to compute trees, and {options.config} has none.")
    return options


def check_peer_is_equal(run: RunConfig) -> None:
    """Raises UserError unless `run` trains a crammed BERT or an UltraFastBERT with AdamW, which is all that the peer knows."""
    kind = run.model.feedforward[0]
    layers = ENCODERS["crammed"] | {"head_transform": False, "head_bias": False}
    if kind in ("dense", "tree"):
        layers |= {"feedforward": (kind,), "tree_activation": "gelu", "tree_balance": 0.0}
    recipe = {"optimizer": "adamw", "average_width": 0.0, "mask_rate": run.train.mask_rate[:1]}
    for part, wanted in (("model", layers), ("train", recipe)):
        found = getattr(run, part)
        name = find_difference(found, wanted)
        if name:
            raise UserError(
                f"The peer is a crammed BERT or UltraFastBERT trained with AdamW: it has {part}.{name} {wanted[name]!r}, not "
                f"{getattr(found, name)!r}."
            )


def beside_run(run: RunConfig, what: Literal["masked", "gather", "native", "dense"]) -> RunConfig:
    """`run` with its trees computed in that way, or with dense layers for its feedforward."""
    model = run.model
    if what == "dense":
        return replace(run, model=replace(model, feedforward=("dense",), d_hidden=4 * model.d_model))
    return replace(run, model=replace(model, tree_backend=what))


def bench_command(args: list[str]) -> None:
    """`ufbert bench`. Raises UserError if a peer fails or computes something else."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
    elif args[0] == "train":
        train_command(args[1:])
    elif args[0] == "layer":
        from ufbert.bench.layer_command import layer_command

        layer_command(args[1:])
    elif args[0] == "encoder":
        from ufbert.bench.encoder_command import encoder_command

        encoder_command(args[1:])
    else:
        raise UserError(f"There is no benchmark {args[0]!r}; there are layer, encoder and train.")


def train_command(args: list[str]) -> None:
    """`ufbert bench train`."""
    options = parse(args)
    use_device("cpu")
    from ufbert.bench.train import race

    command = (options.peer_python, options.peer_script or str(PEER_SCRIPT), "{folder}")
    known: dict[str, tuple[str, ...]] = {"torch": command, "torch-compile": (*command, "compile")}
    wanted = list(known) if options.peer == "both" else [options.peer]
    peers = {name: known[name] for name in (wanted if options.peer_python else [])}
    beside = {f"our {name}": beside_run(options.run, name) for name in options.beside}
    size = Race(options.rows, options.checked, options.updates, options.blocks, options.seed)
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as folder:
        report = race(Path(folder), options.run, peers, size, beside)
    show(report, "trains", lambda one: f"{one['tokens_per_second']:>10,.0f} tokens/s", options.json)

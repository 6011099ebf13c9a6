"""`ufbert bench`: options to a table."""

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ufbert.config import DataConfig, ModelConfig, PretrainConfig, RunConfig, Scale
from ufbert.device import use_device
from ufbert.errors import UserError
from ufbert.presets import load_preset, scaled

USAGE = """usage: ufbert bench KIND [OPTIONS]; `ufbert bench KIND --help` lists the options

  train  training speed on this CPU, against a peer that trains the same model"""

PEER_SCRIPT = Path(__file__).parent / "torch_peer.py"


@dataclass(frozen=True)
class BenchTrainOptions:
    """Time training on this CPU against the same model in PyTorch: equal parameters, batches, optimizer, float32, cores.

    The losses of the first updates must agree with the peer's to 1e-4 before anything is timed. Then blocks of updates
    alternate between the processes, on new random rows in every round. Printed are median speeds, and the median and
    quartiles of the ratios of neighbouring blocks. The model must be like crammed_bert, trained with AdamW.
    """

    peer_python: str = ""
    """Interpreter of an environment with torch and numpy (torch 2.13 was tried); needed."""
    peer: Literal["torch", "torch-compile", "both"] = "torch"
    """Eager PyTorch, the same through torch.compile (which needs a C++ compiler), or both, each in a process of its own."""
    peer_script: str = ""
    """Script to run instead of the packaged peer; `ufbert/bench/worker.py` describes what it must answer."""
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
    if not options.peer_python:
        raise UserError("Name the interpreter that has torch, with --peer-python PATH.")
    check_peer_is_equal(options.run)
    return options


def check_peer_is_equal(run: RunConfig) -> None:
    """Raises UserError unless `run` trains a dense crammed BERT with AdamW, which is all that the peer knows."""
    layers = {
        "mixer": ("attention",), "feedforward": ("glu",), "activation": "gelu", "norm": "pre", "first_norm": True,
        "norm_bias": True, "positions": "scaled_sinusoid", "qk_norm": False, "n_token_types": 0, "use_bias": False,
        "embedding_norm": True, "embedding_projection": False, "final_norm": True, "head_transform": False,
        "head_bias": False,
    }  # fmt: skip
    recipe = {"optimizer": "adamw", "average_width": 0.0, "mask_rate": run.train.mask_rate[:1]}
    wanted: dict[str, Any] = {f"model.{k}": v for k, v in layers.items()} | {f"train.{k}": v for k, v in recipe.items()}
    for name, value in wanted.items():
        part, field_name = name.split(".")
        found = getattr(getattr(run, part), field_name)
        same = set(found) == set(value) if isinstance(found, tuple) else found == value
        if not same:
            raise UserError(f"The peer is a crammed BERT trained with AdamW: it has {name} {value!r}, not {found!r}.")


def bench_command(args: list[str]) -> None:
    """`ufbert bench`. Raises UserError if a peer fails or computes something else."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    if args[0] != "train":
        raise UserError(f"There is no benchmark {args[0]!r}; there is train.")
    options = parse(args[1:])
    use_device("cpu")
    from ufbert.bench.train import Race, race

    command = (options.peer_python, options.peer_script or str(PEER_SCRIPT), "{folder}")
    known: dict[str, tuple[str, ...]] = {"torch": command, "torch-compile": (*command, "compile")}
    peers = {name: known[name] for name in (known if options.peer == "both" else [options.peer])}
    size = Race(options.rows, options.checked, options.updates, options.blocks, options.seed)
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as folder:
        report = race(Path(folder), options.run, peers, size)
    print_report(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_report(report: dict[str, Any]) -> None:
    """The table: machine, speeds, ratios."""
    print("{cpu}, {cores} cores, load {load:.1f} before and {load_after:.1f} after".format(**report["machine"]))
    for one in report["contestants"]:
        print(f"{one['name']:<14} {one['tokens_per_second']:>10,.0f} tokens/s  ({one['facts']})")
    for name, ratio in report["ratios"].items():
        print(
            f"ufbert trains {ratio['median']:.2f} times as fast as {name}: median of {ratio['pairs']} pairs of blocks, "
            f"quartiles {ratio['low']:.2f} and {ratio['high']:.2f}, fastest blocks {ratio['fastest']:.2f}; losses within "
            f"{ratio['loss_difference']:.0e}"
        )

"""`ufbert bench finetune`: options to a table."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ufbert.bench.contest import Race
from ufbert.bench.report import show
from ufbert.config import FinetuneConfig
from ufbert.errors import UserError
from ufbert.runtime.device import use_device

PEER_SCRIPT = Path(__file__).parent / "torch_finetune_peer.py"
PEERS = {"torch": "random", "torch-bucketed": "bucketed"}
"""The order of each peer's batches."""


@dataclass(frozen=True)
class BenchFinetuneOptions:
    """Time fine-tuning on this CPU against the same model in PyTorch: equal weights, rows, optimizer, float32, cores.

    Rows are single texts with a class. The losses of the first updates, on the same batches and without dropout, must agree
    with the peer's to 1e-4 before anything is timed. Then blocks of updates with dropout alternate between the processes, on
    new batches in every round: ours of rows of like length, as `ufbert finetune` makes them, the peer's of rows at random,
    padded to the longest of the batch. Printed are median speeds in rows, the tokens that a row is padded to on average, and
    the median and quartiles of the ratios of neighbouring blocks. The model must be a dense BERT or crammed BERT.
    """

    model: str = ""
    """Model folder; needed."""
    rows_file: str = ""
    """TSV file whose header names `sentence` and `label`, such as SST-2's train.tsv; needed."""
    peer_python: str = ""
    """Interpreter of an environment with torch and numpy (torch 2.13 was tried); needed."""
    peer: Literal["torch", "torch-bucketed", "both"] = "both"
    """PyTorch with rows at random, PyTorch with our batches, or both, each in a process of its own."""
    peer_script: str = ""
    """Script to run instead of the packaged peer; `ufbert/bench/finetune_worker.py` describes what it must answer."""
    batch_rows: int = 16
    """Rows of an update."""
    lr: float = 4e-5
    """Constant learning rate."""
    max_len: int = 128
    """Longest row in tokens; longer ones are cut."""
    checked: int = 5
    """Updates whose losses must agree first."""
    updates: int = 20
    """Updates in a block."""
    blocks: int = 12
    """Rounds of blocks."""
    seed: int = 0
    """Seed of the classifier, the batches and dropout."""
    json: str = ""
    """File that gets everything measured, as JSON."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must lie between 0 and 4294967295.")
        for name in ("batch_rows", "max_len", "checked", "updates", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.lr < 1e38:
            raise UserError(f"lr is {self.lr}; it must be positive and finite.")


def parse(args: list[str]) -> BenchFinetuneOptions:
    """Options. Raises UserError if one that is needed is not there."""
    import tyro

    options = tyro.cli(BenchFinetuneOptions, args=args, prog="ufbert bench finetune")
    if not options.peer_python:
        raise UserError("Name the interpreter that has torch, with --peer-python PATH.")
    for name in ("model", "rows_file"):
        if not getattr(options, name):
            raise UserError(
                f"Name what is fine-tuned, with --model FOLDER and --rows-file FILE.tsv: {name} is not given."
            )
    return options


def finetune_command(args: list[str]) -> None:
    """`ufbert bench finetune`. Raises UserError if a peer fails or computes something else."""
    options = parse(args)
    use_device("cpu")
    from ufbert.bench.architectures import peer_of
    from ufbert.bench.finetune import race, read_rows
    from ufbert.hub.folder import load_model

    model = load_model(options.model)
    peer_of(model.config)
    model = replace(model, config=replace(model.config, dtype="float32"))
    command = (options.peer_python, options.peer_script or str(PEER_SCRIPT), "{folder}")
    peers = {name: (*command, order) for name, order in PEERS.items() if options.peer in (name, "both")}
    tune = FinetuneConfig(batch_rows=options.batch_rows, lr=options.lr, max_len=options.max_len)
    size = Race(options.batch_rows, options.checked, options.updates, options.blocks, options.seed)
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as folder:
        report = race(Path(folder), model, read_rows(Path(options.rows_file)), tune, peers, size)
    show(report, "fine-tunes", speed, options.json)


def speed(one: dict[str, Any]) -> str:
    """A contestant's speed, and how much it pads."""
    return (
        f"{one['rows_per_second']:>8,.1f} rows/s, rows padded to {one['tokens_per_row']:.1f} tokens on average "
        f"({one['tokens_per_row_of_an_epoch']:.1f} in an epoch)"
    )

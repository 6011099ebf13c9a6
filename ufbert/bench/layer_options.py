"""The options of `ufbert bench layer`."""

from dataclasses import dataclass
from typing import Literal

from ufbert.bench.layer_job import Layers
from ufbert.errors import UserError
from ufbert.runtime.device import usable_threads

Path = Literal["gather", "native", "native-bf16", "native-int8", "native-bf16-exact", "native-int8-exact"]
"""The tree layer in jax, by the C++ kernels, and by them with narrow weights; `-exact`: with float32 input weights."""

Peer = Literal["jax", "jax-bf16", "numpy", "torch", "torch-bf16", "torch-int8"]
"""A dense layer: jax's products; NumPy's BLAS; PyTorch; each in float32, bfloat16 or with int8 weights."""


@dataclass(frozen=True)
class BenchLayerOptions:
    """Time tree layers' forward pass on this CPU against dense layers that others compute.

    A chain of layers with different random weights, on new random rows at every call. Before anything is timed, answers and
    routes are compared with a float64 evaluation, and the rows must spread over the leaves. Then short blocks of work
    alternate between processes. Printed are times, ratios of neighbouring blocks, and how far each is from what the memory
    and the arithmetic of this machine allow.
    """

    rows: tuple[int, ...] = (1, 8, 128, 1024, 4096)
    """Rows of a call; each number is a table."""
    d_model: int = 768
    """Width."""
    tree_depth: int = 11
    """Depth of a tree, of 2^(depth + 1) - 1 neurons."""
    n_trees: int = 1
    """Parallel trees of a layer."""
    dense: int = 4095
    """Neurons of the dense layers (BERT has 3072)."""
    layers: int = 12
    """Layers of the chain."""
    paths: tuple[Path, ...] = ("gather", "native", "native-bf16", "native-int8")
    """Which of ours."""
    exact_routing: bool = False
    """Add native-bf16-exact and native-int8-exact, which route by float32 weights."""
    peers: tuple[Peer, ...] = ("jax", "jax-bf16", "numpy", "torch", "torch-bf16", "torch-int8")
    """Which of the others."""
    peer_python: str = ""
    """Interpreter of an environment with torch and numpy (torch 2.13 was tried); without it the torch peers are missing."""
    peer_script: str = ""
    """Script to run instead of the packaged torch peer; `ufbert/bench/layer_worker.py` describes what it must answer."""
    threads: int = 0
    """Threads of every contestant; 0 takes all cores."""
    blocks: int = 9
    """Rounds of blocks."""
    seconds_a_block: float = 0.3
    """About how long a block is; never less than a call."""
    seed: int = 0
    """Seed of weights and rows."""
    zeros: bool = False
    """Show besides what weights and rows of zeros would do to the ratios, as in UltraFastBERT's released benchmark."""
    claims: bool = False
    """Print the published figures and what they were measured against, and time nothing."""
    json: str = ""
    """File that gets everything measured, as JSON."""
    plot: str = ""
    """File that gets a picture (.svg or .png); beside the JSON file, where there is one, unless named."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must lie between 0 and 4294967295.")
        for name in ("d_model", "n_trees", "dense", "layers", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.rows or min(self.rows) < 1:
            raise UserError("rows are numbers from 1 on, at least one of them.")
        if not self.paths:
            raise UserError("paths are empty; name at least one of ours.")
        if self.tree_depth < 0 or self.threads < 0 or not 0 < self.seconds_a_block < 1e6:
            raise UserError("tree_depth and threads must not be negative, and seconds_a_block must be above 0.")
        if self.plot and not self.plot.endswith((".svg", ".png")):
            raise UserError(f"plot is {self.plot!r}; its name must end in .svg or .png.")

    @property
    def shape(self) -> Layers:
        """The sizes of a chain."""
        return Layers(self.d_model, self.tree_depth, self.n_trees, self.dense, self.layers)

    @property
    def our_paths(self) -> tuple[str, ...]:
        """Names of ours, each once."""
        exact = ("native-bf16-exact", "native-int8-exact") if self.exact_routing else ()
        return tuple(dict.fromkeys((*self.paths, *exact)))

    @property
    def used_threads(self) -> int:
        """Threads of every contestant."""
        return usable_threads(self.threads)


def parse(args: list[str]) -> BenchLayerOptions:
    """Options from the command line."""
    import tyro

    return tyro.cli(BenchLayerOptions, args=args, prog="ufbert bench layer")

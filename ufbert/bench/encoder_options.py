"""The options of `ufbert bench encoder`."""

from dataclasses import dataclass
from typing import Literal

from ufbert.errors import UserError
from ufbert.runtime.device import usable_threads

Ours = Literal[
    "tree-float32", "tree-bfloat16", "tree-int8", "fourier-float32", "fourier-int8", "dense-float32", "dense-int8"
]
"""A model of ours (BERT with trees; with Fourier mixing and trees; BERT) and the type of its weights."""

Peer = Literal["onnxruntime", "onnxruntime-int8", "torch", "torch-int8"]
"""The dense BERT in ONNX Runtime, or by transformers in PyTorch, in float32 or with int8 weights."""


@dataclass(frozen=True)
class BenchEncoderOptions:
    """Time whole encoders on this CPU against the dense BERT that others compute.

    Weights are random, and so are the ids of every call, which goes from ids to hidden states. Before anything is timed, our
    engine's answers are compared with the training graph, the peers' with those of our dense BERT, and tokens must spread over
    the leaves. Then short blocks of work alternate between processes. Printed are times, ratios of neighbouring blocks, where
    the time goes, and how far each is from what the arithmetic of this machine allows.
    """

    shapes: tuple[str, ...] = ("1x128", "8x128", "1x512")
    """BATCHxTOKENS of a call; each is a table."""
    layers: int = 12
    """Layers of every encoder."""
    d_model: int = 768
    """Width; heads are 64 wide, a dense feedforward 4 x width."""
    tree_depth: int = 11
    """Depth of a tree, of 2^(depth + 1) - 1 neurons."""
    vocab_size: int = 30522
    """Word pieces."""
    fourier_len: int = 128
    """The one length of the Fourier model, which is timed at shapes of that many tokens."""
    ours: tuple[Ours, ...] = (
        "tree-float32",
        "tree-int8",
        "fourier-float32",
        "fourier-int8",
        "dense-float32",
        "dense-int8",
    )
    """Which of ours."""
    peers: tuple[Peer, ...] = ("onnxruntime", "onnxruntime-int8", "torch")
    """Which of the others."""
    peer_python: str = ""
    """Interpreter of an environment with what the peers need: onnxruntime, onnx and sympy; torch and transformers. Without it
    this one is asked."""
    peer_script: str = ""
    """Script to run instead of the packaged peer, whose beginning describes what it must answer."""
    threads: int = 0
    """Threads of every contestant; 0 takes all cores."""
    blocks: int = 9
    """Rounds of blocks."""
    seconds_a_block: float = 0.5
    """About how long a block is; never less than a call."""
    seed: int = 0
    """Seed of weights and ids."""
    json: str = ""
    """File that gets everything measured, as JSON."""
    plot: str = ""
    """File that gets a picture (.svg or .png); beside the JSON file, where there is one, unless named."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must lie between 0 and 4294967295.")
        for name in ("layers", "d_model", "vocab_size", "fourier_len", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.vocab_size < 100:
            raise UserError(f"vocab_size is {self.vocab_size}; it must be at least 100.")
        if self.d_model % 64 and self.d_model > 64:
            raise UserError(f"d_model is {self.d_model}; it must be a multiple of 64, the width of a head.")
        for shape in self.shapes:
            batch, _, tokens = shape.partition("x")
            if not (batch.isdecimal() and tokens.isdecimal() and int(batch) > 0 and int(tokens) > 0):
                raise UserError(f"{shape!r} is not a shape; 8x128 is one.")
        if not self.shapes or not self.ours:
            raise UserError("Name at least one shape and one of ours.")
        if self.tree_depth < 1 or self.threads < 0 or not 0 < self.seconds_a_block < 1e6:
            raise UserError("tree_depth and seconds_a_block must be above 0, and threads not negative.")
        if self.plot and not self.plot.endswith((".svg", ".png")):
            raise UserError(f"plot is {self.plot!r}; its name must end in .svg or .png.")

    @property
    def used_threads(self) -> int:
        """Threads of every contestant."""
        return usable_threads(self.threads)


def parse(args: list[str]) -> BenchEncoderOptions:
    """Options from the command line."""
    import tyro

    return tyro.cli(BenchEncoderOptions, args=args, prog="ufbert bench encoder")

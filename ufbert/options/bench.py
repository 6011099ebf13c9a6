"""The options of `ufbert bench`, one class a benchmark."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from ufbert.config import Scale
from ufbert.config.checks import NotNegative, Positive, Seed, Size, SizeOrNone, check_kinds
from ufbert.errors import UserError
from ufbert.options.train import RunOptions

LayerPath = Literal["gather", "native", "native-bf16", "native-int8", "native-bf16-exact", "native-int8-exact"]
"""The tree layer in jax, by the C++ kernels, and by them with narrow weights; `-exact`: with float32 input weights."""
LayerPeer = Literal["jax", "jax-bf16", "numpy", "torch", "torch-bf16", "torch-int8"]
"""A dense layer: jax's products; NumPy's BLAS; PyTorch; each in float32, bfloat16 or with int8 weights."""
OurEncoder = Literal[
    "tree-float32", "tree-bfloat16", "tree-int8", "fourier-float32", "fourier-int8", "dense-float32", "dense-int8",
    "static-int8",
]  # fmt: skip
"""A model of ours (BERT with trees; with Fourier mixing and trees; BERT; BERT in a quantised folder whose activations are
rounded by steps that are fixed on ids of the job) and the type of its weights."""
EncoderPeer = Literal["onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "torch", "torch-int8"]
"""The dense BERT in ONNX Runtime, in OpenVINO, or by transformers in PyTorch, in float32 or with int8 weights."""
WeightType = Literal["float32", "bfloat16", "int8"]
"""Type of a model's weights in use."""
Variant = Literal["masked", "gather", "native", "pallas", "dense"]
"""The trees computed otherwise, or a dense layer in their place."""


@dataclass(frozen=True)
class BenchOptions:
    """Options of every benchmark."""

    peer_python: str = ""
    """Interpreter of an environment with what the peers need: torch and numpy (torch 2.13 was tried); for encoders torch and
    transformers, or onnxruntime, onnx and sympy, or openvino and nncf (2026.4 and 3.4 were tried)."""
    peer_script: str = ""
    """Script to run instead of the packaged peer; `ufbert/bench/worker.py` describes what it must answer."""
    blocks: Size = 9
    """Rounds of blocks."""
    seed: Seed = 0
    """Seed of everything random: weights, inputs, masking."""
    json: str = ""
    """File that gets everything measured, as JSON."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "")


@dataclass(frozen=True)
class ForwardOptions(BenchOptions):
    """Options of the benchmarks of a forward pass."""

    threads: SizeOrNone = 0
    """Threads of every process; 0 takes all cores."""
    seconds_a_block: Positive = 0.3
    """Approximate length of a block; never less than a call."""
    plot: str = ""
    """File that gets a picture (.svg or .png). By default it lies next to the JSON file, if that is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot and not self.plot.endswith((".svg", ".png")):
            raise UserError(f"plot is {self.plot!r}; its name must end in .svg or .png.")


@dataclass(frozen=True, kw_only=True)
class BenchTrainOptions(RunOptions, BenchOptions):
    """Time training against the same model in PyTorch: equal parameters, batches and optimizer; float32 on the cores of this
    CPU, bfloat16 on a graphics card. PyTorch trains trees as UltraFastBERT's authors do, by computing every neuron and
    masking.

    The losses of the first steps must agree before anything is timed: with the peer's to 1e-4 in float32, and with those of a
    float32 reference to 2e-3 in bfloat16. Then blocks of steps alternate between the processes, on new random rows in every
    round. Printed are median speeds, and the median and quartiles of the ratios of neighbouring blocks; on a card also the
    share of its peak and the most memory held. The model must be like crammed_bert or ultrafastbert, trained with AdamW.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    """cpu, or gpu for an NVIDIA card, which changes the defaults: crammed_bert and ultrafastbert_1x11 at base, 128 rows,
    torch-compile, 3 steps checked, 6 rounds of 12 updates, 240 seconds."""
    peer: Literal["torch", "torch-compile", "both"] = "torch"
    """Eager PyTorch, the same through torch.compile (which needs a C++ compiler), or both, each in a process of its own.
    Without --peer-python only --beside and --also are timed."""
    beside: tuple[Variant, ...] = ()
    """Variants of ours to time as well: the same trees computed otherwise, or the same model with a GELU layer of 4 x width
    neurons (3,072 at base) for its feedforward."""
    config: str = "crammed_bert"
    """Preset name (see `ufbert presets`) or the path of a preset file."""
    also: str = ""
    """A second preset, under the same options and with peers of its own, timed in the same rounds."""
    scale: Scale = "mini"
    """tiny 2x128, mini 4x256, small 4x512, base the preset's own size; auto takes tiny."""
    rows: Size = 32
    """Rows of a step, in one micro-batch, on every side."""
    checked: Size = 5
    """Steps whose losses must agree first."""
    updates: Size = 5
    """Steps in a block."""
    blocks: Size = 12
    """Rounds of blocks."""
    seconds: NotNegative = 0.0
    """The longest that the contest may take; 0 sets no limit. A process that is not ready after 70 % of it is left out, and no
    round begins after 90 %."""
    profile: bool = False
    """Also print where our time goes, by kind of kernel: products, attention, the rest of the feedforward, norms and sums,
    embedding and loss, optimizer, copies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile and self.updates < 2:
            raise UserError("--profile needs blocks of at least 2 --updates.")


@dataclass(frozen=True)
class BenchLayerOptions(ForwardOptions):
    """Time tree layers' forward pass on this CPU against dense layers that others compute.

    A chain of layers with different random weights, on new random rows at every call. Before anything is timed, answers and
    routing decisions are compared with a float64 evaluation, and the rows must spread over the leaves. Then short blocks of
    work alternate between processes. Printed are times, ratios of neighbouring blocks, and how far each is from what the
    memory and the arithmetic of this machine allow.
    """

    rows: tuple[Size, ...] = (1, 8, 128, 1024, 4096)
    """Rows of a call; each number is a table."""
    d_model: Size = 768
    """Width."""
    tree_depth: Annotated[int, Meta(ge=0, le=20)] = 11
    """Depth of a tree, of 2^(depth + 1) - 1 neurons."""
    n_trees: Size = 1
    """Parallel trees of a layer."""
    dense: Size = 4095
    """Neurons of the dense layers (BERT has 3072)."""
    layers: Size = 12
    """Layers of the chain."""
    paths: tuple[LayerPath, ...] = ("gather", "native", "native-bf16", "native-int8")
    """Ours to time."""
    exact_routing: bool = False
    """Add native-bf16-exact and native-int8-exact, which route by float32 weights."""
    peers: tuple[LayerPeer, ...] = ("jax", "jax-bf16", "numpy", "torch", "torch-bf16", "torch-int8")
    """The others to time; those of torch need --peer-python."""
    zeros: bool = False
    """Also show what weights and rows of zeros would do to the ratios, as in UltraFastBERT's released benchmark."""
    claims: bool = False
    """Print the published figures and what they were measured against, and time nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows or not self.paths:
            raise UserError("Name at least one number of rows, and one path of ours.")

    @property
    def our_paths(self) -> tuple[str, ...]:
        """Names of ours, each once."""
        exact = ("native-bf16-exact", "native-int8-exact") if self.exact_routing else ()
        return tuple(dict.fromkeys((*self.paths, *exact)))


@dataclass(frozen=True)
class BenchEncoderOptions(ForwardOptions):
    """Time whole encoders on this CPU against the dense BERT that others compute, or trained models against each other.

    Without --model, weights are random, and so are the ids of every call, which goes from ids to hidden states. Before
    anything is timed, our engine's answers are compared with the training graph, the peers' with those of our dense BERT,
    and tokens must spread over the leaves. Then short blocks of work alternate between processes. Printed are times, ratios
    of neighbouring blocks, where the time goes, and how far each is from what the arithmetic of this machine allows.
    """

    shapes: tuple[str, ...] = ("1x128", "8x128", "1x512")
    """BATCHxTOKENS of a call; each is a table."""
    layers: Size = 12
    """Layers of every encoder."""
    d_model: Size = 768
    """Width; heads are 64 wide, a dense feedforward 4 x width."""
    tree_depth: Annotated[int, Meta(ge=1, le=20)] = 11
    """Depth of a tree, of 2^(depth + 1) - 1 neurons."""
    vocab_size: Annotated[int, Meta(ge=100, le=65536)] = 30522
    """Tokens of the vocabulary."""
    fourier_len: Size = 128
    """The one length of the Fourier model, which is timed at shapes of that many tokens."""
    ours: tuple[OurEncoder, ...] = (
        "tree-float32", "tree-int8", "fourier-float32", "fourier-int8", "dense-float32", "dense-int8",
    )  # fmt: skip
    """Ours to time."""
    peers: tuple[EncoderPeer, ...] = ("onnxruntime", "onnxruntime-int8", "torch")
    """The others to time; without --peer-python, by this interpreter."""
    model: tuple[str, ...] = ()
    """Model folders to time against each other instead, each FOLDER or NAME=FOLDER. Options of size, --ours and those of peers
    then say nothing. A model whose answers are not those of its training graph is named and not timed, and the command ends
    with status 2."""
    types: tuple[WeightType, ...] = ("float32", "int8")
    """Types of these models' weights in linear layers and trees."""
    baseline: str = ""
    """The model, by its name, whose times are divided by the others' of the same type; by default the first."""
    seconds_a_block: Positive = 0.5
    """Approximate length of a block; never less than a call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % 64 and self.d_model > 64:
            raise UserError(f"d_model is {self.d_model}; it must be a multiple of 64, the width of a head.")
        for shape in self.shapes:
            batch, _, tokens = shape.partition("x")
            if not (batch.isdecimal() and tokens.isdecimal() and int(batch) > 0 and int(tokens) > 0):
                raise UserError(f"{shape!r} is not a shape; 8x128 is one.")
        if not self.shapes or not self.ours or not self.types:
            raise UserError("Name at least one shape, one of ours and one type.")
        if self.baseline and not self.model:
            raise UserError("--baseline is one of the models of --model.")

"""Options of `ufbert compress`. Imports no jax."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta
from tyro.conf import Positional

from ufbert.config import Device, ModelConfig
from ufbert.config.checks import NotNegative, Positive, Seed, Share, Size, SizeOrNone
from ufbert.options.ending import EndOptions
from ufbert.options.finetune import TaskOptions

Method = Literal["prune", "distill", "drop-feedforward", "magnitude", "quantize", "to-tree"]
Split = Literal["neurons", "tokens", "random"]
Choice = Literal["greedy", "contribution", "cluster"]
Refit = Literal["ridge", "mean", "none"]
Control = Literal["narrow", "pruned", "none"]


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """The tuning that follows, and the data that it and the scores use."""

    tasks: str = ""
    """The one GLUE task to tune on and to score, for a model that was fine-tuned for it. Other options describe a task of your
    own, as for `ufbert finetune`. Without a task, and without --corpus, nothing is tuned or scored."""
    corpus: str = ""
    """Text to tune on and to score by masked-LM loss, for a model with that head, instead of a task: demo, text:PATH[,PATH] or
    hf:NAME[:CONFIG[:FIELD]]."""
    prepared: str = ""
    """Folder that keeps prepared text for later runs; by default prepared/ under $UFBERT_CACHE or ~/.cache/ufbert."""
    max_tokens: Annotated[int, Meta(ge=1, le=10**12)] = 20_000_000
    """Stop reading the corpus after this many tokens."""
    train_rows: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    """Use this many training rows of the task, drawn with the seed; 0 uses all."""
    budget: str = "10m"
    """Time or updates of the tuning, 24h, 90m, 300s or 200steps; none tunes nothing. Scores, calibration and timing come on
    top."""
    lr: NotNegative = 0.0
    """Peak learning rate; 0 takes 0.04 / d_model, about 5e-5 for BERT's width."""
    batch_rows: Size = 32
    """Rows of an update."""
    max_len: SizeOrNone = 128
    """Longest row in tokens; longer ones are cut."""
    teacher_weight: Share = 0.9
    """Share of the loss that the teacher's logits make up; the labels, or the masked words, make up the rest."""
    temperature: Positive = 2.0
    """Divisor of both sides' logits before they become the probabilities that are compared."""
    hidden_weight: NotNegative = 1.0
    """Weight of the distance between the hidden states of student and teacher, a mean square over that of the teacher's."""
    seed: Seed = 0
    """Seed of the row order, masking and dropout."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What pruning takes away, and how it chooses."""

    keep_heads: Annotated[int, Meta(ge=0, le=2**20)] = 0
    """prune: heads of each layer that stay; 0 keeps all."""
    keep_layers: Annotated[int, Meta(ge=0, le=1024)] = 0
    """prune: layers that stay; 0 keeps all. Those go first without which the loss is least."""
    keep_depth: Annotated[int, Meta(ge=-1, le=20)] = -1
    """prune: depth of trees after their least used branches have gone; -1 keeps it."""
    target_latency: str = ""
    """prune: milliseconds that a call of --shape with the first of --types may take, as 10ms. Instead of --keep and
    --keep-heads, the largest share of neurons and heads is taken that reaches it on this machine."""
    score: Literal["first-order", "magnitude"] = "first-order"
    """prune: what chooses: the change of the loss to first order, |sum of w g| over --calibration batches, or the norm of the
    weights. Without rows it is magnitude."""
    spread: Literal["even", "free"] = "even"
    """prune: even takes the same share from every layer; free lets the layers compete, so that they end up unequal."""
    calibration: Size = 16
    """prune: batches of rows that scores are computed on."""
    ramp: Share = 0.4
    """prune: share of the budget over which parts go, by a cubic schedule: many at first, few at last."""


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The student of a distillation."""

    student: str = ""
    """distill: preset of the student, or its model folder; by default it is like its teacher, but for --model options and
    --from-layers."""
    from_layers: str = ""
    """distill: comma-separated numbers of the teacher's layers, from 0, that the student's layers start from; their widths are
    cut to the student's. Without it, a student that is no model folder starts from random weights."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """distill: fields of the student."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How weights are rounded to int8, and on which text that is chosen."""

    texts: tuple[str, ...] = ()
    """quantize: UTF-8 files with a text on each line, on which factors are chosen and errors measured. By default rows of the
    task or the corpus are."""
    activations: Literal["dynamic", "static"] = "dynamic"
    """quantize: rounding of a linear layer's input. dynamic gives each token a step of its own when it is computed; static
    fixes one step and zero for all, chosen on the text, which saves hardly any time and is less exact on trained models."""
    keep_wide: str = "none"
    """quantize: layers whose weights stay float32: none, numbers as 0,5, or auto for those whose rounding alone moves the last
    hidden states more than twice as far as the median layer's."""
    wide_tables: bool = False
    """quantize: keep embeddings and other tables float32."""
    exact_routing: bool = False
    """quantize: keep the input weights of trees float32, so that no token takes another way for their rounding."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions(QuantizeOptions, DistillOptions, PruneOptions, TuneOptions, TaskOptions, EndOptions):
    """Make a smaller or faster child of a model folder, and state what it lost: points, or nats, against milliseconds. The
    child lies in OUT/model, a model folder like any other; OUT/report.html and report.md compare both."""

    folder: Annotated[str, Positional]
    """Model folder, pretrained or fine-tuned; mini for the model that comes with ufbert, hf:OWNER/NAME[@REVISION] for one on
    the Hugging Face hub."""
    method: Method
    """prune: takes away hidden neurons, heads, layers and branches of trees, with what is left taught by the whole model.
    distill: teaches a student of another configuration. drop-feedforward: leaves every feedforward out, as a control.
    magnitude: sets the smallest weights to zero, which makes nothing faster. quantize: rounds weights to int8, a quarter of the
    size. to-tree: makes a tree of each dense feedforward, fitted to what it reads (docs/compression.md)."""
    out: str
    """Folder for the child and the report; it must not exist, or be what --resume goes on with."""
    keep: float = 1.0
    """prune: share of the hidden neurons of a feedforward, leaf or expert that stays. magnitude: share of the weights."""
    neurons: tuple[Size, ...] = (128,)
    """to-tree: feedforward neurons that a token uses in a layer, its decisions among them. Each number makes a child; the first
    is OUT/model, the others are OUT/tree_NUMBER/model."""
    tree_depth: Annotated[int, Meta(ge=0, le=12)] = 4
    """to-tree: decisions of a token, of which there are 2^D leaves."""
    shared_neurons: SizeOrNone = 0
    """to-tree: neurons that every token uses besides those of its leaf, among --neurons."""
    split: Split = "neurons"
    """to-tree: what the decisions are fitted to: clusters of neurons that are active together, clusters of tokens that use the
    same neurons, or nothing (random)."""
    choice: Choice = "greedy"
    """to-tree: neurons of a leaf. greedy: those that can best answer for all, for its tokens; contribution: those that
    contribute most; cluster: likewise, those of its own cluster first."""
    refit: Refit = "ridge"
    """to-tree: what kept neurons do for the others. ridge: they get output weights that answer for them, too; mean: the bias
    takes their mean; none: nothing."""
    ridge: NotNegative = 0.1
    """to-tree: weight that holds a refit near the weights that were there, over the neurons' mean variance."""
    calibration_tokens: Size = 16_384
    """to-tree: tokens of the training rows that it looks at; they set the time it takes."""
    controls: tuple[Control, ...] = ()
    """to-tree: children to compare with, in OUT/NAME_NUMBER. narrow: dense layers of as many neurons, the same for all tokens,
    chosen and refitted likewise; pruned: those that contribute most, not refitted; none: feedforwards that answer all tokens
    alike."""
    resume: bool = False
    """Go on with the compression in --out, within what is left of its budget; give the same options."""
    shape: str = "1x128"
    """BATCHxTOKENS of a call when both models are timed."""
    types: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("float32", "int8")
    """Types of the weights in the timing; int8 and bfloat16 need the native kernels."""
    blocks: Size = 10
    """Rounds of the timing, which alternate between the models; 0.3 s each."""
    threads: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Threads on a CPU; 0 takes all cores."""
    device: Device = "auto"
    """cpu, gpu or tpu."""


METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "prune": (
        "keep",
        "keep_heads",
        "keep_layers",
        "keep_depth",
        "target_latency",
        "score",
        "spread",
        "calibration",
        "ramp",
    ),
    "distill": ("student", "from_layers", "model"),
    "drop-feedforward": (),
    "magnitude": ("keep",),
    "quantize": ("texts", "activations", "keep_wide", "wide_tables", "exact_routing"),
    "to-tree": (
        "neurons", "tree_depth", "shared_neurons", "split", "choice", "refit", "ridge", "calibration_tokens", "controls",
    ),
}  # fmt: skip
"""Options that belong to some methods only, by method; the others are everybody's."""

FREE_ON_RESUME = (
    "out", "resume", "device", "threads", "prepared", "types", "blocks", "when_done", "when_finished", "when_failed",
)  # fmt: skip
"""Options that do not change the child, so that a resumed compression may change them."""

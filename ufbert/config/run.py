"""A preset: an architecture, the recipe that trains it, and the shape of its data. Imports no jax."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from msgspec import Meta

from ufbert.config.checks import MaskRate, NotNegative, Positive, ShareBelowOne, Size, check_kinds
from ufbert.config.model import ModelConfig
from ufbert.errors import UserError

Scale = Literal["auto", "tiny", "mini", "small", "base"]


Recipe = Literal["crammed", "modern"]


@dataclass(frozen=True)
class PretrainConfig:
    """The pretraining recipe. Defaults: crammed BERT (Geiping & Goldstein 2022, code release of 2023); `presets.with_recipe`
    turns them into the modern one."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for attention and dense feedforward matrices and adamw for the rest."""
    peak_lr: Positive = 1e-3
    """Highest learning rate. Muon's updates are scaled to the size of AdamW's, so one rate serves both."""
    schedule: Literal["triangle", "stable"] = "triangle"
    """Rate over its peak at the share x of the budget: crammed BERT's min(0.25 + x, 4 (1 - x)), or a warm-up, a plateau and a
    linear decay to zero."""
    warmup: ShareBelowOne = 0.02
    """Share of the budget that a stable schedule warms up over."""
    decay: ShareBelowOne = 0.45
    """Share of the budget at its end over which a stable schedule decays."""
    adam_b1: ShareBelowOne = 0.9
    """AdamW's first-moment decay."""
    adam_b2: ShareBelowOne = 0.98
    """AdamW's second-moment decay."""
    adam_eps: NotNegative = 1e-12
    """AdamW's epsilon."""
    muon_momentum: ShareBelowOne = 0.95
    """Muon's momentum."""
    muon_lr_share: Positive = 1.0
    """Learning rate of Muon's updates over that of AdamW's, which is `peak_lr` times the schedule. Weight decay goes by AdamW's
    everywhere."""
    muon_stacks: bool = True
    """Muon also for stacks of matrices, such as the leaves of a routed_tree, each by itself; else they have AdamW."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay, on everything but norms and biases."""
    cautious_decay: bool = False
    """Decay an entry only where its update, too, pulls it towards zero (cautious weight decay: Chen et al. 2025,
    arXiv 2510.12402)."""
    position_scale_lr: NotNegative = 1.0
    """Learning rate of the scalar that multiplies the position sinusoid, over that of everything else."""
    decision_lr: NotNegative = 0.05
    """Learning rate of a routed_tree's decisions, over that of everything else. Their weights have length 1 in use, which a
    full step of AdamW would turn into another direction within tens of updates, and leaves would see other tokens each time."""
    leaf_lr_power: NotNegative = 0.0
    """A node or leaf of a routed_tree at level l, which about 2^-l of the tokens reach, learns at the rate of everything else
    times 2^(-l * leaf_lr_power): 0 for the same rate, 0.5 for as much less as its gradient is noisier."""
    ngram_lr: NotNegative = 2.0
    """Learning rate of hashed tables, over that of everything else. Whatever the optimizer, their rows take steps of AdaGrad
    when they are read, and are neither clipped nor averaged."""
    clip_norm: Positive = 0.5
    """Largest global norm of a gradient; a longer one is scaled down to it."""
    average_width: Annotated[float, Meta(ge=0, lt=0.28)] = 0.0
    """Width of the average over past weights, as a share of all steps so far (standard deviation of the averaging profile,
    Karras et al. 2024); 0 for none. The model folder gets the average if its held-out loss is lower."""
    mask_rate: tuple[MaskRate, ...] = (0.25,)
    """Share of each row that is predicted: round(rate * seq_len) positions. Several rates are stages of equal length."""
    eval_mask_rate: MaskRate = 0.25
    """The same in held-out evaluations: one rate for all recipes, so that their losses compare."""
    next_token_until: NotNegative = 0.0
    """Share of the budget during which each token predicts the next one of its document, from itself and those before it;
    masked tokens are predicted afterwards, and in every held-out evaluation. Needs attention in all layers."""
    next_token_rate: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of each row's positions that predict their next token then, drawn at random: fewer spare the decoder work."""
    batch_rows: Annotated[int, Meta(ge=0, le=2**24)] = 0
    """Rows per update once the ramp is over; 0 takes min(8192, expected rows / aim_updates), in whole micro-batches."""
    aim_updates: Size = 500
    """Number of updates that an open batch (batch_rows 0) aims for: more make it smaller, down to one micro-batch. A run has
    more updates than that, for its batch ramps up."""
    micro_rows: Size = 128
    """Rows per forward and backward pass; an update accumulates batch_rows / micro_rows of them."""
    ramp_until: NotNegative = 0.6
    """Share of the budget over which the batch grows from micro_rows to batch_rows."""
    n_evals: Size = 10
    """Held-out evaluations in a run, evenly spread over the budget; the last one is at its end."""
    n_checkpoints: Size = 10
    """Checkpoints in a run, evenly spread, at least."""
    checkpoint_minutes: Positive = 15.0
    """Minutes of budget between checkpoints, at most."""
    keep_checkpoints: Size = 2
    """Newest checkpoints to keep, besides the one with the lowest held-out loss."""
    max_skipped: Size = 20
    """Steps in a row that may be skipped because a loss or gradient is not finite. After this many in a row, the run goes
    back to its last good checkpoint."""
    shard_params: bool = False
    """On several devices, split parameters and optimizer state among them instead of keeping a copy on each."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "train.")
        if not self.mask_rate:
            raise UserError("train.mask_rate is empty; give at least one rate.")
        if self.batch_rows % self.micro_rows:
            raise UserError(
                f"train.batch_rows {self.batch_rows} is not a multiple of train.micro_rows {self.micro_rows}."
            )


@dataclass(frozen=True)
class DataConfig:
    """The way from text to rows."""

    seq_len: Annotated[int, Meta(ge=3, le=2**20)] = 128
    """Tokens in a packed row."""
    document_attention: bool = True
    """Keep packed documents from attending to each other: their segment ids are recomputed from the [CLS] ids with which
    documents begin. Crammed BERT lets them attend; docs/results/pretraining.md has what it costs."""
    short_len: Size = 32
    """Tokens in a piece while rows are cut into pieces (see short_until); seq_len must be a multiple of it."""
    short_until: NotNegative = 0.0
    """Share of the budget during which rows are cut into pieces, each a row of its own. Attention learns to find a
    token's neighbours far sooner among 32 positions than among 128, and keeps it afterwards."""
    eval_rows: Size = 256
    """Held-out rows that each evaluation reads, spread evenly over the held-out text."""
    max_tokens: Annotated[int, Meta(ge=0, le=10**12)] = 0
    """Stop reading the corpus after this many tokens, counted once duplicates are gone and the worst documents are not; 0 takes
    the tokens that the budget is planned to see, rounded up, from 20 million to 2 billion."""
    tokenizer_chars: Annotated[int, Meta(ge=1, le=10**12)] = 100_000_000
    """Characters of the corpus that the tokenizer is trained on."""
    filter_worst: ShareBelowOne = 0.05
    """Leave out this share of the documents, those with most tokens per character; 0 keeps all."""
    drop_exact: bool = True
    """Leave out documents that have occurred before, case and blanks aside."""
    drop_near: bool = True
    """Leave out documents that nearly equal one of the last near_window documents kept."""
    near_window: Annotated[int, Meta(ge=1, le=100_000_000)] = 1_000_000
    """Documents to remember for that, at about 400 bytes each."""
    near_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.8
    """Two documents are nearly equal from this share of common runs of five tokens (Jaccard similarity)."""
    order: Literal["shuffled", "quality"] = "shuffled"
    """Order of rows: new and random in every pass, or the same in every pass, best documents (fewest tokens per character)
    first."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "data.")
        if self.short_until > 0 and self.seq_len % self.short_len:
            raise UserError(f"data.seq_len {self.seq_len} is not a multiple of data.short_len {self.short_len}.")


@dataclass(frozen=True)
class RunConfig:
    """A preset: a model, the recipe that trains it, and the shape of its data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: PretrainConfig = field(default_factory=PretrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.train.micro_rows * self.data.seq_len

    def __post_init__(self) -> None:
        if self.data.seq_len > self.model.max_len:
            raise UserError(f"data.seq_len {self.data.seq_len} is longer than model.max_len {self.model.max_len}.")
        for rate in (*self.train.mask_rate, self.train.eval_mask_rate):
            if not round(rate * self.data.seq_len):
                raise UserError(
                    f"train.mask_rate {rate} of data.seq_len {self.data.seq_len} tokens is no token; raise either."
                )
        if self.micro_tokens > 2**28:
            raise UserError(
                f"train.micro_rows {self.train.micro_rows} x data.seq_len {self.data.seq_len} are too many tokens."
            )
        others = sorted({mixer for mixer, _ in self.model.layers} - {"attention"})
        if self.train.next_token_until > 0 and others:
            raise UserError(
                f"train.next_token_until {self.train.next_token_until} needs attention in all layers, which can be kept from "
                f"seeing the next token; model.mixer has {', '.join(others)}."
            )
        only = self.model.only_len
        if only and (self.data.seq_len != only or self.data.short_until > 0):
            raise UserError(
                f"A model with Fourier mixers reads rows of one length: data.seq_len must be {only} (model.fixed_len or "
                f"max_len), not {self.data.seq_len}, and data.short_until 0."
            )


LATER_FIELDS = {
    "aim_updates", "cautious_decay", "decision_lr", "final_norm_start", "head_width", "hidden_from",
    "layer_heads", "layer_hidden", "leaf_ancestors", "leaf_bias", "leaf_lr_power",
    "muon_lr_share", "muon_stacks", "next_token_rate", "next_token_until", "ngram_keys", "ngram_layer", "ngram_lr",
    "ngram_rows", "ngram_width", "tie_head", "tree_even", "tree_gate", "tree_harden", "tree_router", "unet_skips",
    "value_embeddings",
}  # fmt: skip
"""Fields that came after the first checkpoints, which know nothing of them."""


def known_fields(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint knows its run by: all fields but later ones that have their defaults."""

    def known(part: ModelConfig | PretrainConfig | DataConfig) -> dict[str, Any]:
        values = {f.name: (getattr(part, f.name), f.default) for f in fields(part)}
        return {name: value for name, (value, usual) in values.items() if name not in LATER_FIELDS or value != usual}

    return {"model": known(run.model), "train": known(run.train), "data": known(run.data)}


Device = Literal["auto", "cpu", "gpu", "tpu"]

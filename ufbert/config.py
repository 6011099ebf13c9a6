"""Everything a preset may set, as frozen dataclasses. Imports no jax, so `--help` stays instant."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ufbert.errors import UserError
from ufbert.kinds import check_kinds

FORMAT_VERSION = 1
"""Version of `config.json` in model and run folders; a folder of a newer format is refused."""

Mixer = Literal["attention", "fourier"]
FeedForwardKind = Literal["dense", "glu", "tree", "leaf_tree", "switch"]
ActivationName = Literal["gelu", "gelu_tanh", "relu", "symmetric_gelu"]
TreeBackend = Literal["masked", "gather", "native"]
Scale = Literal["auto", "tiny", "mini", "small", "base"]
Recipe = Literal["crammed", "modern"]


def _check_least(config: Any, group: str, least: int, *names: str) -> None:
    """Raises UserError for a field of those names that is less."""
    for name in names:
        if getattr(config, name) < least:
            wanted = f"be at least {least}" if least else "not be negative"
            raise UserError(f"{group}.{name} is {getattr(config, name)}; it must {wanted}.")


def _check_share(config: Any, group: str, *names: str) -> None:
    """Raises UserError for a field of those names that does not lie in [0, 1)."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UserError(f"{group}.{name} is {getattr(config, name)}; it must lie in [0, 1).")


@dataclass(frozen=True)
class ModelConfig:
    """One encoder. A BERT, a crammed BERT, an UltraFastBERT, an FNet and a Switch encoder are settings of these fields.

    Raises UserError from the constructor when two fields contradict each other.
    """

    vocab_size: int = 32768
    """Number of WordPiece tokens; a tokenizer trained by this package gets at most this many."""
    max_len: int = 128
    """Longest row, in tokens, that the model accepts."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 16
    """Number of blocks, each a token mixer and a feedforward."""
    n_heads: int = 12
    """Attention heads; `d_model` must be a multiple of it."""
    mixer: tuple[Mixer, ...] = ("attention",)
    """Token mixer of each layer (attention or fourier); a shorter tuple is repeated from the bottom up."""
    feedforward: tuple[FeedForwardKind, ...] = ("glu",)
    """Feedforward of each layer: dense, glu, tree (UltraFastBERT), leaf_tree (the original fast feedforward) or switch
    (experts); a shorter tuple is repeated from the bottom up."""
    d_hidden: int = 1536
    """Hidden width of a dense feedforward, of each half of a GLU, or of an expert."""
    activation: ActivationName = "gelu"
    """Nonlinearity of dense feedforwards, GLU gates, leaves, experts and the masked-LM head."""
    n_trees: int = 1
    """K of a KxD tree layer: trees that run side by side and are summed."""
    tree_depth: int = 11
    """D of a KxD tree layer: a token visits D+1 of the 2^(D+1)-1 nodes of each tree. Of a leaf_tree: the D decisions
    above its 2^D leaves."""
    tree_backend: TreeBackend | Literal["auto"] = "auto"
    """How tree layers are computed; every backend gives the same numbers. native: C++ kernels for CPUs, compiled by the
    system's compiler when first used. auto: native on a CPU; without a compiler, and on a GPU, gather, or masked if the trees
    are shallow; masked on a TPU."""
    tree_activation: ActivationName = "gelu"
    """Nonlinearity of a tree's neurons. symmetric_gelu, z erf(z / sqrt 2), is as alive on the left as on the right, so a
    subtree does not die by its neurons' silence (arXiv 2604.08565 describes the dying)."""
    tree_init: Literal["normal", "uniform"] = "normal"
    """Start of a tree's weights: N(0, init_std) as the reference trains it, or the uniform start its code intends, whose
    output is about as large as a dense layer's: +-1/sqrt(d) for inputs, +-1/sqrt(K (D+1)) for outputs."""
    tree_balance: float = 0.0
    """Weight of a loss that asks every node (tree) or leaf (leaf_tree) to be used alike. The paper has none."""
    leaf_width: int = 32
    """Neurons in each leaf of a leaf_tree."""
    leaf_training: Literal["soft", "hard"] = "soft"
    """How a leaf_tree trains: a soft mixture of all leaves, or one leaf a token with a straight-through gradient."""
    leaf_hardening: float = 0.0
    """Weight of a leaf_tree's mean node entropy in the loss, which pushes soft decisions towards hard ones."""
    leaf_hardening_ramp: float = 0.0
    """Share of the budget over which the hardening weight rises from zero; 0 has it in full from the start."""
    leaf_temperature: float = 1.0
    """Temperature of a leaf_tree's soft decisions at the end of the budget. It starts at 1 and falls geometrically, to
    make the mixture nearly hard by then; nodes can shrink their weights against it, so judge by the held-out loss."""
    leaf_leak: float = 0.0
    """Chance, in training, that a node of a leaf_tree swaps its children for a token (region leak)."""
    master_leaf: int = 0
    """Neurons of a leaf that every token uses beside its own (Charalampopoulos et al. 2024); 0 for none."""
    n_experts: int = 8
    """Experts of a switch layer."""
    capacity_factor: float = 1.25
    """An expert takes at most this times tokens / experts in training; tokens beyond ride the residual. Inference drops
    none."""
    router_balance: float = 0.01
    """Weight of a switch layer's balance loss."""
    router_z: float = 0.001
    """Weight of a switch layer's z-loss, which keeps router logits small."""
    router_jitter: float = 0.01
    """Training noise on a router's input: a factor drawn from 1 +- this."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each sublayer (crammed BERT) or after each residual sum (BERT)."""
    first_norm: bool = True
    """LayerNorm before the first mixer of a pre-norm encoder; ModernBERT, whose embeddings are normalised, has none."""
    norm_bias: bool = True
    """Biases in LayerNorms."""
    positions: Literal["scaled_sinusoid", "learned", "rotary"] = "scaled_sinusoid"
    """A fixed sinusoid times one learned scalar, a learned table, or rotated queries and keys (RoPE)."""
    rotary_base: float = 10000.0
    """Base of the rotary wavelengths."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, head by head, before they meet."""
    attention_impl: Literal["auto", "xla", "cudnn"] = "auto"
    """Implementation of jax.nn.dot_product_attention; auto lets jax choose."""
    fourier_norm: Literal["auto", "none", "ortho"] = "auto"
    """Scale of Fourier mixing: none as in FNet, ortho divides by sqrt(tokens x width). auto: none after post-norm."""
    fixed_len: int = 0
    """The one row length of a model with Fourier mixers, which mix padding in; 0 takes max_len."""
    n_token_types: int = 0
    """Rows of the token-type (segment) embedding of BERT; 0 for none."""
    use_bias: bool = False
    """Biases in attention, dense feedforwards and the masked-LM transform. Tree inputs and leaves always have one."""
    embedding_norm: bool = True
    """LayerNorm on the summed embeddings."""
    embedding_projection: bool = False
    """FNet's linear layer after the embedding norm."""
    final_norm: bool = True
    """LayerNorm after the last block."""
    head_transform: bool = False
    """BERT's dense + activation + LayerNorm before the tied masked-LM decoder."""
    head_bias: bool = False
    """A bias per token in the masked-LM decoder."""
    pooling: Literal["first", "mean"] = "first"
    """What a classifier reads: the hidden state of the first token, as BERT, or the mean over all real tokens. Nothing in
    masked-LM pretraining teaches the first token to gather a row, so a small model has that still to learn."""
    pooler: Literal["tanh", "transform"] = "tanh"
    """What stands between that and a classifier: BERT's dense + tanh, or ModernBERT's dense + activation + LayerNorm."""
    pooler_width: int = 1024
    """Width of that layer."""
    pad_id: int = 0
    """Id of the padding token."""
    norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation of every matrix."""
    zero_init_out: bool = False
    """Start the last matrix of attention and of dense feedforwards at zero, so that every block starts as the identity."""
    dropout: float = 0.1
    """Dropout while fine-tuning (embeddings, attention, sublayers, classifier). Pretraining uses none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products. auto: float32 on a CPU, bfloat16 on an accelerator. Parameters stay float32."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "model.")
        positive = ("vocab_size", "max_len", "d_model", "n_layers", "n_heads", "d_hidden", "n_trees", "pooler_width")
        _check_least(self, "model", 1, *positive, "leaf_width", "n_experts")
        for name in (*positive, "leaf_width", "n_experts"):
            if getattr(self, name) > 2**20:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at most {2**20:,}.")
        if self.n_layers > 1024:
            raise UserError(f"model.n_layers is {self.n_layers}; it must be at most 1,024.")
        weights = ("tree_balance", "leaf_hardening", "router_balance", "router_z", "router_jitter", "master_leaf")
        _check_least(self, "model", 0, *weights, "fixed_len", "pad_id", "n_token_types", "norm_eps", "init_std")
        for name in ("leaf_temperature", "capacity_factor", "rotary_base"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("leaf_leak", "leaf_hardening_ramp"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must lie in [0, 1].")
        if self.vocab_size > 65536:
            raise UserError(f"model.vocab_size is {self.vocab_size}; rows are stored as 2-byte ids, so at most 65536.")
        if self.d_model % self.n_heads:
            raise UserError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}.")
        if not 0 <= self.tree_depth <= 20:
            raise UserError(f"model.tree_depth is {self.tree_depth}; it must lie between 0 and 20.")
        _check_share(self, "model", "dropout")
        for name, kinds in (("mixer", self.mixer), ("feedforward", self.feedforward)):
            object.__setattr__(self, name, tuple(kinds))  # a list could not be looked up among what is compiled
            if not 1 <= len(kinds) <= self.n_layers:
                raise UserError(f"model.{name} names {len(kinds)} layers, the model has {self.n_layers}.")
        if self.positions == "rotary" and (self.d_model // self.n_heads) % 2:
            raise UserError(f"Rotary positions need an even head width, not {self.d_model // self.n_heads}.")
        if self.pad_id >= self.vocab_size:
            raise UserError(f"model.pad_id is {self.pad_id}; the vocabulary has the ids 0 to {self.vocab_size - 1}.")
        if self.fixed_len > self.max_len:
            raise UserError(f"model.fixed_len {self.fixed_len} is longer than model.max_len {self.max_len}.")

    @property
    def nodes_per_tree(self) -> int:
        """2^(D+1) - 1."""
        return 2 ** (self.tree_depth + 1) - 1

    @property
    def only_len(self) -> int:
        """The one row length this model can read, or 0 if it reads any up to max_len. Fourier mixers mix every position
        of a row into every other, padding included, so a text has one answer only at one length."""
        return (self.fixed_len or self.max_len) if any(mixer == "fourier" for mixer, _ in self.layers) else 0

    @property
    def layers(self) -> tuple[tuple[Mixer, FeedForwardKind], ...]:
        """(mixer, feedforward) of every layer, bottom first."""
        return tuple(
            (self.mixer[i % len(self.mixer)], self.feedforward[i % len(self.feedforward)]) for i in range(self.n_layers)
        )


@dataclass(frozen=True)
class PretrainConfig:
    """The pretraining recipe. Defaults: crammed BERT (Geiping & Goldstein 2022, code release of 2023); `presets.with_recipe`
    turns them into the modern one."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for attention and dense feedforward matrices and adamw for the rest."""
    peak_lr: float = 1e-3
    """Highest learning rate. Muon's updates are scaled to the size of AdamW's, so one rate serves both."""
    schedule: Literal["triangle", "stable"] = "triangle"
    """Rate over its peak at the share x of the budget: crammed BERT's min(0.25 + x, 4 (1 - x)), or a warm-up, a plateau and a
    linear decay to zero."""
    warmup: float = 0.02
    """Share of the budget that a stable schedule warms up over."""
    decay: float = 0.45
    """Share of the budget at its end over which a stable schedule decays."""
    adam_b1: float = 0.9
    """AdamW's first-moment decay."""
    adam_b2: float = 0.98
    """AdamW's second-moment decay."""
    adam_eps: float = 1e-12
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on everything but norms and biases."""
    position_scale_lr: float = 1.0
    """Learning rate of the scalar that multiplies the position sinusoid, over that of everything else."""
    clip_norm: float = 0.5
    """Global gradient norm above which the gradient is scaled down."""
    average_width: float = 0.0
    """Width of the average over past weights that the model folder gets, as a share of all updates so far (standard
    deviation of the averaging profile, Karras et al. 2024); 0 for none. It is kept only if its held-out loss is lower."""
    mask_rate: tuple[float, ...] = (0.25,)
    """Share of each row that is predicted: round(rate * seq_len) positions. Several rates are stages of equal length."""
    eval_mask_rate: float = 0.25
    """The same in held-out evaluations: one rate for all recipes, so that their losses compare."""
    batch_rows: int = 0
    """Rows per update once the ramp is over; 0 takes min(8192, expected rows / 500), in whole micro-batches."""
    micro_rows: int = 128
    """Rows per forward and backward pass; an update accumulates batch_rows / micro_rows of them."""
    ramp_until: float = 0.6
    """Share of the budget over which the batch grows from micro_rows to batch_rows."""
    n_evals: int = 10
    """Held-out evaluations in a run, evenly spread over the budget; the last one is at its end."""
    n_checkpoints: int = 10
    """Checkpoints in a run, evenly spread, at least."""
    checkpoint_minutes: float = 15.0
    """Minutes of budget between checkpoints, at most."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the one with the lowest held-out loss stays besides."""
    max_skipped: int = 20
    """Updates in a row that may be skipped for a loss or gradient that is not finite before the run goes back to its last
    good checkpoint."""
    shard_params: bool = False
    """On several devices, split parameters and optimizer state among them instead of keeping a copy on each."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "train.")
        _check_least(self, "train", 1, "micro_rows", "n_evals", "n_checkpoints", "keep_checkpoints", "max_skipped")
        _check_least(self, "train", 0, "position_scale_lr", "batch_rows", "weight_decay", "adam_eps", "ramp_until")
        _check_share(self, "train", "adam_b1", "adam_b2", "muon_momentum")
        for name in ("peak_lr", "clip_norm", "checkpoint_minutes"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be positive.")
        for rate in (*self.mask_rate, self.eval_mask_rate):
            if not 0.0 < rate < 1.0:
                raise UserError(f"train.mask_rate is {rate}; it must lie between 0 and 1.")
        if not self.mask_rate:
            raise UserError("train.mask_rate is empty; give at least one rate.")
        for name in ("warmup", "decay", "average_width"):
            if not 0.0 <= getattr(self, name) < (0.28 if name == "average_width" else 1.0):
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be a share below 1 (averages: 0.28).")
        if self.batch_rows % self.micro_rows:
            raise UserError(
                f"train.batch_rows {self.batch_rows} is not a multiple of train.micro_rows {self.micro_rows}."
            )


@dataclass(frozen=True)
class DataConfig:
    """How text becomes rows."""

    seq_len: int = 128
    """Tokens in a packed row."""
    document_attention: bool = True
    """Keep packed documents from attending to each other: their segment ids are recomputed from the [CLS] ids with which
    documents begin. Crammed BERT lets them attend; see the README for what it costs."""
    short_len: int = 32
    """Tokens in a piece while rows are cut into pieces (see short_until); seq_len must be a multiple of it."""
    short_until: float = 0.0
    """Share of the budget during which rows are cut into pieces, each a row of its own. Attention learns to find a
    token's neighbours far sooner among 32 positions than among 128, and keeps it afterwards."""
    eval_rows: int = 256
    """Held-out rows that each evaluation reads, spread evenly over the held-out text."""
    max_tokens: int = 0
    """Stop reading the corpus after this many tokens, counted after duplicates are gone and before the worst documents are;
    0 takes what the budget is planned to see once, rounded up, at least 20 million and at most 2 billion."""
    tokenizer_chars: int = 100_000_000
    """Characters of the corpus that the tokenizer is trained on."""
    filter_worst: float = 0.05
    """Leave out this share of the documents, those with most tokens per character; 0 keeps all."""
    drop_exact: bool = True
    """Leave out documents that have occurred before, case and blanks aside."""
    drop_near: bool = True
    """Leave out documents that are nearly one of the last near_window kept ones."""
    near_window: int = 1_000_000
    """Documents that are remembered for that, at about 400 bytes each."""
    near_threshold: float = 0.8
    """Share of runs of five tokens, of all that either has (Jaccard), from which two documents are nearly the same."""
    order: Literal["shuffled", "quality"] = "shuffled"
    """How rows are read: in a new random order every pass, or every pass the same, best documents (fewest tokens per
    character) first."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "data.")
        _check_least(self, "data", 1, "short_len", "eval_rows", "tokenizer_chars", "near_window")
        _check_least(self, "data", 3, "seq_len")  # [CLS], a piece and [SEP]
        _check_least(self, "data", 0, "max_tokens", "short_until")
        _check_share(self, "data", "filter_worst")
        if not 0.0 < self.near_threshold <= 1.0:
            raise UserError(f"data.near_threshold is {self.near_threshold}; it must lie in (0, 1].")
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
        only = self.model.only_len
        if only and (self.data.seq_len != only or self.data.short_until > 0):
            raise UserError(
                f"A model with Fourier mixers reads rows of one length: data.seq_len must be {only} (model.fixed_len or "
                f"max_len), not {self.data.seq_len}, and data.short_until 0."
            )


@dataclass(frozen=True)
class FinetuneConfig:
    """Hyper-parameters of fine-tuning, the same for every task. A protocol sets them; one given by hand wins and is named."""

    epochs: int = 5
    """Passes over the training rows."""
    batch_rows: int = 16
    """Rows per update."""
    lr: float = 0.0
    """Peak learning rate; 0 takes 4e-5 from width 768 up, and 0.2 / d_model below: small models want more (chosen on held-out
    training rows of SST-2 at width 256, where it was best pretrained and from scratch alike)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls to zero."""
    warmup: float = 0.1
    """Share of the updates over which the rate rises before it falls."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    pooling: Literal["model", "first", "mean"] = "model"
    """What the classifier reads of a row: what the model's configuration says, its first token, or the mean of its tokens
    (which models of sentence-transformers were trained to use)."""
    adam_b1: float = 0.9
    """AdamW's first-moment decay."""
    adam_b2: float = 0.98
    """AdamW's second-moment decay."""
    adam_eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 for none."""
    max_len: int = 128
    """Longest row in tokens; longer ones are cut. A model with Fourier mixers keeps its own length."""
    early_stop: int = 0
    """Stop when no run has improved on dev for so many epochs; 0 never does."""
    teacher_weight: float = 0.9
    """Share of the loss that a teacher's answers make up, where there is one; the labels make up the rest."""
    temperature: float = 2.0
    """What a teacher's scores are divided by before they become probabilities."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "tune.")
        _check_least(self, "tune", 1, "epochs", "batch_rows")
        if self.max_len < 3:
            raise UserError(
                f"tune.max_len is {self.max_len}; a row needs room for [CLS] and [SEP] and at least one piece of text, so that "
                "it must be at least 3."
            )
        _check_least(self, "tune", 0, "lr", "weight_decay", "clip_norm", "early_stop", "adam_eps")
        _check_share(self, "tune", "dropout", "adam_b1", "adam_b2")
        for name in ("warmup", "teacher_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"tune.{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if self.temperature <= 0:
            raise UserError(f"tune.temperature is {self.temperature}; it must be positive.")

    def peak_lr(self, config: ModelConfig) -> float:
        """The learning rate with 0 resolved."""
        return self.lr or (4e-5 if config.d_model >= 768 else 0.2 / config.d_model)


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(cls: Any, values: Any, where: str) -> Any:
    """Rebuild a config dataclass of type `cls` from `to_json` values.

    Raises UserError, naming `where`, for a field that `cls` does not have or a value of the wrong kind.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {values!r} where an object of settings belongs.")
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where} has a setting this version does not know: {', '.join(unknown)}.")
    rebuilt = {}
    for name, value in values.items():
        nested = {"model": ModelConfig, "train": PretrainConfig, "data": DataConfig}.get(name)
        if cls is RunConfig and nested is not None:
            rebuilt[name] = from_json(nested, value, where)
        else:
            rebuilt[name] = tuple(value) if isinstance(value, list) else value
    check_kinds(cls, rebuilt, f"{where}: ")
    try:
        return cls(**rebuilt)
    except TypeError as error:
        raise UserError(f"{where} holds a value of the wrong kind: {error}.") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error

"""The architecture: every setting of one encoder. Imports no jax."""

import os
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from ufbert.config.checks import NotNegative, Positive, Share, ShareBelowOne, Size, SizeOrNone, check_kinds
from ufbert.errors import UserError

MIXER_NAMES = ["attention", "fourier"]
"""Names of the token mixers. `ufbert.nn.registry` has an entry for each, and adds those that a user registers."""


FEEDFORWARD_NAMES = ["dense", "glu", "tree", "fixed_tree", "leaf_tree", "routed_tree", "switch", "none"]
"""Names of the feedforwards, likewise."""


ONE_LENGTH = {"fourier"}
"""Those of both that mix padding in, so that a model with one reads rows of one length only."""


ActivationName = Literal["gelu", "gelu_tanh", "relu", "symmetric_gelu"]


TreeBackend = Literal["masked", "gather", "native", "pallas"]


NgramKey = Literal["around", "before", "after", "trigram"]


HiddenFrom = Literal["d_hidden", "tree_path", "tree_all", "routed_path", "routed_all"]


@dataclass(frozen=True)
class ModelConfig:
    """One encoder. A BERT, a crammed BERT, an UltraFastBERT, an FNet and a Switch encoder are settings of these fields.

    Raises UserError from the constructor when two fields contradict each other.
    """

    vocab_size: Annotated[int, Meta(ge=1, le=65536)] = 32768
    """Number of WordPiece tokens; a tokenizer trained by this package gets at most this many. Rows are stored as 2-byte ids."""
    max_len: Size = 128
    """Longest row, in tokens, that the model accepts."""
    d_model: Size = 768
    """Width of the residual stream."""
    n_layers: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Number of blocks, each a token mixer and a feedforward."""
    n_heads: Size = 12
    """Attention heads; `d_model` must be a multiple of it, unless `head_width` says how wide they are."""
    head_width: SizeOrNone = 0
    """Width of a head; 0 for `d_model` / `n_heads`. A model that has lost heads keeps the width of the others."""
    layer_heads: tuple[Size, ...] = ()
    """Heads of each layer, bottom first, where they differ, as pruning may leave them; empty for `n_heads` in every layer.
    Needs `head_width`."""
    mixer: tuple[str, ...] = ("attention",)
    """Token mixer of each layer: attention, fourier or one of your own (docs/layers.md); a shorter tuple is repeated from
    the bottom up."""
    feedforward: tuple[str, ...] = ("glu",)
    """Feedforward of each layer: dense, glu, tree (UltraFastBERT), fixed_tree (the same with random decisions that never
    learn), leaf_tree (the original fast feedforward), routed_tree (trees with neurons in their leaves), switch (experts), none
    (the mixer alone) or one of your own (docs/layers.md); a shorter tuple is repeated from the bottom up."""
    d_hidden: Size = 1536
    """Hidden width of a dense feedforward, of each half of a GLU, or of an expert."""
    layer_hidden: tuple[Size, ...] = ()
    """Hidden width of each layer, bottom first, where they differ, as pruning may leave them; empty for `d_hidden` in every
    layer."""
    hidden_from: HiddenFrom = "d_hidden"
    """Origin of `d_hidden`: as given, or as many neurons as trees of these `n_trees` and `tree_depth` have, at any scale: those
    that a token uses (tree_path) or all (tree_all) of a tree layer; of a routed_tree likewise (routed_path, routed_all),
    decisions included. With `feedforward` dense this is the control of a tree layer."""
    activation: ActivationName = "gelu"
    """Nonlinearity of dense feedforwards, GLU gates, leaves, experts and the masked-LM head."""
    n_trees: Size = 1
    """K of a KxD tree layer: trees that run side by side and are summed."""
    tree_depth: Annotated[int, Meta(ge=0, le=20)] = 11
    """D of a KxD tree layer: a token visits D+1 of the 2^(D+1)-1 nodes of each tree. Of a leaf_tree or routed_tree: the D
    decisions above its 2^D leaves."""
    tree_backend: TreeBackend | Literal["auto"] = "auto"
    """Backend of tree layers; all give the same numbers in float32. native: C++ kernels for CPUs, compiled by the
    system's compiler when first used. pallas: kernels for one NVIDIA GPU, not yet timed. auto: native on a CPU; without a
    compiler, and on a GPU, gather, or masked if the trees are shallow; masked on a TPU."""
    tree_activation: ActivationName = "gelu"
    """Nonlinearity of a tree's neurons. symmetric_gelu, z erf(z / sqrt 2), is as alive on the left as on the right, so a
    subtree does not die by its neurons' silence (arXiv 2604.08565 describes the dying)."""
    tree_init: Literal["normal", "uniform"] = "normal"
    """Start of a tree's weights: N(0, init_std) as the reference trains it, or the uniform start its code intends, whose
    output is about as large as a dense layer's: +-1/sqrt(d) for inputs, +-1/sqrt(K (D+1)) for outputs."""
    tree_balance: NotNegative = 0.0
    """Weight of a loss that asks every node (tree) or leaf (leaf_tree) to be used alike. The paper has none."""
    leaf_width: Size = 32
    """Neurons in each leaf of a leaf_tree or routed_tree."""
    leaf_training: Literal["soft", "hard"] = "soft"
    """Training of a leaf_tree: a soft mixture of all leaves, or one leaf a token with a straight-through gradient."""
    leaf_hardening: NotNegative = 0.0
    """Weight of a leaf_tree's mean node entropy in the loss, which pushes soft decisions towards hard ones."""
    leaf_hardening_ramp: Share = 0.0
    """Share of the budget over which the hardening weight rises from zero; 0 has it in full from the start."""
    leaf_temperature: Positive = 1.0
    """Temperature of a leaf_tree's soft decisions at the end of the budget. It starts at 1 and falls geometrically, to
    make the mixture nearly hard by then; nodes can shrink their weights against it, so judge by the held-out loss."""
    leaf_leak: Share = 0.0
    """Chance, in training, that a node of a leaf_tree swaps its children for a token (region leak)."""
    master_leaf: SizeOrNone = 0
    """Neurons of a leaf that every token uses beside its own (leaf_tree: Charalampopoulos et al. 2024; routed_tree: as
    DeepSeekMoE's shared experts, Dai et al. 2024, arXiv 2401.06066); 0 for none."""
    tree_gate: Literal["none", "path", "through", "anneal"] = "path"
    """What lets a routed_tree's decisions learn: path multiplies a leaf's output by a number that grows with the margins of
    the decisions on its path; through sends back the gradient of a soft mixture of all leaves; anneal trains such a mixture,
    which hardens; none leaves them as they start."""
    tree_harden: Share = 0.7
    """Share of the budget after which an annealed routed_tree is hard."""
    tree_even: Share = 0.1
    """Share of the way that a routed_tree's thresholds go at every update towards the batch's mean logit at their node, so that
    they are running means. 0 leaves them at 0, and decisions as uneven as they come."""
    tree_router: Literal["state", "token"] = "state"
    """A routed_tree chooses leaves by the hidden state, or by a hash of the token's id (Roller et al. 2021)."""
    leaf_ancestors: Literal["none", "root", "levels"] = "none"
    """Weights that a routed_tree's leaves share while they are trained: none; those of the root, added to each leaf's own;
    or those of every node above a leaf."""
    leaf_bias: bool = False
    """Biases in a routed_tree: of its neurons, and of the output of each leaf."""
    n_experts: Size = 8
    """Experts of a switch layer."""
    capacity_factor: Positive = 1.25
    """An expert takes at most this times tokens / experts in training; tokens beyond ride the residual. Inference drops
    none."""
    router_balance: NotNegative = 0.01
    """Weight of a switch layer's balance loss."""
    router_z: NotNegative = 0.001
    """Weight of a switch layer's z-loss, which keeps router logits small."""
    router_jitter: NotNegative = 0.01
    """Training noise on a router's input: a factor drawn from 1 +- this."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each sublayer (crammed BERT) or after each residual sum (BERT)."""
    first_norm: bool = True
    """LayerNorm before the first mixer of a pre-norm encoder; ModernBERT, whose embeddings are normalised, has none."""
    unet_skips: bool = False
    """Skips from the lower half of the layers to the upper one, as in a U-net: the input of layer i from the top gets the
    output of layer i from the bottom, times a learned scalar that starts at 1. A middle layer gets none."""
    norm_bias: bool = True
    """Biases in LayerNorms."""
    positions: Literal["scaled_sinusoid", "learned", "rotary"] = "scaled_sinusoid"
    """A fixed sinusoid times one learned scalar, a learned table, or rotated queries and keys (RoPE)."""
    rotary_base: Positive = 10000.0
    """Base of the rotary wavelengths."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, head by head, before they meet."""
    value_embeddings: Annotated[int, Meta(ge=0, le=512)] = 0
    """Tables of value embeddings: table j adds a vector for each token, times a learned scalar, to the values of attention
    in layer j from the bottom and in layer j from the top (modded-nanogpt). The scalars start at sqrt(d_model) / 2."""
    attention_impl: Literal["auto", "xla", "cudnn"] = "auto"
    """Implementation of jax.nn.dot_product_attention. auto lets jax choose; on an NVIDIA GPU it takes kernels of this package
    for rows of 16, 32, 64 or 128 tokens and heads that fit."""
    fourier_norm: Literal["auto", "none", "ortho"] = "auto"
    """Scale of Fourier mixing: none as in FNet, ortho divides by sqrt(tokens x width). auto: none after post-norm."""
    fixed_len: Annotated[int, Meta(ge=0)] = 0
    """The one row length of a model with Fourier mixers, which mix padding in; 0 takes max_len."""
    n_token_types: SizeOrNone = 0
    """Rows of the token-type (segment) embedding of BERT; 0 for none."""
    ngram_rows: SizeOrNone = 0
    """Rows of each hashed table of n-grams, whose vectors tell a token its neighbours at the cost of a look-up; 0 for no tables
    (docs/layers.md)."""
    ngram_keys: tuple[NgramKey, ...] = ("around", "before", "after")
    """The tables, by the ids that pick a row: around (left and right neighbour), before (left neighbour, token), after (token,
    right neighbour), trigram (all three)."""
    ngram_width: SizeOrNone = 0
    """Width of a table's rows; 0 for `d_model`. Narrower rows are joined, and a linear layer widens them."""
    ngram_layer: Annotated[int, Meta(ge=0, le=1023)] = 0
    """Place where the tables' vectors enter: 0 adds them to the embeddings before their norm, i to the residual stream that
    block i, counted from 0, reads."""
    use_bias: bool = False
    """Biases in attention, dense feedforwards and the masked-LM transform. Tree inputs and leaves always have one."""
    embedding_norm: bool = True
    """LayerNorm on the summed embeddings."""
    embedding_projection: bool = False
    """FNet's linear layer after the embedding norm."""
    final_norm: bool = True
    """LayerNorm after the last block."""
    final_norm_start: Positive = 1.0
    """Start of that LayerNorm's scale. Where blocks start as the identity (zero_init_out) and weights at 1/sqrt(d_model), a
    masked token's logit for [MASK] starts at sqrt(d_model), far above the loss of knowing nothing; 1/sqrt(d_model) here mends
    that."""
    head_transform: bool = False
    """BERT's dense + activation + LayerNorm before the masked-LM decoder."""
    tie_head: bool = True
    """The masked-LM decoder is the token embedding. If not, it is a matrix of its own, which starts at zero: every token is
    as likely as any other."""
    head_bias: bool = False
    """A bias per token in the masked-LM decoder."""
    pooling: Literal["first", "mean"] = "first"
    """Vector that a classifier reads: the hidden state of the first token, as BERT, or the mean over all tokens. Nothing in
    masked-LM pretraining teaches the first token to gather a row, so a small model has that still to learn."""
    pooler: Literal["tanh", "transform"] = "tanh"
    """Layer between that and a classifier: BERT's dense + tanh, or ModernBERT's dense + activation + LayerNorm."""
    pooler_width: Size = 1024
    """Width of that layer."""
    pad_id: Annotated[int, Meta(ge=0)] = 0
    """Id of the padding token."""
    norm_eps: NotNegative = 1e-12
    """Epsilon of every LayerNorm."""
    init_std: NotNegative = 0.02
    """Standard deviation of the normal initialisation of every matrix."""
    zero_init_out: bool = False
    """Start the last matrix of attention and of dense feedforwards at zero, so that pre-norm blocks with
    these start as the identity."""
    dropout: ShareBelowOne = 0.1
    """Dropout while fine-tuning (embeddings, attention, sublayers, classifier). Pretraining uses none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products. auto: float32 on a CPU, bfloat16 on an accelerator. Parameters stay float32."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "model.")
        self._check_widths()
        if self.n_trees * self.nodes_per_tree > 2**24:
            raise UserError(
                f"model.n_trees {self.n_trees} of model.tree_depth {self.tree_depth} have more than 2^24 nodes."
            )
        for name, kinds, known in (
            ("mixer", self.mixer, MIXER_NAMES),
            ("feedforward", self.feedforward, FEEDFORWARD_NAMES),
        ):
            object.__setattr__(self, name, tuple(kinds))  # a list could not be looked up among what is compiled
            if not 1 <= len(kinds) <= self.n_layers:
                raise UserError(f"model.{name} names {len(kinds)} layers, the model has {self.n_layers}.")
            _check_known(name, kinds, known)
        self._take_hidden()
        self._check_ngrams()
        self._check_depth()
        if self.positions == "rotary" and self.width_of_head % 2:
            raise UserError(f"Rotary positions need an even head width, not {self.width_of_head}.")
        if self.pad_id >= self.vocab_size:
            raise UserError(f"model.pad_id is {self.pad_id}; the vocabulary has the ids 0 to {self.vocab_size - 1}.")
        if self.fixed_len > self.max_len:
            raise UserError(f"model.fixed_len {self.fixed_len} is longer than model.max_len {self.max_len}.")

    def _take_hidden(self) -> None:
        """Set `d_hidden` as `hidden_from` says. Raises UserError if there are more neurons than it may be."""
        m, depth, leaves = self.n_trees, self.tree_depth, 2**self.tree_depth
        decisions, nodes = (depth, leaves - 1) if self.tree_router == "state" else (0, 0)
        d_hidden = {
            "d_hidden": self.d_hidden,
            "tree_path": m * (depth + 1),
            "tree_all": m * self.nodes_per_tree,
            "routed_path": m * (decisions + self.leaf_width) + self.master_leaf,
            "routed_all": m * (nodes + leaves * self.leaf_width) + self.master_leaf,
        }[self.hidden_from]
        check_kinds(type(self), {"d_hidden": d_hidden}, f"model.hidden_from {self.hidden_from}: model.")
        object.__setattr__(self, "d_hidden", d_hidden)

    def _check_widths(self) -> None:
        """Raise UserError for heads and hidden widths that do not fit the model."""
        if not self.head_width and self.d_model % self.n_heads:
            raise UserError(f"model.d_model {self.d_model} is not a multiple of model.n_heads {self.n_heads}.")
        for name in ("layer_heads", "layer_hidden"):
            widths = tuple(getattr(self, name))
            object.__setattr__(self, name, widths)
            if len(widths) not in (0, self.n_layers):
                raise UserError(f"model.{name} has {len(widths)} entries, and the model {self.n_layers} layers.")
        if self.layer_heads and not self.head_width:
            raise UserError("model.layer_heads needs model.head_width, for heads of different layers are equally wide.")
        heads = set(self.layer_heads) or {self.n_heads}
        if self.value_embeddings and heads != {self.d_model // self.width_of_head}:
            raise UserError("model.value_embeddings are as wide as the model, and its heads together are not.")

    def _check_ngrams(self) -> None:
        """Raise UserError if the fields of the hashed tables contradict each other."""
        object.__setattr__(self, "ngram_keys", tuple(self.ngram_keys))
        if len(set(self.ngram_keys)) < max(1, len(self.ngram_keys)):
            raise UserError(
                f"model.ngram_keys {' '.join(self.ngram_keys)!r} must name at least one table, and none twice."
            )
        if self.ngram_rows and self.ngram_layer >= self.n_layers:
            raise UserError(
                f"model.ngram_layer is {self.ngram_layer}, and the blocks of the model are numbered 0 to {self.n_layers - 1}."
            )

    def _check_depth(self) -> None:
        """Raise UserError for skips or value embeddings that these layers have no place for."""
        if self.unet_skips and self.n_layers < 2:
            raise UserError("model.unet_skips go from lower to upper layers, and model.n_layers is 1.")
        if self.value_embeddings > (self.n_layers + 1) // 2:
            raise UserError(
                f"model.value_embeddings {self.value_embeddings} are too many for model.n_layers {self.n_layers}: each table "
                "serves a layer from the bottom and one from the top."
            )
        for i, (table, (mixer, _)) in enumerate(zip(self.value_tables, self.layers, strict=True)):
            if table is not None and mixer != "attention":
                raise UserError(
                    f"model.value_embeddings {self.value_embeddings} add to the values of attention, and layer {i} has the "
                    f"mixer {mixer!r}."
                )

    def architecture(self, backend: str = "") -> str:
        """Describe the size and the parts for a reader: `2 layers x 128, tree 1x8 (native) feedforward`."""
        mixers, kinds = (list(dict.fromkeys(layer[part] for layer in self.layers)) for part in (0, 1))
        names = [self._feedforward(kind, backend) for kind in kinds]
        mixing = "" if mixers == ["attention"] else f"{'+'.join(mixers)} mixing, "
        tables = f", {len(self.ngram_keys)} n-gram tables of {self.ngram_rows:,} rows" if self.ngram_rows else ""
        return (
            f"{self.n_layers} layers x {self.d_model}, {mixing}{'+'.join(names)} feedforward{tables}{self._left_over()}"
        )

    def _feedforward(self, kind: str, backend: str) -> str:
        """Describe a feedforward: trees by number x depth, then neurons of a leaf and those that all tokens use."""
        trees, shared = f" {self.n_trees}x{self.tree_depth}", f" + {self.master_leaf}" if self.master_leaf else ""
        sizes = {
            **dict.fromkeys(("dense", "glu"), "" if self.layer_hidden else f" {self.d_hidden}"),
            **dict.fromkeys(("tree", "fixed_tree"), trees),
            **dict.fromkeys(("leaf_tree", "routed_tree"), f"{trees} of {self.leaf_width}{shared}"),
            "switch": f" {self.n_experts} of {self.d_hidden}",
        }
        return kind + sizes.get(kind, "") + (f" ({backend})" if backend and kind == "tree" else "")

    def _left_over(self) -> str:
        """Describe heads and hidden widths that are other than the model's width lets expect, as after pruning."""
        heads, hidden = (" to ".join(map(str, sorted({min(w), max(w)}))) if w else "" for w in self._uneven)
        heads = f", {heads} head{'' if heads == '1' else 's'} of {self.head_width}" if heads else ""
        return heads + (f", {hidden} hidden neurons" if hidden else "")

    @property
    def _uneven(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.layer_heads or ((self.n_heads,) if self.head_width else ()), self.layer_hidden

    def of_layer(self, i: int) -> "ModelConfig":
        """Return the configuration that layer i is computed by: heads and hidden width are its own."""
        if not self.layer_heads and not self.layer_hidden:
            return self
        heads = self.layer_heads[i] if self.layer_heads else self.n_heads
        hidden = self.layer_hidden[i] if self.layer_hidden else self.d_hidden
        return replace(self, n_heads=heads, d_hidden=hidden, hidden_from="d_hidden", layer_heads=(), layer_hidden=())

    @property
    def width_of_head(self) -> int:
        """`head_width`, with 0 resolved."""
        return self.head_width or self.d_model // self.n_heads

    @property
    def nodes_per_tree(self) -> int:
        """2^(D+1) - 1."""
        return 2 ** (self.tree_depth + 1) - 1

    @property
    def only_len(self) -> int:
        """The one row length this model can read, or 0 if it reads any up to max_len. Fourier mixers mix every position
        of a row into every other, padding included, so a text has one answer only at one length."""
        return (self.fixed_len or self.max_len) if any(map(ONE_LENGTH.intersection, self.layers)) else 0

    @property
    def skips(self) -> tuple[int | None, ...]:
        """Layer whose output is added to the input of each layer, bottom first; None where there is none."""
        n = self.n_layers
        return tuple(n - 1 - i if self.unet_skips and 2 * i >= n else None for i in range(n))

    @property
    def value_tables(self) -> tuple[int | None, ...]:
        """Table of value embeddings that each layer uses, bottom first; None where it uses none."""
        nearest = (min(i, self.n_layers - 1 - i) for i in range(self.n_layers))
        return tuple(table if table < self.value_embeddings else None for table in nearest)

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """(mixer, feedforward) of every layer, bottom first."""
        return tuple(
            (self.mixer[i % len(self.mixer)], self.feedforward[i % len(self.feedforward)]) for i in range(self.n_layers)
        )


def _check_known(field: str, kinds: tuple[str, ...], known: list[str]) -> None:
    """Raise UserError for the name of a layer that is not registered, after running the file of $UFBERT_LAYERS."""
    for kind in kinds:
        if kind not in known:
            _register_own()
        if kind not in known:
            raise UserError(
                f"model.{field} names {kind!r}; known are {', '.join(known)}. If it is a layer of your own, let "
                "$UFBERT_LAYERS name the Python file that registers it."
            )


def _register_own() -> None:
    """Run the Python file that $UFBERT_LAYERS names, once a process."""
    path = os.environ.get("UFBERT_LAYERS", "")
    if not path or path in _run:
        return
    _run.add(path)  # first: the file may itself hold a config that names an unknown layer
    try:
        runpy.run_path(str(Path(path).expanduser()))
    except Exception as error:  # of a user's code, anything
        raise UserError(f"$UFBERT_LAYERS names {path}, which fails: {type(error).__name__}: {error}") from error


_run: set[str] = set()

"""Every kind of token mixer and feedforward: one entry holds all that the rest of the package asks about a layer.

A new kind is a module (`attention.py`, `feedforward.py`), an entry here, and its name in `ufbert.config.model`. A layer that
lives outside the package registers itself: `register_feedforward(name, Layer(...))`, or `register_mixer`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ufbert.config import ModelConfig, TreeBackend
from ufbert.config.model import FEEDFORWARD_NAMES, MIXER_NAMES, ONE_LENGTH
from ufbert.errors import UserError
from ufbert.nn import attention, feedforward, onnx_rules
from ufbert.nn.layers import Context
from ufbert.ops.dense import ACTIVATIONS
from ufbert.ops.fff import fast_feedforward
from ufbert.ops.mixing import attention as attend
from ufbert.ops.mixing import fourier_mix

OnnxRule = Callable[[onnx_rules.Graph, ModelConfig, onnx_rules.Part, str, dict[str, str]], str]


class Use(NamedTuple):
    """The conditions under which a layer's cost is counted."""

    seq_len: int
    """Tokens of a row."""
    trees: TreeBackend
    """Backend of trees: masked computes every node, the others the nodes on the path."""
    training: bool


class TimedPart(NamedTuple):
    """A function of arrays to time, forward and backward, and the shapes of the arrays."""

    function: Callable[..., Array]
    shapes: Sequence[tuple[int, ...]]


def _none(config: ModelConfig, use: Use) -> float:
    return 0.0


def _no_neurons(config: ModelConfig) -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One kind of token mixer or feedforward. Counts are for one token and may be estimates, but for `neurons`."""

    module: Callable[..., nn.Module]
    """The Linen module, called as `module(config, name=...)`."""
    flops: Callable[[ModelConfig, Use], float]
    """Floating-point operations of the forward pass; a multiply-add counts two."""
    traffic: Callable[[ModelConfig, Use], float]
    """Numbers that forward and backward move in training, of the model's type; weights are not counted. The factors of the
    entries below were fitted to XLA's count of the compiled step on a CPU, of the presets at the scales below `base`."""
    neurons: Callable[[ModelConfig], tuple[int, int]] = _no_neurons
    """(neurons that a token uses in inference, neurons in all) of a feedforward."""
    routing_flops: Callable[[ModelConfig, Use], float] = _none
    """The operations among `flops` that route: float32 arithmetic whatever the model's type."""
    routing_traffic: Callable[[ModelConfig, Use], float] = _none
    """Numbers moved as float32 whatever the model's type, not counted in `traffic`."""
    muon: tuple[str, ...] = ()
    """Names of the parameters that Muon takes, each an (inputs, outputs) matrix: `("kernel",)` for linear layers. AdamW
    takes all others."""
    own_steps: tuple[str, ...] = ()
    """Names of the parameters that no optimizer moves: their gradient is their step, whatever the learning rate."""
    one_length: bool = False
    """True if padding is mixed in: a model with this layer reads rows of one length only."""
    fields: tuple[str, ...] = ()
    """Fields of ModelConfig, besides `d_model`, that decide what the layer computes or its shapes (not its start, losses or
    backend)."""
    timed: Callable[[ModelConfig, int, int], TimedPart] | None = None
    """(config, rows, tokens of a row) -> what the layer does besides its large matrix products, to be timed on this machine.
    None times the whole layer, and the time of its products is subtracted."""
    onnx: OnnxRule | str = "its entry in the registry has no rule."
    """The rule that adds the layer to an ONNX graph, or the sentence that says why there is none."""

    def timed_part(self, config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
        """The part to time on `rows` rows of `seq_len` tokens: `timed`, or the whole layer."""
        return (self.timed or self._whole)(config, rows, seq_len)

    def _whole(self, config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
        layer: Any = self.module(config)
        context = Context(
            attention_mask=None, segment_ids=None, real=None, position_ids=jnp.arange(seq_len)[None], training=True,
            progress=1.0, statistics=False,
        )  # fmt: skip
        x = jax.ShapeDtypeStruct((rows, seq_len, config.d_model), jnp.float32)
        variables = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, context, None), x)
        leaves, structure = jax.tree.flatten(variables)

        def apply(x: Array, *weights: Array) -> Array:
            y = layer.apply(jax.tree.unflatten(structure, weights), x, context, None)
            return y[0] if isinstance(y, tuple) else y  # a feedforward also returns what it reports

        return TimedPart(apply, [x.shape, *(leaf.shape for leaf in leaves)])


def _attention_flops(config: ModelConfig, use: Use) -> int:
    width = config.n_heads * config.width_of_head
    return 2 * 4 * config.d_model * width + 2 * 2 * use.seq_len * width


def _attention_timed(config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
    visible = jnp.ones((rows, seq_len, seq_len), bool)
    shape = (rows, seq_len, config.n_heads, config.width_of_head)
    return TimedPart(lambda q, k, v: attend(q, k, v, visible), [shape] * 3)


def _fourier_flops(config: ModelConfig, use: Use) -> float:
    """A complex FFT of n points takes about 5 n log2 n operations (Cooley & Tukey 1965); FNet's runs over both axes."""
    return 5 * config.d_model * (math.log2(config.d_model) + math.log2(max(1, use.seq_len)))


def _fourier_timed(config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
    return TimedPart(lambda x: fourier_mix(x, ortho=True), [(rows, seq_len, config.d_model)])


def _hidden_timed(config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
    return TimedPart(ACTIVATIONS[config.activation], [(rows * seq_len, config.d_hidden)])


def _glu_timed(config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
    activation = ACTIVATIONS[config.activation]
    return TimedPart(lambda u, v: activation(u) * v, [(rows * seq_len, config.d_hidden)] * 2)


def _tree_nodes(config: ModelConfig, use: Use) -> int:
    """Nodes that are computed for a token."""
    return config.n_trees * (config.nodes_per_tree if use.trees == "masked" else config.tree_depth + 1)


def _tree_traffic(config: ModelConfig, use: Use) -> float | int:
    if use.trees == "native":
        return 0.0
    if use.trees == "masked":
        return 45 * config.n_trees * config.nodes_per_tree
    if use.trees == "pallas":
        # Its kernels' time on an H100, 0.6 ms at depth 11 for 16,384 rows of width 768, as if memory were what it waits for.
        return 10 * config.d_model * config.n_trees * (config.tree_depth + 1)
    return config.d_model * (60 + 7.4 * config.n_trees * (config.tree_depth + 1))


def _tree_timed(config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
    shape, tokens = (config.n_trees, config.nodes_per_tree), rows * seq_len
    backend = feedforward.tree_backend(config, tokens)
    return TimedPart(
        lambda x, w: fast_feedforward(x, w, jnp.zeros(shape), w, backend=backend),
        [(tokens, config.d_model), (*shape, config.d_model)],
    )


def _leaf_tree_flops(config: ModelConfig, use: Use) -> int:
    """All leaves in training, one in inference."""
    leaves = 2**config.tree_depth
    decisions, used = (leaves - 1, leaves) if use.training else (config.tree_depth, 1)
    return 2 * config.d_model * (decisions + 2 * (used * config.leaf_width + config.master_leaf))


def _leaf_tree_neurons(config: ModelConfig) -> tuple[int, int]:
    leaves, width = 2**config.tree_depth, config.leaf_width
    return config.tree_depth + width + config.master_leaf, leaves - 1 + leaves * width + config.master_leaf


def _leaf_tree_timed(config: ModelConfig, rows: int, seq_len: int) -> TimedPart:
    return TimedPart(ACTIVATIONS[config.activation], [(rows * seq_len, 2**config.tree_depth * config.leaf_width)])


def _routed_tree_flops(config: ModelConfig, use: Use) -> int:
    """One leaf a tree, but all of them where training sends the gradient of their mixture back; and its decisions."""
    leaves = 2**config.tree_depth
    decisions = _routed_tree_decisions(config, use)
    used = leaves if use.training and config.tree_gate in ("through", "anneal") else 1
    return 2 * config.d_model * (decisions + 2 * config.n_trees * used * config.leaf_width + 2 * config.master_leaf)


def _routed_tree_decisions(config: ModelConfig, use: Use) -> int:
    each = 2**config.tree_depth - 1 if use.training else config.tree_depth
    return config.n_trees * each if config.tree_router == "state" else 0


def _routed_tree_neurons(config: ModelConfig) -> tuple[int, int]:
    m, leaves, width, shared = config.n_trees, 2**config.tree_depth, config.leaf_width, config.master_leaf
    decisions, nodes = (config.tree_depth, leaves - 1) if config.tree_router == "state" else (0, 0)
    return m * (decisions + width) + shared, m * (nodes + leaves * width) + shared


def _switch_flops(config: ModelConfig, use: Use) -> float:
    """The places of the experts in training, filled or not, and one expert in inference."""
    places = config.capacity_factor if use.training else 1.0
    return 2 * config.d_model * (config.n_experts + 2 * config.d_hidden * places)


MIXERS = {
    "attention": Layer(
        module=attention.Attention,
        flops=_attention_flops,
        traffic=lambda config, use: 50 * config.n_heads * use.seq_len + 10 * config.d_model,
        muon=("kernel",),
        fields=("n_heads", "head_width", "layer_heads", "qk_norm"),
        timed=_attention_timed,
        onnx=onnx_rules.attention,
    ),
    "fourier": Layer(
        module=attention.Fourier,
        flops=_fourier_flops,
        traffic=_none,
        one_length=True,
        timed=_fourier_timed,
        onnx=onnx_rules.fourier,
    ),
}
FEEDFORWARDS = {
    "dense": Layer(
        module=feedforward.DenseFeedForward,
        flops=lambda config, use: 2 * config.d_model * 2 * config.d_hidden,
        traffic=lambda config, use: 20 * config.d_hidden,
        neurons=lambda config: (config.d_hidden, config.d_hidden),
        muon=("kernel",),
        fields=("d_hidden", "layer_hidden", "activation"),
        timed=_hidden_timed,
        onnx=onnx_rules.dense,
    ),
    "glu": Layer(
        module=feedforward.GluFeedForward,
        flops=lambda config, use: 2 * config.d_model * 3 * config.d_hidden,
        traffic=lambda config, use: 48 * config.d_hidden,
        neurons=lambda config: (config.d_hidden, config.d_hidden),
        muon=("kernel",),
        fields=("d_hidden", "layer_hidden", "activation"),
        timed=_glu_timed,
        onnx=onnx_rules.glu,
    ),
    "tree": Layer(
        module=feedforward.TreeFeedForward,
        flops=lambda config, use: 2 * config.d_model * 2 * _tree_nodes(config, use),
        traffic=_none,
        neurons=lambda config: (config.n_trees * (config.tree_depth + 1), config.n_trees * config.nodes_per_tree),
        routing_flops=lambda config, use: 2 * config.d_model * _tree_nodes(config, use),
        routing_traffic=_tree_traffic,
        fields=("n_trees", "tree_depth", "tree_activation"),
        timed=_tree_timed,
        onnx=onnx_rules.tree,
    ),
    "fixed_tree": Layer(
        module=feedforward.FixedTreeFeedForward,
        flops=lambda config, use: 2 * config.d_model * (3 * config.n_trees * (config.tree_depth + 1) - config.n_trees),
        traffic=_none,
        neurons=lambda config: (config.n_trees * (config.tree_depth + 1), config.n_trees * config.nodes_per_tree),
        routing_flops=lambda config, use: 2 * config.d_model * config.n_trees * (2 * config.tree_depth + 1),
        routing_traffic=lambda config, use: config.d_model * (60 + 10 * config.n_trees * (config.tree_depth + 1)),
        own_steps=("route",),  # of length 0
        fields=("n_trees", "tree_depth", "tree_activation"),
        onnx=onnx_rules.tree,
    ),
    "leaf_tree": Layer(
        module=feedforward.LeafTreeFeedForward,
        flops=_leaf_tree_flops,
        traffic=lambda config, use: 40 * 2**config.tree_depth * config.leaf_width,
        neurons=_leaf_tree_neurons,
        routing_flops=lambda config, use: 2 * config.d_model * (2**config.tree_depth - 1),
        fields=("tree_depth", "activation", "leaf_width", "master_leaf"),
        timed=_leaf_tree_timed,
        onnx=onnx_rules.leaf_tree,
    ),
    "routed_tree": Layer(
        module=feedforward.RoutedTreeFeedForward,
        flops=_routed_tree_flops,
        traffic=lambda config, use: 20 * (config.n_trees * (config.d_model + config.leaf_width) + config.master_leaf),
        neurons=_routed_tree_neurons,
        routing_flops=lambda config, use: 2 * config.d_model * _routed_tree_decisions(config, use),
        muon=("kernel", "leaf_in", "leaf_out", "above_in", "above_out"),
        own_steps=("node_bias",),
        fields=(
            "n_trees",
            "tree_depth",
            "activation",
            "leaf_width",
            "master_leaf",
            "tree_gate",
            "tree_router",
            "leaf_bias",
        ),
        onnx=onnx_rules.routed_tree,
    ),
    "switch": Layer(
        module=feedforward.SwitchFeedForward,
        flops=_switch_flops,
        traffic=lambda config, use: 50 * config.d_hidden,
        neurons=lambda config: (config.d_hidden, config.n_experts * config.d_hidden),
        routing_flops=lambda config, use: 2 * config.d_model * config.n_experts,
        fields=("d_hidden", "layer_hidden", "activation", "n_experts"),
        timed=_hidden_timed,
        onnx=onnx_rules.switch,
    ),
    "none": Layer(
        module=feedforward.NoFeedForward,
        flops=_none,
        traffic=lambda config, use: -35 * config.d_model,  # its norm and sum, which every block is taken to have
        timed=lambda config, rows, seq_len: TimedPart(lambda x: x, [(rows * seq_len, config.d_model)]),
        onnx="a block without one is exported without it.",
    ),
}
_PACKAGED = frozenset({*MIXERS, *FEEDFORWARDS})

assert list(MIXERS) == MIXER_NAMES, "every name of ufbert.config.model has an entry, and every entry a name"
assert list(FEEDFORWARDS) == FEEDFORWARD_NAMES, "every name of ufbert.config.model has an entry, and every entry a name"
assert {name for name, layer in (MIXERS | FEEDFORWARDS).items() if layer.one_length} == ONE_LENGTH


def register_feedforward(name: str, layer: Layer) -> None:
    """Make a feedforward of your own known by a name, which `ModelConfig.feedforward` accepts from then on.

    The name is that of the layer's parameters, too. Registering it again replaces the layer.

    Raises UserError for a name that a part of a block has already, and for one that is no Python identifier.
    """
    _register(name, layer, FEEDFORWARDS, FEEDFORWARD_NAMES, others=MIXERS)


def register_mixer(name: str, layer: Layer) -> None:
    """Make a token mixer of your own known by a name, which `ModelConfig.mixer` accepts; else like a feedforward."""
    _register(name, layer, MIXERS, MIXER_NAMES, others=FEEDFORWARDS)


def _register(name: str, layer: Layer, layers: dict[str, Layer], names: list[str], others: dict[str, Layer]) -> None:
    if not name.isidentifier():
        raise UserError(f"A layer cannot be called {name!r}: its name must be a Python identifier.")
    if name in _PACKAGED or name in others or name.endswith("_norm"):
        raise UserError(f"A layer cannot be called {name!r}: another part of a block has that name.")
    if name in layers:
        jax.clear_caches()  # what was compiled is known by the configuration, which names the layer only
    else:
        names.append(name)
    layers[name] = layer
    (ONE_LENGTH.add if layer.one_length else ONE_LENGTH.discard)(name)

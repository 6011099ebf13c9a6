"""The feedforward sublayers. A new kind is a module here and an entry in `registry.py`.

Each takes hidden states, the layer's `Context` and a key for its noise (None: no noise), and returns its output and what
it has to report (`Aux`): weighted losses, and counts where statistics are asked for.
"""

import functools
import sys
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ufbert.config import ModelConfig, TreeBackend
from ufbert.nn.layers import Aux, Context, compute_dtype, dense, gpu_kernels, side_by_side
from ufbert.ops import fff, leaf_fff, native, routed_tree, switch, tree_kernels
from ufbert.ops.dense import ACTIVATIONS

Output = tuple[Float[Array, "b t d"], Aux]


class DenseFeedForward(nn.Module):
    """activation(x W_in) W_out."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        hidden = ACTIVATIONS[cfg.activation](dense(cfg, cfg.d_hidden, "in")(x))
        return dense(cfg, x.shape[-1], "out", closes_block=True)(hidden).astype(jnp.float32), Aux({})


class GluFeedForward(nn.Module):
    """(activation(x W_gate) * x W_value) W_out: GEGLU with the default GELU (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        d, f = x.shape[-1], cfg.d_hidden
        gate, value = dense(cfg, f, "gate"), dense(cfg, f, "value")
        out = dense(cfg, d, "out", closes_block=True)
        gpu = gpu_kernels() if cfg.activation == "gelu" else None
        if gpu is not None and gpu.gates.fits(x.size // d, f):
            hidden = gpu.gates.gated_gelu(side_by_side(x, [gate, value]).reshape(-1, 2, f))
            return out(hidden.reshape(*x.shape[:-1], f)), Aux({})
        hidden = ACTIVATIONS[cfg.activation](gate(x)) * value(x)
        return out(hidden).astype(jnp.float32), Aux({})


class TreeFeedForward(nn.Module):
    """K trees of depth D (`ufbert.ops.fff`). A node is one contiguous row of `w_in` and of `w_out`.

    Initialised as the reference trains it: N(0, init_std) for both matrices, zero bias (the class's own uniform
    initialisation is overwritten there; `tree_init = "uniform"` restores it).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        n, shape = cfg.nodes_per_tree, (cfg.n_trees, cfg.nodes_per_tree, cfg.d_model)
        if cfg.tree_init == "uniform":
            start_in, start_bias = (_uniform(cfg.d_model) for _ in range(2))
            start_out = _uniform(cfg.n_trees * (cfg.tree_depth + 1))
        else:
            start_in = start_out = nn.initializers.normal(cfg.init_std)
            start_bias = nn.initializers.zeros
        w_in = self.param("w_in", start_in, shape)
        bias = self.param("bias", start_bias, shape[:2])
        w_out = self.param("w_out", start_out, shape)
        activation = ACTIVATIONS[cfg.tree_activation]
        backend = tree_backend(cfg, x.size // cfg.d_model)
        y = fff.fast_feedforward(x, w_in, bias, w_out, backend=backend, activation=activation, dtype=compute_dtype(cfg))
        aux = Aux({})
        balanced = context.training and cfg.tree_balance > 0
        if balanced or context.statistics:
            rows, real = x.reshape(-1, cfg.d_model), None if context.real is None else context.real.reshape(-1)
            nodes, logits = fff.path_nodes(rows, w_in, bias)
            if balanced:
                balance = fff.balance_loss(nodes, logits, n, real)
                aux = aux._replace(losses={"tree_balance": cfg.tree_balance * balance})
            if context.statistics:
                aux = aux._replace(visits=fff.node_visits(nodes, n, real))
        return y, aux


class FixedTreeFeedForward(nn.Module):
    """K trees of depth D whose decisions are random and never learn: right where route . x > 0. Their neurons learn as those of
    `TreeFeedForward` do, and so tell what learnt decisions are worth.

    No gradient reaches `route`, and the optimizer leaves it alone. It starts at N(0, 1/d); only its directions decide.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        d, n, shape = cfg.d_model, cfg.nodes_per_tree, (cfg.n_trees, cfg.nodes_per_tree, cfg.d_model)
        normal = nn.initializers.normal(cfg.init_std)
        route = self.param("route", nn.initializers.normal(d**-0.5), (cfg.n_trees, n // 2, d))
        w_in = self.param("w_in", normal, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[:2])
        w_out = self.param("w_out", normal, shape)
        rows = x.reshape(-1, d)
        nodes = fff.decided_nodes(rows, jax.lax.stop_gradient(route))
        y = fff.sum_of_nodes(ACTIVATIONS[cfg.tree_activation], rows, nodes, w_in, bias, w_out)
        aux = Aux({})
        if context.statistics:
            aux = Aux({}, visits=fff.node_visits(nodes, n, None if context.real is None else context.real.reshape(-1)))
        return y.reshape(x.shape), aux


class LeafTreeFeedForward(nn.Module):
    """The original fast feedforward layer (`ufbert.ops.leaf_fff`), soft or straight-through in training, hard otherwise.

    Weights start as in the reference: uniform within 1/sqrt(d) for nodes and leaf inputs, 1/sqrt(w) for leaf outputs.
    With a master leaf the output is (1 - k) * tree + k * master, k one learned number that starts at a half.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        d, w, leaves = cfg.d_model, cfg.leaf_width, 2**cfg.tree_depth
        near, far = _uniform(d), _uniform(w)
        tree = leaf_fff.LeafTree(
            self.param("node", near, (leaves - 1, d)),
            self.param("node_bias", near, (leaves - 1,)),
            self.param("leaf_in", near, (leaves, d, w)),
            self.param("leaf_in_bias", near, (leaves, w)),
            self.param("leaf_out", far, (leaves, w, d)),
            self.param("leaf_out_bias", far, (leaves, d)),
        )
        rows, real = x.reshape(-1, d), None if context.real is None else context.real.reshape(-1)
        activation = ACTIVATIONS[cfg.activation]
        aux = Aux({})
        if context.training:
            y, aux = self._trained(rows, tree, context, key)
        else:
            hard = leaf_fff.descend_native if tree_backend(cfg, len(rows)) == "native" else leaf_fff.descend
            y, leaf = hard(rows, tree, activation)
            if context.statistics:
                weight = jnp.ones(leaf.shape) if real is None else real.astype(jnp.float32)
                aux = Aux({}, counts={"leaves": jnp.zeros((leaves,)).at[leaf].add(weight)})
        if cfg.master_leaf:
            hidden = activation(dense(cfg, cfg.master_leaf, "master_in", use_bias=True)(rows))
            share = self.param("master_share", nn.initializers.constant(0.5), (1,))[0]
            y = (1 - share) * y + share * dense(cfg, d, "master_out", use_bias=True)(hidden).astype(jnp.float32)
        return y.reshape(x.shape), aux

    def _trained(
        self, rows: Float[Array, "r d"], tree: leaf_fff.LeafTree, context: Context, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "r d"], Aux]:
        """Training output and losses, with the temperature and the hardening weight of the moment."""
        cfg, progress = self.config, context.progress
        real = None if context.real is None else context.real.reshape(-1)
        shares = leaf_fff.right_shares(rows, tree, temperature=cfg.leaf_temperature**progress)
        if key is not None and cfg.leaf_leak > 0:
            shares = leaf_fff.leak_regions(shares, cfg.leaf_leak, key)
        soft = leaf_fff.leaf_weights(shares)
        weights = soft if cfg.leaf_training == "soft" else leaf_fff.leaf_weights(leaf_fff.straight_through(shares))
        losses = {}
        if cfg.leaf_hardening > 0 and cfg.tree_depth > 0:
            ramp = jnp.minimum(1.0, progress / cfg.leaf_hardening_ramp) if cfg.leaf_hardening_ramp > 0 else 1.0
            losses["hardening"] = cfg.leaf_hardening * ramp * jnp.mean(leaf_fff.node_entropies(shares, real))
        if cfg.tree_balance > 0:
            losses["tree_balance"] = cfg.tree_balance * leaf_fff.balance_loss(soft, real)
        return leaf_fff.mixture(rows, tree, weights, ACTIVATIONS[cfg.activation]), Aux(losses)


class RoutedTreeFeedForward(nn.Module):
    """Trees with a leaf of neurons at the end of each path (`ufbert.ops.routed_tree`), one leaf a tree in training, too.

    Nodes start at N(0, 1/d), so that the logits of a normalised row start at N(0, 1). With ancestors all leaves start alike.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        d, m, g, dtype = cfg.d_model, cfg.n_trees, 2**cfg.tree_depth, compute_dtype(cfg)
        rows, real = x.reshape(-1, d), None if context.real is None else context.real.reshape(-1)
        sides = {"in": (d, cfg.leaf_width), "out": (cfg.leaf_width, d)}
        w_in, w_out = (routed_tree.folded(self._leaves(*side), side[0]).astype(dtype) for side in sides.items())
        activation, bias = ACTIVATIONS[cfg.activation], self._leaf_bias(dtype)
        aux = Aux({})
        if cfg.tree_router == "token":
            assert context.ids is not None
            leaf = routed_tree.hashed_leaves(context.ids.reshape(-1), m, g)
            y = routed_tree.grouped(rows.astype(dtype), leaf, jnp.ones(leaf.shape), w_in, w_out, activation, bias)
        else:
            node = self.param("node", nn.initializers.normal(d**-0.5), (m, g - 1, d))
            node_bias = self.param("node_bias", nn.initializers.zeros, (m, g - 1))
            logits = routed_tree.node_logits(rows, routed_tree.directions(node), node_bias)
            path = routed_tree.descend(logits)
            leaf = path.leaf
            if context.training and cfg.tree_even > 0:
                aux = Aux({"tree_even": routed_tree.centred(path, node_bias, cfg.tree_even, real)})
            if cfg.tree_gate in ("through", "anneal") and context.training:
                shares = routed_tree.leaf_shares(logits)
                if cfg.tree_gate == "anneal":
                    shares = routed_tree.annealed_shares(logits, context.progress, cfg.tree_harden)
                y = routed_tree.masked(rows.astype(dtype), shares, w_in, w_out, activation, bias)
            else:
                gate = routed_tree.path_gate(path) if cfg.tree_gate == "path" else jnp.ones(leaf.shape)
                y = routed_tree.grouped(rows.astype(dtype), leaf, gate, w_in, w_out, activation, bias)
        if context.statistics:
            weight = jnp.ones(len(rows)) if real is None else real.astype(jnp.float32)
            aux = aux._replace(
                counts={"leaves": jnp.zeros(m * g).at[leaf + g * jnp.arange(m)[None]].add(weight[:, None])}
            )
        if cfg.master_leaf:
            hidden = activation(dense(cfg, cfg.master_leaf, "shared_in", use_bias=cfg.leaf_bias)(rows))
            y = y + dense(cfg, d, "shared_out", use_bias=False, closes_block=True)(hidden)
        return y.reshape(x.shape).astype(jnp.float32), aux

    def _leaves(self, side: str, shape: tuple[int, int]) -> dict[str, Float[Array, "m k a b"]]:
        """Declare the weights of the leaves and of the nodes above them, if those have any."""
        cfg = self.config
        n_leaves = 2**cfg.tree_depth
        above = {"none": 0, "root": 1, "levels": n_leaves - 1}[cfg.leaf_ancestors]
        zeros, normal = nn.initializers.zeros, nn.initializers.normal(cfg.init_std)
        first = zeros if side == "out" and cfg.zero_init_out else normal

        def root_first(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return jnp.zeros(shape, dtype).at[:, :1].set(first(key, (shape[0], 1, *shape[2:]), dtype))

        starts = {f"leaf_{side}": (n_leaves, zeros if above else first)}
        if above:
            starts[f"above_{side}"] = above, root_first
        return {name: self.param(name, start, (cfg.n_trees, k, *shape)) for name, (k, start) in starts.items()}

    def _leaf_bias(self, dtype: jnp.dtype) -> routed_tree.LeafBias | None:
        """Declare the biases of the leaves, if they have any."""
        cfg = self.config
        if not cfg.leaf_bias:
            return None
        widths = {"leaf_in_bias": cfg.leaf_width, "leaf_out_bias": cfg.d_model}
        shapes = {name: (cfg.n_trees, 2**cfg.tree_depth, width) for name, width in widths.items()}
        return routed_tree.LeafBias(
            *(self.param(name, nn.initializers.zeros, shape).astype(dtype) for name, shape in shapes.items())
        )


class SwitchFeedForward(nn.Module):
    """Experts, one a token (`ufbert.ops.switch`). In training each takes at most its capacity, in inference any number.

    Padding is never routed: it takes no place and counts in no loss.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        cfg = self.config
        d, e = cfg.d_model, cfg.n_experts
        normal, dtype = nn.initializers.normal(cfg.init_std), compute_dtype(cfg)
        router = self.param("router", normal, (d, e))
        w_in = self.param("w_in", normal, (e, d, cfg.d_hidden)).astype(dtype)
        w_out = self.param("w_out", normal, (e, cfg.d_hidden, d)).astype(dtype)
        rows, real = x.reshape(-1, d), None if context.real is None else context.real.reshape(-1)
        activation = ACTIVATIONS[cfg.activation]
        routing = switch.route(rows, router, real, jitter=cfg.router_jitter, key=key)
        losses, counts = {}, None
        if context.training:
            limit = switch.capacity(len(rows), e, cfg.capacity_factor)
            y, _ = switch.switch_with_capacity(rows.astype(dtype), routing, w_in, w_out, activation, limit, real)
            losses["router_balance"] = cfg.router_balance * routing.balance_loss
            losses["router_z"] = cfg.router_z * routing.z_loss
        else:
            y = switch.switch_whole(rows.astype(dtype), routing, w_in, w_out, activation, real)
        if context.statistics:
            weight = jnp.ones(len(rows)) if real is None else real.astype(jnp.float32)
            counts = {"experts": jnp.zeros((e,)).at[routing.expert].add(weight)}
        return y.reshape(x.shape).astype(jnp.float32), Aux(losses, counts=counts)


class NoFeedForward(nn.Module):
    """Nothing. A block of this kind is its mixer alone, and has no norm for a feedforward."""

    config: ModelConfig

    def __call__(self, x: Float[Array, "b t d"], context: Context, key: Key[Array, ""] | None) -> Output:
        return jnp.zeros_like(x), Aux({})


def _uniform(fan: int) -> nn.initializers.Initializer:
    """Uniform within +-1/sqrt(fan)."""

    def start(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, minval=-(fan**-0.5), maxval=fan**-0.5)

    return start


def tree_backend(config: ModelConfig, rows: int) -> TreeBackend:
    """`config.tree_backend`, with auto resolved for the default device and calls of so many rows (tokens).

    Kernels that cannot be had here are replaced, and one line says why. `auto` takes none where several devices share the work:
    XLA, which knows nothing of them, would have every device compute all rows.
    """
    wanted, platform = config.tree_backend, jax.default_backend()
    if wanted in ("masked", "gather"):
        return wanted
    if wanted == "pallas":
        why = tree_kernels.unavailable()
        return _instead("pallas", why, tree_backend(replace(config, tree_backend="auto"), rows)) if why else wanted
    alone = jax.device_count() == 1
    has_trees = any(kind in ("tree", "leaf_tree") for kind in config.feedforward)  # else nothing need be compiled
    tried = has_trees and (wanted == "native" or (platform == "cpu" and alone))
    why = native.unavailable() if tried else ""
    if tried and wanted == "native" and not why:
        return "native"
    usual = fff.usual_backend(platform, rows, config.tree_depth, native_kernels=tried and not why)
    return _instead("native", why, usual) if why else usual


def _instead(wanted: TreeBackend, why: str, backend: TreeBackend) -> TreeBackend:
    """Say once why other kernels than the wanted ones compute the trees, and return their backend."""
    _say_once(f"no {wanted} tree kernels: {why}; {backend} computes the trees instead")
    return backend


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

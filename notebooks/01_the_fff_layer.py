# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The fast feedforward layer
#
# UltraFastBERT uses 12 of the 4095 neurons of each feedforward layer. Which 12, who chooses them, what is saved, how such
# a layer learns at all, and what goes wrong in it: this notebook answers each question with a picture, a formula and a
# number. It needs no accelerator, no download, and about a minute. Nothing is assumed but matrix products and the idea of
# a gradient.
#
# Two layers carry the name *fast feedforward* (FFF). Most confusion comes from mixing them up:
#
# - the **tree of neurons** of UltraFastBERT (Belcak & Wattenhofer 2023, arXiv 2311.10770): parts 1 to 5;
# - the **tree of small networks** of the paper before it (Belcak & Wattenhofer 2023, arXiv 2308.14711): part 6.
#
# A *token* is here a vector of `d` numbers, the state of one word piece inside the network. Other letters: `b` tokens,
# `m` trees side by side, `n` nodes a tree, `D` the depth of a tree. What the text claims, an `assert` in a cell checks, so
# this notebook fails when a claim stops being true. Numbers that depend on the machine are printed and not promised.

# %%
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm

from ufbert.ops import fff, leaf_fff
from ufbert.ops.dense import gelu, symmetric_gelu

walk = jax.jit(fff.path_nodes)
LEFT, RIGHT, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#333333"  # told apart by colour-blind readers too
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

# %% [markdown]
# ## 1. One neuron: a dot product that is also a question
#
# A neuron has a row of input weights `w` (`d` numbers), a bias `b` (one number) and a row of output weights `u` (`d`
# numbers). For a token `x` it computes
#
# $$ z = w \cdot x + b, \qquad \text{contribution to the output} = \mathrm{gelu}(z)\, u . $$
#
# The number `z` is called the *logit*. All `x` with `z = 0` form a line in the plane (a hyperplane in `d` dimensions), so
# the sign of `z` answers a question: on which side of my line is this token? `gelu(z) = z Φ(z)`, with Φ the distribution
# function of the normal law (Hendrycks & Gimpel 2016, arXiv 1606.08415), makes the neuron loud on one side and nearly
# silent on the other. Keep that asymmetry in mind: it comes back in part 5.

# %%
w, b = jnp.array([1.2, 0.8]), -0.2
side = jnp.linspace(-2, 2, 201)
grid = jnp.stack(jnp.meshgrid(side, side), axis=-1)
logit = grid @ w + b
tokens = jax.random.uniform(jax.random.key(3), (24, 2), minval=-1.8, maxval=1.8)
says_right = np.asarray(tokens @ w + b > 0)

figure, (plane, curve) = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(1, 1.15), layout="constrained")
shade = plane.contourf(side, side, gelu(logit), levels=np.linspace(-0.25, 4, 18), cmap="cividis", alpha=0.75)
plane.contour(side, side, logit, levels=[0], colors="white", linewidths=2.5)
for right, colour, name in ((False, LEFT, "z ≤ 0: left"), (True, RIGHT, "z > 0: right")):
    chosen = tokens[says_right == right]
    plane.scatter(chosen[:, 0], chosen[:, 1], c=colour, edgecolors="white", s=45, label=name)
unit = w / jnp.linalg.norm(w)
foot = -b * w / (w @ w) + 1.2 * jnp.array([-unit[1], unit[0]])  # a point of the line
plane.annotate("", foot + 0.75 * unit, foot, arrowprops={"arrowstyle": "-|>", "color": "white", "lw": 2})
plane.text(*(foot + 0.85 * unit), "w", color="white", fontsize=13, weight="bold")
plane.set(title="24 tokens, one neuron, d = 2; shade: gelu(z)", xlabel="x[0]", ylabel="x[1]", aspect="equal")
plane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
figure.colorbar(shade, ax=plane, ticks=[0, 1, 2, 3, 4])

z = jnp.linspace(-4, 4, 401)
curve.axvspan(-4, 0, color=LEFT, alpha=0.08)
curve.axvspan(0, 4, color=RIGHT, alpha=0.08)
curve.plot(z, gelu(z), color=INK, lw=2, label="gelu(z), what it says")
curve.plot(z, jax.vmap(jax.grad(gelu))(z), color=GREEN, lw=2, ls="--", label="its slope, what it hears")
curve.text(-3.8, 0.25, "left: nearly silent", color=LEFT)
curve.text(1.2, 0.25, "right: loud", color=RIGHT)
curve.set(title="the same neuron, seen along z", xlabel="logit z", ylabel="value")
curve.legend(loc="upper left")
plt.show()

# %% [markdown]
# The slope matters as much as the value. A neuron's input weights learn from a token in proportion to `gelu'(z)`: where
# the slope is zero, the neuron does not hear what it should change.

# %%
for value in (-4.0, -2.0, 0.0, 2.0, 4.0):
    print(f"z = {value:+.0f}   gelu {float(gelu(value)):+.4f}   slope {float(jax.grad(gelu)(value)):+.4f}")
assert abs(float(jax.grad(gelu)(-4.0))) < 0.001
assert abs(float(jax.grad(gelu)(4.0)) - 1) < 0.001

# %% [markdown]
# ## 2. From one neuron to a tree
#
# An ordinary feedforward layer asks all its neurons about every token. A tree asks few, one after the other, and the
# answer decides who is asked next (arXiv 2311.10770, section 2):
#
# 1. Start at the root, node 0.
# 2. Compute the node's logit `z` and add `gelu(z) u` to the output.
# 3. Go on to the **right** child if `z > 0` (strictly), else to the **left** one.
# 4. Stop after `D + 1` nodes.
#
# Nodes are numbered as in a heap, level by level: the children of node `i` are `2i + 1` (left) and `2i + 2` (right). A tree
# of depth `D` has `n = 2^(D+1) - 1` nodes, a token visits `D + 1` of them. Every node is a neuron like any other: those
# above decide *and* contribute, and the last ones contribute and have nobody left to send the token to.
#
# $$ y = \sum_{v \,\in\, \text{path}(x)} \mathrm{gelu}(w_v \cdot x + b_v)\; u_v $$
#
# Weights are stored one row a node: `w_in (m, n, d)`, `bias (m, n)`, `w_out (m, n, d)`. In the plane one can see it all.
# Here is a tree of depth 3, one tree (`m = 1`), 15 neurons, made by hand.


# %%
def place(n):
    """Where to draw the nodes of a tree: an (n, 2) array, the root on top."""
    level = np.floor(np.log2(np.arange(n) + 1)).astype(int)
    return np.stack([(np.arange(n) - (2**level - 1) + 0.5) / 2**level, -level], axis=1)


def draw_tree(axis, colours, *, path=(), labels=False, size=90.0):
    """Nodes as circles. `colours`: one a node, None for a hollow circle. `path`: nodes whose edges are drawn thick."""
    at = place(len(colours))
    for child in range(1, len(colours)):
        ends, on_path = at[[(child - 1) // 2, child]], child in path
        axis.plot(*ends.T, color=INK if on_path else "#bbbbbb", lw=3 if on_path else 0.8, zorder=1)
    for hollow in (True, False):
        chosen = [i for i, colour in enumerate(colours) if (colour is None) == hollow]
        face = "white" if hollow else [colours[i] for i in chosen]
        edge = "#999999" if hollow else "#444444"
        axis.scatter(*at[chosen].T, c=face, s=size, edgecolors=edge, linewidths=0.8, zorder=2)
    if labels:
        for i, spot in enumerate(at):
            axis.text(*spot, str(i), ha="center", va="center", fontsize=9, zorder=3)
    axis.set_axis_off()
    axis.margins(x=0.05, y=0.12)


# %%
turning = [
    (1, 0.25, 0),
    (0.2, 1, 0.1),
    (-0.3, 1, -0.1),
    (1, -0.2, 0.5),
    (1, 0.3, 0.45),
    (1, 0.3, -0.4),
    (1, -0.2, -0.5),
]
last = np.asarray(jax.random.normal(jax.random.key(0), (8, 3)))
small = np.concatenate([np.array(turning), last]).astype(np.float32)
w_in, bias = jnp.asarray(small[None, :, :2]), jnp.asarray(small[None, :, 2])

token = jnp.array([[0.1, 0.35]])
nodes, logits = walk(token, w_in, bias)
path = nodes[0, 0].tolist()
for node, value in zip(path, logits[0, 0].tolist(), strict=True):
    turn = (
        "the last node" if node == path[-1] else f"{'right' if value > 0 else 'left '} -> {2 * node + 1 + (value > 0)}"
    )
    print(f"node {node:2d}   z = {value:+.3f}   {turn}")

side = jnp.linspace(-1, 1, 301)
points = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
visited = np.asarray(walk(points, w_in, bias)[0])[:, 0]
regions = visited[:, -1].reshape(301, 301)
eight = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#88AADD", "#D55E00", "#CC79A7", "#BBBBBB"]

figure, (plane, tree) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.5), layout="constrained")
plane.pcolormesh(side, side, regions, cmap=ListedColormap(eight), vmin=6.5, vmax=14.5, alpha=0.75, rasterized=True)
values = np.asarray(points @ w_in[0].T + bias)
for node in range(7):
    here = np.any(visited == node, axis=1).reshape(301, 301)
    value = np.where(here, values[:, node].reshape(301, 301), np.nan)
    plane.contour(side, side, value, levels=[0], colors=INK, linewidths=3 if node in path else 1)
for leaf in range(7, 15):
    plane.text(*points[visited[:, -1] == leaf].mean(axis=0), str(leaf), ha="center", va="center", fontsize=12)
plane.scatter(*token[0], marker="*", s=260, c="white", edgecolors=INK, zorder=3)
plane.set(title="eight regions; thick: the cuts this token met", xlabel="x[0]", ylabel="x[1]", aspect="equal")
draw_tree(tree, ["white"] * 7 + eight, path=path, labels=True, size=380)
tree.set_title("the tree; thick: the way of the token ★")
tree.text(0.02, 0, "left child 2i + 1\nright child 2i + 2", fontsize=10, va="center", color=INK)
plt.show()

assert path[0] == 0
assert all(
    child == 2 * node + 1 + (value > 0)
    for node, child, value in zip(path, path[1:], logits[0, 0].tolist(), strict=False)
)
assert set(regions.ravel()) == set(range(7, 15))

# %% [markdown]
# A child's line cuts only its parent's half, so three questions tell eight regions apart. Inside a region all tokens use
# the same four neurons.
#
# Now the real size: `d = 768` and depth 11, one tree. And the rule for ties, which differs between the two kinds of FFF and
# has spoilt many a comparison: a logit of exactly zero turns **left** here.

# %%
n, d = 4095, 768
key_x, key_in, key_out = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(key_x, (64, d))
big_in, big_out = 0.02 * jax.random.normal(key_in, (1, n, d)), 0.02 * jax.random.normal(key_out, (1, n, d))
big_bias = jnp.zeros((1, n))

nodes, logits = walk(x, big_in, big_bias)
print("the first token visits", nodes[0, 0].tolist())
assert nodes.shape == (64, 1, 12)
assert fff.tree_depth(n) == 11

tie, _ = walk(jnp.zeros((1, 2)), w_in, jnp.zeros((1, 15)))
print("a token of zeros, no bias:", tie[0, 0].tolist())
assert tie[0, 0].tolist() == [0, 1, 3, 7]

# %% [markdown]
# ## 3. What is computed, and what is not
#
# The same function can be computed in two ways.
#
# - `masked` computes all `n` neurons and then multiplies those off the path by zero. This is how UltraFastBERT was trained,
#   and how its published model runs: it saves nothing.
# - `gather` reads only the rows on the path, level by level.
#
# They give the same numbers, up to the rounding of float32.

# %%
forms = {backend: jax.jit(partial(fff.fast_feedforward, backend=backend)) for backend in ("masked", "gather")}
outputs = {name: form(x, big_in, big_bias, big_out) for name, form in forms.items()}
difference = float(jnp.abs(outputs["masked"] - outputs["gather"]).max())
print(f"largest difference {difference:.1e}, at values up to {float(jnp.abs(outputs['masked']).max()):.2f}")
assert difference < 1e-5

# %% [markdown]
# Now the work. A dense layer of `n` neurons needs `d` multiply-adds a neuron on the way in and `d` on the way out: `2 d n` a
# token. A path needs `2 d (D + 1)`. Instead of trusting the formula we count: jax can show the program it would run, and
# every product in it has known shapes.


# %%
def multiply_adds(function, *arguments):
    """Multiply-adds of all matrix and dot products in the program that jax makes of `function`."""

    def count(program):
        total = 0
        for step in program.eqns:
            if step.primitive.name == "dot_general":
                (summed, _), _ = step.params["dimension_numbers"]
                shape = step.invars[0].aval.shape
                total += step.outvars[0].aval.size * int(np.prod([shape[axis] for axis in summed]))
            for value in step.params.values():
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def dense(x, w_in, bias, w_out):
    """An ordinary feedforward layer with the same neurons: all of them contribute."""
    return gelu(x @ w_in[0].T + bias) @ w_out[0]


forms["dense"] = jax.jit(dense)
weights = (big_in, big_bias, big_out)
counts = {name: multiply_adds(form, x[:1], *weights) for name, form in forms.items()}
for name, count in sorted(counts.items()):
    print(f"{name:7} {count:10,} multiply-adds a token")
assert counts["dense"] == counts["masked"] == 2 * d * n
assert counts["gather"] == 2 * d * 12
print(f"dense / gather = {counts['dense'] / counts['gather']:.0f}")

# %% [markdown]
# 341 times less arithmetic is **not** 341 times less time. A dense product reads each weight once for the whole batch, in
# order, at full speed. `gather` reads other rows for each token, and must finish one level before it knows where to go on.
# So the gain depends on the machine and the batch: it is good on a CPU, and often none on an accelerator, which would
# rather do plenty of regular work than a little irregular work. Below is this machine, this minute, 64 random tokens;
# nothing in this notebook rests on it.

# %%
for name, form in forms.items():
    spent = []
    for attempt in range(6):
        fresh = jax.random.normal(jax.random.key(attempt), (64, d)).block_until_ready()
        began = time.perf_counter()
        form(fresh, *weights).block_until_ready()
        spent.append(time.perf_counter() - began)
    print(f"{name:7} {1e3 * sorted(spent[1:])[2]:7.2f} ms for 64 tokens")

# %% [markdown]
# ## 4. How gradients reach a path
#
# In training the walk is the same hard walk: no randomness, no mixture of paths. The path is a list of whole numbers, and
# whole numbers have no gradient, so it is treated as given. With `g = ∂loss/∂y` (`d` numbers a token), node `v` gets
#
# $$ \frac{\partial\,\text{loss}}{\partial u_v} = \sum_{x:\, v \in \text{path}(x)} \mathrm{gelu}(z_v)\, g, \qquad
# \frac{\partial\,\text{loss}}{\partial w_v} = \sum_{x:\, v \in \text{path}(x)} \mathrm{gelu}'(z_v)\, (u_v \cdot g)\; x . $$
#
# Both sums run over the visitors of `v`. No visitors, no gradient: exactly zero, not merely small.

# %%
n, d = 63, 8  # depth 5
key_x, key_y, key_in, key_out = jax.random.split(jax.random.key(1), 4)
x, y = jax.random.normal(key_x, (64, d)), jax.random.normal(key_y, (64, d))
tree = {
    "w_in": jax.random.normal(key_in, (1, n, d)) * d**-0.5,
    "bias": jnp.zeros((1, n)),
    "w_out": jax.random.normal(key_out, (1, n, d)) * d**-0.5,
}


def output(tree, x, activation=gelu):
    return fff.fast_feedforward(x, tree["w_in"], tree["bias"], tree["w_out"], backend="masked", activation=activation)


def loss(tree, x, y):
    return 0.5 * jnp.sum((output(tree, x) - y) ** 2)


slopes = jax.jit(jax.grad(loss))

figure, axes = plt.subplots(2, 1, figsize=(10, 5.6), layout="constrained")
scale, colours = LogNorm(0.01, 100), plt.get_cmap("viridis")
for axis, count, title in zip(axes, (1, 64), ("one token", "64 tokens"), strict=True):
    gradient = slopes(tree, x[:count], y[:count])
    strength = np.linalg.norm(gradient["w_in"][0], axis=1)
    visits = np.asarray(fff.node_visits(walk(x[:count], tree["w_in"], tree["bias"])[0], n))[0]
    draw_tree(axis, [colours(scale(s)) if s > 0 else None for s in strength])
    axis.set_title(f"{title}: {np.sum(strength > 0)} of {n} neurons get a gradient")
    print(f"{title:9}: {int((visits > 0).sum())} neurons visited, {int((strength > 0).sum())} with a gradient")
    assert np.array_equal(visits > 0, strength > 0)
    for part in gradient.values():
        assert np.all(np.asarray(part[0])[visits == 0] == 0)  # exactly zero
figure.colorbar(
    plt.cm.ScalarMappable(scale, colours), ax=axes, label="|∂loss/∂w_in| of the node (hollow: zero)", shrink=0.8
)
plt.show()

# %% [markdown]
# The root hears all tokens, each of its children about half, a leaf one in 32. That is the *shrinking batch* of a deep tree:
# far down, a batch is small. (One more thing to know: an optimiser with weight decay or momentum, such as AdamW, moves rows
# even when their gradient is zero.)
#
# The formula by hand, for the root, against what jax finds:

# %%
gradient = slopes(tree, x, y)
root_in, root_out = tree["w_in"][0, 0], tree["w_out"][0, 0]
g = output(tree, x) - y  # the derivative of the loss by the output, (b, d)
slope = jax.vmap(jax.grad(gelu))(x @ root_in)
by_hand = (slope * (g @ root_out)) @ x
print("by hand", np.round(by_hand[:4], 3), "   jax", np.round(gradient["w_in"][0, 0, :4], 3))
np.testing.assert_allclose(by_hand, gradient["w_in"][0, 0], rtol=1e-3, atol=1e-3)

# %% [markdown]
# **The turn has no gradient.** Push the root's bias up and down and watch one number of the output. While the token stays on
# one side, the output moves smoothly, and the gradient is its slope. When the logit crosses zero, the token goes to the
# other half of the tree, where other neurons answer: the output jumps. No gradient sees the jump.

# %%
one = x[:1]
start = float(walk(one, tree["w_in"], tree["bias"])[1][0, 0, 0])  # the root's logit


def first_number(root_logit):
    """The first number of the output if the root's bias were such that its logit is `root_logit`."""
    moved = tree | {"bias": tree["bias"].at[0, 0].set(root_logit - start)}
    return output(moved, one)[0, 0]


reach = jnp.linspace(-1.5, 1.5, 300)
heights = jax.vmap(first_number)(reach)
figure, axis = plt.subplots(figsize=(7.5, 3.3), layout="constrained")
for right, colour in ((False, LEFT), (True, RIGHT)):
    half = (reach > 0) == right
    axis.plot(reach[half], heights[half], color=colour, lw=2.5, label=f"turns {'right' if right else 'left'}")
at = -0.9
tangent = float(jax.grad(first_number)(at))
run = np.array([-0.45, 0.45])
axis.plot(at + run, float(first_number(at)) + tangent * run, color=INK, ls="--", label="the gradient's view at ●")
axis.plot(at, float(first_number(at)), "o", color=INK)
axis.axvline(0, color="#999999", lw=1, ls=":")
axis.set(
    xlabel="logit of the root", ylabel="first number of the output", title="smooth on each side, a jump between them"
)
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

step = 0.001
across = float((first_number(step) - first_number(-step)) / (2 * step))
beside = float(jax.grad(first_number)(-step))
print(f"slope across the jump, measured with a step of {step}: {across:+.1f}; the gradient beside it: {beside:+.3f}")
assert abs(across) > 10 * abs(beside)

# %% [markdown]
# Away from the jump the gradient is right. The check is the oldest one there is: move all weights a little along a random
# direction, there and back, and compare the difference with what the gradient predicts. We take a token none of whose turns
# is close.

# %%
_, logits = walk(x, tree["w_in"], tree["bias"])
closest = jnp.abs(logits[:, 0, :-1]).min(axis=1)  # the last node does not turn
clear = int(closest.argmax())
print(f"token {clear}: its closest turn has |z| = {float(closest[clear]):.2f}")
assert closest[clear] > 0.1

alone, goal = x[clear : clear + 1], y[clear : clear + 1]
gradient = slopes(tree, alone, goal)
for seed in range(4):
    keys = dict(zip(tree, jax.random.split(jax.random.key(seed), 3), strict=True))
    way = {name: jax.random.normal(keys[name], array.shape) for name, array in tree.items()}
    predicted = float(sum(jnp.vdot(gradient[name], way[name]) for name in tree))
    there, back = ({name: tree[name] + e * way[name] for name in tree} for e in (0.003, -0.003))
    measured = float((loss(there, alone, goal) - loss(back, alone, goal)) / 0.006)
    print(f"predicted {predicted:+9.4f}   measured {measured:+9.4f}")
    np.testing.assert_allclose(measured, predicted, rtol=0.02, atol=0.02)

# %% [markdown]
# **Why it learns nonetheless.** Each node that turns is also a neuron whose answer is part of the output. Its weights move so
# that `gelu(z) u` helps; as they move, its line moves, and the tokens are divided anew. The division is a by-product. Nobody
# ever optimised it as such, which is the charm of the layer and the source of its ailment.
#
# ## 5. Why subtrees die
#
# A *dead subtree* is a part of the tree that no token enters. It gets no gradient, so it cannot do anything about it.
# Sedghi et al. 2026 (arXiv 2604.08565) report this in tree layers of large language models, call it auto-pruning, and put
# it down to hard routing together with an asymmetric nonlinearity. Let us watch it, with a toy that trains in seconds.
#
# **The toy.** Tokens are random directions in `d = 8` dimensions, scaled as a norm layer scales them. What the layer should
# answer has two parts, drawn at random for every seed: a *bent* part, `|x A| B` less its mean, in which no straight
# (linear) function can explain anything; and, if we like, a *straight* part `x M`. The error is quoted as a share of the
# variance: 1 is the error of always answering the mean. The tree has depth 5: 63 neurons, 6 a token.

# %%
D_MODEL, DEPTH, TOKENS, UPDATES, RATE, SEEDS = 8, 5, 128, 600, 0.01, 8
NODES = 2 ** (DEPTH + 1) - 1


def draw_tokens(key, count):
    x = jax.random.normal(key, (count, D_MODEL))
    return x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True))


def wanted(key, x, straight):
    """What the layer should answer; `straight` is the weight of the part that a matrix could compute."""
    a, b, m = jax.random.split(key, 3)
    bend = jnp.abs(x @ jax.random.normal(a, (D_MODEL, 16)) * D_MODEL**-0.5) - (2 / jnp.pi) ** 0.5
    bent = 1.5 * bend @ jax.random.normal(b, (16, D_MODEL)) / 4
    return bent + straight * x @ jax.random.normal(m, (D_MODEL, D_MODEL)) * D_MODEL**-0.5


def error(found, goal):
    return jnp.mean((found - goal) ** 2) / jnp.mean((goal - goal.mean(axis=0)) ** 2)


def trained(params, loss, key, rate=RATE):
    """`params` after UPDATES steps of Adam down `loss(params, tokens, progress)`, new tokens each, `rate` falling to 0."""

    def update(state, i):
        params, mean, square = state
        slope = jax.grad(loss)(params, draw_tokens(jax.random.fold_in(key, i), TOKENS), i / UPDATES)
        mean = jax.tree.map(lambda m, s: 0.9 * m + 0.1 * s, mean, slope)
        square = jax.tree.map(lambda q, s: 0.98 * q + 0.02 * s**2, square, slope)
        first, second, now = 1 - 0.9 ** (i + 1.0), 1 - 0.98 ** (i + 1.0), rate * (1 - i / UPDATES)

        def moved(p, m, q):
            return p - now * (m / first) / (jnp.sqrt(q / second) + 1e-8)

        return (jax.tree.map(moved, params, mean, square), mean, square), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(update, (params, zeros, zeros), jnp.arange(UPDATES))[0][0]


def start_tree(seed, root_bias):
    key_in, key_out = jax.random.split(jax.random.key(1000 + seed))
    return {
        "w_in": jax.random.normal(key_in, (1, NODES, D_MODEL)) * D_MODEL**-0.5,
        "bias": jnp.zeros((1, NODES)).at[0, 0].set(root_bias),
        "w_out": jax.random.normal(key_out, (1, NODES, D_MODEL)) * D_MODEL**-0.5,
    }


def train_tree(seed, symmetric, straight, balance, root_bias):
    """One tree layer on the toy: visits of each node (1, n) by 4096 new tokens, and the error on them."""
    task, batches, test = jax.random.split(jax.random.key(seed), 3)

    def activation(z):
        return jnp.where(symmetric, symmetric_gelu(z), gelu(z))

    def loss(tree, x, progress):
        miss = jnp.mean((output(tree, x, activation) - wanted(task, x, straight)) ** 2)
        nodes, logits = fff.path_nodes(x, tree["w_in"], tree["bias"])
        return miss + balance * fff.balance_loss(nodes, logits, NODES)

    tree = trained(start_tree(seed, root_bias), loss, batches)
    x = draw_tokens(test, 4096)
    nodes, _ = fff.path_nodes(x, tree["w_in"], tree["bias"])
    return fff.node_visits(nodes, NODES), error(output(tree, x, activation), wanted(task, x, straight))


# %% [markdown]
# We train all cases at once, 8 seeds each: `gelu` and `symmetric_gelu` (`gelu(z) + gelu(-z)`, as loud on the left as on the
# right); targets without and with a straight part; without and with `fff.balance_loss`, a loss that asks every node to send
# half its visitors each way (after the balance loss of Switch, Fedus et al. 2021, arXiv 2101.03961); and some trees whose
# root starts with a bias of -4 or +4, of which more in a moment.

# %%
cases = [  # symmetric_gelu?, weight of the straight part, weight of the balance loss, bias of the root at the start
    *((symmetric, straight, balance, 0.0) for symmetric in (False, True) for straight in (0.0, 1.0) for balance in (0.0, 0.3)),
    *((symmetric, straight, 0.0, root) for straight in (0.0, 1.0) for symmetric, root in ((False, -4.0), (False, 4.0), (True, -4.0))),
    (False, 1.0, 0.3, -4.0),
]  # fmt: skip
seeds = jnp.tile(jnp.arange(SEEDS), len(cases))
settings = [jnp.repeat(jnp.array(column), SEEDS) for column in zip(*cases, strict=True)]
visits, errors = jax.jit(jax.vmap(train_tree))(seeds, *settings)
visits = dict(zip(cases, np.asarray(visits).reshape(-1, SEEDS, 1, NODES), strict=True))
errors = dict(zip(cases, np.asarray(errors).reshape(-1, SEEDS), strict=True))
assert all(found.mean() < 0.7 for found in errors.values())  # they do learn

# %% [markdown]
# ### First ailment: a silent neuron cannot call anybody back
#
# Let the root start with bias -4. Nearly all tokens turn left, so half the tree is as good as dead before the first update,
# and they do so on the root's silent side. Will some of them be won back? For comparison: +4, where the right half holds
# everybody and the root is loud; and -4 with `symmetric_gelu`, where the left side is loud too.

# %%
x = draw_tokens(jax.random.key(0), 1000)
for symmetric, activation in ((False, gelu), (True, symmetric_gelu)):
    for root in (-4.0, 4.0):
        logits = x @ start_tree(0, root)["w_in"][0, 0] + root
        hears = float(jnp.abs(jax.vmap(jax.grad(activation))(logits)).mean())
        print(
            f"{'symmetric' if symmetric else 'gelu':10} root at {root:+.0f}: mean |slope| at the root before training {hears:.3f}"
        )
        assert hears < 0.06 if (root < 0 and not symmetric) else hears > 0.9

print("\nshare of the tokens, after training, in the half of the tree that started empty, seed by seed:")
home = {}
for case in cases:
    symmetric, straight, balance, root = case
    if root != 0:
        home[case] = visits[case][:, 0, 2 if root < 0 else 1] / visits[case][:, 0, 0]
        name = f"{'symmetric' if symmetric else 'gelu'} {root:+.0f}{', balance' if balance else ''}"
        target = "with a straight part" if straight else "bent only"
        print(f"{target:21} {name:18}" + " ".join(f"{s:5.3f}" for s in home[case]) + f"   mean {home[case].mean():.3f}")

assert home[False, 1.0, 0.0, -4.0].mean() < 0.01  # silent: nobody
assert home[False, 1.0, 0.3, -4.0].mean() < 0.05  # silent, with the balance loss: hardly anybody
assert home[False, 1.0, 0.0, 4.0].mean() > 0.03  # loud: some
assert home[True, 1.0, 0.0, -4.0].mean() > 0.03  # made loud: some
assert all(
    share.mean() < 0.03 for case, share in home.items() if case[1] == 0
)  # nothing straight to gain: hardly anybody

# %% [markdown]
# On the target with a straight part, next to nobody comes back to the silent root: before training it hears about a
# five-hundredth of what the loud one hears. From the loud side about a tenth comes home, and `symmetric_gelu` makes the left
# side loud. So silence is a trap, and a symmetric nonlinearity opens it. Two more lines are worth a look:
#
# - **Hearing is not enough.** On the bent target nobody comes home, not even from the loud side. There is a reason why
#   a neuron should change, or there is none, and "this half of the tree stands empty" is no reason: no gradient says so.
# - **The balance loss says so, but too softly here.** It pushes the right way, through `sigmoid(z)`, and at -4 the sigmoid is
#   flat too (slope 0.02). It is a remedy to begin with, not one to come with later.
#
# ### Second ailment: one-sided neurons are useful
#
# Now the trees with an ordinary start: bias zero, every turn about even. `fff.node_visits` counts who came where, and
# `fff.usage_summary` says how many subtrees are dead and which share of all nodes is visited. (A dead subtree counts once,
# however large it is. `left:right` tells how many of them, over all seeds, are left and right children.)

# %%
print(
    "nonlinearity  straight part  balance   dead subtrees, seed by seed  mean  left:right  nodes visited  left turns  error"
)
dead, left_turns = {}, {}
for case in cases[:8]:
    symmetric, straight, balance, _ = case
    usage = [fff.usage_summary(v) for v in visits[case]]
    dead[case] = np.array([u["dead_subtrees"] for u in usage])
    found = visits[case][:, 0]
    left_turns[case] = found[:, 1::2].sum() / found[:, 1:].sum()
    topmost = (found[:, 1:] == 0) & (found[:, (np.arange(1, NODES) - 1) // 2] > 0)  # node 1 first: even places are left
    print(
        f"{'symmetric' if symmetric else 'gelu':14}{'yes' if straight else 'no':15}{'yes' if balance else 'no':10}"
        f"{'  '.join(f'{c:.0f}' for c in dead[case]):29}{dead[case].mean():4.1f}"
        f"{topmost[:, ::2].sum():8d}:{topmost[:, 1::2].sum():<3d}"
        f"{np.mean([u['nodes_visited'] for u in usage]):15.0%}{left_turns[case]:12.0%}{errors[case].mean():7.2f}"
    )

mean = {case: count.mean() for case, count in dead.items()}
assert sum(mean[c] for c in cases[1:8:2]) < 0.7 * sum(mean[c] for c in cases[0:8:2])  # the balance loss saves subtrees
assert mean[True, 1.0, 0.0, 0.0] > 2 * mean[True, 0.0, 0.0, 0.0]  # a straight part to learn costs subtrees
assert mean[True, 1.0, 0.0, 0.0] > mean[False, 1.0, 0.0, 0.0]  # symmetry alone does not save them
assert left_turns[False, 1.0, 0.0, 0.0] < 0.45
assert 0.4 < left_turns[True, 1.0, 0.0, 0.0] < 0.65
assert errors[True, 1.0, 0.0, 0.0].mean() < errors[False, 1.0, 0.0, 0.0].mean()
assert abs(errors[False, 1.0, 0.3, 0.0].mean() - errors[False, 1.0, 0.0, 0.0].mean()) < 0.03

# %%
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
jitter = np.linspace(-0.22, 0.22, SEEDS)
for i, (case, count) in enumerate(dead.items()):
    symmetric, straight, balance, _ = case
    spot = i + (i >= 4) * 0.6 + (i % 4 >= 2) * 0.3
    colour = RIGHT if symmetric else LEFT
    axis.plot(spot + jitter, count, "o", color=colour, mfc="white" if balance else colour, ms=6)
    axis.hlines(count.mean(), spot - 0.35, spot + 0.35, color=INK, lw=2)
    axis.text(spot, -1.0, "with\nbalance" if balance else "plain", ha="center", va="top", fontsize=9)
    if not balance:
        axis.text(spot + 0.5, -2.9, "with a straight part" if straight else "bent target", ha="center", va="top")
for middle, name, colour in ((1.65, "gelu", LEFT), (6.25, "symmetric_gelu", RIGHT)):
    axis.text(middle, 10, name, ha="center", color=colour, fontsize=12, weight="bold")
axis.set(xticks=[], ylim=(-0.6, 10.8), ylabel="dead subtrees", title="one dot a seed, the bar is their mean")
plt.show()

# %% [markdown]
# And the same as trees, for the first seed and the target with a straight part. Colour is the share of tokens that come by;
# a hollow circle is a neuron that nobody visits.

# %%
figure, axes = plt.subplots(3, 2, figsize=(12, 7.2), layout="constrained")
scale, colours = LogNorm(0.001, 1), plt.get_cmap("viridis")
rows = (("ordinary start", 0.0, 0.0), ("balance loss", 0.3, 0.0), ("root at -4", 0.0, -4.0))
for row, (title, balance, root) in zip(axes, rows, strict=True):
    for axis, symmetric in zip(row, (False, True), strict=True):
        found = visits[symmetric, 1.0, balance, root][0]
        share = found[0] / found[0, 0]
        draw_tree(axis, [colours(scale(max(s, 0.001))) if s > 0 else None for s in share], size=55)
        usage = fff.usage_summary(found)
        count = f"{usage['dead_subtrees']:.0f} dead, {usage['nodes_visited']:.0%} visited"
        axis.set_title(f"{'symmetric' if symmetric else 'gelu'}, {title}: {count}", fontsize=10)
figure.colorbar(plt.cm.ScalarMappable(scale, colours), ax=axes, label="share of tokens that visit the node", shrink=0.6)
plt.show()

# %% [markdown]
# What the numbers say is not quite the story one would tell without measuring:
#
# - **More subtrees die when the target has a straight part.** A neuron whose `z` is positive for everybody is a straight
#   neuron, `gelu(z) ≈ z`, and where something straight is wanted, that is useful. Its line then lies outside of all tokens, and
#   one of its subtrees is empty. With `gelu` most turns then go right, to the loud side.
# - **`symmetric_gelu` cures the lopsidedness, not the dying.** Left and right are used alike, but now a neuron is straight on
#   *both* sides and can close either door. On the target with a straight part more subtrees die than with `gelu`.
# - **The balance loss saves subtrees**, in all four pairs of our run, but not all of them. It weighed 0.3 here; how much is right
#   depends on the task.
# - **Dead is not the same as bad.** With `gelu` the error hardly changed when the balance loss brought subtrees back, and the
#   symmetric trees, which have most dead subtrees, have the smaller error. (Not a contest: the bent part is made of `|·|`, which
#   suits them.) Dead neurons are capacity that was paid for and is not used; whether that hurts, only the loss can say.
#
# A toy of 63 neurons proves nothing about a language model. It shows that two things are at work, and that one should count.
# A training run of `ufbert` writes these counts for every layer (`usage` in `metrics.jsonl`).
#
# ## 6. The two FFFs side by side
#
# The first paper's layer (arXiv 2308.14711) is a different machine. Its inner nodes only decide. Its leaves are whole little
# networks, and only leaves contribute. With `g = 2^D` leaves of width `w`, and `p_v = sigmoid(w_v · x + b_v)` the share that node
# `v` sends to the right:
#
# $$ c_j = \prod_{v \text{ above leaf } j} \begin{cases} p_v & \text{if the way goes right} \\ 1 - p_v & \text{if left} \end{cases}
# \qquad y_\text{training} = \sum_j c_j \, \text{leaf}_j(x), \qquad y_\text{inference} = \text{leaf}_{j^*}(x), $$
#
# where `leaf_j(x) = act(x W_in[j] + b_in[j]) W_out[j] + b_out[j]` and `j*` is the leaf one reaches by going right where
# `w_v · x + b_v ≥ 0`. Shapes: `node_w (n, d)`, `w_in (g, d, w)`, `w_out (g, w, o)`, with `n = g - 1`.
#
# | | tree of neurons (UltraFastBERT) | tree of small networks (the original) |
# |---|---|---|
# | paper | arXiv 2311.10770 | arXiv 2308.14711 |
# | who decides | every neuron on the path, as it answers | inner nodes that do nothing else |
# | what a leaf is | a neuron like all others | a network of `w` neurons with biases |
# | what contributes | all `D + 1` nodes of the path | the leaf alone |
# | training | hard: one path | soft: a mixture of all leaves |
# | inference | hard, the same function | hard, **another** function |
# | gradient of a decision | none; a line moves because its neuron answers | yes, through the sigmoid |
# | who gets gradient | the nodes visited | everybody, by their share |
# | a tie, `z = 0` | left (right is `> 0`) | right (right is `≥ 0`) |
# | its ailment | dead subtrees | the gap between soft and hard |
# | in this package | `ufbert/ops/fff.py` | `ufbert/ops/leaf_fff.py` |
#
# The tie, in code, and the leaf shares along a line, for a tree of two levels:


# %%
def start_leaves(key, depth, width, d):
    """Weights as the authors start them: uniform within 1/sqrt(inputs)."""
    leaves = 2**depth
    shapes = [(leaves - 1, d), (leaves - 1,), (leaves, d, width), (leaves, width), (leaves, width, d), (leaves, d)]
    fans = [d, d, d, d, width, width]
    keys = jax.random.split(key, 6)
    return leaf_fff.LeafTree(
        *(
            jax.random.uniform(k, s, minval=-(f**-0.5), maxval=f**-0.5)
            for k, s, f in zip(keys, shapes, fans, strict=True)
        )
    )


still = jax.tree.map(jnp.zeros_like, start_leaves(jax.random.key(0), 3, 4, 2))
assert int(leaf_fff.hard_leaves(jnp.zeros((1, 2)), still)[0]) == 7  # right, right, right: the last of 8 leaves

line = start_leaves(jax.random.key(0), 2, 4, 1)
line = line._replace(node_w=jnp.array([[2.0], [2.0], [2.0]]), node_b=jnp.array([0.0, 3.0, -3.0]))
reach = jnp.linspace(-4, 4, 400)[:, None]
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for axis, temperature in zip(axes, (1.0, 0.1), strict=True):
    shares = leaf_fff.leaf_weights(leaf_fff.right_shares(reach, line, temperature))
    assert float(jnp.abs(shares.sum(axis=1) - 1).max()) < 1e-5
    for leaf, (colour, style) in enumerate(zip((LEFT, RIGHT, GREEN, INK), ("-", "--", "-.", ":"), strict=True)):
        axis.plot(reach[:, 0], shares[:, leaf], color=colour, ls=style, lw=2, label=f"leaf {leaf}")
    axis.set(title=f"temperature {temperature:g}", xlabel="x")
axes[0].set_ylabel("share of the leaf in the output")
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %% [markdown]
# On the left, two or three leaves answer together in most places. On the right each is nearly alone. Inference always asks
# one leaf. So a tree that was trained as on the left has leaves that were never asked to be right alone, and the answer
# changes when inference begins: the **soft-to-hard gap**. What can be done:
#
# - **a hardening loss** (the paper's remedy): `h` times the mean entropy of the decisions is added to the loss. The entropy
#   of a decision is `-p ln p - (1 - p) ln(1 - p)`: `ln 2 = 0.69` if undecided, 0 if certain. The authors' example uses
#   `h = 0.1`, which we call stock;
# - **a temperature that falls**: `p = sigmoid(z / T)` with `T` going from 1 to a small number during training (once at a tenth
#   of the learning rate, called *slow*);
# - **straight-through** (Bengio et al. 2013, arXiv 1308.3432): compute the hard output, send back the soft gradient.
#
# The same toy with its straight part, 8 leaves of 8 neurons, the same number of updates, 8 seeds each. *Soft* is the error of
# what training computes at its end; *hard* is the error of `leaf_fff.descend`, which is what inference computes.


# %%
def train_leaves(seed, hardening, temperature, straight_through, rate):
    """Errors of the output in training and in inference, mean entropy of the decisions, mean length of a node's row."""
    task, start, batches, test = jax.random.split(jax.random.key(seed), 4)

    def shares(tree, x, progress):
        soft = leaf_fff.right_shares(x, tree, temperature**progress)
        return soft, jnp.where(straight_through, leaf_fff.straight_through(soft), soft)

    def loss(tree, x, progress):
        soft, used = shares(tree, x, progress)
        y = leaf_fff.mixture(x, tree, leaf_fff.leaf_weights(used), gelu)
        return jnp.mean((y - wanted(task, x, 1.0)) ** 2) + hardening * jnp.mean(leaf_fff.node_entropies(soft))

    tree = trained(start_leaves(start, 3, 8, D_MODEL), loss, batches, rate)
    x = draw_tokens(test, 4096)
    goal = wanted(task, x, 1.0)
    soft, used = shares(tree, x, 1.0)
    in_training = leaf_fff.mixture(x, tree, leaf_fff.leaf_weights(used), gelu)
    in_inference, _ = leaf_fff.descend(x, tree, gelu)
    entropy = jnp.mean(leaf_fff.node_entropies(soft))
    return error(in_training, goal), error(in_inference, goal), entropy, jnp.mean(jnp.linalg.norm(tree.node_w, axis=1))


recipes = {  # hardening h, last temperature, straight-through, learning rate
    "soft, nothing else": (0.0, 1.0, False, RATE),
    "stock: h = 0.1": (0.1, 1.0, False, RATE),
    "h = 1": (1.0, 1.0, False, RATE),
    "h = 3": (3.0, 1.0, False, RATE),
    "T to 0.05": (0.0, 0.05, False, RATE),
    "T to 0.05, slow": (0.0, 0.05, False, RATE / 10),
    "T to 0.00001": (0.0, 0.00001, False, RATE),
    "straight-through": (0.0, 1.0, True, RATE),
}
seeds = jnp.tile(jnp.arange(SEEDS), len(recipes))
settings = [jnp.repeat(jnp.array(column), SEEDS) for column in zip(*recipes.values(), strict=True)]
measured = jax.jit(jax.vmap(train_leaves))(seeds, *settings)
soft, hard, entropy, length = (dict(zip(recipes, np.asarray(a).reshape(-1, SEEDS), strict=True)) for a in measured)

print(f"{'recipe':20}{'soft':>7}{'hard':>7}   hard, seed by seed{'':33}{'entropy':>8}{'|node|':>8}")
for name in recipes:
    each = " ".join(f"{value:5.2f}" for value in hard[name])
    print(
        f"{name:20}{soft[name].mean():7.2f}{hard[name].mean():7.2f}   {each}  {entropy[name].mean():10.2f}{length[name].mean():8.2f}"
    )

# %%
figure, axis = plt.subplots(figsize=(10, 3.9), layout="constrained")
for i, name in enumerate(recipes):
    for shift, found, colour in ((-0.2, soft[name], LEFT), (0.2, hard[name], RIGHT)):
        axis.bar(i + shift, found.mean(), 0.38, color=colour, alpha=0.55)
        axis.plot(i + shift + 0.5 * jitter, found, ".", color=INK, ms=4)
axis.axhline(1, color=INK, lw=1, ls="--")
axis.text(7.45, 1.08, "always answering the mean", ha="right", va="bottom", fontsize=9)
axis.set(
    yscale="log",
    ylim=(0.01, 10),
    ylabel="error (share of the variance)",
    title="bars: mean of 8 seeds; dots: the seeds",
)
axis.set_xticks(range(len(recipes)), [name.replace(", ", ",\n").replace(": ", ":\n") for name in recipes])
handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.55) for colour in (LEFT, RIGHT)]
axis.legend(handles, ["soft: what training computes", "hard: what inference computes"], loc="upper right", framealpha=1)
plt.show()

gap = {name: hard[name] - soft[name] for name in recipes}
for name in ("soft, nothing else", "stock: h = 0.1"):
    assert gap[name].min() > 0.5  # in every seed
    assert hard[name].mean() > 1  # worse than always answering the mean
assert hard["h = 3"].mean() < hard["h = 1"].mean() < hard["stock: h = 0.1"].mean()
assert gap["T to 0.05"].mean() > 0.5
assert length["T to 0.05"].mean() < 0.5 * length["soft, nothing else"].mean()
assert gap["T to 0.05, slow"].mean() < 0.15
assert gap["T to 0.00001"].mean() < 0.05
assert np.abs(gap["straight-through"]).max() < 0.001
assert max(hard["straight-through"].mean(), hard["T to 0.00001"].mean()) < 0.4
assert soft["straight-through"].mean() > 2 * soft["soft, nothing else"].mean()

# %% [markdown]
# - **Soft training alone** finds a mixture that is nearly perfect, and useless once it must decide: its decisions are as
#   undecided as can be (entropy near 0.69), and the hard error is several times that of always answering the mean.
# - **The stock weight** hardens too little on this toy. A larger `h` closes most of the gap and makes the soft output worse: the
#   soft number was flattering, because it could use eight leaves at once.
# - **A falling temperature is no guarantee.** Going to 0.05 changes little here: the nodes shrink their weights (last column)
#   about as fast as the temperature falls, so that `z / T`, and with it the softness, stays. Falling to 0.00001 outruns them.
#   With a tenth of the learning rate the nodes cannot keep up, and 0.05 is enough (that tree learns too slowly to be good).
#   So look at the entropy, not at the setting.
# - **Straight-through** has no gap, since training computes what inference will compute.
#
# The tree of neurons has no gap either, for the same reason. Its price is part 5. Both papers' trees pay for hard
# decisions: one in training, one when training ends. For the original tree there are two further helps, a loss that balances
# the leaves and a *master leaf* that every token uses beside its own (Charalampopoulos et al. 2024, arXiv 2405.16836); the
# package has both.
#
# ## 7. What to remember
#
# 1. A token walks down a tree; at each node one dot product both answers and decides. `D + 1` of `2^(D+1) - 1` neurons, 12 of 4095.
# 2. `masked` and `gather` are the same function. Only `gather` saves work, and less work is less time only where it is measured.
# 3. Only visited neurons learn. A turn has no gradient: it moves because the neuron that turns also answers.
# 4. Subtrees die because silent neurons hear nothing, *and* because one-sided neurons are useful. Count them; do not guess.
# 5. The original FFF is another layer: soft in training, hard in inference, ties to the right. Its soft score is not its score.
#
# **Where to read on:** `ufbert/ops/fff.py` is the tree of neurons, all of it, and `ufbert/ops/leaf_fff.py` the tree of small
# networks. `ufbert/nn/feedforward.py` gives them weights and losses inside the encoder. `configs/ultrafastbert_1x11.py`,
# `configs/ultrafastbert_symmetric.py` and `configs/original_fff.py` are the presets, and `tests/ops/test_fff.py` is the list of
# promises that the code keeps. `notebooks/00_first_steps` trains a whole model.

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
# # Your own layer
#
# You have an idea for a feedforward layer that uses few of its neurons. This notebook takes one such idea from a formula to a
# verdict: write it, check it, put it into the encoder in *one* place, train it, and compare it with its control. It ends with
# the part that hurts, which is how little a single run says.
#
# The idea: a chest of **drawers**. A token opens one of `g` drawers and uses the `w` neurons in it. Which drawer is chosen by
# `g` scores in one step, with no tree. (It is a close relative of the Switch layer, Fedus et al. 2021, arXiv 2101.03961, with
# small experts, no capacity, and no balance loss.)

# %%
import io
import json
import os
import random
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, stdev

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.test_util import check_grads

import ufbert
from ufbert.config import ModelConfig
from ufbert.nn.layers import Aux
from ufbert.nn.registry import Layer, register_feedforward
from ufbert.ops.dense import gelu

os.chdir(tempfile.mkdtemp())  # everything below is written to a new folder, which the system clears one day
BLUE, ORANGE, INK = "#0072B2", "#D55E00", "#333333"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## 1. The function
#
# First the mathematics, as a pure function of arrays. With scores `p = softmax(R x)` and the best drawer `k`:
#
# $$ y = p_k \sum_{j=1}^{w} \mathrm{gelu}(a_{kj} \cdot x)\; b_{kj} $$
#
# Note the factor `p_k`. The choice of `k` is a whole number and has no gradient (notebook `01`, part 4), but `p_k` has one: a
# token whose drawer helped will want more of it. Without that factor nothing would ever teach the scores.
#
# We compute all drawers and keep one. That saves nothing, and is the right way to begin: short, and easy to check. It is
# also how UltraFastBERT was trained.


# %%
def drawers(x, router, w_in, w_out):
    """x (t, d), router (g, d), w_in and w_out (g, w, d) -> the output (t, d) and each token's drawer (t,)."""
    shares = jax.nn.softmax(x @ router.T)
    best = jnp.argmax(shares, axis=-1)
    gate = shares * jax.nn.one_hot(best, len(router))  # zero for all drawers but one
    hidden = gelu(jnp.einsum("td,gwd->tgw", x, w_in)) * gate[..., None]
    return jnp.einsum("tgw,gwd->td", hidden, w_out), best


# %% [markdown]
# ## 2. Check it before you train it
#
# A wrong layer trains, too. It is merely worse, and you will blame the idea. Three checks find most mistakes.
#
# **Against a loop** that follows the formula and is too simple to be wrong:


# %%
def by_loop(x, router, w_in, w_out):
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        scores = np.exp(router @ token)
        k = np.argmax(scores)
        for a, b in zip(w_in[k], w_out[k], strict=True):
            y[t] += scores[k] / scores.sum() * float(gelu(a @ token)) * b
    return y


keys = jax.random.split(jax.random.key(0), 4)
shapes = ((12, 16), (8, 16), (8, 4, 16), (8, 4, 16))  # 12 tokens of width 16, 8 drawers of 4 neurons
arguments = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
difference = np.abs(by_loop(*map(np.asarray, arguments)) - drawers(*arguments)[0]).max()
print(f"largest difference from the loop: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# **Its gradients**, against differences: move all arguments a little, there and back, and compare. jax has a function for it.

# %%
check_grads(lambda *arrays: drawers(*arrays)[0], arguments, order=1, modes=["rev"], atol=0.02, rtol=0.02, eps=1e-3)
slopes = jax.grad(lambda *arrays: jnp.sum(drawers(*arrays)[0] ** 2), argnums=(1, 2))(*arguments)
opened = sorted(set(np.asarray(drawers(*arguments)[1]).tolist()))
learns = [k for k in range(8) if np.any(slopes[1][k] != 0)]
print("drawers that 12 tokens opened:", opened, "  drawers whose neurons get a gradient:", learns)
assert opened == learns
assert np.all(np.any(slopes[0] != 0, axis=1))  # all scores learn, those of closed drawers, too

# %% [markdown]
# **That a token's answer is its own.** In inference the same sentence must get the same answer, whatever else is in the batch.
# Layers that share out places among tokens break this without anybody noticing.

# %%
together, _ = drawers(*arguments)
alone, _ = drawers(arguments[0][3:4], *arguments[1:])
assert np.allclose(together[3], alone[0], atol=1e-5)
print("token 3 alone and in a batch:", np.round(alone[0, :3], 4), np.round(together[3, :3], 4))

# %% [markdown]
# ## 3. One place
#
# The encoder asks a registry for its layers. An entry holds the module, which declares the parameters and calls the function,
# and everything that the rest of the package wants to know of it: its arithmetic for `plan`, its neurons for the tables, the
# fields that shape it. After this cell it has a name like any other layer: training, plans, fine-tuning and
# prediction take it (`docs/layers.md#add-a-layer`).
#
# We use two existing fields for the sizes, `n_experts` and `leaf_width`.


# %%
class Drawers(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x, context, key):
        g, w, d = self.config.n_experts, self.config.leaf_width, self.config.d_model
        start = nn.initializers.normal(self.config.init_std)
        router = self.param("router", start, (g, d))
        w_in, w_out = self.param("w_in", start, (g, w, d)), self.param("w_out", start, (g, w, d))
        y, best = drawers(x.reshape(-1, d).astype(jnp.float32), router, w_in, w_out)
        counts = None
        if context.statistics:  # asked for at evaluations: how many tokens opened each drawer
            real = jnp.ones(len(best)) if context.real is None else context.real.reshape(-1).astype(jnp.float32)
            counts = {"drawers": jnp.zeros(g).at[best].add(real)}
        return y.reshape(x.shape), Aux({}, counts=counts)


def operations(config, use):
    """Of a token in the forward pass. All drawers are computed, so all are counted."""
    return 2 * config.d_model * config.n_experts * (1 + 2 * config.leaf_width)


register_feedforward(
    "drawers",
    Layer(
        module=Drawers,
        flops=operations,
        traffic=lambda config, use: 20 * config.n_experts * config.leaf_width,
        neurons=lambda config: (config.leaf_width, config.n_experts * config.leaf_width),
        fields=("n_experts", "leaf_width"),
    ),
)

config = ufbert.preset("crammed_bert", "tiny", feedforward=("drawers",), n_experts=8, leaf_width=16)
ids = jnp.ones((2, 10), int)
hidden, logits = ufbert.apply(ufbert.init(config), config, ids)
print("hidden states", hidden.shape, "  token logits", logits.shape)

# %% [markdown]
# ## 4. The control
#
# Compared with what? A drawer of 16 neurons among 8 must be compared with two other layers:
#
# - **the control**: a plain layer of *as many neurons as a token uses*. Our token uses 16, and reads 8 rows of scores, which
#   are worth half a neuron each (they have input weights only). So the control gets 20. If we do not beat it, choosing is
#   worth nothing.
# - **the ceiling**: a plain layer of all 128. If it does not beat the control either, then the task has no use for more
#   neurons, and no layer can show anything. We leave it out here to save a minute. A real study must have it.
#
# All else is equal: text, tokenizer, order, budget, learning rate. And the optimiser: the recipe `modern` would give Muon to
# the plain layer's matrices, and AdamW to ours, which it does not know. So we ask for AdamW in both. Such small print
# decides many a comparison.
#
# The text: 64 people, each with a hobby that first name and last name decide *together*. Neither says it alone, so it
# must be remembered pair by pair, which is the work of a feedforward.

# %%
first = ["ada", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo"]
last = ["stone", "brook", "field", "hill", "wood", "lake", "marsh", "ford"]
hobbies = ["coins", "maps", "stamps", "shells", "clocks", "masks", "bells", "knives"]
rng = random.Random(0)
facts = {f"{a} {b}": rng.choice(hobbies) for a in first for b in last}


def sentence():
    person = rng.choice(list(facts))
    return f"{person} collects {facts[person]}."


documents = ["\n".join(sentence() for _ in range(rng.randint(6, 12))) for _ in range(2500)]
Path("text.txt").write_text("\n\n".join(documents))
print("\n".join(documents[0].splitlines()[:4]))

# %%
SEEDS, BUDGET = (0, 1, 2), "150steps"
variants = {
    "drawers": {"feedforward": ("drawers",), "n_experts": 8, "leaf_width": 16},
    "control": {"feedforward": ("dense",), "d_hidden": 20},
}


def heldout_loss(name, seed):
    """Train a variant, without the lines that a run prints."""
    with redirect_stdout(io.StringIO()):
        summary = ufbert.pretrain(
            f"{name}{seed}",
            budget=BUDGET,
            config="crammed_bert",
            scale="tiny",
            recipe="modern",
            corpus="text:text.txt",
            prepared="text",
            device="cpu",
            seed=seed,
            model={**variants[name], "n_layers": 1},
            train={"optimizer": "adamw", "batch_rows": 16, "micro_rows": 16, "n_evals": 5},
            data={"short_until": 0.0},
        )
    print(
        f"{name}, seed {seed}: {summary['heldout_loss']:.3f} nats; word frequency alone {summary['unigram_loss']:.3f}"
    )
    return summary["heldout_loss"]


losses = {name: {0: heldout_loss(name, 0)} for name in variants}

# %% [markdown]
# ## 5. One seed is an anecdote
#
# There is a number now, and a temptation.

# %%
difference = losses["drawers"][0] - losses["control"][0]
print(f"drawers {losses['drawers'][0]:.3f}, control {losses['control'][0]:.3f} nats")
print(f"seed 0 says: drawers are {abs(difference):.3f} nats {'worse' if difference > 0 else 'better'}")

# %% [markdown]
# One could stop here, and many have. Two more seeds cost a few seconds. We compare *pairs*: the same seed on both sides, hence
# the same order of the text, so that this part of the luck cancels.

# %%
for seed in SEEDS[1:]:
    for name in variants:
        losses[name][seed] = heldout_loss(name, seed)

# %%
differences = [losses["drawers"][seed] - losses["control"][seed] for seed in SEEDS]
mean, error = fmean(differences), stdev(differences) / len(SEEDS) ** 0.5

figure, (curves, pairs) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, colour in (("drawers", ORANGE), ("control", BLUE)):
    for seed in SEEDS:
        records = [json.loads(line) for line in Path(f"{name}{seed}/metrics.jsonl").read_text().splitlines()]
        steps, loss = zip(*((r["step"], r["loss"]) for r in records if "loss" in r), strict=True)
        curves.plot(steps, loss, color=colour, lw=1, alpha=0.8, label=name if seed == 0 else None)
curves.set(xlabel="update", ylabel="training loss, nats", title="three seeds each")
curves.legend(frameon=False)
pairs.axhline(0, color=INK, lw=1, ls="--")
pairs.plot(SEEDS, differences, "o", ms=9, color=ORANGE)
pairs.errorbar([3.2], [mean], yerr=[2 * error], fmt="s", color=INK, capsize=5)
reach = 1.3 * max(map(abs, [*differences, mean - 2 * error, mean + 2 * error]))
pairs.set(
    ylabel="loss less that of the control, nats", ylim=(-reach, reach), title="below the line: drawers are better"
)
pairs.set_xticks([*SEEDS, 3.2], [*(f"seed {seed}" for seed in SEEDS), "mean ± 2\nstandard errors"])
plt.show()
print("differences", ", ".join(f"{d:+.3f}" for d in differences), f"  mean {mean:+.3f} ± {error:.3f} (standard error)")
print(
    "the sign is",
    "settled for these three seeds" if abs(mean) > 2 * error else "not settled: more seeds, or a longer run",
)

# %% [markdown]
# Look at the spread of the dots before you look at their mean. Each of them alone is a result that one could have published. With
# three seeds even the interval is a rough guess, since a spread from three numbers is one itself.
#
# On the left, look how far apart the seeds of *one* layer are, and how close the two layers are at each seed. Had we compared seed 0
# of one with seed 1 of the other, luck alone would have decided.
#
# And the runs are far too short: the curves are still on their way down, and what decides there is who starts to learn
# first. In `docs/results/pretraining.md` routed trees lead their control for eight million tokens, and are behind at twelve.
#
# ## 6. Are all drawers used?
#
# A choice may die: a drawer that nobody opens learns nothing (notebook `01`, part 5). The layer counts its visitors, and each
# evaluation writes what became of them. *Effective use* is exp(entropy) of the visits over 8: 100 % if all drawers are opened
# equally often, one eighth if all tokens open the same one.

# %%
for seed in SEEDS:
    lines = Path(f"drawers{seed}/metrics.jsonl").read_text().splitlines()
    usage = [json.loads(line) for line in lines if "drawers_in_use" in line][-1]["usage"]["layer_00"]
    print(f"seed {seed}: in effective use {usage['drawers_in_use']:.0%}, dead {usage['drawers_dead']:.0f} of 8")

# %% [markdown]
# ## 7. From an anecdote to a result
#
# `ufbert study` does this properly: one text and tokenizer for all, several seeds *and* learning rates (each layer at its own
# best), equal tokens or equal time, control and ceiling, intervals, and it goes on after a crash. Save sections 1 and 3 as
# `drawers.py`, and
#
# ```
# export UFBERT_LAYERS=drawers.py
# uv run ufbert study --out=runs/drawers --config=crammed_bert --scale=mini --recipe=modern --train.optimizer=adamw \
#     --corpus=text:a.txt --tokens=20e6 --seeds=0,1,2 --rates=1e-3,3e-3,1e-2 --gap-from=control --gap-to=ceiling \
#     "control: --model.feedforward=dense --model.d-hidden=20" \
#     "ceiling: --model.feedforward=dense --model.d-hidden=128" \
#     "drawers: --model.feedforward=drawers --model.n-experts=8 --model.leaf-width=16"
# ```
#
# `--plan` says first how many hours that takes. Its report has a column with the share of the gap between control and ceiling
# that your layer closes, or a sentence that there is no gap to speak of.
#
# ## 8. What to remember
#
# 1. Function, checks, module, entry: in this order.
# 2. Check against a loop, against differences, and alone against together.
# 3. The control has as many neurons as a token *uses*. The ceiling has all.
# 4. Equal in everything else, the optimiser included.
# 5. One seed is an anecdote. Three are a hint.
#
# **Where to read on:** `docs/layers.md` (the entry, field by field, and how a layer becomes part of the package),
# `docs/research.md` (studies), `ufbert/nn/feedforward.py` (six layers to copy from), and
# `docs/results/pretraining.md` (how our own ideas fared).

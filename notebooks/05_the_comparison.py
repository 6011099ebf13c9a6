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
# # The comparison
#
# A student wanted to put BERT, crammed BERT and UltraFastBERT side by side, left a machine running overnight by accident, and
# handed in a table full of *not implemented*. This notebook is that table, filled in: every model trained on the same text, with
# the same tokenizer, at the same scale, by the same recipe, for the same number of tokens, beside the controls that the papers
# left out.
#
# Nothing is trained here. The notebook reads `results/comparison_mini.json`, which `ufbert compare` wrote, and every figure
# below is computed from it when you run the cell. Change a line and see.

# %%
from itertools import combinations, pairwise
from math import log, sqrt
from pathlib import Path
from statistics import fmean
from textwrap import fill

import matplotlib.pyplot as plt

from ufbert.compare.claims import claim_rows
from ufbert.compare.results import read_results
from ufbert.compare.verdict import paired

BLUE, ORANGE, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#333333"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

results = read_results(Path("results/comparison_mini.json"))
models = {model.name: model for model in results.models if model.by_tokens}
print(fill(f"made by: {results.asked.command}", 120))
print("on:", ", ".join(sorted({cell.cpu for cell in results.cells})))
for line in results.notes:
    print(fill(f"- {line}", 120))

# %% [markdown]
# ## 1. The verdict
#
# These sentences were not written by a person. They follow from the numbers, so they would say the opposite if the numbers did.

# %%
for sentence in results.verdict:
    print(fill(f"- {sentence}", 120))

# %% [markdown]
# ## 2. Who is who
#
# The *neurons used* are those of one feedforward layer that a token's answer depends on. For a dense layer that is all of them.
# For a tree it is a path: one neuron a level.

# %%
print(f"{'model':20} {'feedforward':34} {'used':>5} {'of':>6} {'parameters':>11} {'MFLOP a token':>14}")
for model in models.values():
    feedforward = model.architecture.split(", ", 1)[-1]
    print(
        f"{model.name:20} {feedforward[:34]:34} {model.neurons_used:5,} {model.neurons:6,} {model.parameters:11,} "
        f"{model.infer_flops / 1e6:14.2f}"
    )

# %% [markdown]
# ## 3. The table, from where you stand
#
# A loss alone says little. What counts is the difference to something. Choose what to compare with:

# %%
BASELINE = "path_dense_1x11"  # change me: any name of the table above

base = models[BASELINE].by_tokens
print(f"{'model':20} {'loss, nats':>10} {'to ' + BASELINE:>20}   accuracy")
for model in sorted(models.values(), key=lambda model: model.by_tokens.loss.mean):
    gap = paired(model.by_tokens, base)
    shown = "" if model.name == BASELINE else f"{gap.mean:+.4f}"
    print(f"{model.name:20} {model.by_tokens.loss.mean:10.4f} {shown:>20}   {model.by_tokens.accuracy:.1%}")

# %% [markdown]
# ## 4. Is it luck?
#
# Two trainings of one model from other random weights, in another order of the text, do not end at one loss. How far apart
# they end is the smallest difference between two *models* that means anything.

# %%
for model in models.values():
    losses = model.by_tokens.losses
    for one, other in combinations(losses, 2):
        print(f"{model.name:20} seed {one}: {losses[one]:.4f}   seed {other}: {losses[other]:.4f}", end="   ")
        print(f"apart by {abs(losses[one] - losses[other]):.4f}")
apart = [abs(a - b) for model in models.values() for a, b in combinations(model.by_tokens.losses.values(), 2)]
if apart:
    spread = sqrt(fmean(gap * gap for gap in apart))  # the standard deviation of such a difference
    print(f"\nso a difference of two single runs within about {2 * spread:.3f} nats may be luck")
else:
    print("one seed of each so far, which cannot say")

# %% [markdown]
# ## 5. What are the neurons worth that a token skips?
#
# This is the question of UltraFastBERT. Its layer has a thousand neurons, and a token uses ten. If the other 990 help, because
# each token can pick the ten that suit it, then the tree must be better than a plain layer of ten. That layer is the control. The
# picture has the neurons that a token *uses* to the right, and loss upwards, so lower is better. A tree that earns its keep lies
# below the line of the plain layers.

# %%
plain = [m for m in models.values() if m.name.startswith("path_dense") or m.name == "no_feedforward"]
plain.sort(key=lambda model: model.neurons_used)
sparse = [m for m in models.values() if m.neurons_used < m.neurons]
others = [m for m in models.values() if m not in plain and m not in sparse]

CEILING = 0.25  # nats above the best model; what lies higher is named above the picture


def draw(groups, place):
    """Draw models by group (label, models, mark, colour); `place` says how far to the right one stands."""
    _, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    top = min(model.by_tokens.loss.mean for model in models.values()) + CEILING
    for label, members, mark, colour in groups:
        shown = [model for model in members if model.by_tokens.loss.mean <= top]
        axis.plot([place(m) for m in shown], [m.by_tokens.loss.mean for m in shown], mark, color=colour, label=label)
        for model in shown:
            side = {"xytext": (7, -3), "ha": "left"} if mark == "D" else {"xytext": (-5, -11), "ha": "right"}
            point = place(model), model.by_tokens.loss.mean
            axis.annotate(model.name, point, textcoords="offset points", fontsize=8, color=colour, **side)
    above = {m.name: m.by_tokens.loss.mean for m in models.values() if m.by_tokens.loss.mean > top}
    if above:
        axis.set_title("above the picture: " + ", ".join(f"{n} {loss:.2f}" for n, loss in above.items()), fontsize=8)
    axis.set(ylabel="held-out loss, nats")
    axis.margins(0.16, 0.1)
    axis.legend(frameon=False)
    return axis


groups = [
    ("plain layers", plain, "o-", BLUE),
    ("skip some", sparse, "D", ORANGE),
    ("other parts, too", others, "s", GREEN),
]
axis = draw(groups, lambda model: model.neurons_used)
axis.set(xscale="symlog", xlabel="feedforward neurons that a token uses")
axis.set_xticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
plt.show()

# %% [markdown]
# The same as a number. How many *plain* neurons would have given a model's loss? Between the plain layers that were trained one must
# guess, and we guess twice: on a straight line over neurons, and over their logarithm. Where the guesses differ much, only
# another control settles it.


# %%
def plain_neurons(loss: float) -> list[float]:
    """The width of a plain layer with this loss, between two trained ones, by two guesses; none outside of them."""
    points = [(model.neurons_used, model.by_tokens.loss.mean) for model in plain]
    for (k0, high), (k1, low) in pairwise(points):
        if low <= loss <= high:
            share = (high - loss) / (high - low)
            return sorted([k0 + share * (k1 - k0), (1 + k0) * ((1 + k1) / (1 + k0)) ** share - 1])
    return []


for model in sparse:
    worth = plain_neurons(model.by_tokens.loss.mean)
    text = (
        f"about as much as {worth[0]:.0f} to {worth[1]:.0f} plain ones"
        if worth
        else "more, or less, than any plain layer here"
    )
    print(f"{model.name:20} uses {model.neurons_used:4,} of {model.neurons:6,}: worth {text}")

# %% [markdown]
# ## 6. At another budget
#
# The end of a run is one moment. What did the ranking look like earlier? Set the number of tokens. (The learning rate falls only
# in the last part of a run. A run *planned* for fewer tokens would have lowered it sooner and ended better than this curve at
# that place. So compare models with each other here, not with a shorter run.)

# %%
MILLIONS = 5  # change me: between 1 and 10


def loss_at(model, tokens):
    """The held-out loss at so many tokens, on a straight line between evaluations over log tokens."""
    points = [(log(p.tokens), p.loss) for p in model.by_tokens.curve if p.tokens > 0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= log(tokens) <= x1:
            return y0 + (y1 - y0) * (log(tokens) - x0) / (x1 - x0)
    return points[-1][1] if log(tokens) > points[-1][0] else points[0][1]


figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
ranked = sorted(models.values(), key=lambda model: loss_at(model, MILLIONS * 1e6))
for model in ranked:
    points = [(p.tokens / 1e6, p.loss) for p in model.by_tokens.curve if p.tokens > 0]
    strong = model.name in (BASELINE, "ultrafastbert_1x11")
    axis.plot(*zip(*points, strict=True), lw=2.4 if strong else 1, alpha=1 if strong else 0.6, label=model.name)
axis.axvline(MILLIONS, color=INK, ls=":")
axis.set(xlabel="M tokens", ylabel="held-out loss, nats", ylim=(None, 6))
axis.legend(frameon=False, fontsize=8, ncols=2)
plt.show()
for place, model in enumerate(ranked, start=1):
    print(f"{place:2} {model.name:20} {loss_at(model, MILLIONS * 1e6):.3f}")

# %% [markdown]
# ## 7. For the same arithmetic
#
# A plain layer of ten neurons is nearly no feedforward at all. Why not compare models that cost the same? Upwards is loss again, to
# the right is the arithmetic of one token in inference. No model beats those on the line in both.

# %%
axis = draw(groups, lambda model: model.infer_flops / 1e6)
frontier, best = [], float("inf")
for model in sorted(models.values(), key=lambda model: (model.infer_flops, model.by_tokens.loss.mean)):
    if model.by_tokens.loss.mean < best:
        best = model.by_tokens.loss.mean
        frontier.append((model.infer_flops / 1e6, best))
axis.step(*zip(*frontier, strict=True), where="post", color=INK, lw=1, ls="--")
axis.set(xlabel="MFLOP a token in inference")
plt.show()

# %% [markdown]
# Arithmetic is not time. What a call costs on a CPU is in notebook `04`, and for trained models of your own:
# `ufbert bench encoder --model A B`.
#
# ## 8. What the papers say

# %%
for name, paper, says, here in claim_rows(results):
    print(f"{name} ({paper})\n  says: {says}\n  here: {here}\n")

# %% [markdown]
# Papers had a hundred million parameters and billions of tokens. A claim that fails at this scale is not refuted, and one that
# holds is not proved. But whoever trains a small model in a day works at a scale much nearer to this one.
#
# ## 9. One row of the table, again
#
# Every cell carries its command. Take one, put your own text into it, and you have a row that can be compared with these. This is
# the first cell's:

# %%
print(results.cells[0].name, "at commit", ", ".join(results.cells[0].commits))
print(results.cells[0].command)

# %% [markdown]
# ## What is missing
#
# What was not measured, in the words of the report:

# %%
for line in results.waiting or ["nothing that was asked for"]:
    print("-", line)

# %% [markdown]
# ## Try it
#
# 1. Set `BASELINE` to `no_feedforward`. How much of the loss is attention's alone?
# 2. Set `MILLIONS` to 2. Which models learn early, and do they stay ahead?
# 3. Take the control out (`del models["path_dense_1x11"]`, with another `BASELINE`). What would you have concluded about trees?
# 4. Notebook `06` adds a layer of your own and puts it beside its control.

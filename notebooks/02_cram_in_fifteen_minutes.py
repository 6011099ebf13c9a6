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
# # Cram in fifteen minutes
#
# *Cramming* turns the usual question around (Geiping & Goldstein 2022, arXiv 2212.14034). Not "how much do I need to reach
# BERT?", but "I have one device and one day: how good a model can I get?" The day is the original's. This notebook does the
# same with a quarter of an hour and the computer in front of you.
#
# You will see what a budget is, what the clock decides, what a plan says beforehand, how to read a loss, and how to go on
# after a crash. Nothing is downloaded, and no accelerator is needed.
#
# The line that matters is `BUDGET`. It says 120 updates, so that the notebook runs in a minute and gives everybody the
# same numbers; the outputs that you see here are of that short run, on the made-up language of section 3. Put `"15m"` there to
# cram in earnest.

# %%
import json
import math
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

import ufbert

BUDGET = "120steps"  # or "15m", "90m", "24h"

results = Path("results").resolve()  # measurements that come with this notebook
os.chdir(tempfile.mkdtemp())  # everything below is written to a new folder, which the system clears one day
BLUE, ORANGE, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#333333"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## 1. One device, one budget
#
# Why fix the time, and not the number of updates or tokens? Because time is what you pay for. A layer that makes the model
# a little better and each update twice as slow looks good after equal updates and bad after equal minutes. With a fixed
# budget every design choice (a wider layer, a larger batch, a slower optimiser) has to earn its own cost.
#
# The price of this is that nobody knows beforehand how many updates there will be. A learning rate that "falls to zero
# over 10,000 updates" cannot be written down. So everything that changes in a run is a function of one number, the share
# `x` of the budget that is spent: 0 at the start, 1 at the end.
#
# ## 2. What the clock decides
#
# Three things: the learning rate, the number of rows in an update, and the moment to stop. Here are the first two. The
# recipe `crammed` is the paper's, a triangle; `modern` warms up, stays level, and falls.

# %%
from ufbert.config.presets import with_recipe
from ufbert.pretrain.schedules import lr_share, rows_per_step

preset = ufbert.preset("crammed_bert")
recipes = {name: with_recipe(preset, name, "base").train for name in ("crammed", "modern")}
shares = [i / 400 for i in range(401)]

figure, (rate, rows) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for (name, train), colour in zip(recipes.items(), (BLUE, ORANGE), strict=True):
    rate.plot(shares, [lr_share(train, x) for x in shares], color=colour, lw=2, label=name)
ramp = replace(recipes["crammed"], micro_rows=128, batch_rows=2048)  # from 128 rows to 2,048
rows.plot(shares, [rows_per_step(ramp, x) for x in shares], color=INK, lw=2)
rate.set(xlabel="share of the budget that is spent", ylabel="learning rate / its peak", title="learning rate")
rows.set(
    xlabel="share of the budget that is spent",
    ylabel="rows of an update",
    title="batch size, in both recipes",
    ylim=(0, None),
)
rate.legend(frameon=False)
plt.show()

# %% [markdown]
# Early on, a rough gradient is good enough, and many small updates are worth more than few precise ones. Later the
# direction is subtle and noise hurts, so the batch grows.
#
# **And if the machine stumbles?** The same clock answers. We let three pretended machines train for fifteen minutes: one
# is steady, one becomes three times as slow after five minutes, and one freezes for three minutes. `WallClock` is the
# real clock of a run; only its watch is ours.

# %%
from ufbert.pretrain.budget import WallClock


def pretend_to_train(seconds_per_update):
    """Minutes and learning rates of all updates on a machine whose updates take `seconds_per_update(now)` seconds."""
    now = 0.0
    clock = WallClock(900.0, started=0.0, now=lambda: now)
    clock.reserve(20.0)  # seconds kept for the last evaluation and for saving
    minutes, rates = [], []
    while not clock.done(len(rates)):
        minutes.append(now / 60)
        rates.append(lr_share(recipes["modern"], clock.fraction(len(rates))))
        now += seconds_per_update(now)
    return minutes, rates


machines = {
    "steady": lambda now: 1.0,
    "slow after 5 minutes": lambda now: 1.0 if now < 300 else 3.0,
    "frozen from 6 to 9": lambda now: 180.0 if 359 <= now < 360 else 1.0,
}
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True, layout="constrained")
for axis, (name, machine), colour in zip(axes, machines.items(), (INK, ORANGE, BLUE), strict=True):
    minutes, rates = pretend_to_train(machine)
    axis.plot(minutes[::12], rates[::12], "o", ms=3.5, color=colour)
    axis.set(xlabel="minutes", title=f"{name}: {len(rates)} updates", xlim=(-0.3, 15.3), xticks=[0, 5, 10, 15])
    assert minutes[-1] < 15 - 20 / 60  # nobody is late
    assert rates[-1] < 0.02  # and all have come down
axes[0].set_ylabel("learning rate / its peak")
figure.suptitle("one dot for every twelfth update")
plt.show()

# %% [markdown]
# All three follow one curve, end in time, and end with a small learning rate, which is worth a good deal of loss. The slow
# machine makes fewer updates; the frozen one loses three minutes and nothing else. A schedule in updates would have been
# cut off in the middle.
#
# ## 3. The text
#
# The `demo` extra brings 4.9 MB of Wikipedia. Without it we make up a small language, in which some words follow from others:
# each animal has its own food, and each town its country. That is enough to see what a masked language model learns.

# %%
from ufbert.data.corpora import demo_path

if demo_path() is not None:
    corpus = "demo"
    questions = ["Paris is the [MASK] of France.", "He was born in [MASK] and died in 1900."]
else:
    import random

    rng = random.Random(0)
    foods = {
        "cat": "fish",
        "dog": "bones",
        "fox": "hens",
        "owl": "mice",
        "cow": "grass",
        "bee": "honey",
        "frog": "flies",
    }
    towns = {"paris": "france", "rome": "italy", "oslo": "norway", "cairo": "egypt", "lima": "peru", "tokyo": "japan"}

    def sentence():
        animal, town = rng.choice(list(foods)), rng.choice(list(towns))
        mood = rng.choice(["old", "young", "clever", "lazy", "hungry", "quiet"])
        return rng.choice(
            [
                f"The {mood} {animal} eats {foods[animal]}.",
                f"In {town} the {animal} likes {foods[animal]}.",
                f"The {animal} of {town} sleeps in {towns[town]}.",
                f"{town} is a town in {towns[town]}.",
            ]
        )

    documents = ["\n".join(sentence() for _ in range(rng.randint(4, 12))) for _ in range(1500)]
    Path("toy.txt").write_text("\n\n".join(documents))
    corpus = "text:toy.txt"
    questions = ["The hungry cat eats [MASK].", "The owl of tokyo sleeps in [MASK].", "In oslo the [MASK] likes honey."]
    questions += ["The [MASK] fox eats hens."]
    print(documents[0])

# %% [markdown]
# ## 4. A plan, before anything is spent
#
# `plan` (on the command line `ufbert plan`) says what a budget buys: it compiles the training step, counts its operations and
# bytes, and divides by speeds that it has just measured. For a device that is not here, such as `device="h200"`, it takes
# the vendor's figures and what others have reached. Its last table says which figure rests on what.
#
# If the machine is busy with something else, the plan promises less: on one and the same two cores it said 31.7 million tokens
# when they had less to do, and 1.7 million beside sixteen other programs.

# %%
model = {
    "config": "crammed_bert",
    "scale": "tiny",  # 2 layers of width 128
    "recipe": "modern",
    "device": "cpu",
    "data": {"short_until": 0.0},  # rows of one length only, so that less is compiled; leave this out in earnest
}
plan = ufbert.plan("15m", check=False, **model)

# %%
print(f"in fifteen minutes: {plan['updates']:,} updates, {plan['tokens'] / 1e6:.1f} million tokens")
print(f"of the time, {plan['seconds']['updates'] / plan['seconds']['total']:.0%} is spent on updates")

# %% [markdown]
# BERT read about 130,000 million tokens (Devlin et al. 2018, arXiv 1810.04805: a million updates of 128,000). A day on one
# H200 buys 54,753 million for the whole crammed BERT of 16 layers (`docs/planning.md`). So fifteen minutes of a CPU are for learning
# how it goes, and a day of a GPU is for a model to keep.
#
# ## 5. Train
#
# The text is prepared first, and that is not charged. Then the clock starts. It covers everything else: compiling, training,
# evaluations, and the last save.

# %%
options = {
    **model,
    "corpus": corpus,
    "prepared": "text",  # a folder for what is prepared
    "train": {"batch_rows": 16, "micro_rows": 16},  # small batches for so short a run; leave this out in earnest
}
summary = ufbert.pretrain("run", budget=BUDGET, **options)

# %% [markdown]
# ## 6. How to read a loss
#
# The loss is the surprise at a masked token, in nats. By itself the number says nothing; it needs two marks:
#
# - **knowing nothing**: all words of the vocabulary equally likely, `log(vocabulary)`;
# - **word frequency alone**: the loss of somebody who knows how often each word occurs and never looks at the sentence.
#   A model that has not passed this line has not learnt to read. Many a broken run hides just above it, with a curve that
#   falls beautifully.
#
# And it is the *held-out* loss that counts, on documents that training never sees.

# %%
records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
updates = [r for r in records if "loss" in r]
evaluations = [r for r in records if "heldout_loss" in r]

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
axis.plot(
    [r["step"] for r in updates], [r["loss"] for r in updates], color=BLUE, alpha=0.35, label="training, each update"
)
axis.plot(
    [r["step"] for r in evaluations], [r["heldout_loss"] for r in evaluations], "o-", color=BLUE, label="held-out"
)
axis.axhline(summary["unigram_loss"], ls="--", color=INK, label="word frequency alone")
axis.set(xlabel="update", ylabel="loss of a masked token, nats", ylim=(0, None))
axis.legend(frameon=False)
plt.show()
print(f"word frequency {summary['unigram_loss']:.2f}, model {summary['heldout_loss']:.2f} nats")
print(f"so a masked token is {math.exp(summary['gain_over_unigram']):.0f} times as likely as by its frequency")

# %% [markdown]
# ## 7. What it fills in
#
# The loss is an average. Ask the model, and you see what it is an average of.

# %%
from ufbert.inference.predictor import Predictor

trained = Predictor.load("run/model")
for question in questions:
    guesses = trained.fill_mask(question)[0][:3]
    print(f"{question:40}", ", ".join(f"{guess.token} {guess.probability:.0%}" for guess in guesses))

# %% [markdown]
# In the made-up language it has learnt who eats what. What nobody can know stays open: the mood of the fox was drawn from six
# by a die, and the model spreads its answer. That is why its loss does not reach zero, and should not. (On Wikipedia, 120
# updates teach little more than which words are frequent.)
#
# ## 8. The real fifteen minutes
#
# Real text is harder than seven animals. These curves are measured: 4 layers of 256, 180 MB of mixed English prose, one core of a
# server, fifteen minutes each (`results/one_core_15m.json` has the commands, and `docs/results/pretraining.md` the story).
# The orange runs have the recipe as it is now, hashed tables of word pairs and narrower layers.

# %%
measured = json.loads((results / "one_core_15m.json").read_text())
runs = {run["name"]: run for run in measured["runs"]}
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
shown = [("modern", "before", BLUE, "-"), ("modern, seed 1", "before, seed 1", BLUE, ":")]
shown += [("narrow, seed 0", "now", ORANGE, "-"), ("narrow, seed 1", "now, seed 1", ORANGE, ":")]
for name, label, colour, line in shown:
    points = runs[name]["evaluations"]
    loss = [p["heldout_loss"] for p in points]
    axis.plot([p["spent"] / 60 for p in points], loss, line, color=colour, lw=2, label=f"{label}: {loss[-1]:.2f}")
axis.axhline(runs["modern"]["summary"]["unigram_loss"], ls="--", color=INK, label="word frequency alone")
axis.set(xlabel="minutes of one core", ylabel="held-out loss, nats", ylim=(3.5, 9.2), xlim=(0, 15.2))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Two things to see. The first minute goes by above the dashed line: until attention has found a token's neighbours, a model
# knows word frequency at best. And two seeds of one recipe lie close together, much closer than the two recipes. Without
# the dotted lines you could not know that the difference is more than luck.
#
# ## 9. Going on after a crash
#
# A day is long, and machines fail. We stop a run in the middle, as the stop button of this notebook does (on a command
# line, Ctrl-C), and let it go on.

# %%
from ufbert.errors import Interrupted


def press_stop(metrics, at_update):
    """Interrupt this process once a run has written so many updates."""
    while not metrics.exists() or metrics.read_text().count('"loss"') < at_update:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=press_stop, args=(Path("stopped/metrics.jsonl"), 30), daemon=True).start()
try:
    ufbert.pretrain("stopped", budget="120steps", **options)
except Interrupted as stop:
    print("interrupted:", stop)

# %%
resumed = ufbert.pretrain("stopped", budget="120steps", resume=True)

# %% [markdown]
# A checkpoint holds the weights, the optimiser, the place in the text, the random key and the clock. With a budget of updates
# the run that was stopped therefore ends where the other one ended, to the last bit. With a budget of time only the time is
# promised: what was spent before the crash stays spent.

# %%
print(f"in one piece   {summary['heldout_loss']!r}")
print(f"stopped once   {resumed['heldout_loss']!r}")
if BUDGET == "120steps":
    assert resumed["heldout_loss"] == summary["heldout_loss"]
assert resumed["restarts"] == 1

# %% [markdown]
# ## 10. What to remember
#
# 1. A budget is a time on a device. Learning rate, batch and end follow the clock, so a slow or stalled machine still
#    finishes its schedule.
# 2. `plan` before you pay.
# 3. A loss means something next to word frequency, on held-out text, with a second seed.
# 4. Interrupt freely: `resume` goes on.
#
# The same on a command line, with a day and your own text:
#
# ```
# uv run ufbert plan  --config=crammed_bert --budget=24h --device=h200 --price=3
# uv run train.py     --config=crammed_bert --budget=24h --recipe=modern --corpus=text:a.txt,b.txt.gz --out=runs/day
# uv run train.py     --resume --out=runs/day
# ```
#
# **Where to read on:** `docs/training.md`, and in the code `ufbert/pretrain/budget.py` (the clock), `schedules.py` (what it
# decides) and `loop.py` (the order of events). Notebook `03` fine-tunes what you have trained.

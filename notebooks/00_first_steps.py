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
# # First steps with ufbert
#
# In a few minutes and on an ordinary CPU: look at a model, train it from scratch on text, ask it to fill in a blank, and
# fine-tune it to classify sentences. Everything here is also a command (`train.py`, `finetune.py`, `ufbert fill-mask`).

# %%
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import ufbert

os.chdir(tempfile.mkdtemp())  # everything below is written to a new folder, which the system clears one day

# %% [markdown]
# ## A model is a configuration and a tree of arrays
#
# `tiny` is an UltraFastBERT: a BERT whose feedforward layers are *trees of neurons*.

# %%
config = ufbert.preset("tiny")
params = ufbert.init(config, seed=0)
print(f"{sum(a.size for a in jax.tree.leaves(params)):,} parameters")
for path, array in jax.tree.leaves_with_path(params["encoder"]["layer_00"]):
    print(f"{jax.tree_util.keystr(path, simple=True, separator='.'):28} {array.shape}")

# %% [markdown]
# `tree.w_in` and `tree.w_out` hold one row per neuron, 511 of them. A token visits only nine: it starts at the root,
# computes that neuron, goes to the right child if the result is positive and to the left one if not, and so on down.

# %%
from ufbert.ops.fff import path_nodes

tree = params["encoder"]["layer_00"]["tree"]
token = jax.random.normal(jax.random.key(1), (1, config.model.d_model))
nodes, logits = path_nodes(token, tree["w_in"], tree["bias"])
for node, logit in zip(nodes[0, 0].tolist(), logits[0, 0].tolist(), strict=True):
    print(f"neuron {node:3d}   logit {logit:+.3f}   {'right' if logit > 0 else 'left'}")

# %% [markdown]
# ## Train it from scratch
#
# The `demo` extra brings 4.9 MB of Wikipedia. Without it we make up a small language, which is enough to see learning.

# %%
from ufbert.data.corpora import demo_path

if demo_path() is not None:
    corpus, question = "demo", "Paris is the [MASK] of France."
else:
    import random

    rng = random.Random(0)
    animals, places = ["cat", "dog", "fox", "owl"], ["paris", "rome", "london"]
    texts = [
        "\n".join(f"The {rng.choice(animals)} lives in {rng.choice(places)}." for _ in range(8)) for _ in range(600)
    ]
    Path("toy.txt").write_text("\n\n".join(texts))
    corpus, question = "text:toy.txt", "The cat [MASK] in paris."

# %% [markdown]
# A budget is a time (`"5m"`) or a number of updates (`"120steps"`). Every option of `train.py` works here by name.

# %%
summary = ufbert.pretrain(
    "run",
    budget="60steps",
    config="tiny",
    scale="base",
    corpus=corpus,
    device="cpu",
    train={"batch_rows": 8, "micro_rows": 8, "n_checkpoints": 3},
)

# %%
records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
updates = [r for r in records if "loss" in r]
evals = [r for r in records if "heldout_loss" in r]
figure, axis = plt.subplots(figsize=(7, 3))
axis.plot([r["step"] for r in updates], [r["loss"] for r in updates], alpha=0.4, label="training")
axis.plot([r["step"] for r in evals], [r["heldout_loss"] for r in evals], "o-", label="held-out")
axis.axhline(summary["unigram_loss"], ls="--", color="gray", label="word frequency alone")
axis.set_xlabel("update")
axis.set_ylabel("masked-LM loss, nats")
axis.legend()
plt.show()

# %% [markdown]
# ## Ask it
#
# After 60 updates it has learnt little more than which words are frequent; after `--budget=5m` it has learnt a good deal.

# %%
from ufbert.inference.predictor import Predictor

for guess in Predictor.load("run/model").fill_mask(question)[0]:
    print(f"{guess.probability:6.1%}  {guess.token}")

# %% [markdown]
# ## Use the arrays directly
#
# `apply` is a pure function of parameters and ids, so `jax.jit`, `jax.grad` and `jax.vmap` work on it.

# %%
model = ufbert.load("run/model")
ids = jnp.array([model.tokenizer.encode("a small sentence").ids])
trained = ufbert.preset("tiny", vocab_size=model.config.vocab_size)
hidden, token_logits = jax.jit(lambda p, i: ufbert.apply(p, trained, i))(model.params, ids)
print(hidden.shape, token_logits.shape)

# %% [markdown]
# ## Fine-tune it
#
# Fine-tuning reads the official GLUE files (`dir:PATH`). Here we write a toy `SST-2` in the same layout, whose sentences are
# positive if they contain "good".

# %%
folder = Path("glue/SST-2")
folder.mkdir(parents=True)
for split, count in (("train", 160), ("dev", 40)):
    rows = [f"the film is {'good' if i % 2 else 'bad'} in part {i % 7}\t{i % 2}" for i in range(count)]
    (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))

results = ufbert.finetune(
    "run/model",
    "sst2",
    "dir:glue",
    "tuned",
    seeds="0",
    device="cpu",
    tune={"epochs": 2, "lr": 1e-3},
)

# %%
print(Predictor.load("tuned/sst2").classify("a good film"))

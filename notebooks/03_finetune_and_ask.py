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
# # Fine-tune it and ask it
#
# A pretrained model fills in blanks. Fine-tuning turns it into something that answers a question about a text: is this
# review good or bad? This notebook shows why that works at all, does it on a task in GLUE's format and on one of your own, and
# then spends some time on the part where most comparisons go wrong.
#
# Everything is made up here and takes a minute: the language, the reviews, the task. So you know what is true, and can see
# whether the model has understood it. The last sections say how the same looks on real text, where it is less pretty.

# %%
import csv
import json
import os
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import ufbert
from ufbert.inference.predictor import Predictor

results = Path("results").resolve()  # measurements that come with this notebook
os.chdir(tempfile.mkdtemp())  # everything below is written to a new folder, which the system clears one day
BLUE, ORANGE, INK = "#0072B2", "#D55E00", "#333333"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## 1. A language in which words keep company
#
# Reviewers use forty adjectives. Twenty are kind and twenty are not. Nobody writes down which is which. But after a kind
# review people come back, and after an unkind one they want their money.

# %%
kind = "warm funny bright tender clever lively moving fresh honest graceful gripping charming rich bold gentle witty"
kind = [*kind.split(), "splendid", "lovely", "joyful", "wise"]
unkind = "dull cold noisy clumsy stale bitter gloomy tedious hollow crude lazy messy shallow bland grim tired"
unkind = [*unkind.split(), "dreary", "silly", "vulgar", "weak"]
things = ["film", "play", "story", "music", "scene", "ending", "dialogue", "cast"]
afterwards = {
    True: ["We laughed and stayed.", "I want to see it again.", "Everybody clapped.", "We told all our friends."],
    False: ["We left early.", "I want my money back.", "Everybody yawned.", "We warned all our friends."],
}
rng = random.Random(0)


def review():
    is_kind = rng.random() < 0.5
    first, second = rng.sample(kind if is_kind else unkind, 2)
    return f"The {rng.choice(things)} was {first} and {second}. {rng.choice(afterwards[is_kind])}"


documents = ["\n".join(review() for _ in range(rng.randint(3, 8))) for _ in range(2000)]
Path("text.txt").write_text("\n\n".join(documents))
print(documents[0])

# %% [markdown]
# ## 2. Pretraining has already sorted the words
#
# We train for 150 updates, as in notebook `02`, and look at the vectors of the forty adjectives: two directions of them, those
# in which they differ most. The colours are ours. The model has never seen them.

# %%
summary = ufbert.pretrain(
    "run",
    budget="150steps",
    config="crammed_bert",
    scale="tiny",
    recipe="modern",
    corpus="text:text.txt",
    prepared="text",
    device="cpu",
    train={"batch_rows": 16, "micro_rows": 16, "n_evals": 5},
    data={"short_until": 0.0},
)

# %%
model = ufbert.load("run/model")
table = np.asarray(model.params["encoder"]["embeddings"]["tokens"])
words = kind + unkind
vectors = table[[model.tokenizer.token_to_id(word) for word in words]]
vectors = vectors - vectors.mean(axis=0)
_, _, directions = np.linalg.svd(vectors, full_matrices=False)
places = vectors @ directions[:2].T

figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
for (x, y), word in zip(places, words, strict=True):
    colour = BLUE if word in kind else ORANGE
    axis.plot(x, y, "o", color=colour, ms=4)
    axis.annotate(word, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8, color=colour)
axis.set(title="vectors of forty adjectives after pretraining (blue: kind)", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# This is what pretraining gives to fine-tuning: words of like company lie side by side. To learn a task from few labels, it is
# then enough to learn which side is which.
#
# ## 3. A task in GLUE's format
#
# GLUE's SST-2 is a folder with `train.tsv` and `dev.tsv`, each with a sentence and a label. We write one, with a twist: the
# training rows use only *five* kind and *five* unkind adjectives, and the dev rows only the other thirty. Whoever learns the ten
# words by heart can only guess on dev.

# %%
folder = Path("glue/SST-2")
folder.mkdir(parents=True)
seen, unseen = (kind[:5], unkind[:5]), (kind[5:], unkind[5:])


def labelled(adjectives, count):
    """Rows of a sentence and its label, half of them kind."""
    rows = []
    for i in range(count):
        is_kind = i % 2 == 0
        word = rng.choice(adjectives[0] if is_kind else adjectives[1])
        rows.append((f"the {rng.choice(things)} was {word}", int(is_kind)))
    return rows


splits = {"train": labelled(seen, 120), "dev": labelled(unseen, 120)}
for split, rows in splits.items():
    with (folder / f"{split}.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([("sentence", "label"), *rows])
for sentence, label in splits["train"][:2] + splits["dev"][:2]:
    print(label, sentence)

# %% [markdown]
# Now twice the same, with three seeds each: once from the pretrained model, once from random weights of the same shape
# (`from_scratch`). Everything else is equal: rows, learning rate, epochs, seeds. That is a *control*. Without it you know a
# score, but not what it is owed to.

# %%
pretrained = ufbert.finetune("run/model", "sst2", "dir:glue", "pretrained", seeds="0,1,2", device="cpu")

# %%
scratch = ufbert.finetune("run/model", "sst2", "dir:glue", "random", seeds="0,1,2", device="cpu", from_scratch=True)


# %%
def accuracies(swept):
    """The dev accuracy of each seed, in per cent."""
    return [100 * scores["accuracy"] for scores in swept["tasks"]["sst2"]["dev"]["dev"]["seeds"].values()]


figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for height, (swept, colour) in enumerate(((scratch, ORANGE), (pretrained, BLUE))):
    values = accuracies(swept)
    axis.plot(values, [height] * len(values), "o", ms=9, color=colour, alpha=0.6)
    axis.plot([np.median(values)] * 2, [height - 0.3, height + 0.3], color=INK, lw=2)
axis.axvline(50, ls="--", color=INK, lw=1)
axis.text(50.5, 1.45, "always the same answer", fontsize=9)
axis.set(xlabel="accuracy on dev, per cent; bar: median", xlim=(40, 102), ylim=(-0.5, 1.7))
axis.set_yticks([0, 1], ["random weights", "pretrained"])
plt.show()
print("pretrained    ", ", ".join(f"{value:.1f}" for value in accuracies(pretrained)))
print("random weights", ", ".join(f"{value:.1f}" for value in accuracies(scratch)))
assert np.median(accuracies(pretrained)) > np.median(accuracies(scratch)) + 15

# %% [markdown]
# From random weights the model learns the ten words of the training rows, and that is worth nothing on thirty others. The
# pretrained model is told ten words and knows forty.
#
# **Fine-tuning that never worked.** If your own scores sit at the dashed line, look at three things before anything else:
#
# - *The learning rate.* 4e-5 is made for BERT's width of 768 and is too low for narrow models. The protocol `small`, which is
#   chosen for them, takes 0.2 / width (`docs/results/finetuning.md` has a table of rates).
# - *The pretraining.* Has it passed the line of word frequency (notebook `02`)? What it fills in shows it at once.
# - *The control.* If random weights do as well, the fault lies in what was pretrained. If they do better, it was harmful.
#
# The package says so in words when a score takes no knowledge of the texts, as it did above.
#
# ## 4. Ask it
#
# Each task leaves a model folder of its median seed. A `Predictor` reads it and takes texts.

# %%
predictor = Predictor.load("pretrained/sst2")
for text in (
    "the film was warm",
    "the film was splendid",
    "the ending was vulgar",
    "the cast was gentle and the play dreary",
):
    answer = predictor.classify(text)
    print(f"{text:42} {answer.label} {answer.probability:.0%}")

# %% [markdown]
# "splendid" and "vulgar" were in no training row. The last sentence has one word of each kind. There is no right answer, and
# the model gives one all the same, sometimes a confident one: probabilities of a fine-tuned model are not a measure of doubt.
#
# ## 5. A task of your own
#
# Your own rows are a TSV, CSV or JSON-lines file with a column of texts and a column of labels. Ours has three classes,
# *mixed* among them, so that the question above has an answer.

# %%
Path("own").mkdir()


def opinion():
    mood = rng.choice(["kind", "unkind", "mixed"])
    first, second = rng.sample(things, 2)
    adjectives = {"kind": rng.sample(kind, 2), "unkind": rng.sample(unkind, 2)}
    adjectives["mixed"] = rng.sample([rng.choice(kind), rng.choice(unkind)], 2)
    return f"the {first} was {adjectives[mood][0]} and the {second} {adjectives[mood][1]}", mood


for name, count in (("train", 300), ("dev", 100)):
    with Path(f"own/{name}.tsv").open("w", newline="") as file:
        rows = [("review", "mood"), *(opinion() for _ in range(count))]
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)

own = ufbert.finetune(
    "run/model",
    train="own/train.tsv",
    dev="own/dev.tsv",
    text="review",
    label="mood",
    out="tuned",
    seeds="0,1,2",
    device="cpu",
)

# %%
mine = Predictor.load("tuned/own")
for text in (
    "the cast was gentle and the play dreary",
    "the film was witty and the music wise",
    "the scene was crude and the story bland",
):
    shares = mine.label_probabilities(text)
    print(f"{text:42}", "  ".join(f"{label} {share:.0%}" for label, share in shares.items()))

# %% [markdown]
# ## 6. Smaller numbers: int8
#
# On a CPU the weights can be rounded to 8 bits, with one factor a row. That makes the model a quarter of the size, and
# faster (notebook `04`). What does it do to the answers? Measure it, on your rows, each time.

# %%
from ufbert.ops import native

texts, labels = zip(*splits["dev"], strict=True)
probability, accuracy = {}, {}
for dtype in ("float32", "int8") if not native.unavailable() else ("float32",):  # int8 needs the C++ kernels
    answers = Predictor.load("pretrained/sst2", dtype=dtype).label_probabilities(list(texts))
    probability[dtype] = np.array([answer["positive"] for answer in answers])
    accuracy[dtype] = np.mean((probability[dtype] > 0.5) == np.array(labels))
    print(f"{dtype:8} accuracy on dev {accuracy[dtype]:.1%}")
if "int8" in probability:
    apart = np.abs(probability["int8"] - probability["float32"])
    print(f"probabilities differ by {apart.mean():.4f} on average, and by {apart.max():.4f} at most")
    assert abs(accuracy["int8"] - accuracy["float32"]) < 0.05

# %% [markdown]
# ## 7. What an honest comparison needs
#
# Between "A scored higher than B" and "A is better than B" lie four questions.
#
# 1. **Another seed?** Fine-tuning a small set depends on luck. Quote the median of several seeds and their range. Never the
#    best one.
# 2. **Other rows?** GLUE's RTE has 277 dev rows: a score of 60 % is uncertain by 6 points, up or down, for them alone. An interval must
#    hold both.
# 3. **The same effort?** Same protocol, same learning rates tried. If you have tuned A and not B, you have measured yourself.
# 4. **Compared with nothing?** The majority class, random weights, a bag of words. They are embarrassing more often
#    than one thinks.
#
# `glue-table` puts sweeps side by side, with a 95 % interval for seeds and rows (the command is called from Python here). It
# warns of everything in which the two differ besides the model. Here that is our control itself.

# %%
from ufbert.cli import call

table = call("glue-table", ["random", "pretrained"])

# %% [markdown]
# ## 8. And on real text?
#
# Here is the same control on real tasks, for `mini`, the model that comes with the package (4 x 256): it had read 134 million
# tokens of English on a GPU (`results/mini.json`; three seeds at the learning rate of the protocol). SST-2 asks whether a
# sentence of a review is positive, STS-B how alike two sentences are.

# %%
measured = json.loads((results / "mini.json").read_text())
print(f"held-out loss after pretraining: {measured['summary']['heldout_loss']:.2f} nats")
for task, score in measured["scores"].items():
    for start in ("trained", "random"):
        low, middle, high = sorted(score[f"{start}_seeds"])
        print(f"{task:5} {score['metric']:8} from {start:8} weights: {middle:.1f} (from {low:.1f} to {high:.1f})")

# %% [markdown]
# On SST-2 the medians differ by less than the seeds do: **there this pretraining is worth nothing.** With 67,349 labelled rows a
# small model learns from the labels what it needs, and general prose says little about film critics. **On STS-B it is worth
# nearly everything**: 5,749 rows do not teach which words are alike, and reading does. (CoLA and MRPC are like SST-2; on RTE both
# stay below the larger class.) Our made-up task was built so that
# pretraining must help: ten words for forty. Knowing when it helps is the whole art; the control is how one finds out. (A model
# that has read far more helps on SST-2, too: an imported MiniLM reaches 90, see `docs/results/finetuning.md`.)
#
# ## 9. What to remember
#
# 1. Pretraining sorts words by their company. Fine-tuning names the heaps.
# 2. Run the control from random weights with the same seeds, rows and learning rate, every time.
# 3. Medians and intervals, not best runs.
# 4. Round to int8 if you like, and measure what it does.
#
# The same on a command line:
#
# ```
# uv run finetune.py --model runs/NAME/model --glue-source dir:GLUE --tasks sst2,rte --out runs/glue
# uv run finetune.py --model runs/NAME/model --glue-source dir:GLUE --tasks sst2,rte --out runs/random --from-scratch
# uv run ufbert glue-table runs/random runs/glue
# uv run finetune.py --model runs/NAME/model --train a.tsv --dev b.tsv --text review --label mood --out runs/own
# uv run ufbert predict --model runs/own/own --dtype int8 "the film was warm"
# ```
#
# **Where to read on:** `docs/finetuning.md` (protocols, seeds, sources of rows), `docs/inference.md` (serving), and
# `docs/results/finetuning.md` (what was measured).

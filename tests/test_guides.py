"""Every command of README and of the guides runs as it stands there, one after the other, on small models and small text.

What is replaced, and nothing else, is in `smaller`: names of texts, sizes and budgets, and what must be downloaded. Commands of
docs/results/speed.md need PyTorch or a graphics card; those of docs/compression.md run in compress/test_guide.py.
"""

import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import COMPRESS, REPO
from test_documents import SCRIPTS, commands

from ufbert import cli
from ufbert.config.model import FEEDFORWARD_NAMES
from ufbert.hub.convert import export_model
from ufbert.nn.registry import FEEDFORWARDS

PAGES = ["README.md", *(f"docs/{name}.md" for name in (
    "comparison", "exchange", "finetuning", "inference", "layers", "planning", "research", "training",
))]  # fmt: skip
SIZE = [
    "--model.d-model=32", "--model.n-heads=2", "--model.n-layers=2", "--model.vocab-size=300", "--model.max-len=128",
    "--model.pooler-width=16",
]  # fmt: skip
BATCH = [
    "--data.seq-len=32", "--data.eval-rows=16", "--train.batch-rows=8", "--train.micro-rows=8", "--train.n-checkpoints=1",
]  # fmt: skip
GENERAL = [
    (r"--budget=(?!200steps).*", "--budget=4steps"), ("--budget=200steps", "--budget=5steps"),
    (r"--tokens=.*", "--tokens=1500"), ("--seeds=0,1", "--seeds=0"),
    (r"--rates=.*", "--rates=3e-3"), (r"--scale=(mini|base)", "--scale=tiny"),
    (r"--(corpus|heldout)=text:.*", r"--\1=text:\1.txt"), ("hf:google-bert/bert-base-uncased", "CHECKPOINT"),
    ("--out=runs/NAME", "--out=runs/STOPPED"), ("there/results.json", "runs/compare/results.json"),
    ("--corpus=demo", "--corpus=text:corpus.txt"),
    (r"--when-done=.*", "--when-done=true"), (r"--model.d-hidden=511", "--model.d-hidden=63"),
]  # fmt: skip
"""Words by regular expression, and what stands in their place here."""


@pytest.fixture(scope="module")
def workplace(run_folder, corpus_file, family, tmp_path_factory):
    """A folder in which all that the guides name lies."""
    place, rng = tmp_path_factory.mktemp("guides"), random.Random(0)
    shutil.copy(corpus_file, place / "corpus.txt")
    text = corpus_file.read_text().replace("The ", "A ").replace("sees", "saw")
    (place / "heldout.txt").write_text(text[: len(text) // 4])
    for name in ("NAME", "A", "B", "C"):
        shutil.copytree(run_folder, place / "runs" / name)
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "layers.md").read_text(), re.DOTALL)
    (place / "my_preset.py").write_text(code)
    leave_out = shutil.ignore_patterns("summary.json", "model", "report.html")
    shutil.copytree(run_folder, place / "runs" / "STOPPED", ignore=leave_out)  # as if it had died before its end
    (place / "reviews.txt").write_text("the cat likes the river\nthe dog\n")
    words = ["cat", "dog", "king", "house", "bird"]

    def sentence(flag: int) -> str:
        return f"the {rng.choice(words)} sees the {rng.choice(words)}{' river' if flag else ''}"

    for split, n in (("train", 32), ("dev", 12)):
        flags = [i % 2 for i in range(n)]
        tables = {
            "SST-2": ["sentence\tlabel", *(f"{sentence(f)}\t{f}" for f in flags)],
            "CoLA": [f"x\t{f}\t\t{sentence(f)}" for f in flags],
            "MRPC": [
                "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
                *(f"{f}\t{i}\t{i}\t{sentence(f)}\t{sentence(0)}" for i, f in enumerate(flags)),
            ],
            "STS-B": [
                "index\tsentence1\tsentence2\tscore",
                *(f"{i}\t{sentence(f)}\t{sentence(0)}\t{5.0 * f}" for i, f in enumerate(flags)),
            ],
            "RTE": [
                "index\tsentence1\tsentence2\tlabel",
                *(f"{i}\t{sentence(f)}\t{sentence(0)}\t{'not_' * f}entailment" for i, f in enumerate(flags)),
            ],
        }
        for task, lines in tables.items():
            (place / "GLUE" / task).mkdir(parents=True, exist_ok=True)
            (place / "GLUE" / task / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        rows = "".join(f"{sentence(f)},{1 + 4 * f}\n" for f in flags)
        (place / {"train": "a.csv", "dev": "b.csv"}[split]).write_text("review,stars\n" + rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        export_model(family("bert", "masked_lm"), Path("CHECKPOINT"), "hf")
        tuned = ["--model=runs/NAME/model", "--tasks=sst2,mrpc,stsb", "--glue-source=dir:GLUE", "--out=runs/glue"]
        cli.call("finetune", [*tuned, "--seeds=0", "--tune.epochs=1", "--device=cpu"])
        shutil.copytree("runs/glue", "runs/other-glue")
    return place


@pytest.fixture
def layers_as_before():
    """One guide adds a layer, which other tests must not know."""
    layers, names = dict(FEEDFORWARDS), list(FEEDFORWARD_NAMES)
    yield
    FEEDFORWARDS.clear()
    FEEDFORWARDS.update(layers)
    FEEDFORWARD_NAMES[:] = names


def smaller(verb: str, words: list[str]) -> list[str]:
    """The words of a command, with less to do and nothing to download."""
    words = [re.sub(f"^{pattern}$", new, word) for word in words for pattern, new in [_rule(word)]]
    if verb == "compare":
        words = [word.replace("--budget=4steps", "--budget=20s") for word in words] + ["--blocks=2"]
    if verb in ("train", "prepare", "compare", "study") and not {"--resume", "--report"} & set(words):
        init = any(word.startswith("--init-from") for word in words)
        given = {word.split("=")[0] for word in words}
        more = [
            *([] if init else SIZE),
            *BATCH,
            *([] if verb == "prepare" else ["--device=cpu"]),
            "--corpus=text:corpus.txt",
        ]
        words += [word for word in more if word.split("=")[0] not in given]
    if verb == "finetune":
        words += [] if {"--glue-source", "--train"} & set(words) else ["--glue-source=dir:GLUE"]
        words += ["--tune.epochs=1", "--seeds=0", "--device=cpu"]
    if verb == "compress":
        words += [*([] if "--glue-source" in words else ["--glue-source=dir:GLUE"]), *COMPRESS]
    if verb == "bench encoder":
        words += ["--blocks=2"]
    return words


def _rule(word: str) -> tuple[str, str]:
    return next(((pattern, new) for pattern, new in GENERAL if re.fullmatch(pattern, word)), (re.escape(word), word))


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_guide_run(page, workplace, layers_as_before, tmp_path, monkeypatch):
    place = tmp_path / "here"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    found = commands(REPO / page)
    assert found
    for words in found:
        verb, rest = cli.split_verb([SCRIPTS[words[0]], *words[1:]] if words[0] in SCRIPTS else words[1:])
        if verb == "finetune" and "--out" in rest:  # what a guide makes itself is not there before
            shutil.rmtree(rest[rest.index("--out") + 1], ignore_errors=True)
        cli.call(verb, smaller(verb, list(rest)))

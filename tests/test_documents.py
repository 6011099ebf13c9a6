"""README, CONTRIBUTING and docs/: links lead somewhere, and what they say of the code's places and presets is so."""

import html
import json
import re
import shlex
import statistics
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.render
import pytest

import ufbert
from ufbert import cli
from ufbert.compare.page import page_of
from ufbert.compare.results import read_results
from ufbert.report.page import html as html_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours in a page's blocks of code, without what a shell makes of it."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        begins = re.search(
            r"(?:^|&& |\$ )(?:uv run |pip install uv && uv run )?(?:--extra \w+ )*(ufbert |train\.py|finetune\.py)",
            line,
        )
        if begins and not line.startswith("ufbert: "):
            found.append(shlex.split(line[begins.start(1) :], comments=True))
    return found


CARDS = [ROOT / "ufbert" / "models" / "mini" / "README.md"]
SCRIPTS = {"train.py": "train", "finetune.py": "finetune"}


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_the_program_takes(page):
    for words in commands(page):
        name, rest = cli.split_verb([SCRIPTS[words[0]], *words[1:]] if words[0] in SCRIPTS else words[1:])
        assert "--help" in rest or cli.parse(cli.VERBS[name].options, rest, name), words


def test_the_pages_hold_many_commands():
    assert sum(len(commands(page)) for page in PAGES) > 60


def test_the_reference_of_the_python_api_builds_from_its_docstrings():
    """As `uv run pdoc ufbert` builds it, but for the modules below the package."""
    module = pdoc.doc.Module(ufbert)
    page = html.unescape(pdoc.render.html_module(module, {"ufbert": module}))
    for name in ufbert.__all__:
        first = (getattr(ufbert, name).__doc__ or "").strip().splitlines()[0]
        assert len(first) > 20, name
        assert first.replace("`", "")[:20] in re.sub(r"<[^>]*>", "", page), name


COMPARISON = ROOT / "notebooks" / "results" / "comparison_mini.json"
SMALL = COMPARISON.with_name("comparison_demo.json")


def rows_of(file: Path) -> list[str]:
    """The rows of a comparison's table, recomputed from the losses of single seeds."""
    results = json.loads(file.read_text(encoding="utf-8"))
    trained = {model["name"]: model for model in results["models"] if model["by_tokens"]}
    losses = {name: model["by_tokens"]["losses"] for name, model in trained.items()}
    rows, base_name = [], results["asked"]["baseline"]
    for name in sorted(trained, key=lambda name: statistics.fmean(losses[name].values())):
        model, own, base = trained[name], losses[name], losses[base_name]
        gap = statistics.fmean(own[seed] - base[seed] for seed in own if seed in base)
        curve = model["by_tokens"]["curve"]
        # The loss that counts is that of the last weights, as here, or of averaged ones.
        assert curve[-1]["loss"] == pytest.approx(statistics.fmean(own.values()), abs=1e-4), name
        rows.append(
            f"| `{name}` | {statistics.fmean(own.values()):.3f} | {len(own)} | "
            f"{'' if name == base_name else f'{gap:+.3f}'} | {curve[-1]['accuracy']:.1%} | {model['neurons_used']:,} | "
            f"{model['neurons']:,} | {model['parameters']:,} | {model['infer_flops'] / 1e6:.2f} |"
        )
    return rows


def test_the_pages_of_the_comparisons_repeat_their_results():
    """Every cell of both tables, and the pages that are drawn from the same files."""
    page = (ROOT / "docs" / "results" / "comparison.md").read_text(encoding="utf-8")
    for file, part in zip((COMPARISON, SMALL), page.split("## Small enough to repeat"), strict=True):
        assert re.findall(r"^\| `\w+` \|.*\|$", part, re.MULTILINE) == rows_of(file)
        assert file.with_suffix(".html").read_text(encoding="utf-8") == html_of(page_of(read_results(file)))


def test_what_is_said_of_the_small_comparison_follows_from_its_results():
    text = (ROOT / "docs" / "results" / "comparison.md").read_text(encoding="utf-8").partition("## Small enough")[2]
    results = json.loads(SMALL.read_text(encoding="utf-8"))
    losses = {model["name"]: model["by_tokens"]["losses"] for model in results["models"]}
    gaps = [losses["ultrafastbert_1x11"][seed] - losses["path_dense_1x11"][seed] for seed in ("0", "1")]
    assert f"Word frequency alone: {results['unigram_loss']:.3f}." in text
    said = text.rpartition("|\n")[2]
    assert re.findall(r"[-+]?\d\.\d{3}", said) == [f"{-statistics.fmean(gaps):.3f}", *(f"{gap:+.3f}" for gap in gaps)]


def test_the_command_that_repeats_a_row_is_that_of_its_cell():
    small = json.loads(SMALL.read_text(encoding="utf-8"))
    guide = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8").partition("## Repeat a row")[2]
    words = guide.partition("ufbert train ")[2].partition("\n")[0].split()
    (cell,) = [cell for cell in small["cells"] if cell["name"] == "tokens: ultrafastbert_1x11-seed0"]
    assert set(words) - {"--out=runs/row"} <= set(cell["command"].split())
    (model,) = [model for model in small["models"] if model["name"] == "ultrafastbert_1x11"]
    assert f"{model['by_tokens']['losses']['0']:.3f}" in guide


def test_what_is_said_of_the_comparison_follows_from_its_results():
    models = json.loads(COMPARISON.read_text(encoding="utf-8"))["models"]
    loss = {m["name"]: statistics.fmean(m["by_tokens"]["losses"].values()) for m in models if m["by_tokens"]}
    page = (ROOT / "docs" / "results" / "comparison.md").read_text(encoding="utf-8").split("\n\n")[1]
    gaps = [
        ("ultrafastbert_1x11", "path_dense_1x11"), ("ultrafastbert_1x11", "fixed_tree_1x11"),
        ("no_feedforward", "ultrafastbert_1x11"),
        ("ultrafastbert_128x4", "path_dense_128x4"), ("no_feedforward", "crammed_bert"), ("bert_base", "bert_rotary"),
    ]  # fmt: skip
    assert re.findall(r"\d\.\d{3}", page) == [f"{loss[a] - loss[b]:.3f}" for a, b in gaps]
    bullet = README[README.index("- **Side by side**") :].split("\n- ")[0]
    names = ["bert_base", "crammed_bert", "ultrafastbert_1x11", "path_dense_1x11", "no_feedforward"]
    assert re.findall(r"\d\.\d{3}", bullet) == [f"{loss[name]:.3f}" for name in names]


def test_the_readme_is_short_and_holds_the_two_commands():
    assert len(README.splitlines()) <= 130
    assert "pip install uv && uv run --extra demo train.py --budget=5m" in README
    assert "pip install -q uv && uv run pytest" in README


def test_the_readme_and_the_guide_of_controls_list_every_preset_with_the_parameters_of_its_file():
    text = README + (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    counts = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \| [\d,]+ of [\d,]+ \|$", text, re.MULTILINE))
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.py")}
    assert counts.keys() == files.keys()
    for name, count in counts.items():
        assert f"{count} parameters" in files[name], name


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("pretrain/step.py", "jax.value_and_grad", "jax.value_and_grad("),
        ("pretrain/schedules.py", "lr_share", "def lr_share("),
        ("nn/updates.py", "apply_update", "def apply_update("),
        ("ops/fff.py", "path_nodes", "node = 2 * node + 1 + (z > 0)"),
    ],
)
def test_the_places_that_the_readme_names_hold_what_it_says(path, text, line):
    assert text in README
    assert Path(path).name in README
    assert line in (ROOT / "ufbert" / path).read_text(encoding="utf-8")


def test_the_table_of_routed_trees_is_that_of_its_file():
    page = (ROOT / "docs" / "results" / "pretraining.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "notebooks" / "results" / "trees_40m_h200.json").read_text(encoding="utf-8"))["runs"]
    losses = {run["name"]: {round(e["tokens"] / 1e6): e["heldout_loss"] for e in run["evaluations"]} for run in runs}
    few, all_of_them, *trees = (losses[f"{name}-lr0.003-seed0"] for name in ("d122", "d2147", "wide", "deep"))
    rows = re.findall(r"^\| (\d+) M \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 10
    for tokens, cells in rows:
        at = int(tokens)
        expected = [f"{few[at]:.3f}", f"{all_of_them[at]:.3f}"]
        for tree in trees:
            share = (few[at] - tree[at]) / (few[at] - all_of_them[at]) if at in tree else 0.0
            expected += [f"{tree[at]:.3f}", f"{share:+.2f}"] if at in tree else ["", ""]
        assert [cell.strip() for cell in cells.split("|")] == expected


def test_the_table_of_int8_is_that_of_its_file():
    page = (ROOT / "docs" / "results" / "speed.md").read_text(encoding="utf-8")
    bench = json.loads((ROOT / "notebooks" / "results" / "int8_one_core.json").read_text(encoding="utf-8"))["bench"]
    head = page.index("| BERT, 12 x 768, 1 x 128 tokens |")
    rows = [line.strip("|").split("|")[1:] for line in page[head:].split("\n\n")[0].strip().splitlines()[2:]]
    names = ["dense-int8", "static-int8", "openvino-int8", "onnxruntime-int8"]
    assert len(rows) == len(names)
    for name, cells in zip(names, rows, strict=True):
        expected = []
        for threads in ("1", "2"):
            ratio = bench[threads]["ratios"].get(name, {}).get("openvino-int8")
            expected.append(f"{1e3 * bench[threads]['seconds'][name]['median']:.1f}")
            expected.append("{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio) if ratio else "")
        assert [cell.strip() for cell in cells] == expected


def test_the_table_of_training_before_and_now_is_that_of_its_file():
    page = (ROOT / "docs" / "results" / "speed.md").read_text(encoding="utf-8").partition("| trained by both |")[2]
    results = json.loads(
        (ROOT / "notebooks" / "results" / "train_cpu_before_gpu_kernels.json").read_text(encoding="utf-8")
    )
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page.partition("\n\n")[0], re.MULTILINE)
    assert [name for name, _ in rows] == ["crammed_bert", "ultrafastbert_1x11"]
    for name, cells in rows:
        run, losses = results["bench"][name], results["updates_200"][name]
        expected = [f"{run[side]['tokens_per_second']:,.0f}" for side in ("now", "before")]
        expected.append("{median:.2f} ({low:.2f} to {high:.2f})".format(**run["ratio"]))
        expected.append(f"{losses[results['commit']]:.4f} and {losses[results['before']]:.4f}")
        assert [cell.strip() for cell in cells.split("|")] == expected


def test_the_points_that_int8_loses_are_those_of_its_file():
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "notebooks" / "results" / "int8_one_core.json").read_text(encoding="utf-8"))["minilm"]
    rows = re.findall(r"^\| (SST-2|STS-B), (\w+) \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 4
    for task, activations, cells in rows:
        run = runs[f"{task.lower().replace('-', '')} {activations}"]
        before, after = ([row["scores"][run["metrics"][0]], row["bytes"]] for row in run["rows"])
        expected = [
            f"{before[1] / 1e6:.1f}",
            f"{after[1] / 1e6:.1f}",
            f"{100 * before[0]:.1f}",
            f"{100 * after[0]:.1f}",
        ]
        expected.append(f"{100 * (before[0] - after[0]):.2f}")
        assert [cell.strip() for cell in cells.split("|")] == expected


def test_the_tables_of_a_quarter_of_an_hour_and_of_an_hour_are_those_of_their_files():
    page = (ROOT / "docs" / "results" / "pretraining.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\(`(\w{7})`\) \| ([\d.]+) \| ([\d.]+) M \| ([\d,]+) \|$", page, re.MULTILINE)
    files = [ROOT / "notebooks" / "results" / f"one_core_{minutes}m.json" for minutes in (15, 60)]
    runs = [run for file in files for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    facts = [(run["commit"], run["summary"]) for run in runs]
    assert rows == [
        (commit, f"{s['heldout_loss']:.3f}", f"{s['tokens'] / 1e6:.2f}", f"{s['steps']:,}") for commit, s in facts
    ]
    assert len(rows) == 9


def test_the_tables_of_trees_from_a_dense_model_are_those_of_their_file():
    page = (ROOT / "docs" / "results" / "trees.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "notebooks" / "results" / "minilm_to_trees.json").read_text(encoding="utf-8"))["runs"]
    rows = re.findall(r"^\| (\d+) neurons \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 10
    kinds = {"none": ("tree", "narrow", "pruned"), "150steps": ("tree", "narrow", "pruned", "prune")}
    for (budget, compared), part in zip(kinds.items(), (rows[:5], rows[5:]), strict=True):
        lost = [{row["name"]: f"{row['lost']:.1f}" for row in run["rows"]} for run in runs if run["budget"] == budget]
        for n, cells in part:
            expected = [run[f"{kind}_{n}"] for kind in compared for run in lost]
            assert [cell.strip() for cell in cells.split("|")] == expected
        assert f"lose {lost[0]['none']} and {lost[1]['none']} points" in " ".join(page.split())


def test_the_table_of_a_layer_that_became_a_tree_half_way_is_that_of_its_file():
    page = (ROOT / "docs" / "results" / "pretraining.md").read_text(encoding="utf-8").partition("| updates since |")[2]
    runs = json.loads((ROOT / "notebooks" / "results" / "trees_from_dense_mini.json").read_text(encoding="utf-8"))[
        "runs"
    ]
    losses = {name: {e["step"]: e["heldout_loss"] for e in evaluations} for name, evaluations in runs.items()}
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", page.partition("\n\n")[0], re.MULTILINE)
    assert [int(step) for step, _ in rows] == [0, 40, 80, 120, 160, 200]
    for step, cells in rows:
        tree, narrow, dense = (losses[name].get(int(step)) for name in ("tree", "narrow", "dense"))
        expected = [f"{tree:.3f}", f"{narrow:.3f}"]
        expected += [f"{dense:.3f}", f"{(narrow - tree) / (narrow - dense):+.2f}"] if dense else ["", ""]
        assert [cell.strip() for cell in cells.split("|")] == expected


STEPS = (
    "none", "pruned", "narrow", "tree", "tree_depth3", "tree_depth5", "tree_shared_half", "tree_cluster",
    "cluster_unrefitted", "tree_tokens", "tree_random_ridge001",
)  # fmt: skip


def test_the_table_of_what_each_step_to_a_tree_is_worth_is_that_of_its_file():
    page = (ROOT / "docs" / "results" / "trees.md").read_text(encoding="utf-8").partition("## What each step")[2]
    results = json.loads((ROOT / "notebooks" / "results" / "minilm_to_trees.json").read_text(encoding="utf-8"))
    errors = results["layers"]["errors"]
    rows = re.findall(r"^\|.*?\| \**([\d.]+)\** \| \**([\d.]*)\** *\|$", page, re.MULTILINE)
    assert rows == [tuple(f"{errors[i][name]:.3f}" if name in errors[i] else "" for i in "25") for name in STEPS]


def test_the_table_of_pruned_models_is_that_of_its_file():
    page = (ROOT / "docs" / "compression.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (SST-2|STS-B) \|(.*)\|$", page, re.MULTILINE)
    results = json.loads((ROOT / "notebooks" / "results" / "prune_minilm.json").read_text(encoding="utf-8"))
    assert [name for name, _ in rows] == ["SST-2", "STS-B"]
    for name, cells in rows:
        task = name.lower().replace("-", "")
        runs = [run for run in results["runs"] if run["task"] == task]
        assert [run["seed"] for run in runs] == [0, 1, 2]
        (before, *_), scores = ([100 * run["rows"][i]["scores"][run["metric"]] for run in runs] for i in (0, 1))
        expected = [f"{before:.1f}", ", ".join(f"{score:.1f}" for score in scores)]
        expected.append(f"{statistics.median(before - score for score in scores):.1f}")
        for dtype in ("float32", "int8"):
            for threads in (1, 2):
                (timed,) = [
                    run["timed"] for run in results["speed"] if (run["task"], run["threads"]) == (task, threads)
                ]
                (child,) = [one for one in timed if (one["model"], one["type"]) == (f"{task}_half", dtype)]
                expected.append("{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})".format(**child))
        assert [cell.strip() for cell in cells.split("|")] == expected

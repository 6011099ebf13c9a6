"""The same rows out of every source, and broken ones named by their place."""

import csv
import json
import random
import shutil

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert.errors import UserError
from ufbert.glue.sources.datasets_source import dataset_columns, dataset_split
from ufbert.glue.sources.official import choose_tasks, load_task, open_source
from ufbert.glue.tasks import TASKS, Examples, TaskData, find_task

TOYS = ("cola", "mrpc", "stsb", "mnli")
"""A single-sentence task, a pair, a regression, and the one with several dev and test sets."""
NAMES = {
    "cola": ["unacceptable", "acceptable"],
    "mrpc": ["not_equivalent", "equivalent"],
    "mnli": ["entailment", "neutral", "contradiction"],
}
"""Class names of the hub's datasets, in their order."""
HEADERS = {
    "cola": ["source", "label", "mark", "sentence"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "stsb": ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
    "mnli": [
        "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
        "sentence2_parse", "sentence1", "sentence2", "label1", "label2", "label3", "label4", "label5", "gold_label",
    ],
}  # fmt: skip


def splits(name):
    return ("train", *TASKS[name].dev, *TASKS[name].test)


def toy(name, split):
    """Seven rows as they were written: texts with quotes, accents and blanks at their ends, and a label."""
    task, rng = TASKS[name], random.Random(f"{name} {split}")
    rows = []
    for i in range(7):
        texts = [f' "{rng.choice("aéß漢")}, {rng.randrange(99)} said he\u2028' for _ in task.text]
        rows.append(
            (texts, round(5 * rng.random(), rng.choice((0, 1, 3, 14))) if task.is_regression else i % len(task.labels))
        )
    return rows


def wanted(name):
    """What a source must give."""
    task = TASKS[name]

    def rows(split):
        found = toy(name, split)
        texts = [[row[0][i].strip() for row in found] for i in range(len(task.text))]
        labels = None if split in task.test else [float(str(np.float32(label))) for _, label in found]
        return Examples(texts[0], texts[1] if len(texts) > 1 else None, labels)

    return TaskData(task, rows("train"), {s: rows(s) for s in task.dev}, {s: rows(s) for s in task.test})


def write_official(root):
    for name in TOYS:
        task, end = TASKS[name], "\r\n" if name == "stsb" else "\n"
        for split in splits(name):
            lines, test = [], split in task.test
            text = ("sentence",) if name == "cola" else task.text
            label = "label" if name == "cola" else task.label
            header = ["index", *text] if test else HEADERS[name]
            for i, (texts, value) in enumerate(toy(name, split)):
                values = dict(zip(text, texts, strict=True)) | {"index": str(i)}
                values[label] = str(value) if task.is_regression else task.labels[value]
                lines.append("\t".join(values.get(column, "x") for column in header))
            if test or task.header:
                lines.insert(0, "\t".join(header))
            path = root / ("AX/diagnostic.tsv" if split == "ax" else f"{task.folder}/{split}.tsv")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes((end.join(lines) + end).encode("utf-8-sig" if name == "mrpc" else "utf-8"))


def dataset_of(name, split):
    task, found = TASKS[name], toy(name, split)
    columns = {column: [texts[i] for texts, _ in found] for i, column in enumerate(task.hub_text)}
    labels = [-1 if split in task.test else label for _, label in found]
    kind = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=NAMES[name])
    features = {column: datasets.Value("string") for column in task.hub_text} | {"label": kind}
    return datasets.Dataset.from_dict({**columns, "label": labels}, features=datasets.Features(features))


def write_saved(root):
    for name in TOYS:
        found = {}
        for split in splits(name):
            config, part = dataset_split(TASKS[name], split)
            found.setdefault(config, datasets.DatasetDict())[part] = dataset_of(name, split)
        for config, dataset in found.items():
            dataset.save_to_disk(root / config)


def write_parquet(root):
    for name in TOYS:
        for split in splits(name):
            config, part = dataset_split(TASKS[name], split)
            (root / config).mkdir(exist_ok=True)
            dataset = dataset_of(name, split)
            if name == "mrpc":
                dataset.to_parquet(root / config / f"{part}.parquet")
                continue
            for i, rows in enumerate((range(4), range(4, 7))):
                dataset.select(rows).to_parquet(root / config / f"{part}-0000{i}-of-00002.parquet")


def write_csv(root):
    for name in TOYS:
        for split in splits(name):
            config, part = dataset_split(TASKS[name], split)
            (root / config).mkdir(exist_ok=True)
            with (root / config / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow([*TASKS[name].hub_text, "label"])
                writer.writerows([*texts, label] for texts, label in toy(name, split))


def write_tfds(root, task, configs):
    """Prepare `glue/CONFIG` with the library's own writer; `configs` has, by configuration and split, (texts, label) rows."""
    import tensorflow_datasets as tfds

    for config, parts in configs.items():

        class Glue(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("2.0.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config, version="2.0.0"),)
            code_path = None
            rows = parts

            def _info(self):
                kind = np.float32 if task.is_regression else tfds.features.ClassLabel(names=NAMES[task.name])
                texts = {column: tfds.features.Text() for column in task.hub_text}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict({**texts, "label": kind, "idx": np.int32})
                )

            def _split_generators(self, dl_manager):
                return {part: self._generate_examples(part) for part in self.rows}

            def _generate_examples(self, part):
                for i, (texts, label) in enumerate(self.rows[part]):
                    yield i, {**dict(zip(task.hub_text, texts, strict=True)), "label": label, "idx": i}

        Glue(config=config, data_dir=root).download_and_prepare(file_format="array_record")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    for name in TOYS:
        found = {}
        for split in splits(name):
            config, part = dataset_split(TASKS[name], split)
            rows = [(texts, -1 if split in TASKS[name].test else label) for texts, label in toy(name, split)]
            found.setdefault(config, {})[part] = rows
        write_tfds(root, TASKS[name], found)
    return root


WRITERS = {"dir": write_official, "saved": write_saved, "parquet": write_parquet, "csv": write_csv}


@pytest.mark.parametrize("kind", [*WRITERS, "tfds"])
def test_every_source_gives_the_same_rows_in_the_same_order(kind, tmp_path, request):
    if kind == "tfds":
        source = open_source(f"tfds:{request.getfixturevalue('tfds_folder')}")
    else:
        WRITERS[kind](tmp_path)
        source = open_source(f"{'dir' if kind == 'dir' else 'hf'}:{tmp_path}")
    assert choose_tasks(source, "all") == ([TASKS[name] for name in TOYS], ["SST-2", "QQP", "QNLI", "RTE", "WNLI"])
    for name in TOYS:
        assert load_task(source, TASKS[name]) == wanted(name)


def test_the_hub_is_asked_for_the_tasks_alone_that_are_wanted(monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        if config not in ("cola", "rte"):
            raise ValueError(f"BuilderConfig '{config}' not found. Available: ['cola', 'rte']")
        if config == "rte":
            raise ConnectionError("The line\nis cut.")
        return {part: dataset_of("cola", split) for split, part in (("train", "train"), ("dev", "validation"))}

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf")
    (task,), absent = choose_tasks(source, "CoLA")
    assert load_task(source, task) == wanted("cola")._replace(test={})
    assert (asked, absent) == ([("nyu-mll/glue", "cola")], [])
    with pytest.raises(UserError, match="not have all of SST-2: there is no nyu-mll/glue sst2, split train and no"):
        choose_tasks(source, "sst2")
    with pytest.raises(
        UserError, match=r"glue rte cannot be had from the hub \(The line\); give .* dir:PATH, or .* tfds:PATH"
    ):
        choose_tasks(source, "all")


@pytest.mark.parametrize("name", ["", ":nobody/has-this", ":not a name"])
def test_a_hub_out_of_reach_is_one_sentence(name):
    with pytest.raises(UserError, match="cannot be had from the hub"):
        choose_tasks(open_source(f"hf{name}"), "all")


@pytest.mark.parametrize("spec", ["", "hf:", "dir:", "tfds:", "tfds", "file:x", "cola"])
def test_other_specs_are_refused(spec):
    with pytest.raises(UserError, match="take hf, hf:NAME, hf:PATH, tfds:PATH or dir:PATH"):
        open_source(spec)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for kind in ("dir", "hf"):
        with pytest.raises(UserError, match="none does not exist"):
            open_source(f"{kind}:{tmp_path / 'none'}")
    with pytest.raises(UserError, match="no folder glue"):
        open_source(f"tfds:{tmp_path}")
    for spec in (f"dir:{tmp_path}", f"hf:{tmp_path}"):
        with pytest.raises(UserError, match=r"no complete task; there is no .*train"):
            choose_tasks(open_source(spec), "all")


def write(root, folder, split, text, encoding="utf-8"):
    (root / folder).mkdir(exist_ok=True)
    (root / folder / f"{split}.tsv").write_bytes(text.encode(encoding))


def read(root, name, split, **options):
    return open_source(f"dir:{root}", **options).read(TASKS[name], split)


def test_official_quirks_are_read(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    write(tmp_path, "MRPC", "dev", header + '1\t1\t2\tHe said "no.\tNo!\r\n', "utf-8-sig")
    assert read(tmp_path, "mrpc", "dev") == Examples(['He said "no.'], ["No!"], [1.0])
    write(tmp_path, "CoLA", "dev", "gj04\t0\t*\tThe cat sleep.\n\n")
    assert read(tmp_path, "cola", "dev") == Examples(["The cat sleep."], None, [0.0])
    write(tmp_path, "CoLA", "test", "index\tsentence\n0\tA cat sleeps.\n")
    assert read(tmp_path, "cola", "test") == Examples(["A cat sleeps."], None, None)
    write(tmp_path, "SST-2", "dev", "sentence\tlabel\ngood \t1")
    assert read(tmp_path, "sst2", "dev") == Examples(["good"], None, [1.0])
    write(tmp_path, "RTE", "dev", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n")
    assert read(tmp_path, "rte", "dev") == Examples(["a"], ["b"], [1.0])
    assert read(tmp_path, "rte", "train") is None


@pytest.mark.parametrize("place", ["diagnostic", "AX", "MNLI"])
def test_the_diagnostic_set_is_found_beside_or_in_mnli(tmp_path, place):
    write(tmp_path, place, "diagnostic", "index\tsentence1\tsentence2\n0\ta\tb\n")
    assert read(tmp_path, "mnli", "ax") == Examples(["a"], ["b"], None)


line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"))


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(line, line, st.sampled_from(["0", "1"])), min_size=1, max_size=5))
def test_any_text_without_tabs_and_newlines_comes_back(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("texts")
    body = "".join(f"{i}\t{a}\t{b}\t{label}\n" for i, (a, b, label) in enumerate(rows))
    write(root, "WNLI", "train", "index\tsentence1\tsentence2\tlabel\n" + body)
    texts, pairs, labels = zip(*rows, strict=True)
    found = read(root, "wnli", "train")
    assert found == Examples([a.strip() for a in texts], [b.strip() for b in pairs], [float(y) for y in labels])


HEADER = "sentence\tlabel\n"
BROKEN = {
    "bad": "unequal columns, 1 instead of 2",
    "good\t1\t1": "unequal columns, 3 instead of 2",
    "good\t7": "'7' is not one of the labels 0, 1",
    "good\t": "label is missing",
    "b\udcffd\t1": "not UTF-8",
}
"""Bad lines (a lone surrogate is written as the byte it stands for), and what is said of them."""


def write_bytes(root, split, text):
    (root / "SST-2").mkdir(exist_ok=True)
    (root / "SST-2" / f"{split}.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("bad", BROKEN)
def test_a_broken_line_is_named_by_file_and_line(tmp_path, bad):
    write_bytes(tmp_path, "train", f"{HEADER}good\t1\n\n{bad}\nfine\t0\n")
    with pytest.raises(UserError, match=rf"SST-2/train\.tsv, line 4: {BROKEN[bad]}; .*--skip-bad-rows"):
        read(tmp_path, "sst2", "train")
    assert read(tmp_path, "sst2", "train", skip_bad_rows=True) == Examples(["good", "fine"], None, [1.0, 0.0], 1)


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.sampled_from(["good\t1", "fine\t0", *BROKEN]), min_size=1, max_size=12))
def test_good_rows_stay_in_order_however_many_are_broken(tmp_path_factory, lines):
    root = tmp_path_factory.mktemp("broken")
    write_bytes(root, "train", HEADER + "".join(f"{line}\n" for line in lines))
    bad = [i for i, line in enumerate(lines) if line in BROKEN]
    good = [line.split("\t") for line in lines if line not in BROKEN]
    if not good:
        with pytest.raises(UserError, match=f"has no rows; {len(bad)} bad ones were left out"):
            read(root, "sst2", "train", skip_bad_rows=True)
        return
    found = read(root, "sst2", "train", skip_bad_rows=True)
    assert found == Examples([text for text, _ in good], None, [float(y) for _, y in good], len(bad))
    if bad:
        with pytest.raises(UserError, match=f"line {bad[0] + 2}: "):
            read(root, "sst2", "train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text\tlabel\ngood\t1\n", r"train\.tsv has no column sentence; it has text, label"),
        ("text\tkind\ngood\t1\n", "no column sentence and no column label"),
        (HEADER, "has no rows"),
        ("", "is empty"),
        ("sent\udcff\tlabel\n", "line 1: not UTF-8"),
    ],
)
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_broken_file_is_an_error_however_rows_are_treated(tmp_path, text, words, skip_bad_rows):
    write_bytes(tmp_path, "train", text)
    with pytest.raises(UserError, match=words):
        read(tmp_path, "sst2", "train", skip_bad_rows=skip_bad_rows)


@pytest.mark.parametrize("score", ["high", "nan", "inf", "1e99", ""])
def test_a_score_that_is_no_number_is_named(tmp_path, score):
    write(tmp_path, "STS-B", "train", f"sentence1\tsentence2\tscore\na\tb\t2.5\na\tb\t{score}\n")
    with pytest.raises(
        UserError, match=rf"STS-B/train\.tsv, line 3: ('({score}|inf)' is not a (finite )?number|score is missing)"
    ):
        read(tmp_path, "stsb", "train")


def test_cuts_are_read_as_their_task_and_named_by_their_folder(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    for split in ("train", "dev"):
        write(tmp_path, "QQP-10k", split, f"{header}1\t1\t2\ta?\tb?\t1\n")
        write(tmp_path, "MNLI-devsplit", split, "sentence1\tsentence2\tgold_label\na\tb\tcontradiction\n")
        write(tmp_path, "SST-2", split, "sentence\tlabel\ngood\t1\n")
    write(tmp_path, "QNLI-small", "train", "question\tsentence\tlabel\n")
    source = open_source(f"dir:{tmp_path}")
    tasks, absent = choose_tasks(source, "all")
    assert [task.name for task in tasks] == ["sst2", "mnli-devsplit", "qqp-10k"]
    assert absent == [task.folder for task in TASKS.values() if task.name != "sst2"]
    (cut, official), none = choose_tasks(source, "mnli-DEVSPLIT, sst-2, MNLI-devsplit,")
    assert (cut.cut_of, official, none) == ("mnli", TASKS["sst2"], [])
    found = load_task(source, cut)
    assert found.train == found.dev["dev"] == Examples(["a"], ["b"], [2.0])
    assert found.test == {}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cola", r"not have all of CoLA: there is no .*CoLA/train\.tsv and no .*CoLA/dev\.tsv"),
        ("sst2,mnli", r"not have all of MNLI: there is no .*MNLI/dev_matched\.tsv\."),
        ("qqp-10", r"no task 'qqp-10'; did you mean QQP-10k\?"),
        ("sst3", r"no task 'sst3'; did you mean sst2\?"),
        ("banana", "known are QQP-10k, cola, sst2"),
        (" ,", "No task is named"),
    ],
)
def test_a_task_that_was_asked_for_must_be_there(tmp_path, names, words):
    for split in ("train", "dev"):
        write(tmp_path, "SST-2", split, "sentence\tlabel\ngood\t1\n")
    write(tmp_path, "MNLI", "train", "sentence1\tsentence2\tgold_label\n")
    (tmp_path / "QQP-10k").mkdir()
    with pytest.raises(UserError, match=words):
        choose_tasks(open_source(f"dir:{tmp_path}"), names)


def test_tasks_are_found_by_any_spelling():
    assert find_task("SST-2") is find_task("sst2") is TASKS["sst2"]


def saved(root, split, columns):
    (root / "rte").mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(root / "rte" / f"{split}.parquet")


def test_broken_rows_of_datasets_are_named_by_split_and_row(tmp_path):
    good = {"sentence1": ["a", "b", None], "sentence2": ["c", "d", "e"], "label": [0, 2, 1]}
    saved(tmp_path, "train", good)
    with pytest.raises(
        UserError, match="rte, split train, row 1: 2 is not a class number below 2, nor one of entailment"
    ):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "train")
    assert open_source(f"hf:{tmp_path}", skip_bad_rows=True).read(TASKS["rte"], "train") == Examples(
        ["a"], ["c"], [0.0], 2
    )
    saved(tmp_path, "validation", {**good, "label": [0, 1, 1]})
    with pytest.raises(UserError, match="split validation, row 2: sentence1 is missing"):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "dev")
    saved(tmp_path, "validation", {**good, "label": ["entailment", "neither", "1"]})
    with pytest.raises(UserError, match="row 1: 'neither' is not a class number"):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "dev")
    saved(tmp_path, "test", {"sentence1": ["a"], "text": ["b"]})
    with pytest.raises(UserError, match="split test has no column sentence2; it has sentence1, text"):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "test")
    saved(tmp_path, "train", {name: [] for name in good})
    with pytest.raises(UserError, match="split train has no rows"):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "train")
    (tmp_path / "rte" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"train\.parquet cannot be read"):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "train")
    (tmp_path / "rte" / "train.parquet").unlink()
    (tmp_path / "rte" / "train.csv").write_text('sentence1,sentence2,label\na,"b",1\na,b\n')
    with pytest.raises(UserError, match=r"train\.csv, line 3: unequal columns, 2 instead of 3"):
        open_source(f"hf:{tmp_path}").read(TASKS["rte"], "train")


def test_a_dataset_that_numbers_the_classes_otherwise_is_read_by_their_names(tmp_path):
    other = datasets.ClassLabel(names=["contradiction", "entailment", "neutral"])
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"), "label": other}
    )
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features)).save_to_disk(tmp_path / "mnli")
    found = open_source(f"hf:{tmp_path}").read(TASKS["mnli"], "train")
    assert [TASKS["mnli"].labels[int(y)] for y in found.labels] == ["contradiction", "entailment", "neutral"]


def classes(place, column, names, labels, kind="string"):
    """Parquet files of one split whose features name the classes; a text for each label."""
    texts = [f"text {i}".encode() if kind == "binary" else f"text {i}" for i in range(len(labels))]
    features = datasets.Features({column: datasets.Value(kind), "label": datasets.ClassLabel(names=names)})
    place.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({column: texts, "label": labels}, features).to_parquet(place)


@pytest.mark.parametrize(
    ("config", "names", "wanted"),
    [
        ("sst2", ["positive", "negative"], [1.0, 0.0]),
        ("sst2", ["Negative", "POSITIVE"], [0.0, 1.0]),
        ("sst2", ["1", "0"], [1.0, 0.0]),
        ("cola", ["acceptable", "unacceptable"], [1.0, 0.0]),
    ],
)
def test_class_names_of_a_datasets_features_decide_in_every_split(tmp_path, config, names, wanted):
    for split, named in (("train", names), ("validation", names[::-1])):
        classes(tmp_path / config / f"{split}.parquet", "sentence", named, [0, 1, 1])
    data = load_task(open_source(f"hf:{tmp_path}"), TASKS[config])
    assert data.train.labels == [wanted[0], wanted[1], wanted[1]]
    assert data.dev["dev"].labels == [wanted[1], wanted[0], wanted[0]]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "stsb"])
def test_the_hubs_own_class_names_are_known_in_any_order(name):
    task = TASKS[name]
    columns = dataset_columns("here", task, "train", list(HUB_NAMES[name]))
    assert [columns.read_label(i) for i in range(len(task.labels))] == list(range(len(task.labels)))
    assert [columns.read_label(text) for text in HUB_NAMES[name]] == list(range(len(task.labels)))
    turned = dataset_columns("here", task, "train", list(HUB_NAMES[name])[::-1])
    assert [turned.read_label(i) for i in range(len(task.labels))] == list(range(len(task.labels)))[::-1]


HUB_NAMES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}
"""As the features of nyu-mll/glue name them, in their order, which is also that of the task's classes."""


@pytest.mark.parametrize(
    "names", [["bad", "good"], ["negative"], ["negative", "neutral", "positive"], ["0", "positive"]]
)
def test_class_names_that_are_not_the_tasks_are_a_sentence(tmp_path, names):
    classes(tmp_path / "sst2" / "train.parquet", "sentence", names, [0])
    with pytest.raises(
        UserError, match=rf"split train: its classes are named {', '.join(names)}, where .* negative, positive"
    ):
        open_source(f"hf:{tmp_path}").read(TASKS["sst2"], "train")


def test_parts_of_a_split_that_name_the_classes_otherwise_are_refused(tmp_path):
    classes(tmp_path / "sst2" / "train-00000-of-00002.parquet", "sentence", ["negative", "positive"], [0])
    classes(tmp_path / "sst2" / "train-00001-of-00002.parquet", "sentence", ["positive", "negative"], [0])
    with pytest.raises(
        UserError, match=r"train-00000-of-00002\.parquet and the other parts of its split have different"
    ):
        open_source(f"hf:{tmp_path}").read(TASKS["sst2"], "train")


def test_texts_stored_as_bytes_are_read_as_utf_8(tmp_path):
    classes(tmp_path / "sst2" / "train.parquet", "sentence", ["negative", "positive"], [0, 1], "binary")
    assert open_source(f"hf:{tmp_path}").read(TASKS["sst2"], "train") == Examples(
        ["text 0", "text 1"], None, [0.0, 1.0]
    )


def test_two_cuts_of_one_name_are_refused(tmp_path):
    for folder in ("QQP-10k", "QQP-10K"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match="QQP-10K and QQP-10k differ by case alone"):
        open_source(f"dir:{tmp_path}").cuts()


def test_broken_rows_of_tfds_are_named_by_split_and_row(tmp_path):
    rows = [(["good"], 1), (["unlabelled"], -1), ([b"b\xff"], 0)]
    write_tfds(tmp_path, TASKS["cola"], {"cola": {"train": rows, "validation": rows[:1], "test": rows[2:]}})
    with pytest.raises(UserError, match="glue/cola, split train, row 1: -1 is not a class number below 2"):
        open_source(f"tfds:{tmp_path}").read(TASKS["cola"], "train")
    assert open_source(f"tfds:{tmp_path}", skip_bad_rows=True).read(TASKS["cola"], "train") == Examples(
        ["good"], None, [1.0], 2
    )
    with pytest.raises(UserError, match="split test, row 0: sentence is not UTF-8"):
        open_source(f"tfds:{tmp_path}").read(TASKS["cola"], "test")
    shutil.copytree(tmp_path / "glue" / "cola", tmp_path / "glue" / "sst2")
    with pytest.raises(UserError, match="split train: its classes are named unacceptable, acceptable"):
        open_source(f"tfds:{tmp_path}").read(TASKS["sst2"], "train")
    (tmp_path / "glue" / "cola" / "2.0.0").rename(tmp_path / "glue" / "cola" / "10.0.0")
    assert open_source(f"tfds:{tmp_path}").read(TASKS["cola"], "dev") == Examples(["good"], None, [1.0])


def test_tfds_files_that_need_tensorflow_or_are_damaged_are_refused(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder / "glue", tmp_path / "glue")
    facts = tmp_path / "glue" / "cola" / "2.0.0" / "dataset_info.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"without TensorFlow .*if it was prepared with file_format='array_record'"):
        open_source(f"tfds:{tmp_path}").read(TASKS["cola"], "train")
    for damage in ("{", "{}"):
        (tmp_path / "glue" / "mrpc" / "2.0.0" / "dataset_info.json").write_text(damage)
        with pytest.raises(UserError, match="not a dataset that tensorflow_datasets prepared"):
            open_source(f"tfds:{tmp_path}").read(TASKS["mrpc"], "train")

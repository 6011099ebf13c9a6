"""A person's own task: files of every kind, what is inferred, and what is refused."""

import csv
import gzip
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ufbert
from ufbert.errors import UserError
from ufbert.glue.sources.custom import CustomTask, read_custom, read_task_file
from ufbert.glue.tasks import Examples
from ufbert.options.finetune import FinetuneOptions

ROWS = [("a river", "x", "yes"), ('"quoted", twice', "y", "no"), (" é ", "z", "yes")]
WANTED = Examples(["a river", '"quoted", twice', "é"], ["x", "y", "z"], [1.0, 0.0, 1.0])


def as_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows([("text", "pair", "label"), *rows])
    return text.getvalue()


def as_tsv(rows):
    return "".join("\t".join(row) + "\r\n" for row in [("text", "pair", "label"), *rows])


def as_jsonl(rows):
    return "\n".join(json.dumps(dict(zip(("text", "pair", "label"), row, strict=True))) for row in rows)


def put(folder, **texts):
    """Files named after the keywords, `train_tsv` for `train.tsv`, and a task of their train and dev."""
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_bytes(text.encode("utf-8", "surrogateescape"))
    files = {key: str(path) for key in ("train", "dev", "test") for path in folder.glob(f"{key}.*")}
    return CustomTask(text="text", label="label", **files)


@pytest.mark.parametrize(("suffix", "written"), [("csv", as_csv), ("tsv", as_tsv), ("jsonl", as_jsonl)])
@pytest.mark.parametrize("zipped", [False, True])
def test_tables_of_every_kind_give_the_same_rows(tmp_path, suffix, written, zipped):
    for name in ("train", "dev", "test"):
        data = ("\ufeff" + written(ROWS)).encode()
        path = tmp_path / f"{name}.{suffix}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(data) if zipped else data)
    own = replace(put(tmp_path), pair="pair")
    data = read_custom(own)
    assert data.train == data.dev["dev"] == WANTED
    assert data.test == {"test": WANTED._replace(labels=None)}
    task = data.task
    assert (task.name, task.labels, task.label_names, task.metrics) == (
        "own",
        ("no", "yes"),
        ("no", "yes"),
        ("accuracy", "f1"),
    )
    assert (task.n_outputs, task.is_regression, task.dev, task.test) == (2, False, ("dev",), {"test": ""})


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(any_text, min_size=2, max_size=6), ascii_only=st.booleans())
def test_any_text_comes_back_from_csv_and_json_lines(tmp_path_factory, texts, ascii_only):
    folder = tmp_path_factory.mktemp("own")
    rows = [(text, str(i % 2)) for i, text in enumerate(texts)]
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=ascii_only) for text, label in rows]
    (folder / "dev.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    data = read_custom(put(folder))
    assert (
        data.train == data.dev["dev"] == Examples([text.strip() for text in texts], None, [float(y) for _, y in rows])
    )


@pytest.mark.parametrize(
    ("found", "regression", "labels", "metrics"),
    [
        (["b", "a", "b"], None, ("a", "b"), ("accuracy", "f1")),
        (["10", "9", "2"], None, ("2", "9", "10"), ("accuracy",)),
        (["10", "9", "x"], None, ("10", "9", "x"), ("accuracy",)),
        ([True, False], None, ("False", "True"), ("accuracy", "f1")),
        ([1, 0, 1.0, "1"], None, ("0", "1"), ("accuracy", "f1")),
        (["nan", "inf"], None, ("inf", "nan"), ("accuracy", "f1")),
        (["1", "0.5"], None, (), ("pearson", "spearman")),
        (["2020_1", "2020_2"], None, ("2020_1", "2020_2"), ("accuracy", "f1")),
        ([*["0", "1"] * 9, "x", "x"], None, ("0", "1", "x"), ("accuracy",)),
        (["1", "0.5"], False, ("0.5", "1"), ("accuracy", "f1")),
        (range(20), None, tuple(map(str, range(20))), ("accuracy",)),
        (range(21), None, (), ("pearson", "spearman")),
        (range(21), False, tuple(map(str, range(21))), ("accuracy",)),
        (["1", "0"], True, (), ("pearson", "spearman")),
    ],
)
def test_labels_and_metrics_follow_from_the_training_rows(tmp_path, found, regression, labels, metrics):
    rows = "\n".join(json.dumps({"text": "a", "label": label}) for label in found)
    data = read_custom(replace(put(tmp_path, train_jsonl=rows, dev_jsonl=rows), regression=regression))
    assert (data.task.labels, data.task.metrics, data.task.is_regression) == (labels, metrics, not labels)
    if not labels:
        assert data.train.labels == [float(label) for label in found]


SPEC = {"train": "train.tsv", "dev": "dev.tsv", "text": "text", "pair": "pair", "label": "label"}


@pytest.mark.parametrize("suffix", ["json", "py"])
def test_a_task_file_says_all_and_its_paths_start_at_its_folder(tmp_path, suffix, monkeypatch):
    put(tmp_path, train_tsv=as_tsv(ROWS), dev_tsv=as_tsv(ROWS))
    spec = {**SPEC, "labels": ["yes", "no"], "label_names": ["Yes!", "No!"], "metrics": ["matthews"]}
    path = tmp_path / f"toy.{suffix}"
    path.write_text(json.dumps(spec) if suffix == "json" else f"BASE = {spec}\nTASK = {{**BASE, 'regression': None}}\n")
    monkeypatch.chdir("/")
    data = read_custom(read_task_file(path))
    assert data.dev["dev"] == WANTED._replace(labels=[0.0, 1.0, 0.0])
    task = data.task
    assert (task.name, task.labels, task.label_names, task.metrics) == (
        "toy", ("yes", "no"), ("Yes!", "No!"), ("matthews",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"lable": "x"}, "'lable' is unknown; did you mean label?"),
        ({"zzz": 1}, "'zzz' is unknown; known are name, train"),
        ({"text": 3}, "text is 3; it must be text"),
        ({"labels": "yes"}, r"labels is 'yes'; it must be a list"),
        ({"regression": "no"}, "regression is 'no'; it must be true or false"),
        ({"text": "", "dev": ""}, "lacks dev and text; it needs train, dev, text and label"),
        ({"name": "../x"}, "cannot be named '../x'"),
        ({"name": "SST2"}, "no GLUE task's name"),
        ({"name": ".x"}, "cannot be named '.x': take letters"),
        ({"name": "x."}, "cannot be named 'x.': take letters"),
        ({"name": "é" * 51}, "take letters, digits, - and _, at most 100"),
        *(
            ({"name": name}, f"cannot be named '{name}': a sweep keeps something else under it")
            for name in ("partial", "Predictions", "submission", "glue.json", "glue.md", "REPORT.html")
        ),
        ({"labels": [["yes"]]}, r"labels\[0\] is \['yes'\]; it must be text"),
        ({"labels": ["yes", "no"], "regression": True}, "names labels and asks for regression"),
        ({"labels": ["1", "1.0"]}, "names a label twice: 1, 1"),
        ({"label_names": ["a"]}, r"2 labels \(no, yes\) and 1 label_names"),
        ({"metrics": ["auc"]}, "no metric 'auc'; take accuracy"),
        ({"metrics": ["pearson"]}, "pearson does not fit a task with 2 labels; take accuracy or f1"),
        ({"regression": True, "metrics": ["f1"]}, "f1 does not fit a task with values for labels"),
        ({"label": "kind"}, r"train\.tsv has no column kind; it has text, pair, label"),
        ({"train": "none.tsv"}, r"none\.tsv does not exist"),
        ({"train": "toy.json"}, r"name must end in \.tsv, \.csv, \.jsonl or with \.gz"),
        ({"labels": ["yes"]}, r"train\.tsv, line 3: the label 'no' is not one of the task's, yes"),
    ],
)
def test_a_description_that_does_not_fit_is_one_sentence(tmp_path, spec, words):
    put(tmp_path, train_tsv=as_tsv(ROWS), dev_tsv=as_tsv(ROWS), toy_json=json.dumps(SPEC | spec))
    with pytest.raises(UserError, match=words):
        read_custom(read_task_file(tmp_path / "toy.json"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("toy.json", '{"train": 1,\n"dev" 2}', r"toy\.json is not readable JSON: .* in line 2"),
        ("toy.json", '{"train": "a", "train": "b"}', "not readable JSON: the key 'train' stands there twice"),
        ("toy.json", "[1]", "must be an object with some of name, train"),
        ("toy.json", "\udcff", "is not UTF-8"),
        ("toy.py", "TASKS = {}", "does not describe a task"),
        ("toy.py", "1 / 0", "fails with ZeroDivisionError: division by zero"),
        ("toy.py", "TASK = {", "fails with SyntaxError"),
        ("toy.py", None, "Cannot read .*: No such file"),
        ("toy.json", None, r"There is no file .*toy\.json"),
        ("toy.json", '{"labels": [NaN]}', "not readable JSON: 'NaN' is not a finite number"),
        ("toy.json", "[" * 100_000, "not readable JSON"),
        ("toy.py", "raise SystemExit(3)", "fails with SystemExit: 3"),
    ],
)
def test_a_broken_task_file_is_one_sentence(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=words):
        read_task_file(tmp_path / name)


def test_a_task_file_stands_alone():
    with pytest.raises(UserError, match="leave out the other options"):
        FinetuneOptions(model="runs/mine/model", task_file="toy.json", train="x.csv")


BROKEN = {
    "csv": [
        ("a,yes,1", "unequal columns, 3 instead of 2"),
        ("a", "unequal columns, 1 instead of 2"),
        ('"a" b,yes', r"broken CSV \("),
        ("b\udcff,yes", "not UTF-8"),
        ("a,maybe", "the label 'maybe' is not one of the task's, no, yes"),
    ],
    "tsv": [
        ("a", "unequal columns, 1 instead of 2"),
        ('"a\tb"\tyes', "unequal columns, 3"),
        ("a\t", "label is missing"),
    ],
    "jsonl": [
        ('{"text": "a"', r"broken JSON \(Expecting ',' delimiter at column 13\)"),
        ('["a", "yes"]', "not a JSON object, of which each line must hold one"),
        ('{"text": "a", "label": ["yes", "no"]}', r"label is \['yes', 'no'\], not one label"),
        ('{"text": "a", "label": {"yes": 1}}', r"label is {'yes': 1}, not one label"),
        ('{"text": "a", "label": null}', "label is missing"),
        ('{"text": ["a"], "label": "yes"}', r"text is \['a'\], not a text"),
        ('{"text": null, "label": "yes"}', "text is missing"),
        ('{"text": "a", "text": "b", "label": "yes"}', r"broken JSON \(the key 'text' stands there twice\)"),
        ("[" * 100_000, r"broken JSON \(.*recursion"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", r"broken JSON \(Exceeds the limit"),
        ('{"text": "a"}', "label is missing"),
        ('{"text": "a", "label": NaN}', r"label is missing \(NaN\)"),
        ('{"text": 5, "label": "yes"}', "text is 5, not a text"),
        ('{"label": "yes"}', "text is missing"),
        ('{"text": "\\ud83d", "label": "yes"}', "text holds half of a surrogate pair"),
        ("\udcff", "not UTF-8"),
    ],
}


@pytest.mark.parametrize(("suffix", "bad", "words"), [(suffix, *case) for suffix in BROKEN for case in BROKEN[suffix]])
def test_a_broken_row_is_named_by_file_and_line_or_left_out(tmp_path, suffix, bad, words):
    lines = {
        "csv": ['"two\nlines",yes', "b,no"],
        "tsv": ["two lines\tyes", "", "b\tno"],
        "jsonl": ['{"text": "two lines", "label": "yes"}', "", '{"text": "b", "label": "no"}'],
    }[suffix]
    header = {"csv": ["text,label"], "tsv": ["text\tlabel"], "jsonl": [""]}[suffix]
    text = "\n".join([*header, lines[0], *lines[1:-1], bad, lines[-1]]) + "\n"
    good = "\n".join(header + lines)
    own = put(tmp_path, **{f"train_{suffix}": good, f"dev_{suffix}": text})
    with pytest.raises(UserError, match=rf"dev\.{suffix}, line 4: {words}.*; correct the row"):
        read_custom(own)
    found = read_custom(own, skip_bad_rows=True)
    assert found.dev["dev"].skipped == 1
    assert (found.dev["dev"].labels, found.train.labels, found.train.skipped) == ([1.0, 0.0], [1.0, 0.0], 0)


def test_broken_training_rows_are_named_before_labels_are_judged(tmp_path):
    array = '[\n {\n  "text": "good",\n  "label": 1\n }\n]\n'
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: broken JSON .* each line must hold one whole object"):
        read_custom(put(tmp_path, train_jsonl=array, dev_jsonl=array))
    lists = '{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["x", "y"]}\n'
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: label is \['x'\], not one label"):
        read_custom(put(tmp_path, train_jsonl=lists, dev_jsonl=lists))


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([f"{i / 10}" for i in range(40)], "(0.1 has a fraction|values)"),
        ([str(i % 30) for i in range(60)], "values"),
        (["1", "0"] * 20, "2 classes"),
    ],
)
@pytest.mark.parametrize("odd", ["N/A", "<1.0", "nan", "1_0"])
def test_one_odd_label_among_numbers_is_a_broken_row_and_what_numbers_are_is_said(tmp_path, labels, kind, odd):
    rows = [*labels[:20], odd, *labels[20:]]
    table = "text,label\n" + "".join(f"a,{label}\n" for label in rows)
    own, said = put(tmp_path, train_csv=table, dev_csv="text,label\na,1\n"), []
    with pytest.raises(UserError, match=rf"train\.csv, line 22: .*'{odd}' is not (a |one of )"):
        read_custom(own, say=said.append)
    data = read_custom(own, skip_bad_rows=True)
    assert (data.train.skipped, len(data.train.labels)) == (1, len(labels))
    assert data.train.labels == [float(label) for label in labels] if kind != "2 classes" else [1.0, 0.0] * 20
    (line,) = said
    assert "label are numbers and taken for " + ("2 classes" if kind == "2 classes" else "values") in line
    other = "values" if kind == "2 classes" else "classes"
    assert f"for {other} give --labels {other}" in line
    forced = read_custom(replace(own, regression=False), skip_bad_rows=True)
    assert odd in forced.task.labels


@pytest.mark.parametrize(
    ("one", "other"), [("Yes", "yes"), ("a b", "a  b"), ("1", "01"), ("1e3", "1000"), ("ﬁt", "fit")]
)
def test_labels_that_only_look_different_are_refused_unless_both_are_named(tmp_path, one, other):
    table = f"text,label\na,{one}\nb,{other}\nc,x\n"
    own = put(tmp_path, train_csv=table, dev_csv=table)
    with pytest.raises(UserError, match="which are perhaps one; write them alike"):
        read_custom(own)
    assert read_custom(replace(own, labels=("x", one, other))).train.labels == [1.0, 2.0, 0.0]


def test_a_column_whose_labels_are_nearly_all_different_is_refused(tmp_path):
    table = "text,label\n" + "".join(f"a,name {i}\n" for i in range(40))
    with pytest.raises(UserError, match=r"40 rows have 40 different labels, .* is label the right column"):
        read_custom(put(tmp_path, train_csv=table, dev_csv=table))


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path):
    for suffix, comma in (("csv", ","), ("tsv", "\t")):
        table = "text,text,label\na,b,yes\nc,d,no\n".replace(",", comma)
        with pytest.raises(UserError, match=rf"train\.{suffix} has 2 columns text; rename or remove"):
            read_custom(put(tmp_path, **{f"train_{suffix}": table, f"dev_{suffix}": table}))
        (tmp_path / f"train.{suffix}").unlink()
    table = "text,label,,\na,yes,,\nb,no,,\n"
    assert read_custom(put(tmp_path, train_csv=table, dev_csv=table)).train.texts == ["a", "b"]


def test_a_field_of_any_length_is_read(tmp_path):
    table = f'text,label\n"{"word " * 30_000}",yes\nb,no\n'
    assert len(read_custom(put(tmp_path, train_csv=table, dev_csv=table)).train.texts[0]) == 149_999


ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for the ends of lines besides newlines and carriage returns."""


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_only_newlines_end_a_row(tmp_path, suffix):
    text = f"a{'b'.join(ENDS)}c"
    line = f'{{"text": {json.dumps(text, ensure_ascii=False)}, "label": "%s"}}'
    rows = {"jsonl": [line % "yes", line % "no"], "csv": ["text,label", f"{text},yes", f"{text},no"]}
    rows["tsv"] = [row.replace(",", "\t") for row in rows["csv"]]
    table = "\n".join(rows[suffix])
    found = read_custom(put(tmp_path, **{f"train_{suffix}": table, f"dev_{suffix}": table}))
    assert found.train == Examples([text, text], None, [1.0, 0.0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text,label\na,x\n".encode("utf-16"), r"train\.csv is not UTF-8: it begins as UTF-16 does"),
        ("text,label\na,x\n".encode("utf-16-le"), r"train\.csv is not UTF-8: it begins as UTF-16 does"),
        (b"text,label\ra,x\rb,y\r", r"train\.csv ends its lines with carriage returns alone"),
    ],
)
def test_files_of_other_encodings_and_line_ends_are_named(tmp_path, data, words):
    own = put(tmp_path, train_csv="", dev_csv="")
    (tmp_path / "train.csv").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_custom(own)


@pytest.mark.parametrize("value", ["much", "nan", "-inf"])
def test_a_value_that_is_no_number_is_named(tmp_path, value):
    own = put(tmp_path, train_csv="text,label\na,0.5\nb,1\n", dev_csv=f"text,label\na,{value}\nb,2\n")
    with pytest.raises(UserError, match=rf"dev\.csv, line 2: '{value}' is not a (finite )?number"):
        read_custom(own)
    assert read_custom(own, skip_bad_rows=True).dev["dev"] == Examples(["b"], None, [2.0], 1)


@pytest.mark.parametrize(
    ("train", "dev", "words"),
    [
        ("", "text,label\na,1\n", r"train\.csv is empty"),
        ("text,label\n", "text,label\na,1\n", r"train\.csv has no rows\."),
        ("text,label\na,\nb,\n", "text,label\na,1\n", r"train\.csv has no rows; 2 bad ones were left out"),
        ("text,label\na,1\nb,0\n", "text,label\n", r"dev\.csv has no rows\."),
        ("text,label\na,1\nb,0\n", "text,label\na,2\n", r"dev\.csv has no rows; 1 bad ones were left out"),
        ("text,label\na,1\nb,1\n", "text,label\na,1\n", "all rows have the label 1, so that there is nothing to learn"),
        ("text,label\na,1\nb,0\n", "words,label\na,1\n", r"dev\.csv has no column text; it has words, label"),
    ],
)
def test_sets_without_rows_or_columns_are_refused_however_rows_are_treated(tmp_path, train, dev, words):
    with pytest.raises(UserError, match=words):
        read_custom(put(tmp_path, train_csv=train, dev_csv=dev), skip_bad_rows=True)


def test_a_damaged_gzip_file_and_a_folder_are_named(tmp_path):
    whole = gzip.compress(b"text,label\n" + b"a,1\nb,0\n" * 5000)
    (tmp_path / "train.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.csv\.gz is damaged or cut short after line \d+"):
        read_custom(put(tmp_path, dev_csv="text,label\na,1\n"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"Cannot read .*folder\.csv: Is a directory"):
        read_custom(replace(put(tmp_path), train=str(tmp_path / "folder.csv")))


def test_python_takes_a_task_of_ones_own_by_its_files_alone(monkeypatch):
    asked = []

    class Results:
        def to_json(self):
            return {}

    def record(options, given):
        asked.append(options)
        return Results()

    monkeypatch.setattr("ufbert.glue.run.finetune", record)
    ufbert.finetune("model", out="own", train="a.tsv", dev="b.tsv", text="review", label="stars")
    assert asked == [
        FinetuneOptions(model="model", out="own", train="a.tsv", dev="b.tsv", text="review", label="stars")
    ]

"""`ufbert predict`: which texts become pairs, what is printed for each, and what becomes of bad lines."""

from dataclasses import replace

import jax
import pytest

from ufbert import nn
from ufbert.cli import call
from ufbert.errors import UserError
from ufbert.hub.folder import TaskInfo, save_model
from ufbert.inference.predictor import Predictor


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """(kind of task) -> a model folder: of single texts, of pairs, or one that does not say."""
    root, made = tmp_path_factory.mktemp("folders"), {}

    def make(kind: str) -> str:
        if kind not in made:
            model = family("bert", "classifier")
            labels = () if kind == "value" else ("no", "yes")
            classifier = nn.init_classifier(model.config, jax.random.key(1), max(1, len(labels)))
            pairs = {"single": False, "pairs": True}.get(kind)
            task = TaskInfo(f"toy_{kind}", labels, {}, pairs=pairs)
            save_model(root / kind, replace(model, params={**model.params, "classifier": classifier}, task=task))
            made[kind] = str(root / kind)
        return made[kind]

    return make


@pytest.fixture
def predict(folder, capsys):
    """Run the command and return its lines on stdout and on stderr."""

    def run(kind: str, *args: str) -> tuple[list[str], list[str]]:
        call("predict", [f"--model={folder(kind)}", *args])
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return run


TEXTS = ["the cat", "the dog sees", "a king"]


def lines_of(answers) -> list[str]:
    return [f"{label}  {probability:.2%}" for label, probability in answers]


def test_texts_of_a_single_text_model_get_a_line_each(predict, folder):
    wanted = lines_of(Predictor.load(folder("single")).classify(TEXTS))
    for n in (1, 2, 3):
        assert predict("single", *TEXTS[:n]) == (wanted[:n], [])
    with pytest.raises(UserError, match=r"task \(toy_single\) is on single texts; leave --pairs out"):
        predict("single", "--pairs", *TEXTS[:2])


def test_texts_of_a_model_of_pairs_are_taken_two_by_two(predict, folder):
    wanted = lines_of(Predictor.load(folder("pairs")).classify(TEXTS[:2] * 2, [*TEXTS[1:], "x", "y"]))
    assert predict("pairs", *TEXTS[:2]) == (wanted[:1], [])
    assert predict("pairs", TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2]) == (wanted[:2], [])
    for n, count in ((1, "1 text is"), (3, "3 texts are")):
        with pytest.raises(UserError, match=rf"task \(toy_pairs\) is on pairs of texts, and {count} given"):
            predict("pairs", *TEXTS[:n])


def test_a_folder_that_does_not_say_takes_single_texts_unless_told(predict, folder):
    predictor = Predictor.load(folder("unknown"))
    out, err = predict("unknown", *TEXTS[:2])
    assert out == lines_of(predictor.classify(TEXTS[:2]))
    (note,) = err
    assert "does not say if its task is on pairs; each text is answered by itself (--pairs" in note
    assert predict("unknown", TEXTS[0]) == (out[:1], [])
    assert predict("unknown", "--pairs", *TEXTS[:2]) == (lines_of([predictor.classify(*TEXTS[:2])]), [])
    with pytest.raises(UserError, match="--pairs asks for pairs of texts, and 3 texts are given"):
        predict("unknown", "--pairs", *TEXTS)


def test_a_tab_makes_a_pair_where_the_model_takes_pairs(predict, folder, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("the cat\ta dog\nthe king\ta bird\n")
    pairs = (["the cat", "the king"], ["a dog", "a bird"])
    for kind, option in (("pairs", ()), ("unknown", ()), ("unknown", ("--pairs",))):
        answers = Predictor.load(folder(kind)).classify(*pairs)
        wanted = [f"{label}\t{probability:.4f}" for label, probability in answers]
        assert predict(kind, f"--lines={file}", *option) == (wanted, [])
    with pytest.raises(
        UserError, match=r"lines.txt, line 1: 2 texts parted by tabs, where 1 is wanted, since .* single texts"
    ):
        predict("single", f"--lines={file}")
    file.write_text("the cat\na king\n")
    assert len(predict("single", f"--lines={file}")[0]) == len(predict("unknown", f"--lines={file}")[0]) == 2
    for kind, option in (("pairs", ()), ("unknown", ("--pairs",))):
        with pytest.raises(UserError, match=r"lines.txt, line 1: 1 text, where 2 are wanted"):
            predict(kind, f"--lines={file}", *option)


def test_bad_lines_stop_the_command_or_keep_their_places_empty(predict, tmp_path, capsys):
    file = tmp_path / "lines.txt"
    file.write_bytes(b"the cat\n\n" + 60 * b"cat " + b"\ncaf\xe9\na\tb\na king\n")
    with pytest.raises(UserError, match=r"lines.txt, line 4: not UTF-8"):
        predict("single", f"--lines={file}")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^4 of 6 texts have no answer; their lines are empty\.$"):
        predict("single", f"--lines={file}", "--on-error=skip")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [bool(line) for line in lines] == [True, False, False, False, False, True]
    reasons = [
        "is empty",
        "has more than the 48 word pieces",
        "is not valid Unicode",
        "2 texts parted by tabs, where 1",
    ]
    for number, reason, line in zip((2, 3, 4, 5), reasons, err.splitlines(), strict=True):
        assert line.startswith(f"{file}, line {number}: ")
        assert reason in line
    file.write_text("the cat\na king\n")
    assert predict("single", f"--lines={file}", "--on-error=skip") == ([lines[0], lines[-1]], [])
    file.write_text(f"the cat\n{60 * 'cat '}\n")
    with pytest.raises(UserError, match=r"lines.txt, line 2: the text has more than the 48 word pieces"):
        predict("single", f"--lines={file}")
    file.write_text("\n" * 30)
    with pytest.raises(UserError, match="30 of 30 texts have no answer"):
        predict("single", f"--lines={file}", "--on-error=skip")
    assert len(capsys.readouterr().err.splitlines()) == 20
    with pytest.raises(UserError, match="text 2: the text is empty"):
        predict("single", "the cat", "")


def test_top_prints_several_labels_and_a_regression_its_value(predict, folder, tmp_path):
    ranked = Predictor.load(folder("single")).classify(TEXTS[0], top=None)
    assert predict("single", "--top=0", TEXTS[0])[0] == lines_of(ranked)
    assert predict("single", "--top=2", *TEXTS[:2])[0][0] == "  ".join(lines_of(ranked))
    (tmp_path / "lines").write_text("the cat\n")
    (line,) = predict("single", "--top=2", f"--lines={tmp_path / 'lines'}")[0]
    assert line == "\t".join(f"{label}\t{probability:.4f}" for label, probability in ranked)
    value = Predictor.load(folder("value")).classify(TEXTS[0])
    assert predict("value", TEXTS[0]) == ([f"{value:.6g}"], [])
    with pytest.raises(UserError, match="has no classes"):
        predict("value", "--top=2", TEXTS[0])
    with pytest.raises(UserError, match="--top is -1"):
        predict("single", "--top=-1", TEXTS[0])
    with pytest.raises(UserError, match="Give at least one text, or --lines FILE"):
        predict("single")

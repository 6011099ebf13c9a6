"""What a user types wrong gets one sentence and status 2; what is right answers."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, SMALL

from ufbert.runtime.files import expand_home


def sentence(result) -> str:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=ultrafastbert_1x12"], "did you mean ultrafastbert_1x11?"),
        (["--budget=abc"], "'abc' is not a budget"),
        (["--budget=0"], "'0' is not a budget"),
        (["--budget=0m"], "trains nothing"),
        (["--budget=5steps", "--corpus=text:/nowhere/at/all.txt"], "does not exist"),
        (["--budget=5steps", "--resume"], "--resume needs --out"),
        (["--budget=5steps", "--resume", "--out=/nowhere/run"], "There is no run"),
        (["--budget=5steps", "--model.n-heads=7"], "is not a multiple of"),
    ],
)
def test_wrong_training_options(command, tmp_path, args, words):
    assert words in sentence(command(*args, script="train.py", cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_option_is_named_with_its_likeness(command):
    found = command("train", "--budget=5steps", "--model.n-layrs=3")
    assert found.returncode == 2
    assert "--model.n-layers" in found.stderr


def test_an_existing_run_folder_needs_resume(command, run_folder):
    assert "pass --resume" in sentence(command("train", "--budget=5steps", f"--out={run_folder}"))


def test_an_empty_corpus(command, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    found = command(
        "train", "--budget=5steps", f"--corpus=text:{tmp_path / 'empty.txt'}", f"--out={tmp_path / 'r'}", *SMALL
    )
    assert "is empty" in sentence(found)


def test_an_accelerator_without_its_extra_is_named(command, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a card'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}"
    }
    code = (
        "from ufbert.runtime.device import use_device\nfrom ufbert.errors import UserError\n"
        "try:\n    use_device('auto')\nexcept UserError as error:\n    print(error)\nprint(use_device('cpu'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "uv sync --extra cuda" in found.stdout
    assert "--device cpu" in found.stdout
    assert found.stdout.endswith("cpu\n")


@pytest.mark.parametrize(("device", "named"), [("cpu", "the device 'cpu'"), ("auto", "JAX_PLATFORMS=cpu")])
def test_a_device_that_is_not_there_is_named(monkeypatch, device, named):
    import jax

    from ufbert.errors import UserError
    from ufbert.runtime import device as room

    def backend() -> str:
        raise AssertionError  # as jax does where it knows a platform and finds no device of it

    monkeypatch.setattr(jax, "default_backend", backend)
    monkeypatch.setattr(room, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match=f"jax cannot use {named}: it finds no such device. Pass `--device cpu`"):
        room.use_device(device)


def test_a_console_that_lacks_a_letter_shows_its_code():
    code = "from ufbert import cli as m; m.main = lambda args: print('caf\\xe9') or 0; m.run([])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=REPO)
    assert (found.returncode, found.stdout, found.stderr) == (0, "caf\\xe9\n", "")


def test_a_home_folder_is_meant_wherever_a_path_begins_in_an_option(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--out=~/run", "text:~/a.txt,~/b~/c.txt", "~", "~other/x", "a ~/b", "--when-done=touch ~/x"]
    wanted = ["--out=/home/me/run", "text:/home/me/a.txt,/home/me/b~/c.txt", "/home/me", *given[3:]]
    assert [expand_home(option) for option in given] == wanted


def test_wrong_fine_tuning_options(command, run_folder, tmp_path):
    model = f"--model={run_folder / 'model'}"
    source = f"--glue-source=dir:{tmp_path}"
    assert "does not have all of CoLA" in sentence(command(model, source, "--tasks=cola", script="finetune.py"))
    assert "did you mean cola?" in sentence(command("finetune", model, source, "--tasks=coal"))
    assert "no GLUE source" in sentence(command("finetune", model, "--glue-source=hub", "--tasks=cola"))
    (tmp_path / "SST-2").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\nbroken\n")
    assert "train.tsv, line 3: unequal columns, 1 instead of 2" in sentence(
        command("finetune", model, source, "--tasks=sst2")
    )
    (tmp_path / "SST-2" / "train.tsv").write_text("sentence\tlabel\nfine\t1\n")
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    absent = command("finetune", f"--model={tmp_path}", source, "--tasks=sst2")
    assert "is not a model folder" in sentence(absent)


def test_fill_mask_prints_five_guesses(command, run_folder):
    model = f"--model={run_folder / 'model'}"
    found = command("fill-mask", model, "The cat sees the [MASK] in london.")
    assert found.returncode == 0, found.stderr
    guesses = [line.split() for line in found.stdout.splitlines()[1:]]
    assert len(guesses) == 5
    shares = [float(guess[0].rstrip("%")) for guess in guesses]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.1
    assert "no [MASK]" in sentence(command("fill-mask", model, "The cat."))
    long = "cat " * 90 + "[MASK]"
    assert "more than the 64 word pieces" in sentence(command("fill-mask", model, long))
    assert "a [MASK] of it was cut off" in sentence(command("fill-mask", model, long, "--truncate"))
    assert "is not valid Unicode" in sentence(command("fill-mask", model, b"caf\xe9 [MASK]"))
    assert "no classifier" in sentence(command("predict", model, "The cat."))
    narrow = command("fill-mask", model, "The cat sees the [MASK] in london.", "--dtype=int8", "--threads=1")
    assert len(narrow.stdout.splitlines()) == 6
    assert re.search(r"int8 weights send \d+\.\d\d% of these tokens another way", narrow.stderr)
    exact = command("fill-mask", model, "A [MASK].", "--dtype=bfloat16", "--exact-routing")
    assert len(exact.stdout.splitlines()) == 6
    assert "another way" not in exact.stderr
    assert "--threads is -1" in sentence(command("fill-mask", model, "A [MASK].", "--threads=-1"))


def test_predict_answers_a_file_line_by_line(command, tmp_path, run_folder):
    """On the words of a model without a task it says so; bad files get a sentence before any model is loaded."""
    model, lines = f"--model={run_folder / 'model'}", tmp_path / "lines.txt"
    lines.write_text("the cat\nthe dog\n")
    assert "no classifier" in sentence(command("predict", model, f"--lines={lines}"))
    assert "not both" in sentence(command("predict", model, f"--lines={lines}", "a text"))
    assert "Cannot read" in sentence(command("predict", model, f"--lines={tmp_path / 'none.txt'}"))
    lines.write_bytes(b"caf\xe9\n")
    assert "lines.txt, line 1: not UTF-8" in sentence(command("predict", model, f"--lines={lines}"))
    lines.write_text("a\tb\na\n")
    assert "lines.txt, line 2: 1 text, where 2, as in line 1, are wanted" in sentence(
        command("predict", model, f"--lines={lines}")
    )
    lines.write_text("a\n\nb\n")
    assert "lines.txt, line 2: the text is empty" in sentence(command("predict", model, f"--lines={lines}"))


def test_presets_and_help(command):
    found = command("presets")
    assert "ultrafastbert_1x11" in found.stdout
    assert "163,671,025" in found.stdout
    assert "12 of 4,095" in found.stdout
    assert "fill-mask" in command("--help").stdout
    assert "did you mean train?" in sentence(command("trian"))
    text = command("train", "--help").stdout
    for option in (
        "--budget",
        "--corpus",
        "--resume",
        "--model.d-model",
        "--train.peak-lr",
        "--data.seq-len",
        "--scale",
    ):
        assert option in text


def test_a_damaged_model_is_one_sentence(command, run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not tensors")
    assert "damaged" in sentence(command("fill-mask", f"--model={tmp_path / 'model'}", "a [MASK]"))

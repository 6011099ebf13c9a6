"""`--when-done` of whole runs, and the report that they leave."""

import json
import shutil

import pytest
from conftest import SMALL

from ufbert.cli import call
from ufbert.errors import UserError
from ufbert.report.run_report import write_report


def test_the_last_command_runs_once_after_everything_is_saved(corpus_file, tmp_path, capsys):
    folder, log = tmp_path / "run", tmp_path / "log"
    last = f"ls {folder} {folder}/model >> {log}; echo status $UFBERT_EXIT_CODE >> {log}"
    options = [f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL]
    call("train", ["--budget=3steps", *options, f"--when-done={last}"])
    said = log.read_text()
    assert "model.safetensors" in said
    assert "report.html" in said
    assert "in_use.lock" not in said  # whatever it starts may have the folder
    assert said.endswith("status 0\n")
    resume = ["--resume", f"--out={folder}"]
    with pytest.raises(UserError, match="is finished"):
        call("train", [*resume, f"--when-done={last}"])
    assert log.read_text() == said
    (folder / "when_done.json").unlink()  # as if the machine had died just before
    capsys.readouterr()
    with pytest.raises(UserError, match="is finished"):  # the folder may be a stranger's: its command is named, not run
        call("train", resume)
    assert f"not run at the end: the stored --when-done {last!r}; give the option again" in capsys.readouterr().out
    assert log.read_text() == said
    assert not (folder / "when_done.json").exists()
    call("train", [*resume, f"--when-done={last}"])
    assert log.read_text() == said * 2
    (folder / "when_done.json").unlink()
    with pytest.raises(UserError, match="ended with status 3"):
        call("train", [*resume, "--when-done=exit 3"])


def test_a_preparation_that_fails_runs_the_last_command_and_a_refused_option_does_not(tmp_path, capfd):
    log, text = tmp_path / "log", tmp_path / "short.txt"
    text.write_text("Too little text for two rows.\n")
    options = [
        "--budget=3steps",
        "--model.tree-backend=gather",
        f"--out={tmp_path / 'run'}",
        f"--when-done=echo $UFBERT_EXIT_CODE >> {log}",
    ]
    for refused in ([f"--corpus=text:{tmp_path / 'missing'}"], [f"--corpus=text:{text}", "--reference=nowhere"]):
        with pytest.raises(UserError):
            call("train", [*options, *refused])
    assert not log.exists()  # a person is still there
    with pytest.raises(UserError, match="too little text"):
        call("train", [*options, f"--corpus=text:{text}"])
    assert log.read_text() == "2\n"
    assert "the run has not ended well: The corpus" in capfd.readouterr().err


def test_the_report_tells_events_environment_and_cost(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("checkpoints", "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "price": 7200.0}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "event": "resumed", "lost_seconds": 1.5, "start_seconds": 2.0}) + "\n")
    spent = json.loads((folder / "summary.json").read_text())["spent_seconds"]
    report = write_report(folder).read_text()
    assert f"{2 * spent:,.2f} in all" in report
    assert "lost seconds 1.5" in report
    assert config["environment"]["jax"] in report
    assert "MFLOP per token" in report
    assert "gradient norm" in report

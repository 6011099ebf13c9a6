"""A contest of training: two models in bfloat16 on a card that the tests make up, and what is kept of it when parts fail."""

import json
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from ufbert.bench.harness import WorkerProcess
from ufbert.bench.training import run as bench_run
from ufbert.bench.training.contest import Contest, Contestant, report_of, text
from ufbert.bench.training.kernels import KINDS
from ufbert.bench.training.run import check_all, contestants_of, on_a_card, profile_ours, run_train, start_all, time_all
from ufbert.cli import parse
from ufbert.config.presets import load_preset
from ufbert.errors import UserError
from ufbert.options.bench import BenchTrainOptions

PARAMETERS = {"crammed_bert": 119_589_889, "ultrafastbert_1x11": 163_671_025}


class MadeUp(WorkerProcess):
    """A process that answers from a table: seconds of a block, losses, parameters; or fails at one of its questions."""

    def __init__(self, name: str, seconds: float, losses: list[float], parameters: int) -> None:
        self.name, self.facts, self.late = name, "made up", ""
        self.seconds, self.losses, self.parameters, self.questions, self.fails_at = seconds, losses, parameters, [], ""
        self.process = self

    def kill(self) -> None:
        self.questions.append("kill")

    def log_lines(self) -> list[str]:
        return ["out of memory"]

    def ask(self, do, wanted, **arguments):
        self.questions.append(do)
        if do == self.fails_at or f"{do} {arguments.get('first')}" == self.fails_at:
            raise UserError(f"{self.name} failed: out of memory.")
        if do == "describe":
            return {
                "parameters": self.parameters,
                "memory": 9.4e9,
                "card": "NVIDIA H100 80GB HBM3",
                "start_seconds": 1.0,
            }
        if do == "profile":
            return {"seconds": 0.03, "kinds": dict.fromkeys(KINDS, 0.03 / len(KINDS)), "largest": []}
        return {"seconds": self.seconds, "losses": self.losses}


@pytest.fixture
def contest(tmp_path) -> Contest:
    """Two models and their compiled peers, all there."""
    runs = {name: load_preset(name) for name in PARAMETERS}
    runs = {name: replace(run, model=replace(run.model, dtype="bfloat16")) for name, run in runs.items()}
    options = BenchTrainOptions(peer_python="python", peer="torch-compile", json=str(tmp_path / "report.json"))
    options = replace(options, device="gpu", rows=128, updates=10, blocks=4, checked=2, profile=True)
    contest = Contest(options, contestants_of(options, runs))
    for c in contest.contestants:
        seconds = {"ufbert": 0.3, "torch-compile": 0.33}.get(c.name.split()[0], 0.0)
        contest.processes[c.name] = MadeUp(c.name, seconds, [10.0, 9.0], PARAMETERS[c.model])
    return contest


def made_up(contest: Contest, name: str) -> MadeUp:
    process = contest.processes[name]
    assert isinstance(process, MadeUp)
    return process


def names(contest: Contest) -> list[str]:
    return [c.name for c in contest.still_in()]


def test_every_model_has_its_peer_and_its_reference(contest):
    assert [c.name for c in contest.contestants] == [
        "ufbert crammed_bert", "torch-compile crammed_bert", "float32 crammed_bert",
        "ufbert ultrafastbert_1x11", "torch-compile ultrafastbert_1x11", "float32 ultrafastbert_1x11",
    ]  # fmt: skip


def test_speeds_ratios_shares_of_the_peak_and_memory_are_reported(contest):
    check_all(contest)
    time_all(contest)
    profile_ours(contest, contest.still_in()[::2])
    report, shown = report_of(contest), text(report_of(contest))
    assert [c["name"] for c in report["contestants"]] == names(contest)
    dense = report["contestants"][0]
    assert dense["tokens_per_second"] == pytest.approx(10 * 128 * 128 / 0.3)
    # The notes' figure: 337,000 tokens a second are 21.2 % of the card.
    assert dense["share_of_peak"] == pytest.approx(0.212 * dense["tokens_per_second"] / 337_000, rel=0.005)
    assert report["ratios"]["torch-compile crammed_bert"]["median"] == pytest.approx(1.1)
    assert not report["ratios"]["ufbert crammed_bert"]["same_model"]
    assert "ufbert crammed_bert trains 1.10 times as fast as torch-compile crammed_bert" in shown
    assert "another model" in shown
    assert "9.4 GB" in shown
    assert "ufbert crammed_bert: 30.00 ms an update in kernels, of 30.00 ms timed" in shown
    json.dumps(report)


def test_references_are_asked_first_and_end_before_anything_is_timed(contest):
    check_all(contest)
    assert made_up(contest, "float32 crammed_bert").questions == ["time", "describe", "kill"]
    assert contest.differences["ufbert crammed_bert"] == 0.0
    assert not any("float32" in name for name in names(contest))


@pytest.mark.parametrize("loss", [9.03, math.nan, math.inf])
def test_a_process_with_other_losses_is_not_timed_and_the_others_are(contest, loss):
    made_up(contest, "torch-compile crammed_bert").losses = [10.0, loss]
    check_all(contest)
    assert "torch-compile crammed_bert" not in names(contest)
    assert len(names(contest)) == 3
    assert "does not train the same model" in contest.left_out["torch-compile crammed_bert"]
    assert contest.logs["torch-compile crammed_bert"] == ["out of memory"]


def test_losses_in_bfloat16_may_differ_as_far_as_the_type_allows(contest):
    made_up(contest, "ufbert crammed_bert").losses = [10.001, 9.01]
    check_all(contest)
    assert contest.differences["ufbert crammed_bert"] == pytest.approx(0.01 / 9)


def test_a_peer_with_other_parameters_is_not_timed(contest):
    made_up(contest, "torch-compile ultrafastbert_1x11").parameters -= 1
    check_all(contest)
    assert "163,671,024 parameters" in contest.left_out["torch-compile ultrafastbert_1x11"]


def test_without_its_reference_a_model_is_timed_and_the_report_says_so(contest):
    made_up(contest, "float32 crammed_bert").fails_at = "time"
    check_all(contest)
    time_all(contest)
    shown = text(report_of(contest))
    assert "LOSSES NOT COMPARED" in shown
    assert "float32 crammed_bert was left out: float32 crammed_bert failed: out of memory" in shown


def test_a_process_that_fails_between_blocks_loses_no_other_number(contest):
    made_up(contest, "torch-compile crammed_bert").fails_at = "time 22"  # its third block
    check_all(contest)
    time_all(contest)
    report = json.loads(Path(contest.options.json).read_text())
    assert {c["name"]: len(c["block_seconds"]) for c in report["contestants"]} == {
        "ufbert crammed_bert": 4, "torch-compile crammed_bert": 2, "ufbert ultrafastbert_1x11": 4,
        "torch-compile ultrafastbert_1x11": 4,
    }  # fmt: skip
    assert report["ratios"]["torch-compile crammed_bert"]["pairs"] == 2


def test_a_profile_that_fails_is_only_missing(contest):
    made_up(contest, "ufbert crammed_bert").fails_at = "profile"
    check_all(contest)
    time_all(contest)
    profile_ours(contest, contest.still_in()[::2])
    assert list(contest.profiles) == ["ufbert ultrafastbert_1x11"]


def test_no_round_begins_after_the_contests_time(contest):
    contest.options = replace(contest.options, seconds=1.0)
    contest.began -= 2.0
    for name, process in contest.processes.items():
        contest.facts[name], contest.losses[name] = process.ask("describe", "parameters"), [10.0]
    time_all(contest)
    assert {len(works["step"]) for works in contest.times.values()} == {1}


def test_a_process_that_is_late_is_ended_and_says_so(tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        WorkerProcess("peer", sleeper, tmp_path) as peer,
        pytest.raises(UserError, match="peer failed: it took longer than 0 s"),
        peer.within(0.01),
    ):
        peer.wait_ready()


def test_a_card_has_defaults_of_its_own_and_a_given_preset_is_the_only_one():
    options, given = parse(BenchTrainOptions, ["--device", "gpu", "--rows", "64"], "bench train")
    options = on_a_card(options, given)
    assert (options.rows, options.scale, options.also, options.peer) == (
        64,
        "base",
        "ultrafastbert_1x11",
        "torch-compile",
    )
    options, given = parse(BenchTrainOptions, ["--device", "gpu", "--config", "crammed_rope"], "bench train")
    assert on_a_card(options, given).also == ""


def test_without_a_card_the_command_says_so(monkeypatch):
    monkeypatch.setattr(bench_run, "visible_accelerator", lambda: None)
    with pytest.raises(UserError, match="no NVIDIA graphics card"):
        run_train(BenchTrainOptions(device="gpu"), {"device": "gpu"})


QUICK = """
import sys
from contextlib import ExitStack
sys.path[:0] = {path!r}
from ufbert.bench import worker
describe = lambda: {{"parameters": 7, "memory": None, "card": None, "start_seconds": 0.0}}
worker.serve(lambda folder, name, *_: (f"quick {{1 / (name != 'torch')}}", worker.step_answers(lambda i: 9.0, describe)))
"""
"""A process that is ready at once, but fails if it is called torch."""


def test_on_a_card_all_processes_start_together_and_those_that_cannot_are_left_out(contest, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "write_job", lambda folder, run, options: folder.mkdir())
    (tmp_path / "quick.py").write_text(QUICK.format(path=sys.path))
    quick = (sys.executable, str(tmp_path / "quick.py"))
    run, nowhere = load_preset("tiny"), (str(tmp_path / "nowhere"),)
    programs = {"ufbert": quick, "torch": quick, "torch-compile": nowhere}
    contest.contestants = [Contestant(name, "tiny", "tiny", "tiny", run, program) for name, program in programs.items()]
    contest.processes = {}
    with ExitStack() as running:
        start_all(contest, tmp_path, running)
        assert names(contest) == ["ufbert"]
        check_all(contest)
        assert contest.losses == {"ufbert": [9.0, 9.0]}
    assert "ZeroDivisionError" in contest.left_out["torch"]
    assert any("Traceback" in line for line in contest.logs["torch"])
    assert "Cannot start torch-compile" in contest.left_out["torch-compile"]

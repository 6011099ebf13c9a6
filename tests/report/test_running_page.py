"""The page of a run while it trains."""

import json
import shutil
from pathlib import Path

from pages import check_page

from ufbert.errors import UserError
from ufbert.report.run_report import write_report
from ufbert.report.running_page import FIRST_GUESS, LAST, SHARE, RunningPage
from ufbert.runtime.claim import LOCK, claimed

RUN = Path(__file__).parent.parent / "fixtures" / "before_house" / "run"


class Day:
    """A clock that moves when it is told to, and pages that take their time."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost, self.drawn = 0.0, cost, []

    def draw(self, folder: Path) -> None:
        self.now += self.cost
        self.drawn.append(self.now)


def pages(day: Day) -> RunningPage:
    return RunningPage(Path("run"), day.draw, lambda: day.now)


def test_pages_take_a_hundredth_of_the_time_at_most():
    day = Day(cost=3.0)
    page = pages(day)
    for minute in range(24 * 60):
        day.now = max(day.now, 60.0 * minute)
        page.refresh(0.5, print)
    assert 200 < len(day.drawn) <= SHARE * 86400 / 3.0
    assert day.drawn[0] < 3600  # after an hour there is something to look at
    assert FIRST_GUESS < 0.01 * 3600


def test_no_page_delays_the_end_of_the_budget():
    day = Day(cost=1.0)
    page = pages(day)
    day.now = 1e6
    assert not page.refresh(LAST + 0.001, print)
    assert page.refresh(LAST, print)


def test_a_page_that_cannot_be_drawn_is_said_once_and_the_run_goes_on():
    said: list[str] = []

    def fail(folder: Path) -> None:
        raise UserError("Cannot write report.html: No space left on device.")

    day = Day(cost=1.0)
    page = RunningPage(Path("run"), fail, lambda: day.now)
    for _ in range(3):
        day.now += 1e6
        assert not page.refresh(0.5, said.append)
    assert said == ["report.html is not drawn while the run trains: Cannot write report.html: No space left on device"]


def test_a_page_says_how_its_run_stands_and_what_was_trained(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    config = json.loads((run / "config.json").read_text())
    trained = f"{config['run']['model']['n_layers']} layers x {config['run']['model']['d_model']}"
    (run / "summary.json").unlink(missing_ok=True)
    with claimed(run):
        running = write_report(run).read_text()
    page = check_page(running)
    assert "running, as of step 50" in running or "running, as of step 60" in running
    assert page.all("svg")
    assert trained in page.all("h1")[0].text
    stopped = write_report(run, "SIGTERM: saved at step 60").read_text()
    assert "SIGTERM: saved at step 60" in stopped
    assert "is running" not in stopped
    assert (
        "is running" in write_report(run, at_work=True).read_text()
    )  # said by the process itself, where there are no locks
    (run / LOCK).write_text("{}")  # as a killed process leaves it
    dead = write_report(run).read_text()
    assert "without a word, killed perhaps" in dead
    assert f"--resume --out={run}" in dead

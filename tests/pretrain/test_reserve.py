"""What is kept for the end of a run, on simulated machines that stall, slow down and compile: no test asks a real clock."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ufbert.pretrain.budget import ALWAYS, PIECES, EndCosts, WallClock

TOKENS = 1000


@dataclass
class Machine:
    """Time on it passes by working; `slowness(t)` is what a second of work takes at time t, and each stall comes once."""

    slowness: Callable[[float], float] = lambda now: 1.0
    stalls: tuple[tuple[float, float], ...] = ()
    """(when, seconds)"""
    now: float = 0.0

    def work(self, seconds: float) -> float:
        """Do what takes that long on an idle machine; returns what it took here."""
        began = self.now
        while seconds > 1e-9:
            part = min(seconds, 0.05)
            before, self.now, seconds = self.now, self.now + part * self.slowness(self.now), seconds - part
            self.now += sum(length for at, length in self.stalls if before <= at < self.now)
        return self.now - began


@dataclass
class Run:
    """Seconds that the parts of a run take on an idle machine."""

    budget: float = 120.0
    update: float = 0.2
    evaluation: float = 0.5
    save: float = 1.0
    compiling: float = 4.0
    n_evals: int = 5
    n_saves: int = 4


def spent(run: Run, machine: Machine) -> tuple[float, list[float]]:
    """Seconds spent and the share of the budget at which each update began, in the loop's own order."""
    clock, costs = WallClock(run.budget, started=0.0, now=lambda: machine.now), EndCosts(save_guess=0.5)
    machine.work(run.compiling)
    costs.evaluated(machine.work(run.evaluation))
    clock.reserve(costs.reserve())
    shares, done = [], {"evals": 0, "saves": 0}
    while not clock.done(len(shares)):
        share = clock.fraction(len(shares))
        for what, many, cost, note in (
            ("evals", run.n_evals, run.evaluation, costs.evaluated),
            ("saves", run.n_saves, run.save, costs.saved),
        ):
            if int(share * many) > done[what] and share < 1.0:
                done[what] = int(share * many)
                note(machine.work(cost))
        clock.reserve(costs.reserve())
        shares.append(clock.fraction(len(shares)))
        costs.stepped(machine.work(run.update), TOKENS)
    machine.work(run.evaluation)
    machine.work(1.3 * run.save)  # the checkpoint, and the model folder
    return machine.now, shares


def idle_end(run: Run) -> float:
    return run.evaluation + 1.3 * run.save + run.update


RUNS = [Run(), Run(budget=20.0, update=0.002, evaluation=0.02, save=0.1, compiling=1.0), Run(update=3.0), Run(save=4.0),
        Run(budget=86400.0, update=20.0, evaluation=30.0, save=15.0, compiling=60.0)]  # fmt: skip


ROOMY = [
    (run, slow) for run in RUNS for slow in (1.0, 5.0) if slow * (run.compiling + 4 * idle_end(run)) < 0.5 * run.budget
]


@pytest.mark.parametrize(("run", "slow"), ROOMY)
def test_a_steady_machine_spends_its_budget_and_no_more(run, slow):
    used, shares = spent(run, Machine(lambda now: slow))
    kept = ALWAYS + slow * (3 * run.update + 1.5 * run.evaluation + 1.5 * run.save)
    assert run.budget - kept <= used <= run.budget
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0


@pytest.mark.parametrize("run", RUNS[:4])
@pytest.mark.parametrize("at", [0.1, 0.3, 0.5])
def test_a_stall_neither_ends_a_run_nor_overruns_it(run, at):
    """Stopped for a third of its budget: what is left is used, to 95 %, and the learning rate does not come to its end."""
    stall = run.budget / 3
    used, shares = spent(run, Machine(stalls=((at * run.budget, stall),)))
    undisturbed, _ = spent(run, Machine())
    assert used <= run.budget
    assert run.budget - used <= (run.budget - undisturbed) + 0.05 * (run.budget - stall)
    jumps = sorted(later - share for share, later in itertools.pairwise(shares))
    assert jumps[-1] == pytest.approx(1 / 3, abs=0.1)  # the stall
    assert jumps[-2] < 0.1


@pytest.mark.parametrize("run", RUNS[:4])
@pytest.mark.parametrize("part", ["evaluation", "save"])
def test_a_stall_in_a_part_of_the_end_is_not_what_that_part_costs(run, part):
    """The second evaluation, or the second save, takes a third of the budget longer."""
    when, share = [], {"evaluation": 2 / run.n_evals, "save": 2 / run.n_saves}[part]

    class Stalling(Machine):
        def work(self, seconds):
            cost = run.evaluation if part == "evaluation" else run.save
            if seconds == cost and self.now > 0.9 * share * run.budget and not when:
                when.append(self.now)
                self.now += run.budget / 3
            return super().work(seconds)

    used, _ = spent(run, Stalling())
    assert when
    assert 0.9 * run.budget - idle_end(run) - ALWAYS <= used <= run.budget


@pytest.mark.parametrize("run", RUNS[:3])
def test_a_machine_that_grows_busier_keeps_the_budget(run):
    used, _ = spent(run, Machine(lambda now: 1.0 + 4.0 * now / run.budget))
    kept = ALWAYS + 5.0 * (3 * run.update + 1.5 * run.evaluation + 1.5 * run.save)
    assert run.budget - kept <= used <= run.budget


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS[:3])
def test_a_machine_five_times_slower_for_good_is_late_only_by_what_it_could_not_know(run):
    """It is known after most of `PIECES` pieces of work at the new pace. Before that, a run that ends is late by what the
    slowness adds to those updates and to its end."""
    pieces = (PIECES // 2 + 1) * max(0.3, 5 * run.update)
    unknowable = pieces + 4.0 * (idle_end(run) + run.update)
    for i in range(4, 400, 9):
        at = i / 400 * run.budget
        used, _ = spent(run, Machine(lambda now, at=at: 1.0 if now < at else 5.0))
        in_time = at < run.budget - ALWAYS - unknowable - 5 * idle_end(run) - pieces
        assert used <= run.budget + (0.0 if in_time else unknowable), at


def test_compiling_is_no_part_of_the_end():
    run = Run(compiling=30.0)
    used, _ = spent(run, Machine())
    assert 0.95 * run.budget <= used <= run.budget


def test_the_end_costs_more_where_updates_do():
    costs = EndCosts(save_guess=0.5, evaluations=2)
    assert costs.reserve() == ALWAYS + 1.5 * 0.5
    costs.evaluated(1.0)
    costs.stepped(0.5, TOKENS)
    costs.saved(2.0)
    assert costs.reserve() == pytest.approx(ALWAYS + 2 * 0.5 + 2 * 1.5 * 1.0 + 1.5 * 2.0)
    costs.stepped(50.0, TOKENS)  # a stall
    assert costs.reserve() == pytest.approx(ALWAYS + 2 * 0.5 + 2 * 1.5 * 1.0 + 1.5 * 2.0)
    for _ in range(PIECES):
        costs.stepped(1.5, TOKENS)
    assert costs.reserve() == pytest.approx(ALWAYS + 3 * (2 * 0.5 + 2 * 1.5 * 1.0 + 1.5 * 2.0))
    for _ in range(4 * PIECES):
        costs.stepped(0.25, TOKENS)  # faster than when they were measured: the end costs what it did
    assert costs.reserve() == pytest.approx(ALWAYS + 0.5 + 2 * 1.5 * 1.0 + 1.5 * 2.0)

"""Kill a training run at random moments, again and again, and check that nothing is lost.

    python tests/pretrain/fault_drill.py --runs 10 --kills 20

A run with a budget of updates must end in the same bits as one that nothing interrupted; one with a budget of seconds must
stay within it by its ledger. Kills are by SIGKILL: some while data is prepared, some while a checkpoint is written, the rest
at any moment of a session, its start included.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ufbert.runtime.metrics import read_records

REPO = Path(__file__).parents[2]


def sentences(path: Path, documents: int = 4000) -> Path:
    """A corpus of a toy grammar."""
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "king", "river", "house", "bird"], ["sees", "likes", "follows", "finds"]
    text = "\n\n".join(
        "\n".join(f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(9))
        for _ in range(documents)
    )
    path.write_text(text + "\n")
    return path


class Drill:
    """One run folder, its command line, and what is found wrong with it."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.prepared = folder.with_name(f"{folder.name}-prepared")  # its own, so that its text is prepared, too
        self.options = [*options, f"--prepared={self.prepared}"]
        self.problems: list[str] = []

    def start(self) -> subprocess.Popen[bytes]:
        """A session: the first one, or one that goes on."""
        begun = (self.folder / "config.json").is_file()
        args = ["--resume", f"--out={self.folder}"] if begun else [*self.options, f"--out={self.folder}"]
        with self.log.open("ab") as log:
            return subprocess.Popen([sys.executable, str(REPO / "train.py"), *args], stdout=log, stderr=log)

    def kill(self, moment: str, rng: random.Random, longest: float) -> bool:
        """Start a session and kill it; False if it ended by itself before."""
        known = set(self.scratch(moment))  # what earlier kills left is cleaned up by this session, in its own time
        process, began = self.start(), time.monotonic()
        delay = rng.uniform(0.5, longest)
        while True:
            if process.poll() is not None:
                if process.returncode:
                    self.problems.append(f"a session ended with status {process.returncode}, see {self.log}")
                return False
            late = time.monotonic() - began
            if not known.issuperset(self.scratch(moment)):
                time.sleep(rng.uniform(0, 0.02))
                break
            if (moment == "any" and late > delay) or late > 3 * longest:
                break
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True

    def scratch(self, moment: str) -> list[Path]:
        """What is half-written now: text in preparation, or a checkpoint."""
        if moment == "preparation":
            return list(self.prepared.glob(".*.partial"))
        return list((self.folder / "checkpoints").glob("*tmp*")) if moment == "checkpoint" else []

    def finish(self) -> None:
        """The last session, and what it leaves."""
        if not (self.folder / "summary.json").is_file():
            code = self.start().wait()
            if code:
                self.problems.append(f"the last session ended with status {code}, see {self.log}")
                return
        places = (self.folder, self.prepared)
        left = [str(p) for place in places for p in place.rglob("*") if "tmp" in p.name or ".partial" in p.name]
        if left:
            self.problems.append(f"half-written: {', '.join(left)}")

    @property
    def spent(self) -> float:
        sessions: dict[int, float] = {}
        for record in read_records(self.folder / "ledger.jsonl"):
            sessions[record["session"]] = max(record["spent"], sessions.get(record["session"], 0.0))
        return sum(sessions.values())

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "model" / "model.safetensors")


def moments(kills: int, rng: random.Random) -> list[str]:
    """When to kill: a tenth in preparation, which comes first, a quarter while a checkpoint is written, the rest anywhere."""
    early, saving = max(1, kills // 10), max(1, kills // 4)
    rest = ["checkpoint"] * saving + ["any"] * (kills - early - saving)
    rng.shuffle(rest)
    return ["preparation"] * early + rest


def drill_steps(folder: Path, options: list[str], whole: Drill, kills: int, seed: int, longest: float) -> Drill:
    """A run by updates, killed `kills` times: equal bits in the end."""
    drill, rng, done = Drill(folder, options), random.Random(seed), 0
    for moment in moments(kills, rng):
        if not drill.kill(moment, rng, longest):
            break
        done += 1
    drill.finish()
    if done < kills:
        drill.problems.append(f"it ended after {done} kills; give it more updates")
    if not drill.problems:
        one, other = whole.weights, drill.weights
        unequal = [name for name, array in one.items() if not np.array_equal(array, other[name])]
        if unequal:
            drill.problems.append(f"{len(unequal)} of {len(one)} arrays differ from the uninterrupted run's")
    return drill


def drill_seconds(folder: Path, options: list[str], budget: float, kills: int, seed: int, longest: float) -> Drill:
    """A run by the clock, killed `kills` times: within its budget by the ledger."""
    drill, rng = Drill(folder, options), random.Random(seed)
    for _ in range(kills):
        if drill.spent > 0.7 * budget or not drill.kill("any", rng, longest):
            break
    drill.finish()
    if drill.spent > budget:
        drill.problems.append(f"{drill.spent:.1f} s spent of {budget:.0f}")
    return drill


def report(drill: Drill) -> bool:
    """Print how a drill ended; whether it failed."""
    sessions = len({r["session"] for r in read_records(drill.folder / "ledger.jsonl")})
    verdict = "; ".join(drill.problems) or "good"
    print(f"{drill.folder.name}: {sessions} charged sessions, {drill.spent:.1f} s spent: {verdict}", flush=True)
    return bool(drill.problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs of each kind")
    parser.add_argument("--first", type=int, default=0, help="seed of the first run; each has its own")
    parser.add_argument("--kills", type=int, default=20, help="kills in a run")
    parser.add_argument("--steps", type=int, default=6000, help="updates of a run by updates")
    parser.add_argument("--seconds", type=int, default=90, help="budget of a run by the clock; 0 leaves them out")
    parser.add_argument("--longest", type=float, default=10.0, help="latest random kill, in seconds after a start")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; must not exist")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    os.environ.setdefault("UFBERT_CACHE", str(given.folder / "cache"))
    corpus = sentences(given.folder / "text.txt", min(4000, 10 * given.steps))
    small = [
        f"--corpus=text:{corpus}", "--config=tiny", "--scale=base", "--model.d-model=32", "--model.n-heads=2",
        "--model.tree-depth=3", "--data.seq-len=32", "--data.eval-rows=16", "--train.batch-rows=8",
        "--train.micro-rows=8", f"--train.n-checkpoints={min(60, given.steps // 15)}", "--train.n-evals=5", "--device=cpu",
    ]  # fmt: skip
    by_steps = [f"--budget={given.steps}steps", *small]
    whole = Drill(given.folder / "whole", by_steps)
    whole.finish()
    failed = len(whole.problems)
    seeds = range(given.first, given.first + given.runs)
    for seed in seeds:
        failed += report(drill_steps(given.folder / f"steps-{seed}", by_steps, whole, given.kills, seed, given.longest))
    by_seconds = [f"--budget={given.seconds}s", *small]
    for seed in seeds if given.seconds else ():
        folder = given.folder / f"seconds-{seed}"
        failed += report(drill_seconds(folder, by_seconds, given.seconds, given.kills, seed, given.longest))
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

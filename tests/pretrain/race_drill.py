"""Start several processes on one run folder at random moments, again and again, and check that one trains and nothing is mixed.

    python tests/pretrain/race_drill.py --tries 100 --whole 5 --folder /tmp/race

A try starts two (and another one ten) processes on one folder: new runs, each of its own seed, or sessions that resume one. One
must end with status 0, all others with status 2 and a sentence, and the folder must hold one ledger session more than before,
every update once and in order, and the configuration of the run that trained. In a third kind of try the processes name no
folder, and each must get one of its own.

The `--tries` are made by light processes: they claim the folder as `ufbert train` does (`claimed_new`, `claimed`, `new_folder`
of `claim.py`), write with its writers and its ledger, and only pretend to train. The `--whole` ones run `train.py`, each
about ten seconds of a core.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from fault_drill import REPO, sentences

from ufbert.errors import UserError
from ufbert.pretrain.budget import Ledger, WallClock
from ufbert.runtime.claim import claimed, claimed_new, new_folder
from ufbert.runtime.files import write_json
from ufbert.runtime.metrics import JsonlWriter, read_records

STEPS = 60


def pretend(how: str, folder: Path, seed: int) -> None:
    """A session in the folder, new or resumed, of STEPS updates that do nothing. Raises UserError if it is taken."""
    if how == "unnamed":
        folder = new_folder(folder, "run")
    with (claimed if how == "resume" else claimed_new)(folder):
        if how != "resume":
            write_json(folder / "config.json", {"seed": seed})
        elif not (folder / "config.json").is_file():
            raise UserError(f"There is no run in {folder} to resume.")
        ledger = Ledger(folder / "ledger.jsonl")
        done = max((record["step"] for record in read_records(folder / "metrics.jsonl")), default=0)
        metrics = JsonlWriter(folder / "metrics.jsonl", done if ledger.sessions else None)
        ledger.start(WallClock(100.0, ledger.spent_before))
        for step in range(done + 1, done + STEPS + 1):
            metrics.write({"step": step, "seed": seed, "process": os.getpid(), "loss": 1.0})
            time.sleep(0.01)
        metrics.close()
        ledger.close()


def start_pretending(how: str, folder: Path, seed: int) -> subprocess.Popen[str]:
    args = [sys.executable, __file__, "--pretend", how, str(seed), "--folder", str(folder)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_training(how: str, folder: Path, seed: int) -> subprocess.Popen[str]:
    """`train.py` itself. Resumed sessions take the seed of the run."""
    small = [
        f"--corpus=text:{folder.parent / 'text.txt'}", "--config=tiny", "--scale=base", "--model.d-model=32",
        "--model.n-heads=2", "--model.n-layers=1", "--model.tree-depth=3", "--model.vocab-size=300", "--data.seq-len=32",
        "--data.eval-rows=16", "--train.batch-rows=8", "--train.micro-rows=8", "--train.n-evals=3", "--device=cpu",
        "--train.n-checkpoints=4", "--budget=1500steps", f"--seed={seed}",
    ]  # fmt: skip
    args = ["--resume"] if how == "resume" else small
    command = [sys.executable, str(REPO / "train.py"), *args, f"--out={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def race(start, how: str, folder: Path, count: int, within: float, rng: random.Random) -> list[str]:
    """One try; what is found wrong."""
    sessions = Ledger(folder / "ledger.jsonl").sessions if how == "resume" else {}
    moments = sorted((rng.uniform(0.0, within), seed) for seed in range(count))
    began, racers = time.monotonic(), {}
    for moment, seed in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        racers[seed] = start(how, folder, seed)
    said = {seed: racer.communicate()[0] for seed, racer in racers.items()}
    codes = {seed: racer.returncode for seed, racer in racers.items()}
    problems = [f"a traceback: {text}" for text in said.values() if "Traceback" in text]
    if how == "unnamed":
        folders = list(folder.iterdir())
        problems += [] if not any(codes.values()) else [f"status {codes}"]
        problems += [] if len(folders) == count else [f"{len(folders)} folders for {count} runs"]
        return problems + [problem for place in folders for problem in mixed(place, {}, None)]
    trained = [seed for seed, code in codes.items() if code == 0]
    late = "is finished" if how == "resume" else "exists already; pass --resume"
    for seed, code in codes.items():
        if code != 0 and (code != 2 or not any(words in said[seed] for words in ("is in use by process ", late))):
            problems.append(f"seed {seed} left with status {code}: {said[seed]}")
    resumed = how == "resume" and start is start_pretending  # a pretender may come when another has ended, and goes on
    if not trained or (len(trained) > 1 and not resumed):
        problems.append(f"{len(trained)} trained")
    seed = trained[0] if how == "new" and len(trained) == 1 else None
    return problems + mixed(folder, sessions, seed, len(trained) if resumed else 1)


def mixed(folder: Path, sessions: dict[int, float], seed: int | None, new: int = 1) -> list[str]:
    """What shows that more than one process wrote at a time: in metrics, ledger, configuration, and what is left."""
    records = [record for record in read_records(folder / "metrics.jsonl") if "loss" in record]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    problems = []
    if [record["step"] for record in records] != list(range(1, len(records) + 1)) or len(lines) < len(records):
        problems.append(f"{folder}: updates are not each there once and in order")
    writers = list(dict.fromkeys(record.get("process") for record in records))
    changes = sum(a.get("process") != b.get("process") for a, b in pairwise(records))
    if changes != len(writers) - 1:
        problems.append(f"{folder}: the updates of {len(writers)} processes are mixed")
    found = Ledger(folder / "ledger.jsonl").sessions
    if len(found) != len(sessions) + new:
        problems.append(f"{folder}: {len(found)} sessions in the ledger, {len(sessions)} before")
    each = Counter((r["session"], r["spent"]) for r in read_records(folder / "ledger.jsonl"))
    order = [r["session"] for r in read_records(folder / "ledger.jsonl")]
    if order != sorted(order) or max(each.values()) > 2:
        problems.append(f"{folder}: sessions of the ledger are mixed")
    configured = json.loads((folder / "config.json").read_text())["seed"]
    if seed is not None and {configured, *(r.get("seed", seed) for r in records)} != {seed}:
        problems.append(f"{folder}: seed {seed} trained, config.json says {configured}")
    left = [path.name for path in folder.iterdir() if path.name.endswith((".lock", ".partial"))]
    return problems + [f"{folder}: left behind: {left}"] * bool(left)


def drill(start, name: str, folder: Path, tries: int, counts: tuple[int, ...], within: float, seed: int) -> int:
    """Tries of every kind with every count of processes; how many went wrong."""
    rng, failed = random.Random(seed), 0
    kinds = ("new", "resume", "unnamed") if start is start_pretending else ("new", "resume")
    for count in counts:
        done: Counter[str] = Counter()
        for number in range(tries):
            how = kinds[number % len(kinds)]
            place = folder / f"{name}-{count}-{number}"
            if how == "unnamed":
                place.mkdir()
            if how == "resume":
                prepare(start, place)
            problems = race(start, how, place, count, within, rng)
            done[how] += 1
            for problem in problems:
                print(f"{place.name} ({how}): {problem}", flush=True)
            failed += bool(problems)
        kinds_done = ", ".join(f"{number} {how}" for how, number in done.items())
        print(f"{name}: {tries} tries of {count} processes ({kinds_done}): {failed} failed so far", flush=True)
    return failed


def prepare(start, folder: Path) -> None:
    """A run to resume: what a kill leaves of one that has trained for a while."""
    process = start("new", folder, 77)
    while len(read_records(folder / "metrics.jsonl")) < 20 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100, help="tries with light processes, of two and of ten each")
    parser.add_argument(
        "--whole", type=int, default=5, help="tries with two train.py, and a third as many with ten; 0 for none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; must not exist")
    parser.add_argument("--pretend", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.pretend:
        try:
            pretend(given.pretend[0], given.folder, int(given.pretend[1]))
        except UserError as error:
            print(f"error: {error}")
            return 2
        return 0
    given.folder.mkdir(parents=True)
    os.environ.setdefault("UFBERT_CACHE", str(given.folder / "cache"))
    sentences(given.folder / "text.txt", 400)
    failed = drill(start_pretending, "light", given.folder, given.tries, (2, 10), 1.0, given.seed)
    if given.whole:
        failed += drill(start_training, "whole", given.folder, given.whole, (2,), 6.0, given.seed)
        failed += drill(start_training, "whole", given.folder, max(2, given.whole // 3), (10,), 6.0, given.seed)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

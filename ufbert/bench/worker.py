"""A process that is timed: the protocol of all benchmarks, the same for ours and for peers.

Peers without ufbert import this file by its name, so it imports the standard library and numpy only.

A process is started as `... FOLDER NAME THREADS [ENTRY ...]`: the job folder, its name, the threads that it may use,
and what it computes, if that is more than one thing. Messages are single lines of JSON. The process reads the job and
prints `{"ready": FACTS}`, or `{"missing": SENTENCE}` if a library is not installed. Then it answers each of

- `{"do": "load", "file": F, "rows": b}`: cut the array in FOLDER/F into batches of b rows and keep them; answers
  `{"batches": number}`;
- `{"do": "check", "name": n, "work": w, "batches": k, "sample": [i, ...]}`: do the work w of entry n on the first k
  batches; answers `{"file": F}`, where the sampled rows of the results are;
- `{"do": "time", "name": n, "work": w, "first": i, "calls": c}`: make the calls i to i + c - 1, each finished before
  the next begins; answers `{"seconds": s}` by the clock of this process. Call j works on batch j modulo the number of
  batches.

If something fails it answers `{"error": SENTENCE}` and ends. `layer_ours` and `encoder_ours` answer more.

Processes of `bench train` do not load or check. They answer `time`: a call is a training step on batch i of the job, and
the answer also holds `losses`. And they answer

- `{"do": "describe"}`: `{"parameters": number, "start_seconds": s, "memory": B, "card": NAME}`: the seconds to read the job
  and compile, the most bytes of a graphics card's memory that they have held, and its name; the last two null on a CPU;
- `{"do": "profile", "first": i, "calls": c}`, ours only: the steps i to i + c - 1; answers `{"kinds": ...}`, as
  `training.kernels` describes it.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

MOST_BATCHES = 4096
"""More different batches of few rows would not make the caches any colder."""

Call = Callable[[int, Any], Any]
"""(number of the call, batch) -> result, when it is computed."""

Answers = Mapping[str, Callable[..., dict[str, Any]]]
"""Functions by the "do" of a message; the rest of the message becomes arguments."""


def say(**message: Any) -> None:
    """Print a message."""
    print(json.dumps(message), flush=True)


def end_without(error: ImportError) -> NoReturn:
    """Say which library this interpreter lacks, and end the process."""
    say(missing=f"{sys.executable} cannot import {error.name or error}")
    sys.exit(1)


try:
    import numpy as np
except ImportError as error:
    end_without(error)


class Worker:
    """The answers to `load`, `check` and `time`."""

    def __init__(
        self, folder: Path, calls: dict[str, dict[str, Call]], place: Callable[[np.ndarray], Any] = lambda batch: batch
    ) -> None:
        """`calls` holds functions by entry and work; `place` puts a batch into the form that they take."""
        self.folder, self.calls, self.place = folder, calls, place
        self.batches: list[Any] = []

    def load(self, file: str, rows: int) -> dict[str, Any]:
        """Keep batches of this many rows."""
        self.batches = []  # the old ones go before the new ones come
        array = np.load(self.folder / file, mmap_mode="r")
        count = min(len(array) // rows, MOST_BATCHES)
        self.batches = [self.place(np.array(array[i * rows : (i + 1) * rows])) for i in range(count)]
        return {"batches": count}

    def check(self, name: str, work: str, batches: int, sample: list[int]) -> dict[str, Any]:
        """Write some rows of the results of the first batches."""
        call = self.calls[name][work]
        y = np.concatenate([np.asarray(call(i, self.batches[i])) for i in range(batches)])
        np.save(self.folder / f"{name}-result.npy", y[sample])
        return {"file": f"{name}-result.npy"}

    def time(self, name: str, work: str, first: int, calls: int) -> dict[str, Any]:
        """Time calls."""
        call, batches, n = self.calls[name][work], self.batches, len(self.batches)
        start = time.perf_counter()
        for i in range(first, first + calls):
            call(i, batches[i % n])
        return {"seconds": time.perf_counter() - start}

    def answers(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Return the answers by message."""
        return {"load": self.load, "check": self.check, "time": self.time}


def step_answers(step: Callable[[int], Any], describe: Callable[[], dict[str, Any]]) -> Answers:
    """Return the answers of a process of `bench train`. `step` turns a batch's number into a loss, perhaps still computing."""

    def timed(name: str, work: str, first: int, calls: int) -> dict[str, Any]:
        start = time.perf_counter()
        losses = [step(i) for i in range(first, first + calls)]
        return {"losses": [float(loss) for loss in losses], "seconds": time.perf_counter() - start}

    return {"time": timed, "describe": describe}


def serve(start: Callable[..., tuple[str, Answers]]) -> None:
    """Get ready by `start` and answer messages until the input ends.

    `start` takes the job folder, the name, the threads and the entries, and returns facts and answers.
    """
    try:
        folder, name, threads, *entries = sys.argv[1:]
        facts, answers = start(Path(folder), name, int(threads), *entries)
        say(ready=f"{facts}, {threads} threads")
        for line in sys.stdin:
            message = json.loads(line)
            say(**answers[message.pop("do")](**message))
    except ImportError as error:
        end_without(error)
    except Exception as error:  # of whatever kind: the process that asked puts it into a sentence
        traceback.print_exc()  # into the log of this process
        say(error=f"{type(error).__name__}: {(str(error).strip() or 'without a word').splitlines()[0]}")
        sys.exit(1)

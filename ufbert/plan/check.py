"""The plan's check on itself: real updates on random rows, measured beside the speeds that predict them."""

import statistics
import time
from typing import NamedTuple

from ufbert.config import RunConfig
from ufbert.cost.flops import routing_flops_per_token, train_flops_per_token
from ufbert.cost.parts import PartSpeeds
from ufbert.cost.speeds import Speeds
from ufbert.plan.counts import count_step, real_update

ROUNDS, SECONDS_PER_ROUND = 8, 0.8
"""The model's parts and real updates are timed in turn this often, so that both see the same machine, however busy."""

LONGEST_UPDATE = 2.0
"""Seconds; a micro-batch that would take longer is halved until it does not."""

WITHIN = 0.25
"""Largest distance of the measured speed from the predicted one."""


class Check(NamedTuple):
    """Predicted and measured training speed on this machine."""

    rows: int
    """Packed rows of an update."""
    updates: int
    predicted: float
    """Tokens/s."""
    measured: float
    """Tokens/s, from the median update."""

    @property
    def ratio(self) -> float:
        """Return the measured over the predicted speed."""
        return self.measured / self.predicted

    @property
    def holds(self) -> bool:
        """Tell if the two agree within a quarter."""
        return abs(self.ratio - 1.0) <= WITHIN


def check_run(run: RunConfig, parts: PartSpeeds | None, speeds: Speeds) -> tuple[Speeds, Check]:
    """Measure updates of `run` on this device, and the speeds (with `parts`, anew in every round; else as given)."""
    masked, seq_len = run.model.tree_backend == "masked", run.data.seq_len
    per_token = train_flops_per_token(run, masked_trees=masked)
    routing = routing_flops_per_token(run, masked_trees=masked)
    rows = run.train.micro_rows
    while rows > 1 and speeds.seconds(rows * seq_len * per_token, 0.0, 0.0) > LONGEST_UPDATE:
        rows //= 2
    count, update = count_step(run, "step", rows, seq_len), real_update(run, rows)
    seconds: list[float] = []
    for _ in range(ROUNDS):
        if parts is not None:
            parts.measure()
        began = time.perf_counter()
        while not seconds or time.perf_counter() - began < SECONDS_PER_ROUND:
            start = time.perf_counter()
            update()
            seconds.append(time.perf_counter() - start)
    speeds = parts.speeds() if parts is not None else speeds
    tokens = rows * seq_len
    predicted = speeds.seconds(max(count.flops, tokens * per_token), tokens * routing, count.bytes)
    return speeds, Check(rows, len(seconds), tokens / predicted, tokens / statistics.median(seconds))

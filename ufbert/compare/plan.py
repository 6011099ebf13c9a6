"""What a comparison will take: hours and money, before anything runs."""

from collections.abc import Mapping
from pathlib import Path

from ufbert.compare.jobs import GLUE, SPEED, TIME, TOKENS, glue_of, read_job, speed_of
from ufbert.compare.protocol import ComparisonFile
from ufbert.glue.protocols import find_protocol
from ufbert.glue.sources.official import choose_tasks, load_task, open_source
from ufbert.glue.sweep import expected_work
from ufbert.options.compare import CompareOptions
from ufbert.runtime.console import phase, say
from ufbert.study.run import DecidedStudy, show_plan
from ufbert.study.variants import expected_seconds

CHARACTERS = 4.0
"""Of a word piece in English text, about."""
PASSES = 3.0
"""Forward passes that an update costs, which `expected_work` counts in."""
START = 30.0
"""Seconds that a process of fine-tuning or timing takes besides its work, about."""


def show_comparison_plan(options: CompareOptions, asked: ComparisonFile, studies: Mapping[str, DecidedStudy]) -> None:
    """Print the cells, and the hours and the money that those still open will take."""
    folder, hours = Path(options.out), 0.0
    for axis in (axis for axis in (TOKENS, TIME) if axis in studies):
        say(f"pretraining for equal {axis}:")
        hours += show_plan(studies[axis])
    if asked.tasks:
        with phase("reading the rows of GLUE"):
            seconds = glue_seconds(asked, studies[TOKENS])
        done = {(name, task): glue_of(folder / GLUE / name / task) for name in asked.models for task in asked.tasks}
        waiting = {cell: seconds[cell] for cell, results in done.items() if results is None}
        glue = sum(waiting.values()) / 3600
        hours += glue
        say(
            f"fine-tuning: {len(done)} cells, {len(done) - len(waiting)} finished; {glue:,.2f} hours for the rest (expected "
            "from the speed of pretraining, to a factor of two)"
        )
    if asked.speed and speed_of(folder / SPEED) is None:
        calls = 2 * len(asked.models) * len(asked.shapes) * asked.blocks * asked.seconds_a_block
        timing = (START * len(asked.models) / 3 + calls) / 3600
        hours += timing
        say(f"timing: {len(asked.models)} models, {timing:,.2f} hours")
    spent = sum(_spent(folder, asked))
    money = f" and {hours * asked.price:,.2f} of money at {asked.price:,.2f} an hour" if asked.price else ""
    before = f" ({spent / 3600:,.2f} hours are spent on fine-tuning already)" if spent else ""
    say(f"in all {hours:,.2f} hours{money} for what is not finished{before}. Nothing was run.")


def glue_seconds(asked: ComparisonFile, study: DecidedStudy) -> dict[tuple[str, str], float]:
    """Return the expected seconds of fine-tuning by (model, task), from the text of the rows and the speed of pretraining."""
    source = open_source(asked.source)
    tasks = [load_task(source, task) for task in choose_tasks(source, ",".join(asked.tasks))[0]]
    seconds = {}
    for variant in study.variants:
        a_pass = expected_seconds(variant, study.platform) / max(variant.tokens, 1.0) / PASSES
        protocol = find_protocol(asked.protocol, variant.run.model)
        for data in tasks:
            each = protocol.with_overrides(protocol.tune, tuple(asked.seeds_of_task(data.task.name)))
            seconds[variant.name, data.task.name] = START + expected_work(data, each) / CHARACTERS * a_pass
    return seconds


def _spent(folder: Path, asked: ComparisonFile) -> list[float]:
    jobs = [read_job(folder / GLUE / name / task) for name in asked.models for task in asked.tasks]
    return [session.seconds or 0.0 for job in jobs if job for session in job.sessions]

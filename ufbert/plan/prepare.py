"""`ufbert prepare`: the text of a run, made ready before the machine that trains is paid for."""

import shlex
from pathlib import Path
from typing import NamedTuple

from ufbert.data.cache import cache_folder
from ufbert.options.given import Given, argument_words, option_names
from ufbert.options.train import PlanOptions, PrepareOptions
from ufbert.plan.target import start_target
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.corpus import corpus_bound, locate_rows, prepare_rows, with_text
from ufbert.pretrain.resolve import Resolved, decided, resolve
from ufbert.runtime.console import say

TOKENS_PER_CORE_SECOND = 300_000.0
"""Assumed speed of preparation, tokenizer and cleaning included: 11.7 M tokens of English (59 MB, a vocabulary of 32,768) took
39.6 s of an AMD EPYC's cores (27 November 2026)."""


def prepare(options: PrepareOptions, given: Given) -> Path:
    """Prepare the text that `train` with the same options would, by the same code, and return its folder.

    Raises UserError for options or a corpus that `train` would refuse, and if the disk refuses.
    """
    budget = parse_budget(options.budget)
    target = start_target(options.device)
    resolved = resolve(options, given, budget, target.platform)
    options, tokens = decided(options, resolved)
    say(f"text for {options.origin} at scale {options.scale} on {target.name}, {options.budget}")
    say(f"  scale: {resolved.reason}")
    data = prepare_rows(locate_rows(with_text(options, tokens)), tokens)
    size, root = sum(path.stat().st_size for path in data.folder.iterdir()), cache_folder(options.prepared)
    print(
        f"prepared  {data.folder} ({size / 1e9:,.3f} GB)\n"
        f"copy it into {root} of the machine that trains, or into a folder that you name there by --prepared; `ufbert train` "
        f"with the same options uses it at once. The corpus need not be there."
    )
    return data.folder


class Preparation(NamedTuple):
    """The expected cost of preparing text."""

    command: str
    tokens: int
    """Tokens that are read, at most."""
    seconds: float
    """On a core."""
    bytes: float
    """Size of the rows."""


def plan_preparation(options: PlanOptions, given: Given, resolved: Resolved) -> Preparation:
    """Estimate what preparing the text of a planned run takes, and name the command that does so ahead."""
    _, tokens = decided(options, resolved)
    bound = resolved.run.data.max_tokens or corpus_bound(tokens)
    known = option_names(PrepareOptions)
    words = argument_words({name: value for name, value in given.items() if name in known})
    command = shlex.join(["ufbert", "prepare", *words])
    return Preparation(command, bound, bound / TOKENS_PER_CORE_SECOND, 2.0 * bound)

"""The text of a run: which corpus, how much of it, and its rows."""

import time
from dataclasses import replace

from ufbert.data.cache import Located, finish, locate
from ufbert.data.corpora import DEMO_TOKENS, HUB_CORPUS, demo_path
from ufbert.data.prepared import PreparedData
from ufbert.hub.vocabulary import read_for_training
from ufbert.options.train import TextOptions, TrainOptions
from ufbert.pretrain.start import start_tokenizer
from ufbert.runtime.console import phase, say, show

MAX_DEMO_PASSES = 40
FEW_ROWS = 4
"""Fewer held-out rows than this say next to nothing."""
MIN_CORPUS_TOKENS, MAX_CORPUS_TOKENS = 20_000_000, 2_000_000_000
"""Unless `data.max_tokens` says otherwise, a corpus is read as far as the budget is planned to see, within these bounds. The
plan rests on a measured speed, so it is rounded up, to the first times a power of two, for the next run to ask for the same."""


def choose_corpus(options: TextOptions, tokens_planned: float) -> str:
    if options.corpus != "auto":
        return options.corpus
    passes = tokens_planned / DEMO_TOKENS
    if demo_path() is not None and passes <= MAX_DEMO_PASSES:
        say(f"corpus demo: about {passes:.1f} passes planned over the packaged Wikipedia text")
        return "demo"
    why = (
        f"{passes:.0f} passes over the packaged text would be planned, more than {MAX_DEMO_PASSES}"
        if demo_path() is not None
        else "the packaged text is not installed"
    )
    say(f"corpus {HUB_CORPUS}: {why}")
    return HUB_CORPUS


def corpus_bound(tokens_planned: float) -> int:
    """Tokens to read of a corpus."""
    bound = MIN_CORPUS_TOKENS
    while bound < tokens_planned:
        bound *= 2
    return min(bound, MAX_CORPUS_TOKENS)


def with_text[Options: TextOptions](options: Options, tokens_planned: float) -> Options:
    """Return `options` with the corpus, and how much of it is read, decided."""
    bound = options.data.max_tokens or corpus_bound(tokens_planned)
    return replace(options, corpus=choose_corpus(options, tokens_planned), data=replace(options.data, max_tokens=bound))


def locate_rows(options: TextOptions, vocab_size: int = 0) -> Located:
    """The prepared data, or the corpus to prepare. Raises UserError if there is neither.

    `vocab_size` is what the tokenizer was asked to have, where the options already hold what it has.
    """
    given = None
    if options.init_from:
        given = start_tokenizer(options.init_from, options.tokenizer)
    elif options.tokenizer:
        given = read_for_training(options.tokenizer)
    with phase("looking for the text and checking it"):
        return locate(
            options.corpus,
            options.data,
            vocab_size or options.model.vocab_size,
            given,
            options.prepared,
            say,
            options.heldout,
        )


def prepare_rows(located: Located, tokens_planned: float) -> PreparedData:
    began = time.monotonic()
    with phase("preparing the text", stays=False):
        data = finish(located, show, say)
    seconds = time.monotonic() - began
    facts = data.manifest
    say(
        f"corpus and tokenizer ready in {seconds:.1f} s (not charged): {facts.documents:,} documents, "
        f"{facts.train_rows:,} training and {facts.heldout_rows:,} held-out rows of {facts.seq_len} tokens, "
        f"{facts.vocab_size:,} word pieces; licence: {facts.licence}"
    )
    say(f"[UNK] stands for {facts.unknown_share:.2%} of the text's characters")
    if tokens_planned:
        passes = tokens_planned / (facts.train_rows * facts.seq_len)
        say(f"planned passes over the text: {passes:.1f}")
        faults = [f"a model learns by heart what it sees {passes:,.0f} times"] if passes > MAX_DEMO_PASSES else []
        if facts.heldout_rows < FEW_ROWS:
            faults.append(f"the held-out loss rests on {facts.heldout_rows} row(s)")
        if faults:
            say(f"caution: the text is short: {', and '.join(faults)}; give a longer --corpus")
    return data


def fit_vocabulary(options: TrainOptions, data: PreparedData) -> TrainOptions:
    """A small corpus may give fewer word pieces than asked for; a given tokenizer has its own number. A model to start from
    keeps its embeddings, which may be more than its tokenizer has pieces."""
    if options.init_from or data.manifest.vocab_size == options.model.vocab_size:
        return options
    return replace(options, model=replace(options.model, vocab_size=data.manifest.vocab_size))

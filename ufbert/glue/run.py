"""`ufbert finetune`: from options to a sweep of tasks, all of whose inputs are checked before the first update."""

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ufbert.config import ProtocolName
from ufbert.data.encode import encode_texts
from ufbert.errors import UserError
from ufbert.glue.protocols import PROTOCOLS, choose_protocol, given_tune
from ufbert.glue.results import GlueResults
from ufbert.glue.sources.custom import CustomTask, read_custom, read_task_file
from ufbert.glue.sources.official import choose_tasks, load_task, open_source
from ufbert.glue.sweep import SweepInputs, sweep
from ufbert.glue.tasks import Examples, TaskData
from ufbert.hub.folder import load_model
from ufbert.options.finetune import CUSTOM, FinetuneOptions, TaskOptions
from ufbert.options.given import Given
from ufbert.runtime.claim import claimed, claimed_new, new_folder
from ufbert.runtime.console import phase, say
from ufbert.runtime.device import use_device
from ufbert.runtime.last_command import last_commands


def finetune(options: FinetuneOptions, given: Given) -> GlueResults:
    """Fine-tune a model folder on the tasks of `options`, and return the results, which the output folder holds too.

    `given` has the fields that a person named, such as {"tune.lr": 1e-4}; only its hyper-parameters override the protocol.
    Raises UserError for wrong options, files or models, and if no run of a task kept a finite loss.
    """
    given_tune(options.tune, given)  # refuses a wrong value before anything is read
    with ExitStack() as held:
        if options.out:
            folder = Path(options.out)
            held.enter_context((claimed if options.resume else claimed_new)(folder))
            inputs = _read_inputs(options, given)
        else:
            inputs = _read_inputs(options, given)
            path = Path(options.model)
            name = (
                path.resolve().parent.name if path.name == "model" else path.name
            )  # a run's model folder is RUN/model
            kind = inputs.tasks[0].task.name if options.is_custom else "glue"
            folder = new_folder(Path("runs"), f"{kind}-{name}")
            held.enter_context(claimed_new(folder))
        with last_commands(options.last_commands, folder, held.close):
            return sweep(inputs, folder)


def _read_inputs(options: FinetuneOptions, given: Given) -> SweepInputs:
    """Read the model and all rows. Raises UserError for anything that would stop the sweep later."""
    skipped_tasks, tasks = read_tasks(options, options.protocol)
    use_device(options.device)
    model = load_model(options.model)
    protocol = choose_protocol(options, given, model.config)
    tune = protocol.tune
    for data in tasks:
        pair = None if data.train.pairs is None else data.train.pairs[:1]
        encode_texts(model.tokenizer, data.train.texts[:1], pair, model.config, tune.max_len)  # has it room?
    if options.train_rows:
        count, seed = options.train_rows, protocol.seeds[0]
        tasks = [data._replace(train=subset(data.train, count, seed)) for data in tasks]
    for data in tasks:
        if math.ceil(len(data.train.texts) / tune.batch_rows) * tune.epochs >= 2**31:
            raise UserError(f"{tune.epochs:,} epochs of {data.task.folder} are 2^31 updates or more (--tune.epochs).")
    if skipped_tasks:
        say(f"not in {options.glue_source}, left out: {', '.join(skipped_tasks)}")
    return SweepInputs(replace(options, tune=tune), protocol, model, tasks, given)


@phase("reading the rows")
def read_tasks(options: TaskOptions, protocol: ProtocolName = "auto") -> tuple[list[str], list[TaskData]]:
    """Return the names of official tasks that the source lacks, and the rows of the tasks to run."""
    if options.is_custom:
        regression = {"auto": None, "classes": False, "values": True}[options.labels]
        described = {name: getattr(options, name) for name in CUSTOM if name != "task_file"}
        path = options.task_file
        custom = read_task_file(Path(path)) if path else CustomTask(**described, regression=regression)
        return [], [read_custom(custom, options.skip_bad_rows, say)]
    source = open_source(options.glue_source, options.skip_bad_rows)
    chosen, skipped = choose_tasks(source, options.tasks)
    if protocol == "mnli-first":
        first = [task for task in chosen if "mnli" in (task.name, task.cut_of)]
        if not first and any(task.name in PROTOCOLS["mnli-first"].mnli_first for task in chosen):
            raise UserError("The protocol mnli-first needs MNLI among the tasks, and its rows in the source.")
        chosen = [*first, *(task for task in chosen if task not in first)]
    return skipped, [load_task(source, task) for task in chosen]


def subset(examples: Examples, count: int, seed: int) -> Examples:
    """Draw `count` rows without replacement, and keep their order. Raises UserError if there are fewer."""
    assert examples.labels is not None
    if count > len(examples.labels):
        raise UserError(f"--train-rows {count} is more than the {len(examples.labels)} rows there are.")
    picks = np.sort(np.random.default_rng(seed).permutation(len(examples.labels))[:count])
    pairs = None if examples.pairs is None else [examples.pairs[i] for i in picks]
    return Examples([examples.texts[i] for i in picks], pairs, [examples.labels[i] for i in picks], examples.skipped)

"""The command line: `python -m ufbert VERB`, also installed as `ufbert`.

The only file that parses arguments. Options are plain data that need no jax (`ufbert.options`); what a verb does is imported
once its options are known, so that `--help` and a mistyped option answer at once.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple, cast

import tyro
from tyro.conf import Positional

from ufbert.config.presets import load_preset, scaled, with_recipe
from ufbert.errors import Interrupted, UserError, near_miss
from ufbert.options.ask import FillMaskOptions, PredictOptions
from ufbert.options.bench import BenchEncoderOptions, BenchLayerOptions, BenchTrainOptions
from ufbert.options.compare import CompareOptions
from ufbert.options.compress import CompressOptions
from ufbert.options.convert import ExportOptions, ImportOptions
from ufbert.options.finetune import FinetuneOptions, GlueTableOptions
from ufbert.options.given import Given, from_given, option_names
from ufbert.options.report import ReportOptions
from ufbert.options.study import StudyOptions
from ufbert.options.train import PlanOptions, PrepareOptions, PresetsOptions, RunOptions, TrainOptions
from ufbert.runtime import console, crash, signals
from ufbert.runtime.files import expand_home


class Verb(NamedTuple):
    """A command."""

    options: type
    work: str
    """`module:function` that does the work, called with the options."""
    summary: str
    layered: bool = False
    """The options go over a preset or a protocol, so the function is called with the values given, too."""
    makes_folder: bool = False
    """Its product is a folder: a console that is gone costs it nothing, and `--resume` goes on with what is begun."""


VERBS = {
    "train": Verb(
        TrainOptions,
        "ufbert.pretrain.run:pretrain",
        "pretrain a model from raw text within a budget (also: python train.py)",
        layered=True,
        makes_folder=True,
    ),
    "prepare": Verb(
        PrepareOptions,
        "ufbert.plan.prepare:prepare",
        "prepare the text of a training run ahead, on a cheap machine",
        layered=True,
        makes_folder=True,
    ),
    "plan": Verb(
        PlanOptions,
        "ufbert.plan.run:plan",
        "say what a budget buys on a device: tokens, updates, memory, time, money",
        layered=True,
    ),
    "study": Verb(
        StudyOptions,
        "ufbert.study.run:study",
        "compare variants of a pretraining run under one protocol, over seeds and learning rates",
        layered=True,
        makes_folder=True,
    ),
    "report": Verb(
        ReportOptions,
        "ufbert.compare.draw:report",
        "draw the page of a run as it stands, or of several over each other",
    ),
    "compare": Verb(
        CompareOptions,
        "ufbert.compare.run:compare",
        "compare presets: pretraining for equal time and equal tokens, GLUE, speed on this CPU, and a verdict",
        layered=True,
        makes_folder=True,
    ),
    "finetune": Verb(
        FinetuneOptions,
        "ufbert.glue.run:finetune",
        "fine-tune a model folder on GLUE or a task of your own (also: python finetune.py)",
        layered=True,
        makes_folder=True,
    ),
    "compress": Verb(
        CompressOptions,
        "ufbert.compress.run:compress",
        "make a smaller or faster child of a model folder, and state what it lost",
        layered=True,
        makes_folder=True,
    ),
    "glue-table": Verb(
        GlueTableOptions,
        "ufbert.glue.compare:compare",
        "put the GLUE scores of several models side by side, with intervals of their differences",
    ),
    "fill-mask": Verb(FillMaskOptions, "ufbert.inference.ask:fill_mask", "guess the [MASK] of a sentence"),
    "predict": Verb(PredictOptions, "ufbert.inference.ask:predict", "classify texts with a fine-tuned model folder"),
    "presets": Verb(
        PresetsOptions, "ufbert.plan.presets:list_presets", "list the presets, their sizes and their arithmetic"
    ),
    "import": Verb(
        ImportOptions, "ufbert.hub.convert:import_checkpoint", "make a model folder of another library's checkpoint"
    ),
    "export": Verb(
        ExportOptions, "ufbert.hub.convert:export_folder", "write a model folder in another library's layout"
    ),
    "bench layer": Verb(
        BenchLayerOptions,
        "ufbert.bench.layer:run_layer",
        "time a tree layer on this CPU against dense layers of jax, NumPy and PyTorch",
    ),
    "bench encoder": Verb(
        BenchEncoderOptions,
        "ufbert.bench.encoder:run_encoder",
        "time whole encoders on this CPU against BERT in ONNX Runtime and PyTorch",
    ),
    "bench train": Verb(
        BenchTrainOptions,
        "ufbert.bench.training.run:run_train",
        "time pretraining on this CPU or graphics card against PyTorch, after checking that both compute the same",
        layered=True,
    ),
}
USAGE = "usage: ufbert VERB [OPTIONS]; `ufbert VERB --help` lists the options\n\n" + "\n".join(
    f"  {name:<13} {verb.summary}" for name, verb in VERBS.items()
)
GO_ON = "`--resume --out=FOLDER` goes on with what is begun."


def call(name: str, args: Sequence[str]) -> Any:
    """Run a verb with command-line arguments and return what its function returns. Raises UserError for wrong use."""
    verb = VERBS[name]
    options, given = parse(verb.options, args, f"ufbert {name}")
    module, function = verb.work.split(":")
    console.PROGRESS.on_stdout = verb.makes_folder
    with console.phase("loading the libraries", stays=False):
        work = getattr(importlib.import_module(module), function)
    return work(options, given) if verb.layered else work(options)


def parse[Options](cls: type[Options], args: Sequence[str], prog: str) -> tuple[Options, Given]:
    """Parse arguments into options of type `cls`, and the values that the arguments name.

    `--help` shows the fields of the preset, scale and recipe that the other arguments name. Prints help or a usage error and
    exits as tyro does. Raises UserError for a value out of range.
    """
    words = [expand_home(arg) if re.match(r"--[\w.-]+=|(text|hf|dir):", arg) else arg for arg in args]
    default = _defaults(cls)
    if {"-h", "--help"} & set(words):
        default = _with_preset(default, words)
    parsed = tyro.cli(type(default), args=words, default=default, prog=prog)
    given = _named(cls, parsed, words)
    return from_given(cls, given), given


def _defaults(cls: Any) -> Any:
    """Return default options of a subclass of `cls` that checks nothing: values are checked once a preset is below them.

    An option without a default is tyro's MISSING, so the instance is made without its constructor.
    """
    namespace = {"__post_init__": lambda self: None, "__doc__": cls.__doc__, "__module__": cls.__module__}
    options = object.__new__(type(cls.__name__, (cls,), namespace))
    for field in fields(cls):
        value = field.default if field.default is not MISSING else tyro.MISSING
        if field.default_factory is not MISSING:
            value = _defaults(field.type) if is_dataclass(field.type) else field.default_factory()
        object.__setattr__(options, field.name, value)
    return options


def _with_preset(default: Any, words: Sequence[str]) -> Any:
    """Return `default` with the fields of the preset, scale and recipe that `words` name, where the options have a preset."""
    if not isinstance(default, RunOptions):
        return default
    asked = default
    with contextlib.suppress(SystemExit):  # the help is shown whatever else is wrong
        rest = [word for word in words if word not in ("-h", "--help")]
        asked = tyro.cli(type(default), args=rest, default=default, console_outputs=False)
    scale = "base" if asked.scale == "auto" else asked.scale
    run = with_recipe(scaled(load_preset(asked.config), scale), asked.recipe, scale)
    for part in ("model", "train", "data"):
        settings, unchecked = getattr(run, part), type(getattr(default, part))
        values = {field.name: getattr(settings, field.name) for field in fields(settings)}
        object.__setattr__(default, part, unchecked(**values))
    return default


def _named(cls: Any, parsed: Any, words: Sequence[str]) -> Given:
    """Return the values of the options that appear in `words`, which the parser has understood."""
    given = {}
    for field in fields(cls):
        if Positional in getattr(field.type, "__metadata__", ()):
            given[field.name] = getattr(parsed, field.name)
    known = option_names(cls)
    for word in words:
        if word == "--":
            break
        flag = word.split("=", 1)[0]
        if not flag.startswith("--"):
            continue
        name = flag[2:].replace("-", "_")
        if name not in known:
            name = re.sub(r"(^|\.)no_", r"\1", name)  # --no-check, --train.no-shard-params
        if name in known:
            outer, _, inner = name.partition(".")
            value = getattr(parsed, outer)
            given[name] = getattr(value, inner) if inner else value
    return given


def main(args: Sequence[str]) -> int:
    """Run a verb and return the exit code: 0, 2 for wrong use or input, 130 for an interrupt, 128 + n for signal n."""
    if not args or args[0] in ("-h", "--help") or list(args) in (["bench"], ["bench", "-h"], ["bench", "--help"]):
        print(USAGE)
        return 0
    if args[0] == "--version":
        print(f"ufbert {importlib.metadata.version('ufbert')}")
        return 0
    gc.set_threshold(50_000, 20, 20)  # what jax imports and traces stays: looking through it is a tenth of every start
    name, makes_folder = args[0], False
    try:
        name, rest = split_verb(args)
        makes_folder = VERBS[name].makes_folder and not {"-h", "--help"} & set(rest)
        call(name, rest)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        console.silence(sys.stdout)  # else the interpreter fails once more to write what is left
        if makes_folder:
            print(f"error: the reader of this command's output is gone. {GO_ON}", file=sys.stderr)
        return 141
    except OSError as error:
        print(f"error: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}.", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except signals.Stopped as stop:
        print(f"{stop}: stopped. {GO_ON if makes_folder else ''}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"SIGINT: stopped. {GO_ON}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {crash.report_crash(error)}", file=sys.stderr)
        return crash.EXIT_CODE
    return 0


def split_verb(args: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the verb that arguments begin with, of one word or two, and the rest. Raises UserError for an unknown verb."""
    for words in (1, 2):
        name = " ".join(args[:words])
        if name in VERBS:
            return name, args[words:]
    name = " ".join(args[: 2 if args[0] == "bench" else 1])
    raise UserError(f"There is no verb {name!r}; {near_miss(name, VERBS)}")


def run(args: Sequence[str] | None = None) -> None:
    """Run a verb as a process of its own and end it: within seconds, whatever a library still waits for."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that lacks a letter shows its code
    console.open_descriptors()
    signals.WATCHER.start()
    sys.stderr = console.Console(sys.stderr, stops=False)
    if args and args[0] in VERBS and VERBS[args[0]].makes_folder:
        sys.stdout = console.Console(sys.stdout, stops=True)
    code = main(args)
    jax = cast(Any, sys.modules.get("jax"))
    waits = jax is not None and jax.distributed.is_initialized()  # processes that have ended well wait for each other
    if code or not waits:
        signals.leave_soon(code)
    sys.exit(code)

"""`python -m ufbert VERB`, also installed as `ufbert`. Each verb's work lives in its own package."""

import gc
import io
import re
import sys
import time

from ufbert.runtime import console, signals
from ufbert.runtime.files import expand_home

STARTED = time.monotonic()

WORKING = ("train", "finetune")
"""Verbs whose product is a folder: a console that is gone costs them nothing."""
GO_ON = "`--resume --out=FOLDER` goes on with what is begun."
VERBS = {
    "train": "pretrain a model from raw text within a budget (also: python train.py)",
    "plan": "say what a budget buys on a device: tokens, updates, memory, time, money",
    "finetune": "fine-tune a model folder on GLUE tasks (also: python finetune.py)",
    "glue-table": "put the GLUE scores of several models side by side, with intervals of their differences",
    "fill-mask": "guess the [MASK] of a sentence",
    "predict": "classify texts with a fine-tuned model folder",
    "presets": "list the presets, their sizes and their arithmetic",
    "import": "make a model folder of another library's checkpoint",
    "export": "write a model folder in another library's layout",
    "bench": "time this package against others, after checking that they compute the same",
}


def main(args: list[str]) -> int:
    """Run a verb and return the exit code: 0, 2 for wrong use or input, 130 for an interrupt, 128 + n for signal n."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: ufbert VERB [OPTIONS]; `ufbert VERB --help` lists the options\n")
        print("\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items()))
        return 0
    if args[0] == "--version":
        import importlib.metadata

        print(f"ufbert {importlib.metadata.version('ufbert')}")
        return 0
    from ufbert.errors import Interrupted, UserError

    gc.set_threshold(50_000, 20, 20)  # what jax imports and traces stays: looking through it is a tenth of every start
    paths = re.compile(r"--[\w.-]+=|(text|hf|dir):")
    try:
        run_verb(args[0], [expand_home(arg) if paths.match(arg) else arg for arg in args[1:]])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        console.silence(sys.stdout)  # else the interpreter fails once more to write what is left
        if args[0] in WORKING:
            print(f"error: the reader of this command's output is gone. {GO_ON}", file=sys.stderr)
        return 141
    except OSError as error:
        print(f"error: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}.", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except signals.Stopped as stop:
        print(f"{stop}: stopped. {GO_ON if args[0] in WORKING else ''}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"SIGINT: stopped. {GO_ON}", file=sys.stderr)
        return 130
    return 0


def run_verb(verb: str, args: list[str]) -> None:
    """Import what the verb needs, and nothing else, and run it. Raises UserError for an unknown verb."""
    if verb == "train":
        from ufbert.pretrain.run import pretrain_command

        pretrain_command(args, STARTED)
    elif verb == "plan":
        from ufbert.plan.run import plan_command

        plan_command(args)
    elif verb == "finetune":
        from ufbert.glue.command import finetune_command

        finetune_command(args)
    elif verb == "glue-table":
        from ufbert.glue.command import glue_table_command

        glue_table_command(args)
    elif verb in ("fill-mask", "predict"):
        from ufbert.inference import ask as command

        {"fill-mask": command.fill_mask_command, "predict": command.predict_command}[verb](args)
    elif verb == "presets":
        from ufbert.plan.presets import presets_command

        presets_command(args)
    elif verb == "bench":
        from ufbert.bench.command import bench_command

        bench_command(args)
    elif verb in ("import", "export"):
        from ufbert.hub import command as hub_command

        {"import": hub_command.import_command, "export": hub_command.export_command}[verb](args)
    else:
        import difflib

        from ufbert.errors import UserError

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}."
        raise UserError(f"There is no verb {verb!r}; {hint}")


def run(args: list[str] | None = None) -> None:
    """Run a verb as a process of its own and end it: within seconds, whatever a library still waits for."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that lacks a letter shows its code
    console.open_descriptors()
    signals.WATCHER.start()
    sys.stderr = console.Console(sys.stderr, stops=False)
    if args and args[0] in WORKING:
        sys.stdout = console.Console(sys.stdout, stops=True)
    code = main(args)
    jax = sys.modules.get("jax")
    waits = jax is not None and jax.distributed.is_initialized()  # processes that have ended well wait for each other
    if code or not waits:
        signals.leave_soon(code)
    sys.exit(code)


if __name__ == "__main__":
    run()

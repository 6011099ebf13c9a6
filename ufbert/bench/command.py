"""`ufbert bench`: the command line of the benchmarks."""

from dataclasses import replace

from ufbert.errors import UserError
from ufbert.options.bench import BenchEncoderOptions, BenchLayerOptions, BenchTrainOptions
from ufbert.presets import load_preset, scaled

USAGE = """usage: ufbert bench KIND [OPTIONS]; `ufbert bench KIND --help` lists the options

  layer     speed of a tree layer's forward pass on this CPU, against dense layers of jax, NumPy and PyTorch
  encoder   speed of whole encoders on this CPU, against BERT in ONNX Runtime and PyTorch
  train     pretraining speed on this CPU, against a peer that trains the same model"""


def bench_command(args: list[str]) -> None:
    """Run a benchmark. Raises UserError if a peer fails or computes something else."""
    import tyro

    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
    elif args[0] == "train":
        options = parse_train(args[1:])
        from ufbert.bench.train import run_train

        run_train(options, {})
    elif args[0] == "layer":
        options = tyro.cli(BenchLayerOptions, args=args[1:], prog="ufbert bench layer")
        from ufbert.bench.layer import run_layer

        run_layer(options)
    elif args[0] == "encoder":
        options = tyro.cli(BenchEncoderOptions, args=args[1:], prog="ufbert bench encoder")
        from ufbert.bench.encoder import run_encoder

        run_encoder(options)
    else:
        raise UserError(f"There is no benchmark {args[0]!r}; there are layer, encoder and train.")


def parse_train(args: list[str]) -> BenchTrainOptions:
    """Return the options over the preset and the scale that they name."""
    import tyro

    named = tyro.cli(BenchTrainOptions, args=args, prog="ufbert bench train")
    run = scaled(load_preset(named.config), "base" if named.scale == "auto" else named.scale)
    default = replace(named, model=run.model, train=run.train, data=run.data)
    return tyro.cli(BenchTrainOptions, args=args, default=default, prog="ufbert bench train")

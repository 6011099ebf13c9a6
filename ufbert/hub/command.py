"""`ufbert import` and `ufbert export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from ufbert.config import ActivationName
from ufbert.errors import UserError


@dataclass(frozen=True)
class ImportOptions:
    """Make a model folder of a checkpoint of Hugging Face's BERT, FNet or ModernBERT (all layers global), of crammedBERT or
    UltraFastBERT; or a layer folder of a PyPI `fastfeedforward` state."""

    source: Annotated[str, Positional]
    """Checkpoint folder, or a single .safetensors file (its config.json is then looked for beside it)."""
    out: str
    """Folder to write."""
    config: str = ""
    """config.json of the checkpoint, where it is not in the folder."""
    tokenizer: str = ""
    """tokenizer.json or vocab.txt, where it is not in the folder."""
    fixed_len: int = 0
    """Row length for a model with Fourier mixers; 0 takes the checkpoint's own."""
    activation: ActivationName = "relu"
    """Nonlinearity of a `fastfeedforward` layer, which its state does not name."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a model folder in another library's layout, with its tokenizer."""

    folder: Annotated[str, Positional]
    """Model folder, or a layer folder for fastfeedforward."""
    to: Literal["hf", "ultrafastbert", "fastfeedforward", "onnx"]
    """hf: a BERT, FNet or ModernBERT that transformers loads without remote code. ultrafastbert: the layout of crammedBERT
    and UltraFastBERT. fastfeedforward: the state of that package. onnx: a graph of standard operators, trees included, for
    ONNX Runtime and others (needs the extra `onnx`)."""
    out: str
    """Folder to write."""


def import_command(args: list[str]) -> None:
    """`ufbert import SOURCE --out FOLDER`."""
    import tyro

    options = tyro.cli(ImportOptions, args=args, prog="ufbert import")
    _refuse_existing(options.out)
    from ufbert import nn
    from ufbert.hub.convert import import_weights, read_checkpoint, with_tokenizer
    from ufbert.hub.folder import save_model
    from ufbert.hub.leaf_layer import from_state, is_state, save_layer
    from ufbert.hub.tensors import first_few

    tensors, values, folder = read_checkpoint(Path(options.source), options.config)
    if is_state(set(tensors)):
        layer = from_state(tensors, options.source)
        save_layer(options.out, layer, options.activation)
        leaves, d, w = layer.w_in.shape
        print(f"layer {options.out}: a fast feedforward layer of {leaves} leaves of {w} neurons, {d} inputs")
        return
    if values is None:
        raise UserError(f"{options.source} has no config.json beside it; name one with --config FILE.")
    found = import_weights(tensors, values, options.source, fixed_len=options.fixed_len)
    save_model(options.out, with_tokenizer(found, folder, options.tokenizer))
    for note in found.notes:
        print(note)
    if found.skipped:
        print(f"not used, since this model has no place for them: {first_few(found.skipped)}")
    model = found.config
    print(
        f"model {options.out}: {found.format.label}, {model.n_layers} layers x {model.d_model}, "
        f"{nn.count_params(model, ()):,} encoder parameters, heads: {', '.join(found.heads) or 'none'}"
    )


def export_command(args: list[str]) -> None:
    """`ufbert export FOLDER --to hf --out DIR`."""
    import tyro

    options = tyro.cli(ExportOptions, args=args, prog="ufbert export")
    _refuse_existing(options.out)
    from ufbert.hub.convert import export_model
    from ufbert.hub.folder import load_model
    from ufbert.hub.leaf_layer import load_layer, to_state
    from ufbert.hub.tensors import write_folder

    if options.to == "fastfeedforward":
        layer, _ = load_layer(options.folder)
        write_folder(options.out, to_state(layer), {})
        print(f"{options.out}/model.safetensors: a state for fastfeedforward's FFF.load_state_dict")
        return
    if options.to == "onnx":
        from ufbert.hub.onnx_export import export_onnx

        print(f"{options.out}: {export_onnx(load_model(options.folder), Path(options.out))}")
        return
    label = export_model(load_model(options.folder), Path(options.out), options.to)
    print(f"{options.out}: {label}")


def _refuse_existing(out: str) -> None:
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out.")

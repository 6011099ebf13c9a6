"""`ufbert import` and `ufbert export`."""

from pathlib import Path

from ufbert import nn
from ufbert.errors import UserError
from ufbert.hub.convert import export_model, import_weights, read_checkpoint, with_tokenizer
from ufbert.hub.folder import load_model, save_model
from ufbert.hub.leaf_layer import from_state, is_state, load_layer, save_layer, to_state
from ufbert.hub.onnx_export import export_onnx
from ufbert.hub.tensors import first_few, write_folder
from ufbert.options.convert import ExportOptions, ImportOptions


def import_checkpoint(options: ImportOptions) -> None:
    """Write a model folder, or a layer folder, of another library's checkpoint.

    Raises UserError for a checkpoint that the encoder does not express, and for an output that exists.
    """
    _refuse_existing(options.out)
    tensors, values, folder = read_checkpoint(Path(options.source), options.config)
    if is_state(set(tensors)):
        layer = from_state(tensors, options.source)
        save_layer(options.out, layer, options.activation)
        leaves, d, w = layer.w_in.shape
        print(f"layer {options.out}: a fast feedforward layer of {leaves} leaves of {w} neurons, {d} inputs")
        return
    if values is None:
        raise UserError(f"{options.source} has no config.json beside it; name one with --config FILE.")
    weights = import_weights(tensors, values, options.source, fixed_len=options.fixed_len)
    save_model(options.out, with_tokenizer(weights, folder, options.tokenizer))
    for note in weights.notes:
        print(note)
    if weights.skipped:
        print(f"not used, since this model has no place for them: {first_few(weights.skipped)}")
    model = weights.config
    print(
        f"model {options.out}: {weights.format.label}, {model.n_layers} layers x {model.d_model}, "
        f"{nn.count_params(model, ()):,} encoder parameters, heads: {', '.join(weights.heads) or 'none'}"
    )


def export_folder(options: ExportOptions) -> None:
    """Write a model folder in another library's layout. Raises UserError for what that layout does not express."""
    _refuse_existing(options.out)
    if options.to == "fastfeedforward":
        layer, _ = load_layer(options.folder)
        write_folder(options.out, to_state(layer), {})
        print(f"{options.out}/model.safetensors: a state for fastfeedforward's FFF.load_state_dict")
    elif options.to == "onnx":
        print(f"{options.out}: {export_onnx(load_model(options.folder), Path(options.out))}")
    else:
        print(f"{options.out}: {export_model(load_model(options.folder), Path(options.out), options.to)}")


def _refuse_existing(out: str) -> None:
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out.")

"""The formats of other libraries' checkpoints: of which one a checkpoint is, its heads and its configuration."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ufbert.config import ModelConfig
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub import bert, crammed, modernbert
from ufbert.hub.fields import Fields, read_fields, wrong_kind
from ufbert.hub.layout import Layout, Tensors, without_wrappers
from ufbert.hub.tensors import first_few


class Format(NamedTuple):
    """A family of foreign checkpoints."""

    label: str
    """Its name in a sentence."""
    kind: str
    """`model_type` in its `config.json`."""
    root: str
    """Prefix of its encoder's tensors, which a checkpoint of the bare encoder lacks."""
    parts: tuple[str, ...]
    """Beginnings of the names of a bare encoder's tensors."""
    sign: str
    """A tensor that no other format has."""
    family: str
    """Beginning of the names of its classes."""
    classes: Mapping[str, tuple[str, ...]]
    """Heads of each class that is read, by the rest of its name; a pooler besides, where the file has one."""
    other_classes: Mapping[str, str]
    """Purposes of the classes that are not read, by the rest of the name."""
    head_parts: Mapping[str, tuple[str, ...]]
    """The heads that tensors of such names belong to; in a checkpoint of none of them they are not used."""
    head_signs: Mapping[str, tuple[str, ...]]
    """Beginnings of tensors' names that tell the head of a checkpoint whose class does not; the first head counts."""
    tied: Mapping[str, str]
    """Copies of tensors, and what they repeat."""
    fields: Fields
    by_path: Callable[[dict[str, Any]], dict[str, Any]]
    """Its `config.json` with nested settings by their path."""
    model_config: Callable[[dict[str, Any], tuple[str, ...]], ModelConfig]
    """Our configuration from the used fields, for a checkpoint with these heads."""
    foreign_config: Callable[[ModelConfig, tuple[str, ...], int], dict[str, Any]]
    layout: Callable[[ModelConfig, tuple[str, ...]], Layout]


BERT = Format(
    label="Hugging Face BERT",
    kind="bert",
    root="bert.",
    parts=("embeddings.", "encoder.", "pooler."),
    sign="bert.encoder.layer.0.attention.self.query.weight",
    family="Bert",
    classes=bert.READ_CLASSES,
    other_classes=bert.OTHER_CLASSES,
    head_parts=bert.PARTS,
    head_signs=bert.SIGNS,
    tied=bert.tied("bert."),
    fields=bert.BERT_FIELDS,
    by_path=dict,
    model_config=bert.model_config,
    foreign_config=bert.foreign_config,
    layout=bert.layout,
)
FNET = BERT._replace(
    label="Hugging Face FNet",
    kind="fnet",
    root="fnet.",
    sign="fnet.encoder.layer.0.intermediate.dense.weight",
    family="FNet",
    tied=bert.tied("fnet."),
    fields=bert.FNET_FIELDS,
)
MODERNBERT = BERT._replace(
    label="Hugging Face ModernBERT",
    kind="modernbert",
    root="model.",
    parts=("embeddings.", "layers.", "final_norm."),
    sign="model.layers.0.attn.Wqkv.weight",
    family="ModernBert",
    head_parts=modernbert.PARTS,
    head_signs=modernbert.SIGNS,
    tied=modernbert.TIED,
    fields=modernbert.FIELDS,
    model_config=modernbert.model_config,
    foreign_config=modernbert.foreign_config,
    layout=modernbert.layout,
)
CRAMMED = Format(
    label="crammedBERT / UltraFastBERT",
    kind="crammedBERT",
    root="encoder.",
    parts=("embedding.", "layers.", "final_norm."),
    sign="encoder.layers.0.attn.self_attention.query_key_value.weight",
    family="ScriptableLM",
    classes=crammed.READ_CLASSES,
    other_classes=crammed.OTHER_CLASSES,
    head_parts=crammed.PARTS,
    head_signs=crammed.SIGNS,
    tied=crammed.TIED,
    fields=crammed.FIELDS,
    by_path=crammed.by_path,
    model_config=crammed.model_config,
    foreign_config=crammed.foreign_config,
    layout=crammed.layout,
)
FORMATS = (BERT, FNET, MODERNBERT, CRAMMED)
NO_CLASSES = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "ScriptableCrammedBERT")
"""Names in `architectures` that do not say which heads there are: wrappers, and an architecture."""


def configuration(found: Format, values: dict[str, Any], heads: tuple[str, ...], where: str) -> ModelConfig:
    """Make our configuration of a foreign `config.json`, for a checkpoint with these heads. Raises UserError as the readers."""
    settings = read_fields(found.by_path(values), found.fields, heads, found.label, where)
    try:
        return found.model_config(settings, heads)
    except UserError as error:
        theirs = {
            f"model.{our}": their for their, our in {"num_attention_heads": "n_heads", **found.fields.names}.items()
        }
        text = re.sub(r"model\.\w+", lambda field: theirs.get(field[0], field[0]), str(error))
        raise UserError(f"The config.json of {where} cannot be read as settings of this package: {text}") from error


def class_name(values: dict[str, Any], where: str) -> str:
    """Find the class that `architectures` names, or nothing."""
    names = values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wrong_kind(where, "architectures", names, "a list with the name of a class")
    names = [name for name in dict.fromkeys(names) if name not in NO_CLASSES]
    if len(names) > 1:
        raise UserError(
            f"The config.json of {where} names several classes in architectures: {first_few(names)}. Name one with only the "
            "right one by --config."
        )
    return names[0] if names else ""


def format_of(values: dict[str, Any], name: str, tensors: Tensors, where: str) -> Format:
    """Find the format that `model_type` says, or else the class, or else a tensor that no other has."""
    kind, known = values.get("model_type"), ", ".join(f.label for f in FORMATS)
    if kind is not None:
        found = next((f for f in FORMATS if f.kind == kind), None)
        if found is None:
            raise UserError(f"The config.json of {where} says model_type={shown(kind)}; this package imports {known}.")
        return found
    stored = {without_wrappers(tensor) for tensor in tensors}
    of_class = [f for f in FORMATS if name and _suffix(f, name) in {**f.classes, **f.other_classes}]
    found = next((f for f in [*of_class, *FORMATS] if f in of_class or f.sign in stored), None)
    if found is None:
        kinds = ", ".join(f'"{f.kind}"' for f in FORMATS)
        raise UserError(
            f"The config.json of {where} has no model_type, and neither its classes nor its tensors tell what it is. Write one "
            f"of {kinds} there as model_type; this package imports {known}."
        )
    return found


def heads_of(found: Format, name: str, tensors: set[str], where: str) -> tuple[tuple[str, ...], list[str]]:
    """Find the heads of a checkpoint by its class, or else by its tensors; and a note if they had to tell."""
    pooler = ("pooler",) if f"{found.root}pooler.dense.weight" in tensors else ()
    encoder = next(found.family + suffix for suffix, heads in found.classes.items() if not heads)
    bare = f'To take its encoder alone, name a config.json with "architectures": ["{encoder}"] by --config.'
    suffix = _suffix(found, name)
    if name and suffix in found.other_classes:
        purpose = found.other_classes[suffix]
        raise UserError(f"{where} is a {name[:100]}, {purpose}; this package has no such head. {bare}")
    if name and suffix not in found.classes:
        read = ", ".join(found.family + suffix for suffix in found.classes)
        raise UserError(f"{where} is of the class {name[:100]}; of {found.label} this package reads {read}. {bare}")
    if name:
        heads = found.classes[suffix]
        return heads if "classifier" in heads else (*heads, *pooler), []
    if any(tensor.startswith("qa_outputs.") for tensor in tensors):
        raise UserError(
            f"{where} has the tensors qa_outputs.*, of a model that marks the answer to a question in a text; this package "
            f"has no such head. {bare}"
        )
    told = (head for head, signs in found.head_signs.items() if any(name.startswith(signs) for name in tensors))
    head = next(told, None)
    if head != "classifier":
        return ((head, *pooler) if head else pooler), []
    return (head,), ["config.json names no class; by the names of its tensors, this is a classifier of whole texts"]


def _suffix(found: Format, name: str) -> str:
    """Cut the family off a class's name; one of another family gives no suffix that any format has."""
    return name.removeprefix(found.family) if name.startswith(found.family) else f"of another family: {name}"

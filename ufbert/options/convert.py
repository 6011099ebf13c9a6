"""Options of `ufbert import` and `ufbert export`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from ufbert.config import ActivationName


@dataclass(frozen=True)
class ImportOptions:
    """Make a model folder of a checkpoint of Hugging Face's BERT, FNet or ModernBERT (all layers global), of crammedBERT or
    UltraFastBERT; or a layer folder of a PyPI `fastfeedforward` state."""

    source: Annotated[str, Positional]
    """Checkpoint folder, a single .safetensors file (its config.json is then looked for beside it), or hf:OWNER/NAME[@REVISION]
    for one on the Hugging Face hub."""
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
    """Model folder, or a layer folder for fastfeedforward; mini for the model that comes with ufbert, hf:OWNER/NAME[@REVISION]
    for one on the Hugging Face hub."""
    to: Literal["hf", "ultrafastbert", "fastfeedforward", "onnx"]
    """hf: a BERT, FNet or ModernBERT that transformers loads without remote code. ultrafastbert: the layout of crammedBERT
    and UltraFastBERT. fastfeedforward: the state of that package. onnx: a graph of standard operators, trees included, for
    ONNX Runtime and others (needs the extra `onnx`)."""
    out: str
    """Folder to write."""

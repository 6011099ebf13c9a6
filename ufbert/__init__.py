"""ufbert: train a BERT from scratch in a day on one accelerator, fine-tune it on GLUE, run it fast on a CPU."""

from ufbert.api import apply, finetune, init, load, prepare, preset, pretrain, save
from ufbert.errors import UserError

__all__ = ["UserError", "apply", "finetune", "init", "load", "prepare", "preset", "pretrain", "save"]

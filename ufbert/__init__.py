"""ufbert: train a BERT from scratch in a day on one accelerator, fine-tune it on GLUE, run it fast on a CPU."""

# A package is bound to its name here when it is first imported. Were that later, it would take the place of the function.
import ufbert.plan
import ufbert.pretrain
from ufbert.api import apply, finetune, init, load, plan, prepare, preset, pretrain, save
from ufbert.errors import UserError

__all__ = ["UserError", "apply", "finetune", "init", "load", "plan", "prepare", "preset", "pretrain", "save"]

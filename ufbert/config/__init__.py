"""Everything a preset may set, as frozen dataclasses. Imports no jax, so that `--help` stays instant."""

from ufbert.config.finetune import FinetuneConfig, ProtocolName
from ufbert.config.model import ActivationName, ModelConfig, TreeBackend
from ufbert.config.run import DataConfig, Device, PretrainConfig, Recipe, RunConfig, Scale

__all__ = [
    "ActivationName", "DataConfig", "Device", "FinetuneConfig", "ModelConfig", "PretrainConfig",
    "ProtocolName", "Recipe", "RunConfig", "Scale", "TreeBackend",
]  # fmt: skip

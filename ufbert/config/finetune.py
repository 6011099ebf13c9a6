"""The hyper-parameters of fine-tuning. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from ufbert.config.checks import check_kinds, check_least, check_most, check_share
from ufbert.config.model import ModelConfig
from ufbert.errors import UserError


@dataclass(frozen=True)
class FinetuneConfig:
    """Hyper-parameters of fine-tuning, the same for every task. A protocol sets them; a value given by hand wins."""

    epochs: int = 5
    """Passes over the training rows."""
    batch_rows: int = 16
    """Rows per update."""
    lr: float = 0.0
    """Peak learning rate; 0 takes 4e-5 from width 768 up, and 0.2 / d_model below. Small models need more: this was the best at
    width 256 on held-out training rows of SST-2, for pretrained models and from scratch."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the rate's fall to zero."""
    warmup: float = 0.1
    """Share of the updates over which the rate rises before it falls."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    pooling: Literal["model", "first", "mean"] = "model"
    """Vector of a row that the classifier reads: the model's own choice, its first token, or the mean of its tokens. Models of
    sentence-transformers were trained to use the mean."""
    adam_b1: float = 0.9
    """AdamW's first-moment decay."""
    adam_b2: float = 0.98
    """AdamW's second-moment decay."""
    adam_eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 for none."""
    max_len: int = 128
    """Longest row in tokens; longer ones are cut. A model with Fourier mixers keeps its own length."""
    early_stop: int = 0
    """Stop when no run has improved on dev for so many epochs; 0 never does."""
    teacher_weight: float = 0.9
    """With a teacher, share of the loss that its answers make up; the labels make up the rest."""
    temperature: float = 2.0
    """Divisor of a teacher's scores before they become probabilities."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "tune.")
        check_least(self, "tune", 1, "epochs", "batch_rows")
        check_most(self, "tune", 10_000, "epochs", "early_stop")
        check_most(self, "tune", 2**20, "batch_rows", "max_len")
        if self.max_len < 3:
            raise UserError(
                f"tune.max_len is {self.max_len}; a row needs room for [CLS] and [SEP] and at least one piece of text, so that "
                "it must be at least 3."
            )
        check_least(self, "tune", 0, "lr", "weight_decay", "clip_norm", "early_stop", "adam_eps")
        check_share(self, "tune", "dropout", "adam_b1", "adam_b2")
        for name in ("warmup", "teacher_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"tune.{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if self.temperature <= 0:
            raise UserError(f"tune.temperature is {self.temperature}; it must be positive.")

    def peak_lr(self, config: ModelConfig) -> float:
        """Return the learning rate, with 0 resolved for a model's width."""
        return self.lr or (4e-5 if config.d_model >= 768 else 0.2 / config.d_model)


ProtocolName = Literal["auto", "crammed", "small", "bert", "mnli-first"]

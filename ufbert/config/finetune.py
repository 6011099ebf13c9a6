"""The hyper-parameters of fine-tuning. Imports no jax."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from ufbert.config.checks import NotNegative, Positive, Share, ShareBelowOne, Size, SizeOrNone, check_kinds
from ufbert.config.model import ModelConfig
from ufbert.errors import UserError


@dataclass(frozen=True)
class FinetuneConfig:
    """Hyper-parameters of fine-tuning, the same for every task. A protocol sets them; a value given by hand wins."""

    epochs: Annotated[int, Meta(ge=1, le=10_000)] = 5
    """Passes over the training rows."""
    batch_rows: Size = 16
    """Rows per update."""
    lr: NotNegative = 0.0
    """Peak learning rate; 0 takes 4e-5 from width 768 up, and 0.2 / d_model below. Small models need more: this was the best at
    width 256 on held-out training rows of SST-2, for pretrained models and from scratch."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the rate's fall to zero."""
    warmup: Share = 0.1
    """Share of the updates over which the rate rises before it falls."""
    dropout: ShareBelowOne = 0.1
    """Share of activations dropped in training."""
    pooling: Literal["model", "first", "mean"] = "model"
    """Vector of a row that the classifier reads: the model's own choice, its first token, or the mean of its tokens. Models of
    sentence-transformers were trained to use the mean."""
    adam_b1: ShareBelowOne = 0.9
    """AdamW's first-moment decay."""
    adam_b2: ShareBelowOne = 0.98
    """AdamW's second-moment decay."""
    adam_eps: NotNegative = 1e-6
    """AdamW's epsilon."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: NotNegative = 0.0
    """Largest gradient norm; 0 for none."""
    max_len: SizeOrNone = 128
    """Longest row in tokens; longer ones are cut. A model with Fourier mixers keeps its own length."""
    early_stop: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """Stop when no run has improved on dev for so many epochs; 0 never does."""
    teacher_weight: Share = 0.9
    """With a teacher, share of the loss that its answers make up; the labels make up the rest."""
    temperature: Positive = 2.0
    """Divisor of a teacher's scores before they become probabilities."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "tune.")
        if self.max_len < 3:
            raise UserError(f"tune.max_len is {self.max_len}; [CLS], [SEP] and at least one piece of text need 3.")

    def peak_lr(self, config: ModelConfig) -> float:
        """Return the learning rate, with 0 resolved for a model's width."""
        return self.lr or (4e-5 if config.d_model >= 768 else 0.2 / config.d_model)


ProtocolName = Literal["auto", "crammed", "small", "bert", "mnli-first"]

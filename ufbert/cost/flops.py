"""Arithmetic and memory traffic of a configuration, counted for one token from the entries of its layers."""

from collections.abc import Iterator

from ufbert.config import ModelConfig, PretrainConfig, RunConfig, TreeBackend
from ufbert.nn.registry import FEEDFORWARDS, MIXERS, Layer, Use


def _layers(config: ModelConfig) -> Iterator[tuple[Layer, ModelConfig]]:
    """The mixer and the feedforward of every layer, bottom first, each with the configuration that it is computed by."""
    for i, (mixer, feedforward) in enumerate(config.layers):
        yield MIXERS[mixer], config.of_layer(i)
        yield FEEDFORWARDS[feedforward], config.of_layer(i)


def _backend(masked_trees: bool) -> TreeBackend:
    """A tree backend that computes every node of a tree, or the nodes on the path."""
    return "masked" if masked_trees else "gather"


def forward_flops_per_token(config: ModelConfig, seq_len: int, *, masked_trees: bool, training: bool = True) -> float:
    """Count the floating-point operations of the encoder for one token of a row; a multiply-add counts two.

    `masked_trees` counts every node of a tree, as the `masked` backend computes; else the nodes on the path. `training`
    counts what layers compute then: all leaves of a leaf tree, and the places of a switch layer's experts, filled or not.
    """
    use = Use(seq_len, _backend(masked_trees), training)
    vectors = 2 * config.d_model * _additions(config)
    return float(sum(layer.flops(own, use) for layer, own in _layers(config)) + vectors + ngram_flops(config))


def ngram_width(config: ModelConfig) -> int:
    """Return the width of the rows of all hashed tables together: the numbers that a token reads."""
    return len(config.ngram_keys) * (config.ngram_width or config.d_model) if config.ngram_rows else 0


def ngram_flops(config: ModelConfig) -> float:
    """Count the operations of hashed tables for one token: the layer that widens narrow rows. The hash is no such work."""
    return 2.0 * ngram_width(config) * config.d_model if config.ngram_width else 0.0


def ngram_traffic(config: ModelConfig) -> float:
    """Count the numbers that hashed tables move for one token in training. The factors were fitted as those of layers were."""
    widened = 9.5 * config.d_model if config.ngram_rows and config.ngram_width else 0.0
    return 4.0 * ngram_width(config) + widened


def _additions(config: ModelConfig) -> int:
    """Vectors that skips and value embeddings scale and add to a token's."""
    return sum(source is not None for source in (*config.skips, *config.value_tables))


def neurons(config: ModelConfig) -> tuple[int, int]:
    """(neurons that one token uses in inference, neurons in all) of the feedforward that has most of them."""
    each = (FEEDFORWARDS[kind].neurons(config.of_layer(i)) for i, (_, kind) in enumerate(config.layers))
    return max(each, key=lambda pair: pair[1])


def predicted_share(train: PretrainConfig) -> float:
    """Return the share of a row's positions that a training step predicts, at most, over the budget on average."""
    until = min(1.0, train.next_token_until)
    return until * train.next_token_rate + (1.0 - until) * max(train.mask_rate)


def train_flops_per_token(run: RunConfig, *, masked_trees: bool) -> float:
    """Forward and backward operations per token of a packed row, the head on predicted tokens included."""
    head = predicted_share(run.train) * 2 * run.model.d_model * run.model.vocab_size
    return 3 * (forward_flops_per_token(run.model, run.data.seq_len, masked_trees=masked_trees) + head)


def routing_flops_per_token(run: RunConfig, *, masked_trees: bool) -> float:
    """The part of `train_flops_per_token` that routes, and so is float32 arithmetic whatever the model's type."""
    use = Use(run.data.seq_len, _backend(masked_trees), training=True)
    return float(3 * sum(layer.routing_flops(own, use) for layer, own in _layers(run.model)))


def train_bytes_per_token(run: RunConfig, *, trees: TreeBackend, bfloat16: bool) -> float:
    """Bytes that forward and backward move per token of a packed row, about; weights and the optimizer's not counted.

    The factors were fitted to XLA's count of the compiled step on a CPU, of the presets at the scales below `base`, and
    hold to about a fifth. They let a scale be chosen without compiling; `ufbert plan` counts the compiled step instead.
    """
    model, use = run.model, Use(run.data.seq_len, trees, training=True)
    norms_and_sums = model.d_model * (91 * model.n_layers + 6 * _additions(model))
    head = 24 * predicted_share(run.train) * model.vocab_size
    short = norms_and_sums + head + sum(layer.traffic(own, use) for layer, own in _layers(model))
    short += ngram_traffic(model)
    routed = sum(layer.routing_traffic(own, use) for layer, own in _layers(model))
    return 4 * (short * (0.65 if bfloat16 else 1.0) + routed)

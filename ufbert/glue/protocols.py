"""Protocols: named settings of fine-tuning, which make two scores comparable."""

from dataclasses import asdict, dataclass, replace

from ufbert.config import FinetuneConfig, ModelConfig, ProtocolName
from ufbert.options.finetune import FinetuneOptions
from ufbert.options.given import Given


@dataclass(frozen=True)
class Protocol:
    """Settings of fine-tuning, the same for every task."""

    name: str
    source: str
    """Paper, and purpose."""
    tune: FinetuneConfig
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Runs; their median is reported."""
    rates: tuple[float, ...] = ()
    """Peak learning rates to try, of which the best on dev is kept; () takes the one of `tune`."""
    mnli_first: tuple[str, ...] = ()
    """Tasks that start from the model fine-tuned on MNLI."""

    def text(self, config: ModelConfig) -> str:
        """Describe the protocol in one line, for the table."""
        tune = self.tune
        rates = " or ".join(f"{rate:g}" for rate in self.rates) or f"{tune.peak_lr(config):.2g}"
        best = " (the best on dev, per task)" if self.rates else ""
        parts = [
            f"{tune.epochs} epochs, batch {tune.batch_rows}, learning rate {rates}{best}, {tune.warmup:.0%} warm-up then "
            f"{tune.schedule}, AdamW ({tune.adam_b1}, {tune.adam_b2}), decay {tune.weight_decay:g}, dropout {tune.dropout:g}, "
            f"at most {tune.max_len} tokens, the same for every task, dev set, median of {len(self.seeds)} seed(s)"
        ]
        if tune.pooling != "model":
            pooled = "the mean of all tokens" if tune.pooling == "mean" else "the first token"
            parts.append(f"the classifier reads {pooled}")
        if tune.clip_norm:
            parts.append(f"gradients clipped at {tune.clip_norm:g}")
        if tune.early_stop:
            parts.append(f"stopped after {tune.early_stop} epochs without a better dev score")
        if self.mnli_first:
            parts.append(f"{', '.join(self.mnli_first)} from the model fine-tuned on MNLI")
        return "; ".join(parts)

    def with_overrides(self, tune: FinetuneConfig, seeds: tuple[int, ...]) -> "Protocol":
        """Return this protocol with other hyper-parameters and seeds, and a name that lists the changes."""
        changed = []
        for name, value in asdict(tune).items():
            if value != getattr(self.tune, name):
                changed.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        if len(seeds) != len(self.seeds):
            changed.append(f"{len(seeds)} seed(s)")
        rates = () if tune.lr != self.tune.lr else self.rates
        name = f"{self.name} with {', '.join(changed)}" if changed else self.name
        return replace(self, name=name, tune=tune, seeds=seeds, rates=rates)


_CRAMMED = FinetuneConfig(lr=4e-5)
_BERT = FinetuneConfig(
    epochs=3, batch_rows=32, lr=5e-5, schedule="linear", adam_b2=0.999, weight_decay=0.01, clip_norm=1.0
)
_PROTOCOLS = (
    Protocol("crammed", "Geiping and Goldstein 2022, section 5: one setting for all tasks", _CRAMMED),
    Protocol("small", "crammed's with a learning rate of 0.2 / width, for models narrower than BERT", FinetuneConfig()),
    Protocol(
        "bert", "Devlin et al. 2019, section 4.1: three epochs, the best of four learning rates on dev", _BERT,
        rates=(5e-5, 4e-5, 3e-5, 2e-5),
    ),
    Protocol(
        "mnli-first", "crammed's, with RTE, MRPC and STS-B started from the MNLI model, as RoBERTa and ALBERT report them",
        _CRAMMED, mnli_first=("rte", "mrpc", "stsb"),
    ),
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}


def find_protocol(name: ProtocolName, config: ModelConfig) -> Protocol:
    """Return the protocol of that name; `auto` is `crammed` from width 768 up and `small` below."""
    if name == "auto":
        name = "crammed" if config.d_model >= 768 else "small"
    return PROTOCOLS[name]


def choose_protocol(options: FinetuneOptions, given: Given, config: ModelConfig) -> Protocol:
    """Return the protocol of a sweep; hyper-parameters in `given`, such as "tune.lr", override it.

    A probe trains a classifier on frozen features, which needs more and larger steps.
    """
    protocol = find_protocol(options.protocol, config)
    if options.probe:
        tune = replace(protocol.tune, epochs=20, lr=1e-3)
        protocol = replace(protocol, name=f"{protocol.name}, probe", tune=tune, rates=())
    return protocol.with_overrides(given_tune(protocol.tune, given), options.seed_list or protocol.seeds)


def given_tune(tune: FinetuneConfig, given: Given) -> FinetuneConfig:
    """Return hyper-parameters with those in `given`, such as "tune.lr". Raises UserError for a value out of range."""
    changes = {name.removeprefix("tune."): value for name, value in given.items() if name.startswith("tune.")}
    return replace(tune, **changes)

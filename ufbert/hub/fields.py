"""The fields of another library's `config.json`, in tables for each format.

They are used, or must stand at a value that changes nothing, or are without effect on what this package computes. A field of no
table is not read, and the import names it: the library itself computes nothing from a name that its classes do not know.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ufbert.config import ModelConfig
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub.tensors import first_few


class Fields(NamedTuple):
    """The fields of one format."""

    names: Mapping[str, str]
    """Our names of the used fields that hold the same value as a field of ModelConfig; read in both directions."""
    used: Mapping[str, Any]
    """Values that the library takes for absent fields; None: it takes nothing, and the reader checks the kind."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Values that change nothing; any other is refused."""
    head_fixed: Mapping[str, Mapping[str, tuple[Any, ...]]]
    """The same, for fields that matter only to a checkpoint with this head."""
    ignored: frozenset[str]
    """Fields without effect on what is computed here: how to train, to store, to generate, to report."""

    def all_fixed(self, heads: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """Join `fixed` and those of `head_fixed` that matter to a checkpoint with these heads."""
        fixed = dict(self.fixed)
        for head in heads:
            fixed |= self.head_fixed.get(head, {})
        return fixed

    def ours(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Take settings of a ModelConfig from the fields that hold the same values."""
        return {our: values[their] for their, our in self.names.items()}

    def theirs(self, config: ModelConfig) -> dict[str, Any]:
        """Write settings of a ModelConfig into the fields that hold the same values."""
        return {their: getattr(config, our) for their, our in self.names.items()}


COMMON_USED: dict[str, Any] = {
    "architectures": None, "id2label": None, "label2id": None, "model_type": None, "num_labels": None,
    "problem_type": None, "sbert_ce_default_activation_function": None, "sentence_transformers": None,
    "tie_word_embeddings": True,
}  # fmt: skip
COMMON_NAMES = {
    "hidden_size": "d_model", "initializer_range": "init_std", "intermediate_size": "d_hidden",
    "max_position_embeddings": "max_len", "num_hidden_layers": "n_layers", "pad_token_id": "pad_id",
    "vocab_size": "vocab_size",
}  # fmt: skip
"""Used fields of Hugging Face's BERT, FNet and ModernBERT."""
COMMON_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "auto_map": (None, {}),  # code of its own
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
COMMON_IGNORED = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_experts_implementation_internal", "_name_or_path", "_num_labels", "_output_attentions", "_post_init_done",
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cls_token_id", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "length_penalty",
    "mask_token_id", "max_length", "min_length", "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past", "output_scores", "prefix",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "unk_token_id", "use_bfloat16",
    "use_cache",
})  # fmt: skip
"""Of transformers' base class: generation, training, storage, reports, and ids that the tokenizer knows better."""
NULLABLE = ("classifier_dropout", "embedding_dim", "num_labels", "pad_token_id", "tpu_short_seq_length")
"""Fields in which null means as much as absence."""


def read_fields(
    values: Mapping[str, Any], fields: Fields, heads: tuple[str, ...], label: str, where: str
) -> dict[str, Any]:
    """Read the used fields of a `config.json`, with the library's defaults for absent ones.

    Raises UserError, naming the field, for a value of another kind than the default's, and for one that the encoder does not
    express.
    """
    fixed = fields.all_fixed(heads)
    present = [name for name in fixed if name in values]
    odd = [f"{name}={shown(values[name])}" for name in present if not _among(values[name], fixed[name])]
    if odd:
        raise UserError(
            f"This {label} checkpoint uses what the encoder does not express: {', '.join(odd)} (in the config.json of {where})."
        )
    return {name: _checked(values, name, default, where) for name, default in fields.used.items()}


def unread(values: Mapping[str, Any], fields: Fields) -> list[str]:
    """List the fields of a `config.json` that no table has, with their values."""
    known = {*fields.used, *fields.all_fixed(fields.head_fixed), *fields.ignored}
    return [f"{name[:100]}={shown(value)}" for name, value in values.items() if name not in known]


def _among(value: Any, same: tuple[Any, ...]) -> bool:
    """True if a value is one of these, and of its type: 1 is not True."""
    return any(type(value) is type(good) and value == good for good in same)


def _checked(values: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    value = values.get(name, default)
    if value is None and name.rpartition(".")[2] in NULLABLE:
        return default
    if default is None:
        return value
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, kind = type(value) is int and 0 <= value < 2**31, "a whole number that is not negative"
    elif isinstance(default, float):
        fits, kind = type(value) in (int, float) and abs(value) < 1e300, "a number"
    else:
        fits, kind = isinstance(value, str), "a name"
    if not fits:
        raise wrong_kind(where, name, value, kind)
    return float(value) if isinstance(default, float) else value


def wrong_kind(where: str, name: str, value: Any, kind: str) -> UserError:
    """Say that the value of a field is of another kind."""
    return UserError(
        f"The config.json of {where} says {name}={shown(value)}, where {kind} belongs; mend it, or name another with --config."
    )


def class_suffix(classes: Mapping[str, tuple[str, ...]], heads: tuple[str, ...]) -> str:
    """Find the end of the name of the class for a model with these heads."""
    wanted = next(((head,) for head in ("classifier", "masked_lm") if head in heads), ())
    return next(suffix for suffix, of_class in classes.items() if of_class == wanted)


class Answers(NamedTuple):
    """The meaning of a classifier's scores."""

    labels: tuple[str, ...]
    """Class names in the order of the scores; empty for a single score."""
    independent: bool
    """True if each score is a probability of its own, by a sigmoid."""


ACTIVATIONS = {"Sigmoid": True, "Identity": False, "Softmax": False}
"""Functions that sentence-transformers may apply to a cross-encoder's scores: True if each becomes a probability of its own.
The others do not change which class is likeliest, and a single raw score is said as it is."""
SIGMOID = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
"""The record of sentence-transformers that one score is a probability."""
PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")


def read_answers(values: Mapping[str, Any], count: int, where: str) -> Answers:
    """Read the meaning of a classifier's `count` scores. Raises UserError if `config.json` contradicts it or itself."""
    problem = values.get("problem_type")
    if problem not in PROBLEMS:
        raise wrong_kind(where, "problem_type", problem, f"one of {', '.join(map(str, PROBLEMS[1:]))}")
    names, activation = _class_names(values, count, where), _activation(values, where)
    independent = problem == "multi_label_classification" or activation == "Sigmoid"
    if count == 1:
        if activation == "Softmax" or problem == "single_label_classification":
            raise UserError(
                f"The config.json of {where} asks for a softmax over the classifier's one score, which is always 1; mend "
                "problem_type or the activation, or name another with --config."
            )
        return Answers((), independent)
    if problem == "regression":
        raise UserError(
            f"The config.json of {where} says problem_type='regression', and the classifier has {count} scores; models of "
            "several values are not read."
        )
    if problem == "single_label_classification" and activation == "Sigmoid":
        raise UserError(
            f"The config.json of {where} says problem_type={problem!r}, whose classes exclude each other, and names a sigmoid, "
            "whose classes do not; take one of them out, or name another with --config."
        )
    return Answers(names, independent)


def _activation(values: Mapping[str, Any], where: str) -> str | None:
    """Find the last part of the name of the function that sentence-transformers recorded, if any."""
    recorded = values.get("sentence_transformers") or {}
    if not isinstance(recorded, dict):
        raise wrong_kind(where, "sentence_transformers", recorded, "an object")
    given = recorded.get("activation_fn", values.get("sbert_ce_default_activation_function"))
    if given is None:
        return None
    name = given.rpartition(".")[2] if isinstance(given, str) else None
    if name not in ACTIVATIONS:
        raise UserError(
            f"The config.json of {where} says that {shown(given)} makes answers of the scores; of such functions "
            f"{', '.join(ACTIVATIONS)} are read."
        )
    return name


def _class_names(values: Mapping[str, Any], count: int, where: str) -> tuple[str, ...]:
    """Read the names of `count` classes: of `id2label`, an object or a list; else of `label2id`; else LABEL_0, ..."""
    field, names, ids = "id2label", values.get("id2label"), values.get("label2id") or {}
    if not isinstance(ids, dict):
        raise wrong_kind(where, "label2id", ids, "an object of class numbers")
    if not names and ids:
        field, names = "label2id", {str(number): name for name, number in ids.items()}
        if len(names) != len(ids):
            raise UserError(f"label2id of the config.json of {where} has two names for one class; mend it.")
    if not names:
        number = count if values.get("num_labels") is None else values["num_labels"]
        if type(number) is not int:
            raise wrong_kind(where, "num_labels", number, "a whole number")
        names = [f"LABEL_{i}" for i in range(min(number, 10_000))]
    if isinstance(names, list):
        names = {str(i): name for i, name in enumerate(names)}
    if not isinstance(names, dict):
        raise wrong_kind(where, field, names, "an object or a list of names")
    if len(names) != count or set(names) != {str(i) for i in range(count)}:
        raise UserError(
            f"{field} of the config.json of {where} names {len(names)} classes ({first_few(list(names))}), and the classifier "
            f"has {count} scores: 0 to {count - 1} are wanted. Mend it, or name another with --config."
        )
    ordered = [names[str(i)] for i in range(count)]
    odd = next((i for i, name in enumerate(ordered) if type(name) not in (str, int)), None)
    if odd is not None:
        raise wrong_kind(where, f"{field}.{odd}", ordered[odd], "the name of a class")
    classes = tuple(str(name) for name in ordered)
    if len(set(classes)) < count:
        raise UserError(f"Two classes in {field} of the config.json of {where} have one name: {first_few(classes)}.")
    if set(ids) == set(classes):
        crossed = [name for i, name in enumerate(classes) if str(ids[name]) != str(i)]
        if crossed:
            raise UserError(
                f"id2label and label2id of the config.json of {where} contradict each other on {first_few(crossed)}; mend the "
                "wrong one, or name another config.json with --config."
            )
    return classes

"""What may stand in another library's `config.json`: for each format a table of the fields that are used, of those that must
stand at a value that changes nothing, and of those without effect on what this package computes.

A field of no table is not read, and the import names it: such files carry notes of every kind, and the library itself computes
nothing from a name that its classes do not know.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub.tensors import first_few


class Fields(NamedTuple):
    """The fields of one format."""

    used: Mapping[str, Any]
    """What the library takes for a field where it is absent; None: it takes nothing, and the reader checks the kind."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Values that change nothing; any other is refused."""
    head_fixed: Mapping[str, Mapping[str, tuple[Any, ...]]]
    """The same, for fields that matter only to a checkpoint with this head."""
    ignored: frozenset[str]
    """Fields without effect on what is computed here: how to train, to store, to generate, to report."""


COMMON_USED: dict[str, Any] = {
    "architectures": None, "id2label": None, "label2id": None, "model_type": None, "num_labels": None,
    "problem_type": None, "sbert_ce_default_activation_function": None, "sentence_transformers": None,
    "tie_word_embeddings": True,
}  # fmt: skip
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
    """The used fields of a `config.json`, with the library's defaults for absent ones.

    Raises UserError, naming the field, for a value of another kind than the default's, and for one that would change what is
    computed in a way that the encoder does not express.
    """
    fixed = dict(fields.fixed)
    for head in heads:
        fixed |= fields.head_fixed.get(head, {})
    odd = [
        f"{name}={shown(values[name])}"
        for name, same in fixed.items()
        if name in values and not _among(values[name], same)
    ]
    if odd:
        raise UserError(
            f"This {label} checkpoint uses what the encoder does not express: {', '.join(odd)} (in the config.json of {where})."
        )
    return {name: _checked(values, name, default, where) for name, default in fields.used.items()}


def unread(values: Mapping[str, Any], fields: Fields) -> list[str]:
    """The fields of a `config.json` that no table has, with their values."""
    known = {
        *fields.used,
        *fields.fixed,
        *fields.ignored,
        *(name for more in fields.head_fixed.values() for name in more),
    }
    return [f"{name[:100]}={shown(value)}" for name, value in values.items() if name not in known]


def _among(value: Any, same: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in same)


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
        fits, kind = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value), "a number"
        value = float(value) if fits else value
    else:
        fits, kind = isinstance(value, str), "a name"
    if not fits:
        raise wrong_kind(where, name, value, kind)
    return value


def wrong_kind(where: str, name: str, value: Any, kind: str) -> UserError:
    """The sentence about a field whose value is of another kind."""
    return UserError(
        f"The config.json of {where} says {name}={shown(value)}, where {kind} belongs; mend it, or name another with --config."
    )


class Answers(NamedTuple):
    """What a classifier's scores mean."""

    labels: tuple[str, ...]
    """Class names in the order of the scores; empty for a single score."""
    independent: bool
    """Whether each score is a probability of its own, by a sigmoid."""


ACTIVATIONS = {"Sigmoid": True, "Identity": False, "Softmax": False}
"""What sentence-transformers may apply to a cross-encoder's scores: whether that makes each a probability of its own. Without
effect on which class is likeliest are the others, and a single raw score is said as it is."""
SIGMOID = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
"""How sentence-transformers records that one score is a probability."""
PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")


def read_answers(values: Mapping[str, Any], count: int, where: str) -> Answers:
    """What the `count` scores of a classifier mean. Raises UserError where `config.json` contradicts itself or the weights."""
    problem = values.get("problem_type")
    if problem not in PROBLEMS:
        raise wrong_kind(where, "problem_type", problem, f"one of {', '.join(map(str, PROBLEMS[1:]))}")
    names, activation = _class_names(values, count, where), _activation(values, where)
    if count == 1:
        if activation == "Softmax" or problem == "single_label_classification":
            raise UserError(
                f"The config.json of {where} asks for a softmax over the classifier's one score, which is always 1; mend "
                "problem_type or the activation, or name another with --config."
            )
        return Answers((), problem == "multi_label_classification" or activation == "Sigmoid")
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
    return Answers(names, problem == "multi_label_classification" or activation == "Sigmoid")


def _activation(values: Mapping[str, Any], where: str) -> str | None:
    """The last part of the name of the function that sentence-transformers recorded, if any."""
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
    """The names of `count` classes: of `id2label`, an object by number or a list; else of `label2id`; else LABEL_0, ..."""
    field, names, ids = "id2label", values.get("id2label"), values.get("label2id") or {}
    if not isinstance(ids, dict):
        raise wrong_kind(where, "label2id", ids, "an object of class numbers")
    if not names and ids:
        field, names = "label2id", {str(number): name for name, number in ids.items()}
        if len(names) != len(ids):
            raise UserError(f"label2id of the config.json of {where} has two names for one class; mend it.")
    if not names:
        names = [f"LABEL_{i}" for i in range(_number_of_labels(values, count, where))]
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
    odd = next((name for name in ordered if type(name) not in (str, int)), None)
    if odd is not None or None in ordered:
        raise wrong_kind(where, field, odd, "the name of each class")
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


def _number_of_labels(values: Mapping[str, Any], count: int, where: str) -> int:
    number = values.get("num_labels")
    if number is None:
        return count
    if type(number) is not int:
        raise wrong_kind(where, "num_labels", number, "a whole number")
    return min(max(number, 0), 10_000)

"""Every field of another library's config.json is used, without effect, or refused by name."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ufbert.config import DataConfig, FinetuneConfig, ModelConfig, PretrainConfig
from ufbert.config.checks import check_kinds
from ufbert.errors import UserError
from ufbert.hub import crammed
from ufbert.hub.convert import import_weights
from ufbert.hub.fields import COMMON_USED, read_answers, read_fields, unread
from ufbert.hub.folder import TaskInfo
from ufbert.hub.formats import FORMATS, Format, configuration
from ufbert.runtime.typed import convert

GOLDEN = Path(__file__).parents[1] / "golden"
LIBRARIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("foreign_fields.json").read_text())
"""Fields and defaults of the config classes of transformers 4.57 and 5.24, and the settings of crammedBERT's files."""
KINDS = {"BertConfig": "bert", "FNetConfig": "fnet", "ModernBertConfig": "modernbert", "crammedBERT": "crammedBERT"}
HEADS: list[tuple[str, ...]] = [(), ("masked_lm",), ("classifier",)]
ODD: list[Any] = ["12", None, [], {}, [1], {"a": 1}, True, -1, 10**40, float("nan"), float("inf"), "x" * 300, 1.5]


def format_of_kind(kind: str) -> Format:
    return next(form for form in FORMATS if form.kind == kind)


def checkpoint(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    tensors = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    return tensors, json.loads(str(golden["config"]))


def whole(kind: str) -> dict[str, Any]:
    """A config.json with nothing that would be refused."""
    if kind == "crammedBERT":
        model = ModelConfig(d_model=16, n_heads=2, n_layers=2, feedforward=("tree",), tree_depth=2)
        return crammed.foreign_config(model, ("masked_lm",), 0)
    return {"model_type": kind, "global_attn_every_n_layers": 1} if kind == "modernbert" else {"model_type": kind}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_field_of_the_libraries_is_used_without_effect_or_refused(library):
    form = format_of_kind(KINDS[library.split("@")[0]])
    head_fixed = {name: same for more in form.fields.head_fixed.values() for name, same in more.items()}
    assert not set(form.fields.used) & set(form.fields.ignored)
    for name, default in LIBRARIES[library].items():
        places = [name in table for table in (form.fields.used, form.fields.fixed, head_fixed, form.fields.ignored)]
        assert sum(places) == 1, name
        if name in form.fields.used and form.kind != "crammedBERT" and form.fields.used[name] is not None:
            assert form.fields.used[name] == default, name
        for allowed in (form.fields.fixed.get(name), head_fixed.get(name)):
            assert allowed is None or default in allowed, name
    assert unread(LIBRARIES[library], form.fields) == []


@pytest.mark.parametrize("form", FORMATS, ids=[form.kind for form in FORMATS])
def test_what_is_called_used_is_used_and_what_is_called_without_effect_has_none(form):
    asked = set()

    class Asked(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    values = form.by_path(whole(form.kind))
    for heads in HEADS:
        form.model_config(Asked(read_fields(values, form.fields, heads, form.label, "here")), heads)
        odd = whole(form.kind) | {name: "odd" for name in form.fields.ignored if not name.startswith("arch.")}
        assert configuration(form, odd, heads, "here") == configuration(form, whole(form.kind), heads, "here")
        settings = values | dict.fromkeys(form.fields.ignored, "odd")
        assert read_fields(settings, form.fields, heads, form.label, "here") == read_fields(
            values, form.fields, heads, form.label, "here"
        )
    assert asked == set(form.fields.used) - set(COMMON_USED) - {"arch"}


@pytest.mark.parametrize("form", FORMATS, ids=[form.kind for form in FORMATS])
def test_fields_that_must_stand_at_one_value_are_refused_by_name_at_another(form):
    values = form.by_path(whole(form.kind))
    for head in ("", "masked_lm", "classifier"):
        table = form.fields.head_fixed.get(head, {}) if head else form.fields.fixed
        for name in table:
            with pytest.raises(UserError, match=rf"does not express: {name}='another' \(in the config\.json of here\)"):
                read_fields(values | {name: "another"}, form.fields, (head,), form.label, "here")
            if head:  # to others it does not matter
                read_fields(values | {name: "another"}, form.fields, (), form.label, "here")


def sentence_about(form: Format, values: dict[str, Any]) -> str:
    """What is said of a config.json that is refused; nothing of one that is read."""
    try:
        form.model_config(read_fields(values, form.fields, (), form.label, "here"), ())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", FORMATS, ids=[form.kind for form in FORMATS])
def test_values_of_another_kind_are_sentences_that_name_the_field(form):
    values = form.by_path(whole(form.kind))
    for name, default in form.fields.used.items():
        for odd in ODD:
            said = sentence_about(form, values | {name: odd})
            if said:
                assert name.removeprefix("arch.") in said or "model." in said or "multiple" in said, said
                assert len(said) < 400
            else:
                right = isinstance(odd, type(default)) or (isinstance(default, float) and type(odd) in (int, float))
                assert right or default is None or odd is None or name in COMMON_USED, (name, odd)
    for arch in ODD:
        if form.kind == "crammedBERT":
            with pytest.raises(UserError, match=r"arch|lacks"):
                configuration(form, {"model_type": "crammedBERT", "arch": arch}, (), "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_attn_every_n_layers": 3}, "local attention"),
        ({"global_attn_every_n_layers": None}, "global_attn_every_n_layers=None"),
        ({"layer_types": ["full_attention"] * 21 + ["sliding_attention"]}, "local attention"),
        ({"layer_types": "full_attention"}, "local attention"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"classifier_activation": "relu"}, "classifier_activation='relu'"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling="),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "factor=2.0"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]"),
        ({"rope_parameters": {"rope_theta": 1e4}, "global_rope_theta": 2e4}, "contradicts itself"),
        ({"global_rope_theta": "1e4"}, "positive number"),
    ],
)
def test_what_a_modernbert_may_say_and_the_encoder_does_not_express(changes, words):
    with pytest.raises(UserError, match=words):
        configuration(format_of_kind("modernbert"), whole("modernbert") | changes, ("classifier",), "here")


def test_the_base_of_rotary_positions_has_three_names():
    form, base = format_of_kind("modernbert"), {"model_type": "modernbert", "layer_types": ["full_attention"] * 22}
    for changes in (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {}}},
        {"rope_parameters": {"rope_theta": 10000}},
        {"global_rope_theta": 1e4},
        {"rope_theta": 1e4},
    ):
        assert configuration(form, base | changes, (), "here").rotary_base == 10000.0
    assert configuration(form, base, (), "here").rotary_base == 160000.0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("embedding.embedding_dim", 8), ("nonlin", "SiLUglu"), ("intermed_type", "moe"), ("attention.type", "fourier"),
        ("attention.causal_attention", True), ("recurrent_layers", 2), ("ffn_layer_frequency", 2),
        ("objective_layout", "SCRIPT"),
    ],
)  # fmt: skip
def test_crammed_settings_that_change_the_arithmetic_are_refused_by_name(path, value):
    values = whole("crammedBERT")
    part, _, last = path.rpartition(".")
    (values["arch"][part] if part else values["arch"])[last] = value
    with pytest.raises(UserError, match=f"does not express: arch.{path}="):
        configuration(FORMATS[-1], values, ("masked_lm",), "here")


@pytest.mark.parametrize("name", ["hf_bert", "hf_fnet", "hf_modernbert"])
def test_absent_fields_have_the_defaults_of_their_library_and_tensors_tell_the_type(name):
    tensors, values = checkpoint(name)
    form = format_of_kind(values["model_type"])
    wanted = import_weights(tensors, values, "here")
    early = {field: value for field, value in values.items() if form.fields.used.get(field) != value}
    del early["model_type"]
    assert len(early) < len(values) - 1
    found = import_weights(tensors, early, "here")
    assert (found.format.kind, found.config, found.heads) == (form.kind, wanted.config, wanted.heads)
    bare = {tensor.removeprefix(form.root): array for tensor, array in tensors.items()}
    assert import_weights(bare, early | {"architectures": values.get("architectures"), "model_type": form.kind}, "here")
    with pytest.raises(UserError, match=r"has no model_type.*Write one of \"bert\""):
        import_weights(bare, early, "here")
    by_class = import_weights(bare, early | {"architectures": [f"{form.family}Model"]}, "here")
    assert by_class.format.kind == form.kind


def test_the_class_decides_which_heads_there_are_and_other_classes_are_named():
    tensors, values = checkpoint("hf_bert_classifier")
    as_class = lambda name: import_weights(tensors, values | {"architectures": [name]}, "here")  # noqa: E731
    assert as_class("BertForSequenceClassification").heads == ("classifier",)
    assert as_class("BertForSequenceClassification").notes == []
    assert "names no class" in import_weights(tensors, values, "here").notes[0]
    assert import_weights(tensors, values | {"architectures": ["OptimizedModule"]}, "here").heads == ("classifier",)
    encoder = as_class("BertModel")
    assert (encoder.heads, encoder.skipped) == (("pooler",), ["classifier.bias", "classifier.weight"])
    for name, words in {
        "BertForTokenClassification": "gives every token a label",
        "BertForQuestionAnswering": "answer to a question",
        "BertForMultipleChoice": "chooses among several texts",
        "BertForNextSentencePrediction": "follows another",
        "BertLMHeadModel": "left to right",
        "RobertaForMaskedLM": "this package reads BertModel, BertForMaskedLM",
        "JinaBertForMaskedLM": "of the class JinaBertForMaskedLM",
    }.items():
        with pytest.raises(UserError, match=rf"{words}.*architectures\": \[\"BertModel\"\] by --config"):
            as_class(name)
    with pytest.raises(UserError, match="several classes"):
        import_weights(tensors, values | {"architectures": ["BertModel", "BertForMaskedLM"]}, "here")
    for odd in ("BertModel", 3, [1]):
        with pytest.raises(UserError, match="architectures="):
            import_weights(tensors, values | {"architectures": odd}, "here")
    answers = {"qa_outputs.weight": np.zeros((2, 16), np.float32)}
    with pytest.raises(UserError, match=r"qa_outputs\.\*, of a model that marks the answer"):
        import_weights({k: v for k, v in tensors.items() if not k.startswith("classifier")} | answers, values, "here")


def test_fields_that_no_class_has_are_named_and_code_of_its_own_is_refused():
    tensors, values = checkpoint("hf_bert")
    notes = import_weights(tensors, values | {"my_note": "x", "alpha": [1]}, "here").notes
    assert notes == ["fields of config.json that no class of this format has, not read: my_note='x', alpha=[1]"]
    with pytest.raises(UserError, match="auto_map="):
        import_weights(tensors, values | {"auto_map": {"AutoModel": "modeling.JinaBert"}}, "here")


@pytest.mark.parametrize(
    ("values", "count", "labels", "independent"),
    [
        ({"id2label": ["bad", "so so", "good"]}, 3, ("bad", "so so", "good"), False),
        ({"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1}}, 2, ("a", "b"), False),
        ({"label2id": {"b": 1, "a": 0}}, 2, ("a", "b"), False),
        ({"id2label": {"0": 1, "1": 2}}, 2, ("1", "2"), False),
        ({}, 2, ("LABEL_0", "LABEL_1"), False),
        ({"problem_type": "multi_label_classification"}, 2, ("LABEL_0", "LABEL_1"), True),
        ({"problem_type": "regression", "id2label": ["x"]}, 1, (), False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, 1, (), True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, 1, (), False),
    ],
)
def test_what_scores_mean(values, count, labels, independent):
    assert read_answers(values, count, "here") == (labels, independent)


@pytest.mark.parametrize(
    ("values", "count", "words"),
    [
        ({"id2label": ["a", "b"]}, 3, "names 2 classes .*has 3 scores"),
        ({"id2label": {"1": "a", "2": "b"}}, 2, "0 to 1 are wanted"),
        ({"id2label": {"0": "a", "1": "a"}}, 2, "one name"),
        ({"id2label": {"0": "a", "1": None}}, 2, r"id2label\.1=None"),
        ({"id2label": [["a"], ["b"]]}, 2, "name of a class"),
        ({"id2label": "a b"}, 2, "an object or a list"),
        ({"label2id": [1, 2]}, 2, "label2id="),
        ({"label2id": {"a": 0, "b": 0}}, 2, "two names for one class"),
        ({"id2label": ["a", "b"], "label2id": {"a": 1, "b": 0}}, 2, "contradict each other on a, b"),
        ({"num_labels": 5}, 2, "names 5 classes"),
        ({"num_labels": "2"}, 2, "num_labels='2'"),
        ({"problem_type": "regression"}, 2, "problem_type='regression'"),
        ({"problem_type": ["x"]}, 2, "problem_type="),
        ({"problem_type": "single_label_classification"}, 1, "always 1"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, 1, "Tanh"),
        ({"sentence_transformers": [1]}, 1, "sentence_transformers="),
    ],
)
def test_labels_and_problems_that_do_not_fit_are_refused(values, count, words):
    with pytest.raises(UserError, match=words):
        read_answers(values, count, "here")


@pytest.mark.parametrize("cls", [ModelConfig, PretrainConfig, DataConfig, FinetuneConfig])
def test_our_own_settings_are_checked_one_by_one(cls):
    for field in fields(cls):
        for odd in ("x", None, [[]], {"a": 1}, float("nan")):
            with pytest.raises(UserError, match=rf"^here: (\w+\.)?{field.name}(\[0\]+)* is .*; it must"):
                convert(asdict(cls()) | {field.name: odd}, cls, "here")
            with pytest.raises(UserError, match=rf"^model\.{field.name} is"):
                check_kinds(cls, {field.name: odd}, "model.")  # what a constructor asks first
    with pytest.raises(UserError, match="where an object belongs"):
        convert([1], cls, "here")


def test_settings_have_upper_bounds():
    for name in ("vocab_size", "max_len", "d_model", "n_layers", "n_heads", "d_hidden", "pad_id"):
        with pytest.raises(UserError, match=rf"model\.{name} is"):
            replace(ModelConfig(), **{name: 10**30})
    with pytest.raises(UserError, match=r"here: labels\[1\] is"):
        convert({"name": "x", "labels": ["a", 1], "metrics": {}}, TaskInfo, "here")

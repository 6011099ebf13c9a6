"""Checkpoints of other libraries: there and back bit-equal, and one sentence for everything that does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from ufbert import nn
from ufbert.cli import call
from ufbert.config import ModelConfig
from ufbert.config.presets import load_preset
from ufbert.data.encode import encode_texts
from ufbert.errors import UserError
from ufbert.hub.convert import export_model, import_weights, read_checkpoint, with_tokenizer
from ufbert.hub.folder import ModelFolder, TaskInfo, flat_shapes, flatten, load_model, save_model
from ufbert.hub.foreign import crammed
from ufbert.hub.formats import FORMATS, configuration
from ufbert.hub.layout import expected_shapes
from ufbert.hub.tokenizer_settings import TokenizerConfig
from ufbert.hub.vocabulary import find_tokenizer, tokenizer_files, wordpiece
from ufbert.inference.predictor import Predictor

GOLDEN = Path(__file__).parents[1] / "golden"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "##s", "sees", ".", "a", "##t"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES))
    return path


def small(name: str, **changes) -> ModelConfig:
    """A preset small enough to draw."""
    model = load_preset(name).model
    sizes = {"vocab_size": 40, "max_len": 16, "fixed_len": 0, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_hidden": 8}
    changes = {"mixer": model.mixer[:1], "tree_depth": 2, "n_trees": 2, "pooler_width": 16} | changes
    return replace(model, **sizes, **changes)


def drawn(config: ModelConfig, tokenizer: Tokenizer, heads=("masked_lm",), labels=("no", "yes")) -> ModelFolder:
    """A model of random weights, biases included."""
    inits = tuple(head for head in heads if head != "classifier")
    params = nn.init(config, jax.random.key(0), inits)
    task = None
    if "classifier" in heads:
        params["classifier"] = nn.init_classifier(config, jax.random.key(1), max(1, len(labels)))
        task = TaskInfo("imported", labels, {})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
    return ModelFolder(config, params, tokenizer, task)


CASES = [
    ("bert_base", {}, ("masked_lm",), "hf"),
    ("bert_base", {"activation": "relu"}, ("masked_lm", "pooler"), "hf"),
    ("bert_base", {}, ("pooler",), "hf"),
    ("bert_base", {}, ("classifier",), "hf"),
    ("fnet", {"fixed_len": 12}, ("masked_lm",), "hf"),
    ("fnet", {}, ("classifier",), "hf"),
    ("modern_hf", {}, ("masked_lm",), "hf"),
    ("modern_hf", {}, ("classifier",), "hf"),
    ("modern_hf", {"pooling": "mean"}, ("classifier",), "hf"),
    ("modern_hf", {}, (), "hf"),
    ("ultrafastbert_1x11", {}, ("masked_lm",), "ultrafastbert"),
    ("ultrafastbert_1x11", {}, ("classifier",), "ultrafastbert"),
    ("crammed_bert", {}, ("masked_lm",), "ultrafastbert"),
    ("crammed_bert", {"feedforward": ("dense",)}, ("masked_lm",), "ultrafastbert"),
    ("crammed_bert", {"activation": "relu"}, (), "ultrafastbert"),
]


@pytest.mark.parametrize(("name", "changes", "heads", "to"), CASES)
def test_there_and_back_is_bit_equal(name, changes, heads, to, vocabulary, tmp_path):
    model = drawn(
        small(name) if "fixed_len" not in changes else replace(small(name), **changes), wordpiece(vocabulary), heads
    )
    model = replace(model, config=replace(model.config, **changes))
    if changes.get("feedforward"):
        model = drawn(model.config, model.tokenizer, heads)
    export_model(model, tmp_path / "out", to)
    tensors, values, folder = read_checkpoint(tmp_path / "out")
    assert values is not None
    back = with_tokenizer(import_weights(tensors, values, "out"), folder)
    unused = {"tree": ("d_hidden",), "dense": ("tree_depth", "n_trees"), "glu": ("tree_depth", "n_trees")}
    unused = unused[model.config.layers[0][1]] + (("n_heads", "fixed_len") if name == "fnet" else ())
    same = {field: getattr(back.config, field) for field in unused}
    assert back.config == replace(model.config, **same)
    assert back.config.only_len == model.config.only_len
    one, other = flatten(model.params), flatten(back.params)
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)
    assert back.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert (back.task and back.task.labels) == (model.task and model.task.labels)
    export_model(back, tmp_path / "again", to)
    for file in sorted(path.name for path in (tmp_path / "out").iterdir()):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("ultrafastbert_1x11", "hf", "feedforward="),
        ("fnet_ultrafast", "ultrafastbert", "mixer="),
        ("switch_8e", "hf", "feedforward="),
        ("crammed_rope", "hf", "qk_norm=True"),
        ("original_fff", "ultrafastbert", "feedforward="),
        ("bert_base", "ultrafastbert", "norm='post'"),
        ("ultrafastbert_symmetric", "ultrafastbert", "tree_activation='symmetric_gelu'"),
    ],
)
def test_what_a_layout_cannot_express_is_said(name, to, words, vocabulary, tmp_path):
    model = drawn(small(name, feedforward=load_preset(name).model.feedforward), wordpiece(vocabulary))
    with pytest.raises(UserError, match="cannot express this model") as caught:
        export_model(model, tmp_path / "out", to)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "to"), [("modern_hf", "hf"), ("crammed_bert", "ultrafastbert")])
def test_hashed_tables_are_refused_by_name_and_their_place_matters_only_to_tables(name, to, vocabulary, tmp_path):
    words = wordpiece(vocabulary)
    with pytest.raises(UserError, match=r"cannot express this model: ngram_rows=9"):
        export_model(drawn(small(name, ngram_rows=9), words), tmp_path / "out", to)
    export_model(drawn(small(name, ngram_layer=1), words), tmp_path / "out", to)


@pytest.mark.parametrize("changes", [{"unet_skips": True}, {"value_embeddings": 1}, {"tie_head": False}])
def test_what_the_other_library_lacks_is_refused_by_the_name_of_the_field(changes, vocabulary, tmp_path):
    model = drawn(replace(small("modern_hf"), **changes), wordpiece(vocabulary))
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=f"ModernBERT, the nearest there is, cannot express this model: {name}={value}"):
        export_model(model, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_how_weights_started_keeps_no_model_from_being_exported(vocabulary, tmp_path):
    model = drawn(replace(small("modern_hf"), zero_init_out=True, final_norm_start=0.25), wordpiece(vocabulary))
    assert "ModernBert" in export_model(model, tmp_path / "out", "hf")


def test_every_wrong_tensor_is_named(tmp_path):
    config = small("ultrafastbert_1x11")
    layout = crammed.layout(config, ("masked_lm",))
    values = crammed.foreign_config(config, ("masked_lm",), 0)
    shapes = expected_shapes(layout, flat_shapes(config, ("masked_lm",), 0))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    import_weights(tensors, values, "here")
    tensors["odd"] = tensors.pop("encoder.final_norm.bias")
    tensors["encoder.final_norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as caught:
        import_weights(tensors, values, "here")
    for words in (
        "final_norm.bias is missing",
        "odd is unexpected",
        "final_norm.weight has shape (3,) instead of (16,)",
    ):
        assert words in str(caught.value)
    whole = {name: np.zeros(s, np.float32) for name, s in shapes.items()}
    whole["decoder.weight"] = np.ones(shapes["encoder.embedding.word_embedding.weight"], np.float32)
    with pytest.raises(UserError, match=r"untied weights.*decoder\.weight"):
        import_weights(whole, values, "here")


def test_bert_without_its_prefix_with_old_names_and_with_buffers(vocabulary, tmp_path):
    model = drawn(small("bert_base"), wordpiece(vocabulary), ("pooler",))
    export_model(model, tmp_path / "out", "hf")
    tensors, values, _ = read_checkpoint(tmp_path / "out")
    assert values is not None
    assert not any(name.startswith("bert.") for name in tensors)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
        for name, a in tensors.items()
    }
    old = {f"bert.{name}": a for name, a in old.items()} | {
        "bert.embeddings.position_ids": np.arange(16),
        "cls.seq_relationship.bias": np.zeros(2, np.float32),
    }
    weights = import_weights(old, values, "here")
    assert weights.skipped == ["bert.embeddings.position_ids", "cls.seq_relationship.bias"]
    for path, array in flatten(model.params).items():
        np.testing.assert_array_equal(array, flatten(weights.params)[path])


def test_what_is_no_checkpoint_is_one_sentence(tmp_path, vocabulary):
    with pytest.raises(UserError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        read_checkpoint(tmp_path / "torch")
    with pytest.raises(UserError, match="model_type='gpt2'; this package imports Hugging Face BERT"):
        import_weights({}, {"model_type": "gpt2"}, "here")
    with pytest.raises(
        UserError, match=r"describes a model of 108,891,648 weights .hidden_size 768, .*, and its tensors are 1"
    ):
        import_weights({"bert.x": np.zeros(1, np.float32)}, {"model_type": "bert"}, "here")
    tiny = {"model_type": "bert", "vocab_size": 5, "hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 1}
    with pytest.raises(UserError, match=r"bert\.embeddings\.\w+\.weight is missing.* more"):
        import_weights({"bert.x": np.zeros(1, np.float32)}, tiny | {"intermediate_size": 2}, "here")
    modern = {"model_type": "modernbert", "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(UserError, match="local attention"):
        import_weights({}, modern, "here")
    with pytest.raises(UserError, match="Name one with --tokenizer"):
        find_tokenizer(tmp_path / "torch", "")
    weights = import_weights(*_tiny_bert(tmp_path, vocabulary, vocab_size=40), "here")
    with pytest.raises(UserError, match="gives '##t' the id 12, and the model has 5 embeddings"):
        with_tokenizer(weights._replace(config=replace(weights.config, vocab_size=5)), tmp_path)


def _tiny_bert(tmp_path, vocabulary, vocab_size):
    model = drawn(replace(small("bert_base"), vocab_size=vocab_size), wordpiece(vocabulary))
    export_model(model, tmp_path / "tiny", "hf")
    tensors, values, _ = read_checkpoint(tmp_path / "tiny")
    return tensors, values


def test_a_crammed_classifier_that_averages_padding_is_refused(vocabulary, tmp_path):
    model = drawn(small("crammed_bert"), wordpiece(vocabulary), ("classifier",))
    export_model(model, tmp_path / "out", "ultrafastbert")
    tensors, values, _ = read_checkpoint(tmp_path / "out")
    assert values is not None
    import_weights(tensors, values, "here")
    values["arch"]["classification_head"]["pooler"] = "avg"
    with pytest.raises(UserError, match=r"does not express: arch\.classification_head\.pooler='avg'"):
        import_weights(tensors, values, "here")
    masked_lm = drawn(small("crammed_bert"), wordpiece(vocabulary))
    export_model(masked_lm, tmp_path / "lm", "ultrafastbert")
    tensors, _, _ = read_checkpoint(tmp_path / "lm")
    values["architectures"] = ["ScriptableLMForPreTraining"]
    assert import_weights(tensors, values, "here").heads == ("masked_lm",)  # without a classifier it does not matter


def test_a_crammed_embedding_may_lie_under_the_decoder_alone(vocabulary, tmp_path):
    model = drawn(small("crammed_bert"), wordpiece(vocabulary))
    export_model(model, tmp_path / "out", "ultrafastbert")
    tensors, values, _ = read_checkpoint(tmp_path / "out")
    assert values is not None
    del tensors[crammed.WORDS]
    for path, array in flatten(import_weights(tensors, values, "here").params).items():
        np.testing.assert_array_equal(array, flatten(model.params)[path])


@pytest.mark.parametrize("labels", [("toxic", "insult", "threat"), ()])
def test_scores_that_are_probabilities_of_their_own_stay_so_on_the_way_out_in_and_in_answers(
    labels, vocabulary, tmp_path, capsys
):
    model = drawn(small("bert_base"), wordpiece(vocabulary), ("classifier",), labels)
    model = replace(model, task=TaskInfo("imported", labels, {}, independent=True))
    export_model(model, tmp_path / "out", "hf")
    tensors, values, folder = read_checkpoint(tmp_path / "out")
    assert values is not None
    save_model(tmp_path / "model", with_tokenizer(import_weights(tensors, values, "here"), folder))
    predictor = Predictor(load_model(tmp_path / "model"))
    assert predictor.task == model.task
    rows = encode_texts(predictor.tokenizer, ["the cat sees a dog"], None, predictor.config)
    (scores,) = predictor.engine.scores(rows)
    odds = 1 / (1 + np.exp(-scores.astype(np.float64)))
    if labels:
        assert predictor.label_probabilities(["the cat sees a dog"])[0] == pytest.approx(
            dict(zip(labels, odds, strict=True))
        )
        with pytest.raises(UserError, match="do not exclude each other"):
            predictor.classify(["the cat sees a dog"])
        call("predict", ["--model", str(tmp_path / "model"), "the cat sees a dog"])
        lines = [f"{label}  {share:.2%}" for label, share in zip(labels, odds, strict=True)]
        assert capsys.readouterr().out.splitlines() == lines
        (tmp_path / "texts").write_text("the cat sees a dog\n" * 2)
        call("predict", ["--model", str(tmp_path / "model"), "--lines", str(tmp_path / "texts")])
        line = "\t".join(f"{label}\t{share:.4f}" for label, share in zip(labels, odds, strict=True))
        assert capsys.readouterr().out.splitlines() == [line, line]
    else:
        assert predictor.classify("the cat sees a dog") == pytest.approx(odds[0])
        with pytest.raises(UserError, match="answers with a value"):
            predictor.label_probabilities(["the cat sees a dog"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_become_float32(dtype, vocabulary, tmp_path):
    tensors, values = _tiny_bert(tmp_path, vocabulary, 40)
    halves = {name: a.astype(jnp.dtype(dtype)) for name, a in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors")
    found, _, _ = read_checkpoint(tmp_path / "half.safetensors")
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, halves[name].astype(np.float32))
    assert import_weights(found, values, "half").params["encoder"]["embeddings"]["tokens"].dtype == np.float32


def test_vocabularies_tokenise_like_their_tokenizer_json(vocabulary, tmp_path):
    tokenizer = wordpiece(vocabulary, TokenizerConfig(do_lower_case=True))
    files = tokenizer_files(tokenizer, 16)
    assert files["vocab.txt"].split() == PIECES
    assert json.loads(files["special_tokens_map.json"])["mask_token"] == "[MASK]"
    (tmp_path / "two").mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "two" / name).write_text(files[name])
    other = find_tokenizer(tmp_path / "two", "")
    for text in ("The cats see a dog.", "Ein Äffchen", "[MASK] sees", "日本"):
        assert (
            tokenizer.encode(text).ids
            == other.encode(text).ids
            == Tokenizer.from_str(files["tokenizer.json"]).encode(text).ids
        )
    assert tokenizer.encode("The cats.").tokens == ["[CLS]", "the", "cat", "##s", ".", "[SEP]"]
    assert wordpiece(vocabulary, TokenizerConfig(do_lower_case=False)).encode("The").tokens[1] == "[UNK]"


def test_import_and_export_on_the_command_line(command, vocabulary, tmp_path):
    golden = dict(np.load(GOLDEN / "hf_bert.npz"))
    source = tmp_path / "source"
    source.mkdir()
    save_file(
        {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}, source / "model.safetensors"
    )
    (source / "config.json").write_text(str(golden["config"]))
    missing = command("import", source, "--out", tmp_path / "model")
    assert missing.returncode == 2
    assert "--tokenizer FILE" in missing.stderr
    assert not (tmp_path / "model").exists()
    found = command("import", source / "model.safetensors", "--out", tmp_path / "model", "--tokenizer", vocabulary)
    assert found.returncode == 0, found.stderr
    assert "Hugging Face BERT, 2 layers x 16" in found.stdout
    answer = command("fill-mask", "--model", tmp_path / "model", "the [MASK] sees")
    assert len(answer.stdout.splitlines()) == 6, answer.stderr
    assert command("export", tmp_path / "model", "--to", "hf", "--out", tmp_path / "back").returncode == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    refused = command("export", tmp_path / "model", "--to", "ultrafastbert", "--out", tmp_path / "no")
    assert refused.returncode == 2
    assert "cannot express this model" in refused.stderr
    assert "exists already" in command("export", tmp_path / "model", "--to", "hf", "--out", tmp_path / "back").stderr


def test_a_fastfeedforward_layer_comes_and_goes(command, tmp_path):
    state = {
        k.removeprefix("param."): v for k, v in np.load(GOLDEN / "leaf_tree.npz").items() if k.startswith("param.")
    }
    counted = state | {"leaf_usage": np.zeros(8, np.float32), "node_usage": np.zeros(7, np.float32)}
    save_file(counted, tmp_path / "fff.safetensors")
    found = command("import", tmp_path / "fff.safetensors", "--out", tmp_path / "layer")
    assert "8 leaves of 4 neurons" in found.stdout, found.stderr
    assert command("export", tmp_path / "layer", "--to", "fastfeedforward", "--out", tmp_path / "back").returncode == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert back[name].shape == array.shape, name
        np.testing.assert_array_equal(array, back[name])
    save_file({k: v for k, v in state.items() if k != "b1s"} | {"w2s": state["w2s"][:3]}, tmp_path / "bad.safetensors")
    bad = command("import", tmp_path / "bad.safetensors", "--out", tmp_path / "no")
    assert bad.returncode == 2
    assert "b1s is missing" in bad.stderr
    assert "w2s has shape (3, 4, 5) instead of (8, 4, 5)" in bad.stderr
    mixed = command("fill-mask", "--model", tmp_path / "layer", "a [MASK]")
    assert mixed.returncode == 2
    assert "not a model folder" in mixed.stderr


def test_an_imported_model_is_saved_and_loaded_unchanged(vocabulary, tmp_path):
    tensors, values = _tiny_bert(tmp_path, vocabulary, 40)
    model = with_tokenizer(import_weights(tensors, values, "here"), tmp_path / "tiny")
    save_model(tmp_path / "model", model)
    copy = load_model(tmp_path / "model")
    assert copy.config == model.config
    for path, array in flatten(model.params).items():
        np.testing.assert_array_equal(array, flatten(copy.params)[path])


def test_the_published_checkpoint_has_the_size_of_its_file():
    """UltraFastBERT-1x11-long: 163,671,025 unique numbers, 16 norm factors and the decoder once more; 755.35 MB in float32."""
    config = load_preset("ultrafastbert_1x11").model
    layout = crammed.layout(config, ("masked_lm",))
    shapes = expected_shapes(layout, flat_shapes(config, ("masked_lm",), 0))
    assert shapes["encoder.layers.15.ffn.linear_in.weight"] == (4095, 768)
    assert shapes["encoder.layers.0.ffn.linear_out.weight"] == (768, 4095)
    assert shapes["encoder.layers.7.attn.self_attention.query_key_value.weight"] == (2304, 768)
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    numbers += sum(int(np.prod(shapes[source])) for source in layout.copies.values())
    assert numbers == 188_836_865
    assert round(4 * numbers / 1e6, 2) == 755.35
    values = crammed.foreign_config(config, ("masked_lm",), 0)
    assert configuration(FORMATS[-1], values, ("masked_lm",), "here").layers == config.layers

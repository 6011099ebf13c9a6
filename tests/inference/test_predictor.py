"""What a caller gets: one answer for a text, a list for a list, numbers of a regression, and the reason of a failure."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.errors import UserError
from ufbert.hub.folder import GLUE_PAIRS, TaskInfo, load_model, save_model
from ufbert.inference.engine import Engine
from ufbert.inference.predictor import Answer, Predictor
from ufbert.inference.questions import BadText, Failure

TEXTS = ["the cat", "the dog sees the king"]


@pytest.fixture(scope="module")
def made(family):
    """(fields of its task) -> a small model with both heads."""

    def make(*labels: str, **task):
        model = family("bert", "masked_lm", "classifier")
        n = max(1, len(labels))
        params = nn.init_classifier(model.config, jax.random.key(1), n)
        return replace(model, params={**model.params, "classifier": params}, task=TaskInfo("toy", labels, {}, **task))

    return make


@pytest.fixture(scope="module")
def predictor(made):
    return Predictor(made("no", "maybe", "yes"))


def test_a_text_gets_an_answer_and_a_list_gets_a_list(predictor):
    one = ["the cat"]
    assert predictor.classify("the cat") == predictor.classify(one)[0]
    assert [answer.label for answer in predictor.classify(TEXTS)] == [predictor.classify(text).label for text in TEXTS]
    assert (
        predictor.classify("the cat", "a dog") == predictor.classify(one, ["a dog"])[0] != predictor.classify("the cat")
    )
    assert predictor.label_probabilities("the cat") == predictor.label_probabilities(one)[0]
    assert predictor.fill_mask("a [MASK]") == predictor.fill_mask(["a [MASK]"])[0]
    np.testing.assert_array_equal(predictor.encode("the cat"), predictor.encode(one)[0])
    for texts, pairs in (("ab", ["c", "d"]), (["a", "b"], "cd")):
        for ask in (predictor.classify, predictor.label_probabilities):
            with pytest.raises(UserError, match="A text goes with one second text, and a list of texts with a list"):
                ask(texts, pairs)


def test_top_ranks_the_classes(predictor):
    every = predictor.classify("the cat", top=None)
    assert dict(every) == predictor.label_probabilities("the cat")
    assert [answer.probability for answer in every] == sorted((share for _, share in every), reverse=True)
    assert sum(share for _, share in every) == pytest.approx(1)
    assert predictor.classify("the cat") == every[0] == Answer(*every[0])
    assert predictor.classify(["the cat"], top=2) == [every[:2]]
    assert predictor.classify("the cat", top=9) == every
    with pytest.raises(UserError, match="top is -1"):
        predictor.classify("the cat", top=-1)


def test_labels_that_do_not_exclude_each_other_are_ranked_by_their_own_probabilities(made):
    predictor = Predictor(made("toxic", "threat", independent=True))
    ranked = predictor.classify("the cat", top=None)
    assert dict(ranked) == predictor.label_probabilities("the cat")
    assert ranked[0].probability >= ranked[1].probability


def test_a_regression_gives_a_number_in_full(made):
    model = made()
    predictor = Predictor(model)
    value = predictor.classify("the cat", "a dog")
    assert type(value) is float
    hidden = nn.pool(model.config, jnp.asarray(predictor.encode("the cat"))[None])
    assert predictor.classify("the cat") == pytest.approx(
        float(nn.classify(model.params, model.config, hidden)[0, 0]), abs=1e-6
    )
    assert value != round(value, 2)
    with pytest.raises(UserError, match="has no classes for `top`"):
        predictor.classify("the cat", top=2)


def test_pooled_vectors(made, predictor):
    states = predictor.encode(TEXTS)
    for pooled, wanted in (("mean", [text.mean(axis=0) for text in states]), ("cls", [text[0] for text in states])):
        vectors = predictor.encode(TEXTS, pooled)
        assert isinstance(vectors, list)
        np.testing.assert_allclose(vectors, wanted, atol=1e-6)
        np.testing.assert_allclose(predictor.encode(TEXTS[0], pooled), wanted[0], atol=1e-6)
    model = made("no", "yes")
    pooler = nn.apply_pooler(model.params["classifier"], model.config, jnp.stack([text[0] for text in states]))
    np.testing.assert_allclose(Predictor(model).encode(TEXTS, "pooler"), pooler, atol=1e-5)
    bare = replace(model, params={"encoder": model.params["encoder"]}, task=None)
    with pytest.raises(UserError, match="has no pooler; ask for pooled='mean' or 'cls'"):
        Predictor(bare).encode("the cat", "pooler")


def test_a_bad_text_is_named_and_the_others_are_answered(predictor):
    long = 60 * "cat "
    texts = ["", TEXTS[0], long, "caf\udce9", TEXTS[1]]
    reasons = [
        "is empty",
        "",
        "has more than the 48 word pieces that this model reads (62); shorten it, or have it cut "
        "(--truncate; truncate=True in Python)",
        "is not valid Unicode (was its file UTF-8?)",
        "",
    ]
    good = {predictor.classify: predictor.classify(TEXTS), predictor.encode: predictor.encode(TEXTS)}
    for ask, answers in good.items():
        found = ask(texts, on_error="return")
        for text, reason, answer in zip(texts, reasons, found, strict=True):
            if reason:
                assert answer == Failure(text, None, reason)
            else:
                np.testing.assert_allclose(
                    np.asarray(answer[-1], float), np.asarray(answers.pop(0)[-1], float), atol=1e-5
                )
        with pytest.raises(BadText, match=r"Text 2, '', is empty\.") as caught:
            ask([TEXTS[0], ""])
        assert (caught.value.index, caught.value.reason) == (1, "is empty")
    assert str(predictor.classify("", on_error="return")) == "'' is empty."
    assert predictor.classify(["a", "b"], ["c", " "], on_error="return")[1] == Failure("b", " ", "has an empty text")
    assert predictor.classify(["", "", " "], on_error="return") == [Failure(t, None, "is empty") for t in ("", "", " ")]
    masks = predictor.fill_mask(["no mask", "a [MASK]", f"{long} [MASK]"], on_error="return")
    assert masks[0] == Failure("no mask", None, "has no [MASK] to fill")
    assert masks[1] == predictor.fill_mask("a [MASK]")
    assert "word pieces" in masks[2].reason
    with pytest.raises(UserError, match=r"The text 'no mask' has no \[MASK\] to fill\."):
        predictor.fill_mask("no mask")


def test_a_text_of_which_the_model_computes_no_numbers_spoils_no_other(made):
    model = made("no", "yes")
    tokens = np.array(model.params["encoder"]["embeddings"]["tokens"])
    (dog,) = (model.tokenizer.encode("dog", add_special_tokens=False).ids,)
    tokens[dog] = np.nan
    encoder = model.params["encoder"]
    wrecked = {**model.params, "encoder": {**encoder, "embeddings": {**encoder["embeddings"], "tokens": tokens}}}
    texts = ["the cat", "the dog", "a bird"]
    found = Predictor(replace(model, params=wrecked)).classify(texts, on_error="return")
    assert found[1].reason.startswith("is given no finite number by this model")
    assert [found[0].label, found[2].label] == [a.label for a in Predictor(model).classify([texts[0], texts[2]])]


def test_a_model_of_pairs_asks_for_second_texts_and_one_of_single_texts_refuses_them(made):
    pairs, singles = Predictor(made("no", "yes", pairs=True)), Predictor(made("no", "yes", pairs=False))
    for ask in (pairs.classify, pairs.label_probabilities):
        assert ask("the cat", "a dog")
        with pytest.raises(
            UserError, match=r"This model's task \(toy\) is on pairs of texts; give each text its second"
        ):
            ask("the cat")
    for ask in (singles.classify, singles.label_probabilities):
        assert ask("the cat")
        with pytest.raises(UserError, match=r"This model's task \(toy\) is on single texts; give no second texts"):
            ask("the cat", "a dog")


def test_a_folder_says_if_its_task_is_on_pairs_and_older_ones_of_glue_are_known(made, tmp_path):
    from ufbert.glue.tasks import TASKS

    assert {name: len(task.text) == 2 for name, task in TASKS.items()} == GLUE_PAIRS
    model = made("no", "yes")
    for name, before, after in (("toy", True, True), ("toy", None, None), ("mrpc", None, True), ("sst2", None, False)):
        task = TaskInfo(name, ("no", "yes"), {}, pairs=before)
        save_model(tmp_path / "model", replace(model, task=task))
        assert load_model(tmp_path / "model").task == replace(task, pairs=after)


def test_warming_up_is_asked_for_on_loading(made, tmp_path, monkeypatch):
    save_model(tmp_path / "model", made("no", "yes"))
    asked = []
    monkeypatch.setattr(Engine, "warm_up", lambda self, most: asked.append(most))
    for warm_up in (False, 0, 128, True):
        Predictor.load(tmp_path / "model", warm_up=warm_up)
    assert asked == [128, 0]
    with pytest.raises(UserError, match="warm_up is -1"):
        Predictor.load(tmp_path / "model", warm_up=-1)

"""The page of a finished run has sample answers, which are the model's own, and says how the run came about."""

import jax
import jax.numpy as jnp
import numpy as np
from pages import check_page, facts_of

import ufbert
from ufbert.data.tokenizer import special_ids
from ufbert.hub.folder import load_model
from ufbert.pretrain.run import _prepared
from ufbert.pretrain.samples import ROWS, WINDOW, _around, _word_at, write_guesses
from ufbert.runtime.run_folder import read_run, read_samples


def test_a_finished_run_shows_what_its_model_guesses_and_the_command_that_made_it(run_folder):
    page = check_page((run_folder / "report.html").read_text())
    facts = facts_of(page)
    assert facts["command"].startswith("ufbert train --budget=80steps --config=tiny")
    assert all(facts[name] != "not recorded" for name in ("commit", "processor", "load"))
    samples = read_samples(run_folder)
    assert 1 <= len(samples) <= ROWS
    for sample in samples:
        assert sample.text.count("[MASK]") == 1
        assert sample.text in page.text
        shares = [guess.probability for guess in sample.guesses]
        assert shares == sorted(shares, reverse=True)


def test_guesses_are_those_of_the_model_that_was_saved(run_folder):
    model, data, config = load_model(run_folder / "model"), _prepared(run_folder), read_run(run_folder).run
    assert data is not None
    special = special_ids(model.tokenizer)
    row = np.array(data.heldout_sample(config.data.eval_rows)[0], np.int32)
    place = _word_at(model.tokenizer, special, row)
    sample = read_samples(run_folder)[0]
    assert sample.token == model.tokenizer.decode([int(row[place])])
    row[place] = special.mask
    assert sample.text == _around(model.tokenizer, special, row, place)
    logits = jax.jit(lambda params, ids: ufbert.apply(params, config.model, ids)[1])(
        model.params, jnp.asarray(row)[None]
    )
    shares = np.asarray(jax.nn.softmax(logits[0, place]))
    best = np.argsort(-shares)[: len(sample.guesses)]
    np.testing.assert_allclose([g.probability for g in sample.guesses], shares[best], atol=1e-3)
    assert sample.guesses[0].token == model.tokenizer.decode([int(best[0])])


def test_a_word_is_shown_with_its_neighbours_and_no_further_than_its_document(run_folder):
    words = load_model(run_folder / "model").tokenizer
    special = special_ids(words)
    cat = words.encode("the cat sees the house in london", add_special_tokens=False).ids
    row = np.array([special.cls, *cat, special.sep, special.cls, *cat * 9, special.sep], np.int32)
    place = len(cat) + 3
    row[place] = special.mask
    text = _around(words, special, row, place)
    assert text.endswith(" ...")
    assert not text.startswith("...")
    assert len(words.encode(text.removesuffix(" ..."), add_special_tokens=False).ids) <= 2 * WINDOW + 1


def test_guesses_that_cannot_be_had_are_said_and_cost_nothing(run_folder, tmp_path, capsys):
    data = _prepared(run_folder)
    assert data is not None
    write_guesses(tmp_path, read_run(run_folder).run, data)
    assert "no sample answers: " in capsys.readouterr().out
    assert read_samples(tmp_path) == []

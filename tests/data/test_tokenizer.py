"""Training a tokenizer: room for every script, words that nothing would cut, and interrupts."""

import os
import signal
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ufbert.config import DataConfig
from ufbert.data import tokenizer as tokenizers_here
from ufbert.data.corpora import Corpus
from ufbert.data.prepare import Recipe, prepare
from ufbert.data.tokenizer import LONGEST_WORD, made_fit, special_ids, train_wordpiece, unknown_characters

HAN = [chr(0x4E00 + i) for i in range(3000)]


def test_the_alphabet_follows_the_text():
    tokenizer = train_wordpiece(["".join(HAN[i : i + 600]) for i in range(0, 3000, 300)], 4100)
    assert all(tokenizer.token_to_id(character) is not None for character in HAN)
    assert not any(piece.startswith("##") for piece in tokenizer.get_vocab())  # each is a word by itself
    letters = "abcdefghijklmnopqrstuvwxyz"
    crowded = train_wordpiece([letters * 3 + " the cat sees" * 500 + "".join(HAN)], 2000)
    assert sum(character in crowded.get_vocab() for character in HAN) == 1500 - 2 * len(letters)


@pytest.mark.long
def test_the_rarest_characters_stay_out_once_there_are_a_thousand():
    often, rare = HAN[:1200], HAN[1200:1210]
    texts = [*often] * 20 + rare[:2]  # 2 of 24,002 characters are less than one in ten thousand, 10 are more
    vocabulary = train_wordpiece(texts, 12_000).get_vocab()
    assert [c in vocabulary for c in (often[0], often[-1], rare[0])] == [True, True, False]
    assert rare[5] in train_wordpiece([*texts, *rare], 12_000).get_vocab()
    assert rare[0] in train_wordpiece([*often[:900], *rare[:1]] * 2, 12_000).get_vocab()


def test_words_that_are_unknown_anyway_never_reach_the_trainer():
    texts = ["the cat sees the dog . " * 9]
    long = "cat" * LONGEST_WORD
    for run, rest in ((long, ""), (f"the.{long},the", "the.,the"), ("x" * 1_000_000, ""), (f"{long}日本", "日本")):
        vocabularies = [train_wordpiece([*texts, f"cat {word} dog"], 200).get_vocab() for word in (run, rest)]
        assert vocabularies[0] == vocabularies[1]
    edge = "ab" * (LONGEST_WORD // 2)
    assert len(train_wordpiece([edge] * 5, 200).encode(edge, add_special_tokens=False).ids) < LONGEST_WORD
    thai = "กขคง" * (LONGEST_WORD // 4)
    trained = train_wordpiece([thai, thai + thai], 200)
    assert unknown_characters(trained, [thai], 1) == (0, len(thai))
    assert unknown_characters(trained, [f"{thai} {thai}{thai}"], 1) == (2 * len(thai), 3 * len(thai))


def test_an_interrupt_ends_the_training_of_a_tokenizer(monkeypatch):
    begun, never = threading.Event(), threading.Event()

    def endless(self, texts, trainer):
        begun.set()
        never.wait()

    def interrupt():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    class Endless:
        def __init__(self, model):
            self.train_from_iterator = lambda texts, trainer: endless(self, texts, trainer)

    monkeypatch.setattr(tokenizers_here, "Tokenizer", Endless)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_wordpiece(["the cat"], 100)
    finally:
        never.set()


def test_an_error_in_the_trainer_is_raised():
    def failing() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        tokenizers_here._interruptibly(failing)


PLAIN = DataConfig(seq_len=32, tokenizer_chars=10**6, filter_worst=0.0, drop_exact=False, drop_near=False)


def test_the_manifest_says_what_share_of_the_text_is_unknown_and_the_largest_id(tmp_path):
    words = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 9}, "[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = made_fit(words, "here")
    corpus = Corpus("toy", "none", lambda: iter(["the abc the xyz"] * 50))
    data = prepare(corpus, tmp_path / "data", Recipe.of(PLAIN, 0, words), tokenizer=words)
    assert data.manifest.unknown_share == 0.5
    assert data.manifest.vocab_size == 10
    assert data.unigram_log_probs().shape == (10,)
    row = data.train.take(np.array([0]))[0].tolist()
    assert row[:6] == [special_ids(words).cls, 9, 1, 9, 1, special_ids(words).sep]
    assert data.tokenizer.encode("the").ids == [2, 9, 3]  # what pretraining puts around a document, the model does, too


def test_stored_truncation_and_padding_do_not_touch_the_rows(tmp_path, corpus_file):
    from ufbert.data.corpora import open_corpus

    tokenizer = train_wordpiece(["the cat sees a bird in london . the king likes the river"], 100)
    corpus, recipe = open_corpus(f"text:{corpus_file}"), Recipe.of(PLAIN, 0, tokenizer)
    plain = prepare(corpus, tmp_path / "plain", recipe, tokenizer=tokenizer)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64)
    stored = prepare(corpus, tmp_path / "stored", recipe, tokenizer=tokenizer)
    assert plain.manifest.fingerprint == stored.manifest.fingerprint


def test_a_tokenizer_given_to_train_is_made_fit(tmp_path, corpus_file):
    from ufbert.options.train import TrainOptions
    from ufbert.pretrain.corpus import locate_rows

    trained, path = train_wordpiece(["the cat sees the dog"], 60), tmp_path / "tokenizer.json"
    found = []
    for post_processor in (trained.post_processor, processors.ByteLevel()):  # one that puts nothing around a text
        trained.post_processor = post_processor
        trained.enable_truncation(16)
        trained.save(str(path))
        options = TrainOptions(corpus=f"text:{corpus_file}", tokenizer=str(path), prepared=str(tmp_path / "prepared"))
        found.append(locate_rows(options))
    assert found[0].recipe == found[1].recipe
    assert [len(each.tokenizer.encode("the cat " * 20).ids) for each in found] == [42, 42]

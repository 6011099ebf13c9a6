"""What `fill_mask` says: pieces as a text has them, and the reason why a [MASK] is lost."""

import json

import jax
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.data.tokenizer import SPECIAL_TOKENS, made_fit, vocabulary_size
from ufbert.errors import UserError
from ufbert.hub.convert import export_model
from ufbert.hub.folder import ModelFolder, load_model, save_model
from ufbert.inference.predictor import Predictor


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġc", "Ġca", "Ġcat", "Ã©", "##r"]
    vocab = {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("Ã", "©")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made_fit(tokenizer, "here")


def model_of(tokenizer: Tokenizer, rows: int = 0) -> ModelFolder:
    """A model of random weights that reads eight word pieces."""
    size = rows or vocabulary_size(tokenizer)
    config = ModelConfig(
        vocab_size=size, max_len=8, d_model=16, n_layers=1, n_heads=2, d_hidden=16, norm="post", use_bias=True,
        feedforward=("dense",), positions="learned", n_token_types=2, final_norm=False, head_transform=True,
        head_bias=True,
    )  # fmt: skip
    return ModelFolder(config, nn.init(config, jax.random.key(0), ("masked_lm",)), tokenizer)


def test_guesses_are_written_as_the_tokenizer_decodes_them():
    tokenizer = byte_level()
    model = model_of(tokenizer, vocabulary_size(tokenizer) + 1)
    pieces = ["Ġcat", "Ã©", "##r", "Ã", "Ġ", "[SEP]"]
    wanted = ["cat", "é", "##r", "Ã", "Ġ", "[SEP]", f"<id {vocabulary_size(tokenizer)}>"]
    bias = np.zeros(model.config.vocab_size, np.float32)
    for rank, piece in enumerate(pieces):
        bias[tokenizer.token_to_id(piece)] = 900 - 100 * rank
    bias[-1] = 200  # an embedding without a piece
    model.params["masked_lm"]["bias"] = bias
    (guesses,) = Predictor(model).fill_mask(["the [MASK]"], 7)[0]
    assert [guess.token for guess in guesses] == wanted


def test_the_reason_why_a_mask_is_lost_is_told():
    tokenizer = byte_level()
    predictor = Predictor(model_of(tokenizer), truncate=True)
    with pytest.raises(UserError, match="is too long, and a \\[MASK\\] of it was cut off"):
        predictor.fill_mask(["abc abc abc abc [MASK]"])
    tokenizer.add_special_tokens([AddedToken("[MASK]", single_word=True)])
    with pytest.raises(
        UserError,
        match=r"'x\[MASK\]y', has a \[MASK\] that the model's tokenizer does not find as a token; write blanks",
    ):
        predictor.fill_mask(["x[MASK]y"])


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "model", model_of(byte_level()))
    return tmp_path / "model"


def test_a_loaded_tokenizer_is_without_stored_state_and_has_no_id_past_the_embeddings(saved, tmp_path, capfd):
    path = saved / "tokenizer.json"
    plain = json.loads(path.read_text())
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(plain | {"truncation": cut, "post_processor": None}))
    tokenizer = load_model(saved).tokenizer
    assert tokenizer.truncation is None
    assert tokenizer.encode(" cat cat cat").tokens == ["[CLS]", "Ġcat", "Ġcat", "Ġcat", "[SEP]"]
    assert "has a stored truncation (max_length 3, strategy LongestFirst), which is taken off" in capfd.readouterr().err
    plain["model"]["vocab"]["##r"] = 500  # the number of tokens still fits
    path.write_text(json.dumps(plain))
    for lazily in (True, False):
        with pytest.raises(UserError, match=r"gives '##r' the id 500, and the model has 266 embeddings"):
            load_model(saved, lazily=lazily)
    with pytest.raises(UserError, match=r"gives 'Ã©' the id 264, and the model has 264 embeddings"):
        export_model(model_of(_without_last(), 264), tmp_path / "out", "hf")


def _without_last() -> Tokenizer:
    state = json.loads(byte_level().to_str())
    del state["model"]["vocab"]["##r"]
    return Tokenizer.from_str(json.dumps(state))

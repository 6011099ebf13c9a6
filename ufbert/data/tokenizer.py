"""WordPiece: trained on the corpus at hand, used the same way everywhere."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ufbert.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The special tokens of tokenizers trained here, which are also BERT's."""
OTHER_NAMES = {
    "[PAD]": ("<pad>",),
    "[UNK]": ("<unk>",),
    "[CLS]": ("<cls>", "<s>"),
    "[SEP]": ("<sep>", "</s>"),
    "[MASK]": ("<mask>",),
}
"""What other libraries' tokenizers call them."""


class SpecialIds(NamedTuple):
    """Ids of the special tokens in one vocabulary."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's own name of each of SPECIAL_TOKENS. Raises UserError if it lacks one."""
    found = {
        token: next((name for name in (token, *OTHER_NAMES[token]) if tokenizer.token_to_id(name) is not None), None)
        for token in SPECIAL_TOKENS
    }
    names = {token: name for token, name in found.items() if name is not None}
    if len(names) < len(found):
        raise UserError(f"The tokenizer has no {', '.join(token for token in found if token not in names)}.")
    return names


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Ids of the five special tokens. Raises UserError if the tokenizer lacks one."""
    ids = [tokenizer.token_to_id(name) for name in special_names(tokenizer).values()]
    return SpecialIds(*(number for number in ids if number is not None))


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-casing, accent-stripping WordPiece tokenizer of at most `vocab_size` tokens.

    Encoding wraps text as `[CLS] text [SEP]` and pairs as `[CLS] a [SEP] b [SEP]`. The same documents give the same
    tokenizer.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    texts = [normalizer.normalize_str(document) for document in documents]
    alphabet = _alphabet(texts, limit=min(1000, vocab_size // 4))
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    draft.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Left to itself the trainer numbers "##" pieces in the order of a randomised hash map.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids.sep), ("[CLS]", ids.cls))
    return tokenizer


def _alphabet(texts: Iterable[str], limit: int) -> list[str]:
    """The `limit` most frequent characters that are not blanks, ties by code point, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    return sorted([c for c in ranked if not c.isspace()][:limit])


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash that is equal for equal tokenizers."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

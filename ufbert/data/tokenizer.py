"""WordPiece: trained on the corpus at hand, used the same way everywhere."""

import contextlib
import hashlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ufbert.config.checks import shown
from ufbert.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The special tokens of tokenizers trained here, which are also BERT's."""
OTHER_NAMES = {
    "[PAD]": ("<pad>",), "[UNK]": ("<unk>",), "[CLS]": ("<cls>", "<s>"), "[SEP]": ("<sep>", "</s>"), "[MASK]": ("<mask>",),
}  # fmt: skip
"""Their names in other libraries' tokenizers."""


class SpecialIds(NamedTuple):
    """Ids of the special tokens in one vocabulary."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Find the tokenizer's own name of each of SPECIAL_TOKENS.

    The unknown piece is its model's, those around a text its post-processor's, and the others have the first known name that
    is in its vocabulary. Raises UserError if it lacks one.
    """
    around, unknown = wrapping(tokenizer), getattr(tokenizer.model, "unk_token", None)
    own = {"[UNK]": unknown if unknown and tokenizer.token_to_id(unknown) is not None else None}
    if around:
        own |= {"[CLS]": tokenizer.id_to_token(around[0]), "[SEP]": tokenizer.id_to_token(around[1])}
    names = {token: own.get(token) or known_name(tokenizer, token) for token in SPECIAL_TOKENS}
    missing = [token for token, name in names.items() if name is None]
    if missing:
        raise UserError(f"The tokenizer has no {', '.join(missing)}; take another one.")
    return {token: name for token, name in names.items() if name is not None}


def known_name(tokenizer: Tokenizer, token: str) -> str | None:
    """Find the first of the names by which a special token is known that the tokenizer has."""
    return next((name for name in (token, *OTHER_NAMES[token]) if tokenizer.token_to_id(name) is not None), None)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Find the ids of the five special tokens. Raises UserError if the tokenizer lacks one."""
    ids = [tokenizer.token_to_id(name) for name in special_names(tokenizer).values()]
    return SpecialIds(*(number for number in ids if number is not None))


def wrapping(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Find the ids that its post-processor puts before and after a text; None if it does not make `[CLS] text [SEP]`."""
    row = tokenizer.encode("a")
    is_put = row.special_tokens_mask
    is_wrapped = sum(is_put) == 2 and is_put[0] and is_put[-1] and not any(row.type_ids)
    return (row.ids[0], row.ids[-1]) if is_wrapped else None


def wrap(tokenizer: Tokenizer, where: str, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Have the tokenizer make `[CLS] text [SEP]` of a text, if it does not. Raises UserError if it lacks one of the two."""
    if wrapping(tokenizer):
        return
    cls, sep = (names.get(token) or known_name(tokenizer, token) for token in ("[CLS]", "[SEP]"))
    before, after = (tokenizer.token_to_id(name) if name else None for name in (cls, sep))
    if cls is None or sep is None or before is None or after is None:
        raise UserError(f"The tokenizer {where} has no [CLS] or no [SEP] to put around a text; take another one.")
    tokenizer.post_processor = processors.BertProcessing((sep, after), (cls, before))
    note(f"{where} does not put {cls} and {sep} around a text; now it does")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Count the rows that an embedding table needs: the largest id plus one, as ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_fits(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Raise UserError if an id lies past an embedding table of so many rows."""
    piece, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise UserError(
            f"The tokenizer of {where} gives {shown(piece)} the id {number:,}, and the model has {rows:,} embeddings; "
            "take the tokenizer that the model was trained with."
        )


def note(line: str) -> None:
    """Tell of a change to a tokenizer on stderr, which does not mix with a command's answers."""
    print(f"tokenizer: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def library_errors(where: str, remedy: str = "Take another tokenizer.") -> Generator[None]:
    """Raise UserError for the tokenizers library's errors: a bare Exception, or a panic that is not even one, of a pattern that
    needs more than ten million steps, for example."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: the tokenizers library fails: {str(error)[:200]}. {remedy}") from error


def made_fit(tokenizer: Tokenizer, where: str, names: Mapping[str, str] = MappingProxyType({})) -> Tokenizer:
    """Change a tokenizer in place to keep this package's promises; a line tells of each change.

    An unknown piece is [UNK], special tokens are found in texts, and a text of any length is `[CLS] text [SEP]`, unless its
    file puts something else around it. `names` are its folder's for some of SPECIAL_TOKENS. Raises UserError if a promise
    cannot be kept.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _settle_unknown(tokenizer, where, names.get("[UNK]"))
    if not any(tokenizer.encode("a").special_tokens_mask):  # else the model knows other tokens around a text
        wrap(tokenizer, where, names)
    own = special_names(tokenizer)
    for token, name in names.items():
        if own[token] != name:
            is_cased = own[token] == name.lower()
            key = f"{token[1:-1].lower()}_token"
            why = " (content that is normalized, or not special, is lower-cased)" if is_cased else ""
            raise UserError(
                f"The folder of {where} calls the {token} token {shown(name)} (content of {key}), and its tokenizer "
                f"{shown(own[token])}{why}; make both say the same."
            )
    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    if unmarked := [name for name in own.values() if name not in marked]:
        tokenizer.add_special_tokens(unmarked)
        note(f"{where} does not mark {', '.join(unmarked)} as special; they are now found in texts")
    return tokenizer


def _settle_unknown(tokenizer: Tokenizer, where: str, name: str | None) -> None:
    """Have the model use an unknown piece that its vocabulary holds; those that need one fail at the first unknown word."""
    unknown, pieces = getattr(tokenizer.model, "unk_token", None), tokenizer.get_vocab(with_added_tokens=False)
    if isinstance(tokenizer.model, models.Unigram):
        try:
            tokenizer.encode("\U00012000")  # a letter of cuneiform
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"The tokenizer {where} has no unknown piece ({error}); set its `unk_id`.") from error
        return
    if unknown in pieces:
        return
    if isinstance(tokenizer.model, models.BPE) and unknown is None:
        return  # it has a piece for every byte, or leaves out what it does not know
    known = next((piece for piece in (name, "[UNK]", *OTHER_NAMES["[UNK]"]) if piece in pieces), None)
    if known is None:
        raise UserError(
            f"The tokenizer {where} calls its unknown piece {shown(unknown)}, and its vocabulary has none of that name; "
            "add it to the vocabulary, or take another tokenizer."
        )
    tokenizer.model.unk_token = known
    note(f"{where} calls its unknown piece {shown(unknown)}, which its vocabulary lacks; {known!r} is used")


LONGEST_WORD = 100
"""Characters of the longest word that a tokenizer trained here cuts into pieces; a longer one is [UNK], as in BERT."""


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a lower-casing, accent-stripping WordPiece tokenizer of at most `vocab_size` tokens.

    Encoding wraps text as `[CLS] text [SEP]` and pairs as `[CLS] a [SEP] b [SEP]`. The same documents give the same
    tokenizer. An interrupt ends the training at once.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [_without_long_words(normalizer.normalize_str(document), pre_tokenizer) for document in documents]
    standalone = {
        c for c in set().union(*texts) if len(pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(f"a{c}a"))) == 3
    }
    alphabet = _alphabet(texts, standalone, vocab_size)
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    draft.pre_tokenizer = pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Left to itself the trainer numbers "##" pieces in the order of a randomised hash map.
        special_tokens=[*SPECIAL_TOKENS, *(f"##{c}" for c in alphabet if c not in standalone)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    _interruptibly(lambda: draft.train_from_iterator(texts, trainer))
    tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids.sep), ("[CLS]", ids.cls))
    return tokenizer


_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def _without_long_words(text: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """Take words out of a text that will be [UNK], for which the trainer would need the square of their length."""

    def short_words(run: re.Match[str]) -> str:
        words = (word for word, _ in pre_tokenizer.pre_tokenize_str(run.group()))
        return " ".join(word for word in words if len(word) <= LONGEST_WORD)

    return _LONG.sub(short_words, text)


def _interruptibly(work: Callable[[], None]) -> None:
    """Do work that lets go of Python for minutes, so that a signal is heard meanwhile."""
    failed: list[BaseException] = []

    def worker() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=worker, daemon=True)  # one that is left behind does not keep the process
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]


RARE = 1e-4
"""Share of a text's characters that may stay out of the alphabet for being the rarest."""


def _alphabet(texts: Iterable[str], standalone: set[str], vocab_size: int) -> list[str]:
    """Find the most frequent characters that are not blanks, ties by code point, and sort them.

    They are a thousand or a quarter of the vocabulary, or as many as it takes to write all but RARE of the text, and leave a
    quarter of the vocabulary to other pieces. A character takes two places, unless it is a word by itself (`standalone`:
    punctuation, Chinese characters).
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    left = sum(counts[c] for c in ranked)
    rare, places, taken = RARE * left, 3 * vocab_size // 4, 0
    for c in ranked:
        places -= 1 if c in standalone else 2
        if places < 0 or (taken >= min(1000, vocab_size // 4) and left <= rare):
            break
        left -= counts[c]
        taken += 1
    return sorted(ranked[:taken])


def unknown_characters(tokenizer: Tokenizer, texts: list[str], unknown: int) -> tuple[int, int]:
    """Count the texts' characters that are lost to the unknown piece, and all that are not blanks."""
    lost = total = 0
    for text, row in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        spans = (text[a:b] for number, (a, b) in zip(row.ids, row.offsets, strict=True) if number == unknown)
        lost += sum(len("".join(span.split())) for span in spans)
        total += len("".join(text.split()))
    return lost, total


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash a tokenizer; equal ones have equal hashes."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

"""A small vocabulary in CLIP's layout, and its tokenizer as the `tokenizers` library builds it; imports no torch."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("a", "photo", "of", "the", "cat", "dog", "red", "astronaut", "riding", "horse", "on", "mars", "watercolour")
TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(tokens, merges) in CLIP's own order: bytes ("!" is 0), bytes that end a word, merges, start and end of text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda symbol: (ord(symbol) > 255, ord(symbol)))
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[(parts[0], parts[1])] = None
            parts[:2] = [parts[0] + parts[1]]
    tokens += [left + right for left, right in merges]
    tokens += [START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, list(merges)


def clip_tokenizer(*, pad: str = END, length: int = TOKENS) -> Tokenizer:
    """What a bundle's tokenizer.json holds: it cuts and pads by itself."""
    tokens, merges = vocabulary()
    tokenizer = Tokenizer(
        models.BPE(tokens, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, tokens[END]), (START, tokens[START]), add_prefix_space=False, trim_offsets=False
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokens[pad], pad_token=pad)
    return tokenizer

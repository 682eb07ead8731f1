"""Small tokenizers of the families that decode differently: bytes, pieces with a space mark, pieces of words."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = [chr(code) for code in range(33, 127)]
MARKERS = ["<tool>", "</tool>"]


def byte_level() -> Any:
    """As of GPT-2, Llama 3 and Qwen: every token is bytes, the space one of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "Ġ'", "Ġ.", "Ġx", "ä½", "éĤ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def sentencepiece() -> Any:
    """As of Llama 2: ▁ for a space, one put before the text and taken away by the decoder, bytes for the rest."""
    tokenizer = _pieces()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _wrapped(tokenizer)


def metaspace() -> Any:
    """As of T5 and Mistral: the same by Metaspace."""
    tokenizer = _pieces()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return _wrapped(tokenizer)


def word_pieces(cleanup: bool = True) -> Any:
    """As of BERT: lower case, a space before every token but pieces that continue a word, and punctuation tidied."""
    words = ["x", "do", "not", "n't", "=", ".", ",", "'", "?", "if", "a", "else", "b", "漢", "##s", "##ing", "##é"]
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return _wrapped(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=cleanup)


def _pieces() -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "▁b", "▁▁", "é", "漢", "▁def"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def _wrapped(tokenizer: Tokenizer, **options: Any) -> Any:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>", *MARKERS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


FAMILIES = {function.__name__: function for function in (byte_level, sentencepiece, metaspace, word_pieces)}

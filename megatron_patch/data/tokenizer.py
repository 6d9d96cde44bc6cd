"""Tokenizers from a folder, also from one that holds nothing but a sentencepiece model."""

from pathlib import Path
from typing import Any

from megatron_patch.errors import UserError

# Holds what implementations read differently: a prefix, two spaces, a digit, other alphabets, a newline.
PROBE = "A chat,  USER: 7 é 赤い\nx"


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder.  Raises UserError."""
    from transformers import AutoTokenizer

    # Checked here: a name that is no folder would be looked up on the hub.
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; wanted the one with the tokenizer (llava/ of a checkpoint)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever transformers makes of strange files
        raise UserError(
            f"{folder}: no tokenizer that transformers can load ({' '.join(str(error).split())[:300]}); "
            "wanted tokenizer.json or tokenizer.model"
        ) from None
    model = Path(folder) / "tokenizer.model"
    if model.is_file() and not (Path(folder) / "tokenizer.json").is_file() and tokenizer.is_fast:
        _put_prefix(tokenizer, model)
    return tokenizer


def _put_prefix(tokenizer: Any, model: Path) -> None:
    """transformers 5.23: a sentencepiece model whose folder names no tokenizer class is read without the space that
    sentencepiece puts before a text, so the first word of each becomes other tokens.  Put it back, and compare.

    Remove when test_a_bare_sentencepiece_model_is_read_as_sentencepiece_does passes without it.
    """
    import sentencepiece
    from tokenizers import pre_tokenizers

    try:
        judge = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except RuntimeError:
        return  # a model of another kind (tiktoken) under the same name
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    wanted, got = judge.encode(PROBE), backend.encode(PROBE, add_special_tokens=False).ids
    if wanted != got:
        raise UserError(
            f"{model}: transformers reads it differently from sentencepiece ({PROBE!r} becomes {got}, "
            f"sentencepiece says {wanted}); put the model's tokenizer.json beside it"
        )

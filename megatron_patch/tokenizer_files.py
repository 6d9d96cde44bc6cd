"""Tokenizers of a folder, with sentencepiece's own ids where only its model lies there, as in Vicuna and LLaVA-1.5."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_patch.errors import UserError

# Holds what implementations read differently: a prefix, two spaces, a digit, other alphabets, a newline.
PROBE = "A chat,  USER: 7 é 赤い\nx"


def load_tokenizer(folder: str | Path, config: Any = None) -> Any:
    """The tokenizer of a folder.

    Args:
        config: transformers' config object of the model, where the folder's config.json is none that it knows.
    Raises:
        UserError: there is no tokenizer that transformers can load from these files, or it reads a sentencepiece model
            differently from sentencepiece.
    """
    # Imported here: it takes two seconds, for those who load one only.
    from transformers import AutoTokenizer

    # Checked here: a name that is no folder would be looked up on the hub.
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; wanted the one with the tokenizer (llava/ of a checkpoint)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config or _bare_config(Path(folder)), local_files_only=True
        )
    except Exception as error:  # whatever transformers makes of strange files
        raise UserError(f"{folder} has no tokenizer that transformers can load: {error}") from error
    model = Path(folder) / "tokenizer.model"
    if model.is_file() and not (Path(folder) / "tokenizer.json").is_file() and tokenizer.is_fast:
        _read_as_sentencepiece(tokenizer, model)
    return tokenizer


def with_exact_offsets(backend: Any) -> Any:
    """The same tokenizer of the tokenizers library, whose tokens cover the spaces that they hold.

    Ids stay.  Byte-level tokenizers like Llama 3's leave the space of ` word` out of the token's characters, and
    transformers then finds no token where an answer begins with a space.
    """
    values = json.loads(backend.to_str())
    parts = [values.get("pre_tokenizer") or {}, values.get("post_processor") or {}]
    for part in parts:
        parts += part.get("pretokenizers", []) + part.get("processors", [])
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    return type(backend).from_str(json.dumps(values, ensure_ascii=False))


def _bare_config(folder: Path) -> Any:
    """config.json as AutoTokenizer would read it, without its model's class; None where that class may matter.

    It matters where tokenizer_config.json names no class (transformers 5.23).  Else its import would be for nothing:
    Llama's takes two seconds, with half of transformers.generation and torch._dynamo.
    """
    try:
        config, tokenizer = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "tokenizer_"))
    except (OSError, ValueError):
        return None  # transformers knows what is wrong
    if not config.get("model_type") or not tokenizer.get("tokenizer_class"):
        return None
    return SimpleNamespace(**config | {"_name_or_path": str(folder)})


def _read_as_sentencepiece(tokenizer: Any, path: Path) -> None:
    """transformers 5.23 makes a tokenizer of a sentencepiece model with two mistakes, fixed here:

    - It merges in the order of the ids, not of the scores (SentencePieceExtractor), so that two spaces of Llama's and
      Mistral's models, id 259 but last in score, swallow the space of the word behind them.
    - Where the folder names no tokenizer class, the space that sentencepiece puts before a text is missing.

    Remove when test_tokenizer_files.py passes without it.
    """
    import sentencepiece
    from tokenizers import decoders, models, pre_tokenizers

    try:
        judge = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        return  # a model of another kind (tiktoken) under the same name
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.model, models.BPE):
        backend.model = _byte_pairs(judge)
    if backend.pre_tokenizer is None and judge.encode("A", out_type=str)[0].startswith("▁"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    wanted, got = judge.encode(PROBE), backend.encode(PROBE, add_special_tokens=False).ids
    if wanted != got:
        raise UserError(
            f"{path}: transformers reads it differently from sentencepiece ({PROBE!r} becomes {got}, "
            f"sentencepiece says {wanted}); put the model's tokenizer.json beside it"
        )


def _byte_pairs(judge: Any) -> Any:
    """The BPE model of a sentencepiece processor, its merges in the order of the scores."""
    from tokenizers import models

    pieces = {judge.id_to_piece(number): number for number in range(len(judge))}
    merges = []
    for piece, number in pieces.items():
        if judge.is_control(number) or judge.is_byte(number) or judge.is_unknown(number):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in pieces and right in pieces]
        known.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        merges += [(judge.get_score(number), pair) for pair in known]
    merges.sort(key=lambda scored: -scored[0])
    return models.BPE(
        vocab=pieces,
        merges=[pair for _, pair in merges],
        unk_token=judge.id_to_piece(judge.unk_id()),
        fuse_unk=True,
        byte_fallback=any(judge.is_byte(number) for number in range(len(judge))),
    )

"""What a user of an exported folder meets first: tokenizer, chat template and generation config, all as trained.

The tokenizer is written for every transformers from 4.57 on: as the plain PreTrainedTokenizerFast of what training
tokenized with, without the fields that only version 5 reads.
"""

from pathlib import Path
from typing import Any

from megatron_patch.conversion.hub_files import read_json, write_json
from megatron_patch.data.chat_template import chat_template, where_spaces_stand
from megatron_patch.data.conversation import ConversationEncoder, Exchange
from megatron_patch.data.templates import IMAGE_MARK, find_template
from megatron_patch.errors import UserError
from megatron_patch.llava_folder import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    LlavaFolder,
    TrainingSettings,
)
from megatron_patch.tokenizer_files import PROBE, load_tokenizer, with_exact_offsets

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OLD_TEMPLATES = ("chat_template.json", CHAT_TEMPLATE)  # of the model that the training began with
_ANSWERS = ("A red seven.", "赤い", "4 of 7")


def write_tokenizer(folder: Path, hub: Path) -> Any:
    """Write the tokenizer of the checkpoint's llava/ folder `hub`; returns it as transformers loads it from `folder`.

    Raises:
        UserError: what was written tokenizes differently.
    """
    from transformers import PreTrainedTokenizerFast

    trained = load_tokenizer(hub)
    with_exact_offsets(trained.backend_tokenizer).save(str(folder / TOKENIZER))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": trained.model_max_length,
        "padding_side": trained.padding_side,
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: token for name in _NAMED if (token := getattr(trained, name)) is not None}
    # version 4's name of what version 5 calls extra_special_tokens; both read it
    config["additional_special_tokens"] = list(map(str, trained.extra_special_tokens))
    write_json(folder / TOKENIZER_CONFIG, config)
    written = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    for probe in (
        "What is in the picture?",
        " a  b\tc\nd",
        f"Grüße, 世界! {IMAGE_MARK}\n42",
        "USER: x ASSISTANT: y</s>",
    ):
        wanted, got = trained(probe)["input_ids"], written(probe)["input_ids"]
        if wanted != got:
            raise UserError(
                f"{hub}: the exported tokenizer cuts {probe!r} into {got}, training into {wanted}; convert the source "
                "again with a tokenizer.json that transformers saved"
            )
    return written


def write_sentencepiece_config(folder: Path, tokenizer: Any) -> None:
    """Have who wants no fast tokenizer, as the original code, read the folder's tokenizer.model, with the same ids.

    Left alone where there is none, or one that is not what the tokenizer was made of.
    """
    import sentencepiece

    backend = tokenizer.backend_tokenizer
    try:
        judge = sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE))
        spaces = where_spaces_stand(backend, tokenizer.bos_token)
    except (OSError, RuntimeError, UserError):  # not there, tiktoken's under the same name, of another kind
        return
    if judge.encode(PROBE) != backend.encode(PROBE, add_special_tokens=False).ids:
        return
    added = backend.get_added_tokens_decoder()
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = read_json(folder / TOKENIZER_CONFIG) | {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": tokenizer.bos_token is not None,
        "add_eos_token": False,
        # whether a space is put behind special tokens too
        "legacy": spaces is None,
        "added_tokens_decoder": {
            str(number): {name: getattr(token, name) for name in fields} for number, token in added.items()
        },
    }
    write_json(folder / TOKENIZER_CONFIG, config)


def write_chat_files(
    folder: Path, hub: Path, tokenizer: Any, settings: TrainingSettings | None, bos: bool
) -> list[str]:
    """Write chat template and generation config as the training's template wants them.

    Where no training is known, those of the source stay.  A chat template is rendered and compared with what training
    tokenizes before it is kept.

    Args:
        tokenizer: of the exported folder, with `<image>`.
        bos: the text begins with BOS, for transformers; else for a reader that adds it.
    Returns:
        Notes for the user: why there is no chat template.
    """
    if settings is None or settings.conversation_template is None:
        return []
    for name in _OLD_TEMPLATES:
        (folder / name).unlink(missing_ok=True)
    try:
        encoder = ConversationEncoder(
            tokenizer,
            settings.conversation_template,
            LlavaFolder(hub).geometry().image_token_id,
            1,
            image_conv_front=settings.image_conv_front,
            image_start_end=settings.image_start_end,
        )
    except UserError as error:
        return [f"no {CHAT_TEMPLATE}: {error}"]
    _write_generation_config(folder, tokenizer, encoder)
    try:
        text = _chat_template(tokenizer, encoder, settings, bos)
    except UserError as error:
        return [f"no {CHAT_TEMPLATE}: {error}"]
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    return []


def _write_generation_config(folder: Path, tokenizer: Any, encoder: ConversationEncoder) -> None:
    """Greedy, up to the token that ends an answer; with a template that teaches none, the tokenizer's own."""
    ending = encoder.ending_id if encoder.ending_id is not None else tokenizer.eos_token_id
    values = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ending, "pad_token_id": encoder.pad_token_id}
    values = {name: value for name, value in values.items() if value is not None}
    write_json(folder / GENERATION_CONFIG, values | {"do_sample": False})


def _chat_template(tokenizer: Any, encoder: ConversationEncoder, settings: TrainingSettings, bos: bool) -> str:
    """The chat template, compared with the encoder.

    Raises:
        UserError: jinja cannot say what training did.
    """
    if settings.image_tiles != (1, 1):
        raise UserError(
            f"IMAGE_TILES={settings.spelled('image_tiles')}: an image is several for the model, no processor makes it"
        )
    text = chat_template(
        find_template(settings.conversation_template),
        tokenizer.bos_token,
        tokenizer.eos_token,
        image_conv_front=settings.image_conv_front,
        image_start_end=settings.image_start_end,
        spaced_unless=where_spaces_stand(tokenizer.backend_tokenizer, tokenizer.bos_token) if bos else None,
        bos_in_front=bos,
    )
    for exchanges, system in _conversations(find_template(settings.conversation_template).most_exchanges):
        chat = [{"role": "system", "content": system}] if system is not None else []
        for exchange in exchanges:
            chat.append({"role": "user", "content": exchange.question})
            chat.append({"role": "assistant", "content": exchange.answer})
        if bos:
            made = tokenizer.apply_chat_template(
                chat, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
            )
            encoded = encoder.encode(exchanges, system)
            same = (made["input_ids"], made["assistant_masks"]) == (encoded.ids, list(map(int, encoded.trained)))
        else:
            made = tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False)
            same = made == encoder.prompt(exchanges, system)
        if not same:
            raise UserError(f"what jinja makes of the template is not what was trained, for example of {chat}")
    return text


def _conversations(most_exchanges: int) -> list[tuple[list[Exchange], str | None]]:
    """(exchanges, system sentence) with no, one and two images, one and three turns."""
    found = []
    for turns in (1,) if 0 < most_exchanges < 3 else (1, 3):
        for images in range(3):
            questions = ["What is this?", "数は？", "3 - why?"][:turns]
            marks = [images] if turns == 1 else [int(number < images) for number in range(turns)]
            exchanges = [
                Exchange(f"{IMAGE_MARK}\n" * count + question, answer)
                for count, question, answer in zip(marks, questions, _ANSWERS, strict=False)
            ]
            found += [(exchanges, None), (exchanges, ""), (exchanges, "Be brief.")]
    return found

"""chat_template.jinja, as transformers runs it, against ConversationEncoder: ids and what is trained."""

import itertools
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.chat_template import chat_template, where_spaces_stand
from megatron_patch.data.conversation import ConversationEncoder, Exchange
from megatron_patch.data.record import read_exchanges
from megatron_patch.data.templates import TEMPLATES, Template, find_template
from megatron_patch.errors import UserError
from megatron_patch.tokenizer_files import load_tokenizer, with_exact_offsets
from tests.data.golden.derive import FOLDER

KINDS = sorted(path.name for path in (FOLDER / "tokenizers").iterdir())
TURNS = (("which digit is it?", "a seven."), ("what colour is the ink?", "red"), ("これは何ですか？", "赤い色のインク。"))


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    """As an export writes them, and with what stands beside images."""
    found = {}
    for kind in KINDS:
        source = load_tokenizer(FOLDER / "tokenizers" / kind)
        found[kind] = PreTrainedTokenizerFast(
            tokenizer_object=with_exact_offsets(source.backend_tokenizer),
            bos_token=source.bos_token,
            eos_token=source.eos_token,
        )
        found[kind].add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    return found


def of_tokenizer(tokenizer: Any, template: Template, **options: bool) -> str:
    spaced = where_spaces_stand(tokenizer.backend_tokenizer, tokenizer.bos_token)
    return chat_template(template, tokenizer.bos_token, tokenizer.eos_token, **options, spaced_unless=spaced)


def records(images: int, turns: int) -> list[dict]:
    """LLaVA's conversations with the images at the front of the first questions."""
    found = []
    for number, (question, answer) in enumerate(TURNS[:turns]):
        here = images if turns == 1 else int(number < images)
        found += [{"from": "human", "value": "<image>\n" * here + question}, {"from": "gpt", "value": answer}]
    return found


def messages(conversations: list[dict], parts: bool = True) -> list[dict]:
    """The same as transformers takes it; parts: images are parts of their own, else marks in the text."""
    found = []
    for turn in conversations:
        text, role = turn["value"], "user" if turn["from"] == "human" else "assistant"
        count = text.count("<image>\n") if parts else 0
        content = [{"type": "image"}] * count + [{"type": "text", "text": text.replace("<image>\n", "")}]
        found.append({"role": role, "content": content if count else text})
    return found


def both(tokenizer: Any, name: str, conversations: list[dict], chat: list[dict], **options: bool) -> tuple[Any, Any]:
    """(ids, trained) as the encoder says, and as transformers makes them of the jinja file."""
    encoder = ConversationEncoder(tokenizer, name, tokenizer.convert_tokens_to_ids("<image>"), 1, **options)
    images = sum(turn["value"].count("<image>") for turn in conversations)
    encoded = encoder.encode(read_exchanges(conversations, images))
    got = tokenizer.apply_chat_template(
        chat,
        chat_template=of_tokenizer(tokenizer, find_template(name), **options),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return (encoded.ids, list(map(int, encoded.trained))), (got["input_ids"], got["assistant_masks"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", ["", "front", "start_end", "front start_end"])
def test_ids_and_mask_are_training_s(tokenizers, name: str, kind: str, options: str) -> None:
    chosen = {f"image_{'conv_' if option == 'front' else ''}{option}": True for option in options.split()}
    for images, turns, parts in itertools.product((0, 1, 2), (1, 3), (True, False)):
        if turns > (TEMPLATES[name].most_exchanges or turns):
            continue
        conversations = records(images, turns)
        wanted, got = both(tokenizers[kind], name, conversations, messages(conversations, parts), **chosen)
        assert got == wanted, (images, turns, parts)

"""chat_template.jinja, as transformers runs it, against ConversationEncoder: ids and what is trained."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.chat_template import chat_template, where_spaces_stand
from megatron_patch.data.conversation import ConversationEncoder, Exchange
from megatron_patch.data.record import read_exchanges
from megatron_patch.data.templates import TEMPLATES, Template, find_template
from megatron_patch.errors import UserError
from megatron_patch.tokenizer_files import load_tokenizer, with_exact_offsets
from tests.data.golden.derive import FOLDER

KINDS = sorted(path.name for path in (FOLDER / "tokenizers").iterdir())
TURNS = (("which digit is it?", "a seven."), ("what colour?", "red"), ("これは何ですか？", "赤い色のインク。"))


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


def test_text_before_its_image_and_a_system_message(tokenizers) -> None:
    """The mark of a single image goes to the front; several stay where they are; an empty system sentence is none."""
    tokenizer = tokenizers["qwen"]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text, image = {"type": "text", "text": "which digit is it? "}, {"type": "image"}
    encoder = ConversationEncoder(tokenizer, "qwen", image_id, 1)
    jinja = of_tokenizer(tokenizer, TEMPLATES["qwen"])
    for content, question in (
        ([text, image], "<image>\nwhich digit is it?"),
        ([text, image, image], "which digit is it? <image>\n<image>\n"),
        ("<image>\nis <image> greater?", "<image>\nis <image> greater?"),
    ):
        for system in (None, "", "Be brief."):
            chat = [{"role": "system", "content": system}] if system is not None else []
            chat.append({"role": "user", "content": content})
            for prompt in (True, False):
                got = tokenizer.apply_chat_template(
                    chat, chat_template=jinja, add_generation_prompt=prompt, return_dict=False
                )
                assert got == encoder.encode([Exchange(question, None)], system).ids


OWN = Template(
    question="{bos}\"Q\" {{ x }} {% y %} \\n 'é': {question}\r\n{# z #}",
    answer="\tA: {answer}{ending}",
    system='It\'s "mine".',
    system_turn="{system}\\",
    between=" | ",
)


@pytest.mark.parametrize("kind", KINDS)
def test_signs_of_jinja_in_a_template_of_ones_own(tokenizers, kind: str, tmp_path) -> None:
    """Also a text that begins with BOS, which keeps one."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps(dataclasses.asdict(OWN)))
    for turns, system in ((1, None), (3, ""), (3, "x")):
        conversations = records(1, turns)
        chat = messages(conversations)
        tokenizer = tokenizers[kind]
        encoder = ConversationEncoder(tokenizer, str(path), tokenizer.convert_tokens_to_ids("<image>"), 1)
        encoded = encoder.encode(read_exchanges(conversations, 1), system)
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        got = tokenizer.apply_chat_template(
            chat, chat_template=of_tokenizer(tokenizer, OWN), return_dict=True, return_assistant_tokens_mask=True
        )
        assert (got["input_ids"], got["assistant_masks"]) == (encoded.ids, list(map(int, encoded.trained)))


USER, ANSWER = {"role": "user", "content": "which?"}, {"role": "assistant", "content": "seven"}
REFUSED = {
    "a system message alone": ([{"role": "system", "content": "x"}], "there is no question"),
    "an answer first": ([ANSWER], "roles must be user and assistant in turn"),
    "two questions": ([USER, USER], "roles must be user and assistant in turn"),
    "a tool's answer": ([USER, {"role": "tool", "content": "x"}], "roles must be user and assistant in turn"),
    "an image in an answer": ([USER, ANSWER | {"content": "<image>"}], "an answer holds an image"),
    "an image in the system": ([{"role": "system", "content": [{"type": "image"}]}, USER], "the system message holds"),
    "a video": ([USER | {"content": [{"type": "video"}]}], "a part of type video"),
    "a second question of plain": ([USER, ANSWER, USER], "no more than 1 question"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_not_trained_is_refused(tokenizers, case: str) -> None:
    chat, told = REFUSED[case]
    tokenizer = tokenizers["llama_3"]
    with pytest.raises(TemplateError, match=told):
        tokenizer.apply_chat_template(chat, chat_template=of_tokenizer(tokenizer, TEMPLATES["plain"]), tokenize=False)


def test_tools_are_refused(tokenizers) -> None:
    tokenizer = tokenizers["llama_3"]
    jinja = of_tokenizer(tokenizer, TEMPLATES["v1"])
    with pytest.raises(TemplateError, match="not trained with tools"):
        tokenizer.apply_chat_template([USER], tools=[{"name": "x"}], chat_template=jinja, tokenize=False)


def test_spaces_stand_where_sentencepiece_wants_them(tokenizers) -> None:
    spaces = {
        kind: where_spaces_stand(tokenizers[kind].backend_tokenizer, tokenizers[kind].bos_token) for kind in KINDS
    }
    assert [kind for kind in KINDS if spaces[kind] is not None] == ["sentencepiece_unigram"]
    assert "<|im_end|>" in spaces["sentencepiece_unigram"]


def test_a_tokenizer_that_no_space_helps_is_refused() -> None:
    """One to which `<image>` is no token, but the letters of a word."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "A": 1, "<image>": 2}, unk_token="<unk>"))
    with pytest.raises(UserError, match="the tokenizer cuts text behind <image>"):
        where_spaces_stand(tokenizer, None)


def test_without_bos_the_text_is_the_encoder_s_prompt(tokenizers) -> None:
    """For the original code, which adds BOS."""
    tokenizer = tokenizers["sentencepiece_bpe"]
    encoder = ConversationEncoder(tokenizer, "llama_2", tokenizer.convert_tokens_to_ids("<image>"), 1)
    jinja = chat_template(TEMPLATES["llama_2"], tokenizer.bos_token, tokenizer.eos_token, bos_in_front=False)
    conversations = records(1, 3)
    got = tokenizer.apply_chat_template(messages(conversations), chat_template=jinja, tokenize=False)
    assert got == encoder.prompt(read_exchanges(conversations, 1)) and not got.startswith("<s>")

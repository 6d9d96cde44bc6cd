"""Templates in jinja: what `apply_chat_template` of transformers, and all that build on it, make of messages.

The file says for messages what record.py and conversation.py say for records, token for token, and
`{% generation %}` stands around what is trained.  Only the lines that a template needs are written.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_patch.data.conversation import IMAGE_END, IMAGE_START
from megatron_patch.data.templates import IMAGE_MARK, Template, WrittenTemplate, write_out
from megatron_patch.errors import UserError

# Beginnings of a text that tokenizers treat differently: a letter, a digit, a newline, a mark, other alphabets.
_PROBES = ("A", "7 x", "\nwhich?", ", then", "é", "赤い")


def chat_template(
    template: Template,
    bos: str | None,
    eos: str | None,
    image_conv_front: bool = False,
    image_start_end: bool = False,
    spaced_unless: Sequence[str] | None = None,
    bos_in_front: bool = True,
) -> str:
    """The template as a chat_template.jinja of one tokenizer.

    Roles are system (at most one, first; in place of the template's own sentence, and an empty one means none), user
    and assistant in turn; content is text or a list of text and image parts.  An image part is `<image>` and a newline
    where it stands; of a single image in a conversation the mark goes to the front of its question, as in training.
    A conversation that ends with a question is a prompt, with or without add_generation_prompt.  Whatever was not
    trained (images in answers, other roles and parts, tools, more questions than the template takes) raises.

    Args:
        bos, eos: the tokenizer's tokens, None where it has none.
        image_conv_front, image_start_end: as ConversationEncoder takes them.
        spaced_unless: what where_spaces_stand() says of the tokenizer.
        bos_in_front: begin with BOS, as transformers wants it, which tokenizes a chat without special tokens.
    """
    words = write_out(template, bos, eos)
    first = bos if bos and bos_in_front else ""
    lines = _MACROS.splitlines()
    space = spaced_unless is not None
    if space:
        lines += _space_macros(words, spaced_unless)
    lines += _beginning(words)
    lines += [
        "{%- for message in exchanges %}",
        "    {%- set text = words(message['content']) %}",
        "    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}",
        "        {{- raise_exception('roles must be user and assistant in turn, user first') }}",
        "    {%- endif %}",
        "    {%- if message['role'] == 'user' %}",
        *_indented(_question(words, first, image_conv_front, image_start_end, space), 2),
        "        {{- chat.text }}",
        "    {%- else %}",
        *_indented(_answer(words, space), 2),
        "    {%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(lines) + "\n"


def where_spaces_stand(backend: Any, bos: str | None) -> list[str] | None:
    """Must a space stand behind `<image>` and BOS, so that the text there gets the tokens it has on its own?

    That is how training tokenizes it, and what sentencepiece's tokenizers with a space before the first word only
    (Mistral's, llm-jp's) do not do behind a special token by themselves.

    Args:
        backend: of the tokenizers library.
    Returns:
        None: no.  Else the special tokens, before which none must stand.
    Raises:
        UserError: a space does not help either.
    """
    tokens = [IMAGE_MARK, bos] if bos else [IMAGE_MARK]
    for space in ("", " "):
        if all(
            _ids(backend, token + space + text) == _alone(backend, token, text) for token in tokens for text in _PROBES
        ):
            return [token.content for token in backend.get_added_tokens_decoder().values()] if space else None
    raise UserError(
        f"the tokenizer cuts text behind {' and '.join(tokens)} into other tokens than training, which cuts it alone"
    )


def _ids(backend: Any, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _alone(backend: Any, token: str, text: str) -> list[int]:
    return [backend.token_to_id(token), *_ids(backend, text)]


# ---------------------------------------------------------------- the pieces of the file

_MACROS = """\
{%- macro words(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- elif part['type'] == 'image' %}
                {{- '<image>\\n' }}
            {%- else %}
                {{- raise_exception('content holds a part of type ' ~ part['type'] ~ ', wanted text or image') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}"""


def _text(text: str) -> str:
    """A text as jinja's literal."""
    return json.dumps(text, ensure_ascii=False)


def _joined(*expressions: str) -> str:
    """Expressions behind each other; empty literals left out."""
    return " ~ ".join(expression for expression in expressions if expression != '""') or '""'


def _around(text: str, placeholder: str, expression: str) -> str:
    """A text with an expression in place of its placeholder."""
    before, _, after = text.partition(placeholder)
    return _joined(_text(before), expression, _text(after))


def _indented(lines: Iterable[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def _when(condition: str, *lines: str) -> list[str]:
    return [f"{{%- if {condition} %}}", *_indented(lines, 1), "{%- endif %}"]


def _space_macros(words: WrittenTemplate, special: Sequence[str]) -> list[str]:
    """behind(text): text behind an image or BOS, with a space unless one is there, or a special token."""
    texts = " ".join((*words.question, *words.answer, words.system_turn, words.opening, words.picture_turn))
    ours = {token for token in special if token in texts} | {IMAGE_MARK, IMAGE_START, IMAGE_END}
    begins = ", ".join(map(_text, (" ", *sorted(ours))))
    return [
        "{%- macro behind(text) %}",
        f"    {{{{- ' ' if text and not text.startswith(({begins},)) else '' }}}}{{{{- text }}}}",
        "{%- endmacro %}",
        "{%- macro spaced(text) %}",
        "    {%- for piece in text.split('<image>') %}",
        "        {{- piece if loop.first else '<image>' ~ behind(piece) }}",
        "    {%- endfor %}",
        "{%- endmacro %}",
    ]


def _beginning(words: WrittenTemplate) -> list[str]:
    """Before the loop: the system sentence, the messages behind it, how many images they hold."""
    return [
        f"{{%- set chat = namespace(system={_text(words.system)}, images=0, text='', open=false) %}}",
        *_when("tools", "{{- raise_exception('the model was not trained with tools') }}"),
        "{%- if messages and messages[0]['role'] == 'system' %}",
        "    {%- set chat.system = words(messages[0]['content']) %}",
        "    {%- set exchanges = messages[1:] %}",
        "{%- else %}",
        "    {%- set exchanges = messages %}",
        "{%- endif %}",
        *_when("'<image>' in chat.system", "{{- raise_exception('the system message holds an image') }}"),
        *_when("not exchanges", "{{- raise_exception('there is no question: wanted a message of the user') }}"),
        "{%- for message in exchanges if message['role'] == 'user' %}",
        "    {%- set chat.images = chat.images + words(message['content']).split('<image>') | length - 1 %}",
        "{%- endfor %}",
    ]


def _question(words: WrittenTemplate, bos: str, front: bool, start_end: bool, space: bool) -> list[str]:
    """The text of a user's message, from what stands before it to where its answer begins, in chat.text."""
    lines = []
    if words.most_exchanges:
        message = f"the template takes no more than {words.most_exchanges} question(s)"
        lines += _when(f"loop.index0 >= {2 * words.most_exchanges}", f"{{{{- raise_exception('{message}') }}}}")
    lines.append("{%- set chat.text = text %}")
    marks = "'<image>' * chat.images"
    without = "chat.text.replace('<image>', '') | trim"
    if front:
        lines += _when("'<image>' in text", f"{{%- set chat.text = {without} %}}")
        if not words.picture_turn:
            marked = f"({marks} ~ '\\n' ~ chat.text) | trim"
            lines += _when("loop.first and chat.images", f"{{%- set chat.text = {marked} %}}")
    else:
        marked = f"('<image>\\n' ~ ({without})) | trim"
        lines += _when("chat.images == 1 and '<image>' in text", f"{{%- set chat.text = {marked} %}}")
    if words.images_only:
        lines.append("{%- set chat.text = '<image>' * (chat.text.split('<image>') | length - 1) %}")
    lines += _frame(words, marks if front else "")
    if start_end:
        beside = IMAGE_START + IMAGE_MARK + IMAGE_END
        lines.append(f"{{%- set chat.text = chat.text.replace('<image>', {_text(beside)}) %}}")
    if space:
        lines += [
            "{%- set chat.open = chat.text == '' or chat.text.endswith('<image>') %}",
            "{%- set chat.text = spaced(chat.text) %}",
        ]
    if bos:
        text = "behind(chat.text)" if space else "chat.text"
        lines += _when(
            f"loop.first and not chat.text.startswith({_text(bos)})",
            f"{{%- set chat.text = {_text(bos)} ~ {text} %}}",
        )
    return lines


def _frame(words: WrittenTemplate, marks: str) -> list[str]:
    """What stands around a question; marks: of all images, where they have a turn of their own, else empty."""
    question = _joined(_text(words.question[0]), "chat.text", _text(words.question[1]))
    system = _around(words.system_turn, "{system}", "chat.system") if words.system_turn else ""
    lines = []
    if system and words.system_in_question and not words.images_only:
        lines += _when("loop.first and chat.system", f"{{%- set chat.text = {_joined(system, 'chat.text')} %}}")
    if question != "chat.text":
        lines.append(f"{{%- set chat.text = {question} %}}")
    first = []
    if marks and words.picture_turn:
        turn = _around(words.picture_turn, "{pictures}", marks)
        first += _when("chat.images", f"{{%- set chat.text = {turn} ~ chat.text %}}")
    if words.opening:
        first.append(f"{{%- set chat.text = {_text(words.opening)} ~ chat.text %}}")
    if system and not words.system_in_question:
        first += _when("chat.system", f"{{%- set chat.text = {system} ~ chat.text %}}")
    later = [f"{{%- set chat.text = {_text(words.between)} ~ chat.text %}}"] if words.between else []
    if first:
        lines += ["{%- if loop.first %}", *_indented(first, 1)]
        lines += ["{%- else %}", *_indented(later, 1)] if later else []
        lines.append("{%- endif %}")
    elif later:
        lines += _when("not loop.first", *later)
    return lines


def _answer(words: WrittenTemplate, space: bool) -> list[str]:
    """An assistant's message."""
    answer = _joined(_text(words.answer[0]), "text", _text(words.answer[1]))
    if space:
        answer = f"behind({answer}) if chat.open else {answer}"
    return [
        *_when("'<image>' in text", "{{- raise_exception('an answer holds an image') }}"),
        f"{{%- generation %}}{{{{- {answer} }}}}{{%- endgeneration %}}",
        *([f"{{{{- {_text(words.closing)} }}}}"] if words.closing else []),
    ]

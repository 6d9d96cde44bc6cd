"""Templates: how questions and answers become text, as data.

The built-in ones are the files of conversation_templates/, which say where their words come from: one more file there
is one more template.  A template is a handful of texts with placeholders in braces.  A conversation is written as

    [system_turn] opening [picture_turn] question answer closing  between question answer closing  between ...

and only `answer` is trained.  The same fields, in JSON or YAML, make a template of one's own (`load_template`).
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_patch.errors import UserError

IMAGE_MARK = "<image>"
SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Template:
    """The texts of a template.  `{bos}`, `{eos}` (the tokenizer's own tokens) and `{ending}` may stand in each.

    Raises UserError when a placeholder is missing, unknown or in the wrong text.
    """

    question: str  # around {question}; or around {pictures}, which drops the words of the question
    answer: str  # trained: around {answer}, and {ending} where there is one
    ending: str = "{eos}"  # the token by which the model ends an answer; empty: nothing is learnt as one
    system: str = ""  # the sentence where a record brings none; empty: none
    system_turn: str = ""  # around {system}; left out where there is no sentence
    system_in_question: bool = False  # system_turn opens the first question's text instead of the conversation
    opening: str = ""  # once, before everything but the system turn
    picture_turn: str = ""  # around {pictures}, with image_conv_front; empty: a line of the first question
    closing: str = ""  # after each answer, not trained
    between: str = ""  # before each question but the first
    most_exchanges: int = 0  # questions that a conversation may have; 0: any number

    def __post_init__(self) -> None:
        problems = [
            problem
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), str)
            for problem in _problems(field.name, getattr(self, field.name))
        ]
        if ("{question}" in self.question) == ("{pictures}" in self.question):
            problems.append("question wants {question} or {pictures}, one of them")
        for name, placeholder, wanted in (
            ("answer", "{answer}", True),
            ("answer", "{ending}", bool(self.ending)),
            ("system_turn", "{system}", bool(self.system or self.system_turn)),
            ("picture_turn", "{pictures}", bool(self.picture_turn)),
        ):
            if getattr(self, name).count(placeholder) != wanted:
                problems.append(f"{name} wants {placeholder} {'once' if wanted else 'nowhere, as ending is empty'}")
        if self.most_exchanges < 0:
            problems.append(f"most_exchanges is {self.most_exchanges}, wanted 0 (any number) or more")
        if problems:
            raise UserError("; ".join(problems))


# The placeholders that may stand in each text, besides {bos} and {eos}.
PLACEHOLDERS = {
    "question": ("question", "pictures", "ending"),
    "answer": ("answer", "ending"),
    "ending": (),
    "system": (),
    "system_turn": ("system", "ending"),
    "picture_turn": ("pictures", "ending"),
    "opening": ("ending",),
    "closing": ("ending",),
    "between": ("ending",),
}


def _problems(name: str, text: str) -> list[str]:
    """What is wrong with one text of a template."""
    allowed = ("bos", "eos", *PLACEHOLDERS[name])
    problems = [
        f"{name} holds {{{found}}}, wanted only {', '.join(f'{{{word}}}' for word in allowed)}"
        for found in re.findall(r"\{(\w+)\}", text)
        if found not in allowed
    ]
    if IMAGE_MARK in text:
        problems.append(f"{name} holds {IMAGE_MARK}, whose places come from the records")
    return problems


def load_template(path: Path) -> Template:
    """The template in a file: a JSON or YAML mapping with the fields of Template.  Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"template {path}: cannot be read ({error.strerror})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"template {path}: is neither JSON nor YAML ({' '.join(str(error).split())})") from None
    types = {field.name: field.type for field in dataclasses.fields(Template)}
    if not isinstance(content, dict):
        raise UserError(f"template {path}: is no mapping; wanted the fields {', '.join(types)}")
    problems = []
    if unknown := [str(name) for name in content if name not in types]:
        problems.append(f"unknown {', '.join(unknown)}; wanted only {', '.join(types)}")
    if missing := [name for name in ("question", "answer") if name not in content]:
        problems.append(f"{' and '.join(missing)} missing")
    for name, value in content.items():
        # bool is an int to isinstance, but `most_exchanges: true` is a mistake
        if name in types and type(value) is not types[name]:
            problems.append(f"{name} is {value!r}, wanted {types[name].__name__}")
    if problems:
        raise UserError(f"template {path}: {'; '.join(problems)}")
    try:
        return Template(**content)
    except UserError as error:
        raise UserError(f"template {path}: {error}") from None


# The built-in templates, one file each, by name.
FOLDER = Path(__file__).with_name("conversation_templates")
TEMPLATES = {path.stem: load_template(path) for path in sorted(FOLDER.glob("*.yaml"))}


def find_template(name_or_file: str) -> Template:
    """The template of this name, or the one in this file.  Raises UserError."""
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    if Path(name_or_file).suffix.lower() in SUFFIXES or Path(name_or_file).is_file():
        return load_template(Path(name_or_file))
    raise UserError(
        f"conversation template is {name_or_file!r}; wanted one of {', '.join(TEMPLATES)}, "
        f"or a file of one's own ({', '.join(SUFFIXES)})"
    )


@dataclass(frozen=True)
class WrittenTemplate:
    """A template with the tokenizer's tokens written out, its question and answer cut at their placeholder."""

    question: tuple[str, str]
    images_only: bool
    answer: tuple[str, str]
    ending: str
    system: str
    system_turn: str
    system_in_question: bool
    opening: str
    picture_turn: str
    closing: str
    between: str
    most_exchanges: int


def write_out(template: Template, bos: str | None, eos: str | None) -> WrittenTemplate:
    """The template's texts for one tokenizer, given its BOS and EOS tokens (None: it has none)."""
    texts = {field.name: getattr(template, field.name) for field in dataclasses.fields(template)}
    for placeholder, token in (("{bos}", bos or ""), ("{eos}", eos or "</s>")):
        texts = {name: _replace(text, placeholder, token) for name, text in texts.items()}
    texts = {name: _replace(text, "{ending}", texts["ending"]) for name, text in texts.items()}
    images_only = "{pictures}" in template.question
    for name, placeholder in (("question", "{pictures}" if images_only else "{question}"), ("answer", "{answer}")):
        before, _, after = texts[name].partition(placeholder)
        texts[name] = (before, after)
    return WrittenTemplate(images_only=images_only, **texts)


def _replace(value: Any, placeholder: str, token: str) -> Any:
    """Fields that are texts, with a placeholder written out; numbers as they are."""
    return value.replace(placeholder, token) if isinstance(value, str) else value

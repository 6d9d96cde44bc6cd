"""Templates: how questions and answers become text, as data, with the sources of their words.

A template is a handful of texts with placeholders in braces.  A conversation is written as

    [system_turn] opening [picture_turn] question answer closing  between question answer closing  between ...

and only `answer` is trained.  The same fields, in JSON or YAML, make a template of one's own (`load_template`).
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

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


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
# What NeVA's preprocess_nvgpt puts before an answer that has no label of its own.
NVGPT_LABELS = (
    "<extra_id_2>quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,"
    "correctness:4,coherence:4,complexity:4,verbosity:4\n"
)

CHATML = Template(
    question="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    answer="{answer}{ending}",
    ending="<|im_end|>",
    system_turn="<|im_start|>system\n{system}<|im_end|>\n",
    picture_turn="<|im_start|>user\n{pictures}<|im_end|>\n",
    closing="\n",
)

TEMPLATES = {
    # LLaVA, conv_llava_plain and preprocess_plain: images, caption, newline; the question's words are dropped and
    # nothing marks the end.
    "plain": Template(question="{pictures}", answer="{answer}\n", ending="", most_exchanges=1),
    # LLaVA, conv_llava_v0 as preprocess and _add_speaker_and_signal write it for training.  Its ending is a string on
    # which generation stops, no token: `###` is learnt like any other word.
    "v0": Template(
        system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        system_turn="{system}\n\n",
        opening="### ",
        picture_turn="Human: {pictures}###",
        question="Human: {question}\n### Assistant:",
        answer=" {answer}\n###",
        ending="",
        closing=" ",
    ),
    # LLaVA, conv_vicuna_v1.  The space before an answer belongs to it: a prompt ends with the colon, and the model must
    # produce what follows.
    "v1": Template(
        system=VICUNA_SYSTEM,
        system_turn="{system} ",
        picture_turn="USER: {pictures} ",
        question="USER: {question} ASSISTANT:",
        answer=" {answer}{ending}",
    ),
    # LLaVA, conv_llava_llama_2 (the one that NeVA trains with too): the system sentence within the first instruction, a
    # BOS before each further one.
    "llama_2": Template(
        system=VISION_SYSTEM,
        system_turn="<<SYS>>\n{system}\n<</SYS>>\n\n",
        system_in_question=True,
        question="[INST] {question} [/INST]",
        answer=" {answer} {ending}",
        between="{bos}",
    ),
    # LLaVA-NeXT, conv_llava_llama_3: Llama 3's own chat template.
    "llama_3": Template(
        system=VISION_SYSTEM,
        system_turn="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        picture_turn="<|start_header_id|>user<|end_header_id|>\n\n{pictures}<|eot_id|>",
        question="<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{answer}{ending}",
        ending="<|eot_id|>",
    ),
    # LLaVA, conv_mistral_instruct: llama_2 without system sentence and second BOS.  A record's own system sentence goes
    # before the question, as in the chat template of Mistral's models.
    "mistral": Template(
        system_turn="{system}\n\n",
        system_in_question=True,
        question="[INST] {question} [/INST]",
        answer=" {answer} {ending}",
    ),
    # ChatML as newer language models know it, without a system sentence of its own.
    "chatml": CHATML,
    # LLaVA 1.6, conv_chatml_direct: no newline between the turns.
    "chatml_direct": dataclasses.replace(
        CHATML,
        system="Answer the questions.",
        system_turn="<|im_start|>system\n{system}<|im_end|>",
        picture_turn="<|im_start|>user\n{pictures}<|im_end|>",
        question="<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n",
        closing="",
    ),
    # LLaVA-NeXT, conv_qwen (qwen_1_5): ChatML with Qwen's system sentence.
    "qwen": dataclasses.replace(CHATML, system="You are a helpful assistant."),
    # NeMo's NeVA, conv_nvgpt and preprocess_nvgpt.
    "nvgpt": Template(
        system=VICUNA_SYSTEM,
        system_turn="<extra_id_0>System\n{system}\n\n",
        opening="<extra_id_1>",
        picture_turn="User\n{pictures}\n<extra_id_1>",
        question="User\n{question}\n<extra_id_1>Assistant\n" + NVGPT_LABELS,
        answer="{answer}\n{ending}",
        ending="<extra_id_1>",
    ),
    # LLaVA-JP, conv_vicuna_v1: v1 in Japanese; its `<EOD|LLM-jp>` is that tokenizer's eos token.
    "japanese_v1": Template(
        system="これは好奇心旺盛なユーザーと人工知能システムのチャットです。"
        "システムはユーザーの質問に親切、詳細、丁寧に答える。",
        system_turn="{system} ",
        picture_turn="ユーザー: {pictures} ",
        question="ユーザー: {question} システム:",
        answer=" {answer}{ending}",
    ),
}


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


def load_template(path: Path) -> Template:
    """A template of one's own: a JSON or YAML mapping with the fields of Template.  Raises UserError."""
    import yaml

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

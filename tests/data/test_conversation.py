"""Conversations: ids and masks against hand-derived text, against the original's rules, and as properties."""

import functools
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_patch.data.conversation import (
    TEMPLATES,
    ConversationEncoder,
    EncodedConversation,
    Exchange,
)
from megatron_patch.data.record import read_exchanges
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.templates import load_template
from megatron_patch.errors import UserError
from megatron_patch.tokenizer_files import load_tokenizer
from tests.data.factories import SPECIAL_TOKENS
from tests.data.golden.derive import FOLDER

ROOT = Path(__file__).parents[2]
IMAGE = SPECIAL_TOKENS.index("<image>")
BOS = SPECIAL_TOKENS.index("<s>")
EOS = SPECIAL_TOKENS.index("</s>")
IMAGE_TOKENS = 3
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def make_encoder(folder: str, template: str) -> ConversationEncoder:
    return ConversationEncoder(AutoTokenizer.from_pretrained(folder), template, IMAGE, IMAGE_TOKENS)


def human(*turns: str) -> list[dict]:
    """Turns of human and gpt in alternation."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(turns)]


def trained_runs(encoded: EncodedConversation, tokenizer) -> list[str]:
    """Decoded runs of trained tokens, special tokens shown."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


ONE_IMAGE = read_exchanges(human("which digit is it?\n<image>", "a seven", "what colour?", "red"), 1)
NO_IMAGE = read_exchanges(human("what is ink?", "a fluid"), 0)
TWO_IMAGES = read_exchanges(human("is <image> or <image> greater?", "the second"), 2)
IMAGES = "<image>" * IMAGE_TOKENS

GOLDEN = [
    # template, exchanges, full text with expanded placeholders, trained runs
    ("plain", read_exchanges(human("drop me <image>", "a seven"), 1), f"{IMAGES}a seven\n", ["a seven\n"]),
    ("plain", NO_IMAGE, "a fluid\n", ["a fluid\n"]),
    (
        "v1",
        ONE_IMAGE,
        f"{VICUNA_SYSTEM} USER: {IMAGES}\nwhich digit is it? ASSISTANT: a seven</s>"
        "USER: what colour? ASSISTANT: red</s>",
        [" a seven</s>", " red</s>"],
    ),
    ("v1", NO_IMAGE, f"{VICUNA_SYSTEM} USER: what is ink? ASSISTANT: a fluid</s>", [" a fluid</s>"]),
    (
        "v1",
        TWO_IMAGES,
        f"{VICUNA_SYSTEM} USER: is {IMAGES} or {IMAGES} greater? ASSISTANT: the second</s>",
        [" the second</s>"],
    ),
    (
        "mistral",
        ONE_IMAGE,
        f"[INST] {IMAGES}\nwhich digit is it? [/INST] a seven </s>[INST] what colour? [/INST] red </s>",
        [" a seven </s>", " red </s>"],
    ),
    (
        "qwen",
        ONE_IMAGE,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGES}\nwhich digit is it?<|im_end|>\n<|im_start|>assistant\na seven<|im_end|>\n"
        "<|im_start|>user\nwhat colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n",
        ["a seven<|im_end|>", "red<|im_end|>"],
    ),
]


@pytest.mark.parametrize("kind", ["bytelevel", "trimmed", "nobos"])
@pytest.mark.parametrize(("template", "exchanges", "text", "runs"), GOLDEN)
def test_text_and_trained_spans(tokenizer_folders, kind, template, exchanges, text, runs) -> None:
    encoder = make_encoder(tokenizer_folders[kind], template)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders[kind])
    encoded = encoder.encode(exchanges)
    assert tokenizer.decode(encoded.ids) == ("" if kind == "nobos" else "<s>") + text
    assert trained_runs(encoded, tokenizer) == runs
    assert encoded.ids.count(BOS) == (kind != "nobos")
    for start in encoded.image_starts:
        assert encoded.ids[start : start + IMAGE_TOKENS] == [IMAGE] * IMAGE_TOKENS
    assert len(encoded.image_starts) * IMAGE_TOKENS == encoded.ids.count(IMAGE)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_training_text(template) -> None:
    encoder = golden_encoder("llama_3", template)
    (full,) = read_exchanges(human("<image>\nwhich?", "seven"), 1)
    prompt = encoder.prompt([Exchange(full.question, None)])
    text = encoder.prompt([full])
    assert text.startswith(prompt) and text[len(prompt) :].lstrip().startswith("seven")
    # What is trained begins right behind the prompt's tokens: the model learns exactly what it will be asked for.
    asked, taught = encoder.encode([Exchange(full.question, None)]), encoder.encode([full])
    assert taught.ids[: len(asked.ids)] == asked.ids
    assert taught.trained.index(True) == len(asked.ids)


def original_v1(tokenizer, exchanges, turn_separator: str) -> tuple[list[int], list[int]]:
    """ids and labels by the rules of LLaVA's preprocess_v1 / preprocess_llama_2 (llava/train/train.py), restated.

    `tokenize` cuts at <image>, tokenises each piece with a BOS and keeps the first BOS; rounds are told apart by </s>
    and questions from answers by the separator; lengths of pieces tokenised again give the mask.
    """

    def tokenize(text: str) -> list[int]:
        pieces = [[BOS, *tokenizer(piece, add_special_tokens=False).input_ids] for piece in text.split("<image>")]
        return [BOS, *pieces[0][1:], *(token for piece in pieces[1:] for token in [IMAGE, *piece[1:]])]

    if turn_separator == " ASSISTANT: ":
        text = VICUNA_SYSTEM + " " + "".join(f"USER: {e.question} ASSISTANT: {e.answer}</s>" for e in exchanges)
    else:
        text = "".join(f"[INST] {e.question} [/INST] {e.answer} </s>" for e in exchanges)
    ids = tokenize(text)
    labels = list(ids)
    position = 1
    labels[:position] = [-100]
    for turn in text.split("</s>"):
        if not turn:
            break
        before, _ = turn.split(turn_separator)
        question = len(tokenize(before + turn_separator)) - 2
        labels[position : position + question] = [-100] * question
        position += len(tokenize(turn))
    labels[position:] = [-100] * (len(labels) - position)
    assert position == len(ids), "the original would mask the whole sample here"
    return ids, labels


@pytest.mark.parametrize(("template", "separator"), [("v1", " ASSISTANT: "), ("mistral", "[/INST] ")])
@pytest.mark.parametrize(
    "turns",
    [
        ("<image>\nwhich digit is it?", "a seven"),
        ("which digit is it?\n<image>", "a seven", "what colour?", "red ink", "and paper?", "blue green"),
        ("what is ink?", "a fluid"),
        ("<image>", "which: digit\nthe ink"),
    ],
)
def test_ids_and_masks_equal_the_original_where_it_is_right(tokenizer_folders, template, separator, turns) -> None:
    """A sentencepiece-like tokenizer, with which the original's counting works."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["metaspace"])
    exchanges = read_exchanges(human(*turns), sum("<image>" in turn for turn in turns))
    ids, labels = original_v1(tokenizer, exchanges, separator)
    ours = ConversationEncoder(tokenizer, template, IMAGE, 1).encode(exchanges)
    assert ours.ids == ids
    # The original's lengths leave the image position of a round in or out of the mask; it is never trained there.
    wanted = [label if label != IMAGE else -100 for label in labels]
    assert [token if trained else -100 for token, trained in zip(ours.ids, ours.trained, strict=True)] == wanted


@pytest.mark.parametrize("kind", ["metaspace", "bytelevel", "nobos"])
def test_plain_equals_the_original(tokenizer_folders, kind) -> None:
    """preprocess_plain: <image> + caption + newline, everything behind the image trained, no EOS."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders[kind])
    encoded = make_encoder(tokenizer_folders[kind], "plain").encode(read_exchanges(human("<image>", "中 seven"), 1))
    caption = tokenizer("中 seven\n", add_special_tokens=False).input_ids
    start = [] if kind == "nobos" else [BOS]
    assert encoded.ids == [*start, *[IMAGE] * IMAGE_TOKENS, *caption]
    assert encoded.trained == [False] * (len(start) + IMAGE_TOKENS) + [True] * len(caption)
    assert EOS not in encoded.ids


# All alphabets, and those that matter most here: Chinese and Japanese, their punctuation, white space.
letters = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from("赤い色のインク、。「」 这是红色的\u3000 \n\tabc:#[]|⟦é")
)
texts = st.text(letters, max_size=30).filter(lambda text: "<" not in text)
KINDS = ("sentencepiece_bpe", "sentencepiece_unigram", "qwen", "llama_3")
# What is trained beside the answer: before and behind it.
TRAINED = {
    "plain": ("", "\n"),
    "v0": (" ", "\n###"),
    "v1": (" ", "{eos}"),
    "llama_2": (" ", " {eos}"),
    "llama_3": ("", "<|eot_id|>"),
    "mistral": (" ", " {eos}"),
    "chatml": ("", "<|im_end|>"),
    "chatml_direct": ("", "<|im_end|>"),
    "qwen": ("", "<|im_end|>"),
    "nvgpt": ("", "\n<extra_id_1>"),
    "japanese_v1": (" ", "{eos}"),
}


@functools.cache
def golden_encoder(kind: str, template: str, **options: bool) -> ConversationEncoder:
    """An encoder with one of the golden tokenizers."""
    tokenizer = load_tokenizer(FOLDER / "tokenizers" / kind)
    return ConversationEncoder(tokenizer, template, tokenizer.convert_tokens_to_ids("<image>"), IMAGE_TOKENS, **options)


@hypothesis_settings(max_examples=500, deadline=None)
@given(
    template=st.sampled_from(sorted(TRAINED)),
    turns=st.lists(st.tuples(texts, texts.filter(lambda text: bool(text.strip()))), min_size=1, max_size=4),
    images=st.integers(0, 3),
    kind=st.sampled_from(KINDS),
    system=st.one_of(st.none(), texts),
    image_conv_front=st.booleans(),
)
def test_every_answer_is_trained_whole_and_nothing_else(
    template, turns, images, kind, system, image_conv_front
) -> None:
    turns = turns[:1] if template == "plain" else turns
    (question, answer), *rest = turns
    values = ["<image>\n" * images + question, answer, *(value for pair in rest for value in pair)]
    exchanges = read_exchanges(human(*values), images)
    encoder = golden_encoder(kind, template, image_conv_front=image_conv_front)
    tokenizer = encoder._tokenizer
    encoded = encoder.encode(exchanges, system)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert len(encoded.ids) == len(encoded.trained)
    assert encoded.ids.count(image) == images * IMAGE_TOKENS == len(encoded.image_starts) * IMAGE_TOKENS
    assert not any(trained for token, trained in zip(encoded.ids, encoded.trained, strict=True) if token == image)
    runs = trained_runs(encoded, tokenizer)
    assert len(runs) == len(turns)
    before, behind = TRAINED[template]
    for run, (_, said) in zip(runs, turns, strict=True):
        # A token may reach over the border when template and answer touch in white space.
        assert run.strip() == normal(tokenizer, before + said + behind.replace("{eos}", tokenizer.eos_token)).strip()


def normal(tokenizer, text: str) -> str:
    """The text as the tokenizer gives it back: Qwen's makes letters with accents of one kind."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer is not None else text


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_records_own_system_sentence_replaces_the_templates(template) -> None:
    encoder = golden_encoder("llama_3", template)
    exchanges = read_exchanges(human("<image>\nwhich?", "a seven"), 1)
    own, default, none = (encoder.prompt(exchanges, system) for system in ("BE BRIEF", None, ""))
    sentence = TEMPLATES[template].system
    if template == "plain":
        assert own == default == none == "<image>a seven\n"
        return
    assert own.count("BE BRIEF") == 1 and own.index("BE BRIEF") < own.index("<image>")
    if sentence:
        assert own == default.replace(sentence, "BE BRIEF")
        assert sentence not in none
    else:
        assert default == none
    with pytest.raises(RecordError, match="the system sentence holds <image>"):
        encoder.encode(exchanges, "look at <image>")


def test_a_template_without_system_turn_puts_the_sentence_before_the_first_question() -> None:
    exchanges = read_exchanges(human("<image>\nwhich?", "a seven", "and?", "red"), 1)
    text = golden_encoder("llama_3", "mistral").prompt(exchanges, "BE BRIEF")
    assert text == "[INST] BE BRIEF\n\n<image>\nwhich? [/INST] a seven <|eot_id|>[INST] and? [/INST] red <|eot_id|>"


IMAGES_IN_FRONT = {
    "plain": "<image><image>a seven\n",
    "v0": "### Human: <image><image>###Human: which? or\n### Assistant: a seven\n### Human: and ?\n",
    "v1": "questions. USER: <image><image> USER: which? or ASSISTANT: a seven<|eot_id|>USER: and ? ASSISTANT:",
    "llama_2": "<</SYS>>\n\n<image><image>\nwhich? or [/INST] a seven <|eot_id|><|begin_of_text|>[INST] and ? [",
    "llama_3": "user<|end_header_id|>\n\n<image><image><|eot_id|><|start_header_id|>user<|end_header_id|>\n\nwhich?",
    "mistral": "[INST] <image><image>\nwhich? or [/INST] a seven <|eot_id|>[INST] and ? [/INST]",
    "chatml": "<|im_start|>user\n<image><image><|im_end|>\n<|im_start|>user\nwhich? or<|im_end|>\n",
    "chatml_direct": "<|im_start|>user\n<image><image><|im_end|><|im_start|>user\nwhich? or<|im_end|><|im_start|>",
    "qwen": "<|im_start|>user\n<image><image><|im_end|>\n<|im_start|>user\nwhich? or<|im_end|>\n",
    "nvgpt": "<extra_id_1>User\n<image><image>\n<extra_id_1>User\nwhich? or\n<extra_id_1>Assistant\n",
    "japanese_v1": "答える。 ユーザー: <image><image> ユーザー: which? or システム: a seven<|eot_id|>ユーザー: and ?",
}


@pytest.mark.parametrize("template", IMAGES_IN_FRONT)
def test_images_in_front_of_the_conversation(template) -> None:
    """NeMo's sep_image_conv_front: `<image>`, separator, role, question."""
    turns = ["<image>which? or", "a seven", "and <image>?", "red"]
    values = ["<image><image>", "a seven"] if template == "plain" else turns
    exchanges = read_exchanges(human(*values), 2)
    encoder = golden_encoder("llama_3", template, image_conv_front=True)
    assert IMAGES_IN_FRONT[template] in encoder.prompt(exchanges)
    without = read_exchanges(human("which?", "a seven"), 0)
    assert encoder.prompt(without) == golden_encoder("llama_3", template).prompt(without)


@pytest.mark.parametrize("template", TEMPLATES)
def test_images_between_tokens_of_their_own(tmp_path, template) -> None:
    tokenizer = load_tokenizer(FOLDER / "tokenizers" / "qwen")
    image = tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(UserError, match=r"'<im_start>', which image_start_end puts .* is \d+ tokens, wanted one"):
        ConversationEncoder(tokenizer, template, image, IMAGE_TOKENS, image_start_end=True)
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    encoder = ConversationEncoder(tokenizer, template, image, IMAGE_TOKENS, image_start_end=True)
    plain = ConversationEncoder(tokenizer, template, image, IMAGE_TOKENS)
    exchanges = read_exchanges(human("<image>\n<image>\nwhich?", "a seven"), 2)
    with_tokens, without = encoder.encode(exchanges), plain.encode(exchanges)
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    for first in with_tokens.image_starts:
        assert with_tokens.ids[first - 1 : first + IMAGE_TOKENS + 1] == [start, *[image] * IMAGE_TOKENS, end]
        assert not any(with_tokens.trained[first - 1 : first + IMAGE_TOKENS + 1])
    # What stands around them stays the same.
    assert [token for token in with_tokens.ids if token not in (start, end)] == without.ids


def test_an_ending_that_is_no_special_token_is_refused(tmp_path) -> None:
    """`USER` is one token, but behind a word its letters become others: what is trained would not be the ending."""
    content = {"question": "{question}", "answer": "{answer}{ending}", "ending": "USER"}
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'USER', which ends an answer .*, becomes other tokens behind a word"):
        golden_encoder("sentencepiece_bpe", str(tmp_path / "own.json"))


def test_every_text_of_a_template_file_is_used(tmp_path) -> None:
    content = {
        "system": "Be brief.",
        "system_turn": "[{system}]",
        "opening": "{bos}>",
        "question": "Q:{question}A:",
        "answer": "{answer}{ending}",
        "ending": "<|im_end|>",
        "closing": ";",
        "between": "/",
        "picture_turn": "P:{pictures}",
        "most_exchanges": 2,
    }
    for name, text in (("own.json", json.dumps(content)), ("own.yaml", yaml.safe_dump(content))):
        (tmp_path / name).write_text(text)
        exchanges = read_exchanges(human("<image>a", "b", "c", "d"), 1)
        encoder = golden_encoder("llama_3", str(tmp_path / name))
        head = "[Be brief.]<|begin_of_text|>>"
        assert encoder.prompt(exchanges) == f"{head}Q:<image>\naA:b<|im_end|>;/Q:cA:d<|im_end|>;"
        front = golden_encoder("llama_3", str(tmp_path / name), image_conv_front=True)
        assert front.prompt(exchanges) == f"{head}P:<image>Q:aA:b<|im_end|>;/Q:cA:d<|im_end|>;"
        assert encoder.ending_id == encoder._tokenizer.convert_tokens_to_ids("<|im_end|>")
        with pytest.raises(RecordError, match="at most 2 questions and their answers, got 3"):
            encoder.encode([*exchanges, *exchanges[:1]])


def test_a_text_that_begins_with_bos_keeps_one(tmp_path: Path) -> None:
    content = {"opening": "{bos}", "question": "Q:{question}A:", "answer": "{answer}{ending}", "ending": "<|im_end|>"}
    (tmp_path / "own.json").write_text(json.dumps(content))
    encoder = golden_encoder("llama_3", str(tmp_path / "own.json"))
    bos = encoder._tokenizer.bos_token_id
    ids = encoder.encode(read_exchanges(human("a", "b"), 0)).ids
    assert ids[0] == bos and ids.count(bos) == 1


def test_the_example_of_a_template_file_is_v1() -> None:
    example = ROOT / "toolkits" / "multimodal_data_preprocessing" / "template_example.yaml"
    assert load_template(example) == TEMPLATES["v1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"question": "{question}", "answer": "{answer}{ending}", "qestion": ""}, "unknown qestion; wanted only quest"),
        ({"question": "{question}"}, "answer missing"),
        ({"question": "Q", "answer": "{answer}{ending}"}, r"question wants \{question\} or \{pictures\}, one of them"),
        ({"question": "{question}", "answer": "{ending}"}, r"answer wants \{answer\} once"),
        ({"question": "{question}", "answer": "{answer}"}, r"answer wants \{ending\} once"),
        ({"question": "{question}", "answer": "{answer}{ending}", "ending": ""}, "nowhere, as ending is empty"),
        ({"question": "{question}{answer}", "answer": "{answer}{ending}"}, r"question holds \{answer\}, wanted only"),
        (
            {"question": "{question}", "answer": "{answer}{ending}", "system": "Be"},
            r"system_turn wants \{system\} once",
        ),
        ({"question": "{question}", "answer": "{answer}{ending}", "picture_turn": "P"}, "picture_turn wants"),
        ({"question": "<image>{question}", "answer": "{answer}{ending}"}, "question holds <image>"),
        ({"question": "{question}", "answer": "{answer}{ending}", "most_exchanges": True}, "is True, wanted int"),
        ({"question": 3, "answer": "{answer}{ending}"}, "question is 3, wanted str"),
        (["question"], "is no mapping"),
        ("{", "is neither JSON nor YAML"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_faulty_template_files_are_refused_by_name(tmp_path, content, message) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as refusal:
        load_template(path)
    assert str(path) in str(refusal.value)


def test_turns_follow_the_original_rules() -> None:
    # A first turn that is not human is dropped; several marks of one turn are one image, moved to the front.
    assert read_exchanges([{"from": "gpt", "value": "hello"}, *human("a<image>b <image>", "c")], 1) == (
        Exchange("<image>\nab", "c"),
    )
    assert read_exchanges(human("<image>", "c"), 1) == (Exchange("<image>", "c"),)
    assert read_exchanges(human(" spaces stay ", " c "), 0) == (Exchange(" spaces stay ", " c "),)


@pytest.mark.parametrize(
    ("conversations", "images", "reason"),
    [
        (None, 0, "malformed"),
        ([], 0, "malformed"),
        (["text"], 0, "malformed"),
        ([{"from": "human"}], 0, "malformed"),
        (human("\ud800", "b"), 0, "malformed"),
        ([{"from": "system", "value": "x"}], 0, "roles"),
        (human("a", "b")[:1] * 2, 0, "roles"),
        (human("a", "b")[1:], 0, "no answer"),
        (human("a"), 0, "no answer"),
        (human("a", "b", "c"), 0, "no answer"),
        (human("a", " \n"), 0, "no answer"),
        (human("a", "b"), 1, "image marks"),
        (human("<image>", "b"), 0, "image marks"),
        (human("<image>", "b", "<image>", "d"), 1, "image marks"),
        (human("<image>", "b<image>"), 1, "image marks"),
    ],
)
def test_unusable_conversations_are_refused_with_their_reason(conversations, images, reason) -> None:
    with pytest.raises(RecordError) as refusal:
        read_exchanges(conversations, images)
    assert refusal.value.reason == reason


def test_plain_takes_one_exchange_only(tokenizer_folders) -> None:
    with pytest.raises(RecordError, match="takes one question and one answer, got 2"):
        make_encoder(tokenizer_folders["bytelevel"], "plain").encode(read_exchanges(human("a", "b", "c", "d"), 0))


def test_tokenizers_that_cannot_learn_the_ending_are_refused(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet(), start=4)}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"<image>": IMAGE}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"]).save_pretrained(tmp_path)
    for template, ending in (("qwen", "<|im_end|>"), ("v1", "</s>")):
        with pytest.raises(UserError, match=f"which ends an answer in template {template}"):
            make_encoder(str(tmp_path), template)
        assert ending
    assert make_encoder(str(tmp_path), "plain").encode(NO_IMAGE).trained == [True] * 8

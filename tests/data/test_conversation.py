"""Conversations: ids and masks against hand-derived text, against the original's rules, and as properties."""

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_patch.data.conversation import (
    TEMPLATES,
    VICUNA_SYSTEM,
    ConversationEncoder,
    EncodedConversation,
    Exchange,
)
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.samples import read_exchanges
from megatron_patch.errors import UserError
from tests.data.making import SPECIAL_TOKENS

IMAGE = SPECIAL_TOKENS.index("<image>")
BOS = SPECIAL_TOKENS.index("<s>")
EOS = SPECIAL_TOKENS.index("</s>")
IMAGE_TOKENS = 3


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


ONE_PICTURE = read_exchanges(human("which digit is it?\n<image>", "a seven", "what colour?", "red"), 1)
NO_PICTURE = read_exchanges(human("what is ink?", "a fluid"), 0)
TWO_PICTURES = read_exchanges(human("is <image> or <image> greater?", "the second"), 2)
IMAGES = "<image>" * IMAGE_TOKENS

GOLDEN = [
    # template, exchanges, full text with expanded placeholders, trained runs
    ("plain", read_exchanges(human("drop me <image>", "a seven"), 1), f"{IMAGES}a seven\n", ["a seven\n"]),
    ("plain", NO_PICTURE, "a fluid\n", ["a fluid\n"]),
    (
        "v1",
        ONE_PICTURE,
        f"{VICUNA_SYSTEM} USER: {IMAGES}\nwhich digit is it? ASSISTANT: a seven</s>"
        "USER: what colour? ASSISTANT: red</s>",
        [" a seven</s>", " red</s>"],
    ),
    ("v1", NO_PICTURE, f"{VICUNA_SYSTEM} USER: what is ink? ASSISTANT: a fluid</s>", [" a fluid</s>"]),
    (
        "v1",
        TWO_PICTURES,
        f"{VICUNA_SYSTEM} USER: is {IMAGES} or {IMAGES} greater? ASSISTANT: the second</s>",
        [" the second</s>"],
    ),
    (
        "mistral",
        ONE_PICTURE,
        f"[INST] {IMAGES}\nwhich digit is it? [/INST] a seven </s>[INST] what colour? [/INST] red </s>",
        [" a seven </s>", " red </s>"],
    ),
    (
        "qwen",
        ONE_PICTURE,
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
def test_a_prompt_is_the_beginning_of_the_training_text(tokenizer_folders, template) -> None:
    encoder = make_encoder(tokenizer_folders["bytelevel"], template)
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
    """preprocess_plain: <image> + caption + newline, everything behind the picture trained, no EOS."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders[kind])
    encoded = make_encoder(tokenizer_folders[kind], "plain").encode(read_exchanges(human("<image>", "中 seven"), 1))
    caption = tokenizer("中 seven\n", add_special_tokens=False).input_ids
    start = [] if kind == "nobos" else [BOS]
    assert encoded.ids == [*start, *[IMAGE] * IMAGE_TOKENS, *caption]
    assert encoded.trained == [False] * (len(start) + IMAGE_TOKENS) + [True] * len(caption)
    assert EOS not in encoded.ids


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "<" not in text)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    turns=st.lists(st.tuples(texts, texts.filter(lambda text: bool(text.strip()))), min_size=1, max_size=4),
    pictures=st.integers(0, 3),
    kind=st.sampled_from(["bytelevel", "trimmed", "nobos"]),
)
def test_every_answer_is_trained_whole_and_nothing_else(tokenizer_folders, template, turns, pictures, kind) -> None:
    turns = turns[:1] if template == "plain" else turns
    (question, answer), *rest = turns
    values = ["<image>\n" * pictures + question, answer, *(value for pair in rest for value in pair)]
    exchanges = read_exchanges(human(*values), pictures)
    encoder = make_encoder_cached(tokenizer_folders[kind], template)
    tokenizer = encoder._tokenizer
    encoded = encoder.encode(exchanges)
    assert len(encoded.ids) == len(encoded.trained)
    assert encoded.ids.count(IMAGE) == pictures * IMAGE_TOKENS == len(encoded.image_starts) * IMAGE_TOKENS
    assert not any(trained for token, trained in zip(encoded.ids, encoded.trained, strict=True) if token == IMAGE)
    before, ending = {"plain": ("", "\n"), "v1": (" ", "</s>"), "mistral": (" ", " </s>"), "qwen": ("", "<|im_end|>")}[
        template
    ]
    runs = trained_runs(encoded, tokenizer)
    assert len(runs) == len(turns)
    for run, (_, said) in zip(runs, turns, strict=True):
        # A token may reach over the border when template and answer touch in white space.
        assert run.strip() == (before + said + ending).strip()


_encoders: dict[tuple[str, str], ConversationEncoder] = {}


def make_encoder_cached(folder: str, template: str) -> ConversationEncoder:
    if (folder, template) not in _encoders:
        _encoders[folder, template] = make_encoder(folder, template)
    return _encoders[folder, template]


def test_turns_follow_the_original_rules() -> None:
    # A first turn that is not human is dropped; several marks of one turn are one picture, moved to the front.
    assert read_exchanges([{"from": "gpt", "value": "hello"}, *human("a<image>b <image>", "c")], 1) == (
        Exchange("<image>\nab", "c"),
    )
    assert read_exchanges(human("<image>", "c"), 1) == (Exchange("<image>", "c"),)
    assert read_exchanges(human(" spaces stay ", " c "), 0) == (Exchange(" spaces stay ", " c "),)


@pytest.mark.parametrize(
    ("conversations", "pictures", "reason"),
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
def test_unusable_conversations_are_refused_with_their_reason(conversations, pictures, reason) -> None:
    with pytest.raises(RecordError) as refusal:
        read_exchanges(conversations, pictures)
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
    assert make_encoder(str(tmp_path), "plain").encode(NO_PICTURE).trained == [True] * 8

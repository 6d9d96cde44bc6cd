"""Derives the golden conversations: ids and labels of every template with every tokenizer, without the product's code.

    python -m tests.data.golden.derive [--check]

Two derivations stand side by side, neither of which shares a line with megatron_patch:

the rule       Each template is written out below by hand, its trained parts between ⟦ and ⟧.  The text is cut at
               <image>, each piece is tokenised by itself, and a bracket lies behind as many tokens as the text before
               it has.  That the tokens of the text before it are the first tokens of the whole piece is asserted.
the original   LLaVA's training code (llava/train/train.py: tokenizer_image_token, preprocess_v1, _llama_2, _mpt, _plain
               and the older way of v0), NeVA's preprocess_nvgpt and _llama_3, LLaVA-JP's preprocess_v1, restated.  It
               counts the tokens of pieces that it tokenises again.

Ids must agree everywhere.  Where the original's labels are the rule's, a cell says "equal"; where they are not, it says
what the original does, and README.md says why; the golden labels are then the rule's alone.  "none": the original has
no such cell.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent
IGNORED = -100
PICTURE = -200  # the original's IMAGE_TOKEN_INDEX
IMAGE_TOKENS = 2  # placeholders per picture in the golden files

# ------------------------------------------------------------------------------------------------ conversations

ONE = [("which digit is it?", "a seven.")]
THREE = [*ONE, ("what colour is the ink?", "red"), ("これは何ですか？", "赤い色のインク。")]


def conversations() -> dict[str, list[tuple[str, str]]]:
    """Name -> turns, as they are once LLaVA's preprocess_multimodal has moved `<image>` to the front of a question."""
    made = {}
    for length, turns in (("one turn", ONE), ("three turns", THREE)):
        (question, answer), *rest = turns
        made[f"no image, {length}"] = turns
        made[f"one image, {length}"] = [(f"<image>\n{question}", answer), *rest]
        if not rest:
            made[f"two images, {length}"] = [(f"<image>\n<image>\n{question}", answer)]
        else:
            middle, (last, end) = rest
            made[f"two images, {length}"] = [(f"<image>\n{question}", answer), middle, (f"<image>\n{last}", end)]
    return made


# ------------------------------------------------------------------------------------------------ tokenizers


class SentencePiece:
    """Text between special tokens goes to sentencepiece itself.

    legacy: a space is put before each such text, as Llama's first tokenizer of transformers did; else before the very
    first only.
    """

    def __init__(self, folder: Path, legacy: bool) -> None:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        self.legacy = legacy
        self.bos, self.eos = "<s>", "</s>"
        special = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        self.special = {token["content"]: token["id"] for token in special}
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString((folder / "tokenizer.model").read_bytes())
        self._prefixing = SentencePieceProcessor(model_proto=model.SerializeToString())
        model.normalizer_spec.add_dummy_prefix = False
        self._bare = SentencePieceProcessor(model_proto=model.SerializeToString())

    def ids(self, text: str) -> list[int]:
        """Ids without BOS."""
        pattern = "|".join(re.escape(token) for token in self.special)
        found: list[int] = []
        for number, part in enumerate(re.split(f"({pattern})", text)):
            if part in self.special:
                found.append(self.special[part])
            elif part:
                model = self._prefixing if self.legacy or number == 0 else self._bare
                found += model.encode(part)
        return found


class ByteLevel:
    """The tokenizers library without transformers around it."""

    legacy = None  # transformers gives this attribute to Llama's tokenizers alone

    def __init__(self, folder: Path, bos: str | None, eos: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.bos, self.eos = bos, eos
        tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        self.special = {token["content"]: token["id"] for token in tokens}

    def ids(self, text: str) -> list[int]:
        """Ids without BOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


Judge = SentencePiece | ByteLevel


def judges() -> dict[str, Judge]:
    """The four tokenizers."""
    root = FOLDER / "tokenizers"
    return {
        "sentencepiece_bpe": SentencePiece(root / "sentencepiece_bpe", legacy=True),
        "sentencepiece_unigram": SentencePiece(root / "sentencepiece_unigram", legacy=False),
        "qwen": ByteLevel(root / "qwen", bos=None, eos="<|im_end|>"),
        "llama_3": ByteLevel(root / "llama_3", bos="<|begin_of_text|>", eos="<|eot_id|>"),
    }


# ------------------------------------------------------------------------------------------------ the rule, by hand

USER_ASSISTANT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_ASSISTANT = USER_ASSISTANT.replace("user", "human")
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
JAPANESE = (
    "これは好奇心旺盛なユーザーと人工知能システムのチャットです。システムはユーザーの質問に親切、詳細、丁寧に答える。"
)
LABELS = (
    "<extra_id_2>quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,"
    "verbosity:4"
)

Turns = list[tuple[str, str]]


def marked_plain(turns: Turns, bos: str, eos: str) -> str:
    ((question, answer),) = turns
    return "<image>" * question.count("<image>") + f"⟦{answer}\n⟧"


def marked_v0(turns: Turns, bos: str, eos: str) -> str:
    return f"{HUMAN_ASSISTANT}\n\n### " + "".join(f"Human: {q}\n### Assistant:⟦ {a}\n###⟧ " for q, a in turns)


def marked_v1(turns: Turns, bos: str, eos: str) -> str:
    return f"{USER_ASSISTANT} " + "".join(f"USER: {q} ASSISTANT:⟦ {a}{eos}⟧" for q, a in turns)


def marked_japanese_v1(turns: Turns, bos: str, eos: str) -> str:
    return f"{JAPANESE} " + "".join(f"ユーザー: {q} システム:⟦ {a}{eos}⟧" for q, a in turns)


def marked_llama_2(turns: Turns, bos: str, eos: str) -> str:
    (question, answer), *rest = turns
    first = (f"<<SYS>>\n{LANGUAGE_AND_VISION}\n<</SYS>>\n\n{question}", answer)
    return bos.join(f"[INST] {q} [/INST]⟦ {a} {eos}⟧" for q, a in [first, *rest])


def marked_mistral(turns: Turns, bos: str, eos: str) -> str:
    return "".join(f"[INST] {q} [/INST]⟦ {a} {eos}⟧" for q, a in turns)


def marked_llama_3(turns: Turns, bos: str, eos: str) -> str:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return f"{header('system')}{LANGUAGE_AND_VISION}<|eot_id|>" + "".join(
        f"{header('user')}{q}<|eot_id|>{header('assistant')}⟦{a}<|eot_id|>⟧" for q, a in turns
    )


def marked_chatml(turns: Turns, bos: str, eos: str) -> str:
    return "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n⟦{a}<|im_end|>⟧\n" for q, a in turns)


def marked_qwen(turns: Turns, bos: str, eos: str) -> str:
    return "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + marked_chatml(turns, bos, eos)


def marked_chatml_direct(turns: Turns, bos: str, eos: str) -> str:
    return "<|im_start|>system\nAnswer the questions.<|im_end|>" + "".join(
        f"<|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n⟦{a}<|im_end|>⟧" for q, a in turns
    )


def marked_nvgpt(turns: Turns, bos: str, eos: str) -> str:
    return f"<extra_id_0>System\n{USER_ASSISTANT}\n\n<extra_id_1>" + "".join(
        f"User\n{q}\n<extra_id_1>Assistant\n{LABELS}\n⟦{a}\n<extra_id_1>⟧" for q, a in turns
    )


def by_the_rule(marked: str, judge: Judge) -> tuple[list[int], list[int]]:
    """ids and labels, with PICTURE for each picture."""
    ids = [judge.special[judge.bos]] if judge.bos else []
    labels = [IGNORED] * len(ids)
    for number, piece in enumerate(marked.split("<image>")):
        if number:
            ids.append(PICTURE)
            labels.append(IGNORED)
        parts = re.split("[⟦⟧]", piece)  # not trained, trained, not trained, ...
        whole = judge.ids("".join(parts))
        ends = []
        for last in range(1, len(parts) + 1):
            before = judge.ids("".join(parts[:last]))
            assert whole[: len(before)] == before, f"no token begins behind {''.join(parts[:last])[-20:]!r}"
            ends.append(len(before))
        begins = [0, *ends[:-1]]
        ids += whole
        for part, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            labels += whole[begin:end] if part % 2 else [IGNORED] * (end - begin)
    return ids, labels


# ------------------------------------------------------------------------------------------------ the original

Labels = tuple[list[int], list[int]]


def tokenize(text: str, judge: Judge) -> list[int]:
    """The original's tokenizer(text).input_ids, and tokenizer_image_token where there are pictures."""
    chunks = [([judge.special[judge.bos]] if judge.bos else []) + judge.ids(chunk) for chunk in text.split("<image>")]
    skip = 1 if judge.bos else 0
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [PICTURE, *chunk[skip:]]
    return ids


def counted(ids: list[int], rounds: list[tuple[int, int]], first: int, wipe: bool = True) -> Labels:
    """Labels from (tokens of a round, those of its question).  wipe: all IGNORED where the sum is not the whole."""
    labels = list(ids)
    position = first
    labels[:position] = [IGNORED] * position
    for length, question in rounds:
        labels[position : position + question] = [IGNORED] * len(labels[position : position + question])
        position += length
    labels[position:] = [IGNORED] * len(labels[position:])
    if wipe and position != len(ids):
        labels = [IGNORED] * len(ids)
    return ids, labels


def original_two(system: str, roles: tuple[str, str], japanese: bool = False) -> Callable[[Turns, Judge], Labels]:
    """preprocess_v1 of LLaVA; and LLaVA-JP's, which begins to count where the text does and never wipes."""

    def preprocess(turns: Turns, judge: Judge) -> Labels:
        text = f"{system} " + "".join(f"{roles[0]}: {q} {roles[1]}: {a}{judge.eos}" for q, a in turns)
        separator = f" {roles[1]}: "
        rounds = []
        for number, turn in enumerate(text.split(judge.eos)[:-1]):
            length = len(tokenize(turn, judge))
            question = len(tokenize(turn.split(separator)[0] + separator, judge)) - 2
            if number and judge.legacy is False and not japanese:
                length, question = length - 1, question - 1
            rounds.append((length, question))
        first = 1 if judge.bos or not japanese else 0
        return counted(tokenize(text, judge), rounds, first, wipe=not japanese)

    return preprocess


def original_llama_2(system: str, second_bos: bool) -> Callable[[Turns, Judge], Labels]:
    """preprocess_llama_2, also used for mistral_instruct."""

    def preprocess(turns: Turns, judge: Judge) -> Labels:
        text = ""
        for number, (question, answer) in enumerate(turns):
            if number == 0 and system:
                question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
            begin = judge.bos or "" if second_bos and number else ""
            text += f"{begin}[INST] {question} [/INST] {answer} {judge.eos}"
        rounds = []
        for turn in text.split(judge.eos)[:-1]:
            question = turn.split("[/INST] ")[0] + "[/INST] "
            rounds.append((len(tokenize(turn, judge)), len(tokenize(question, judge)) - 2))
        return counted(tokenize(text, judge), rounds, 1)

    return preprocess


def original_mpt(turns: Turns, judge: Judge) -> Labels:
    """preprocess_mpt with conv_chatml_direct."""
    end = "<|im_end|>"
    text = f"<|im_start|>system\nAnswer the questions.{end}" + "".join(
        f"<|im_start|>user\n{q}{end}<|im_start|>assistant\n{a}{end}" for q, a in turns
    )
    parts = text.split(end)
    joined = [end.join(parts[:3]), *(end.join(parts[number : number + 2]) for number in range(3, len(parts), 2))]
    rounds = []
    for number, turn in enumerate(joined):
        if not turn:
            break
        question = turn.split(f"{end}<|im_start|>assistant\n")[0] + f"{end}<|im_start|>assistant\n"
        more = 1 if number and judge.legacy else 0
        rounds.append((len(tokenize(turn, judge)) + more, len(tokenize(question, judge)) - 1 + more))
    return counted(tokenize(text, judge), rounds, 1)


def original_plain(turns: Turns, judge: Judge) -> Labels | None:
    """preprocess_plain, which asserts that there is a picture and makes several of them one."""
    ((question, answer),) = turns
    if question.count("<image>") != 1:
        return None
    ids = tokenize(f"<image>{answer}\n", judge)
    begin = len(tokenize("<image>", judge))
    return ids, [IGNORED] * begin + ids[begin:]


def original_v0(turns: Turns, judge: Judge) -> Labels:
    """preprocess's own way, _add_speaker_and_signal and _mask_targets."""
    header = f"{HUMAN_ASSISTANT}\n\n"
    sentences = [
        f"### {role}: {text}\n" for turn in turns for role, text in zip(("Human", "Assistant"), turn, strict=True)
    ]
    ids = tokenize(header + "".join(sentences) + "### ", judge)
    labels = list(ids)
    position = len(tokenize(header, judge))
    labels[:position] = [IGNORED] * position
    for number, sentence in enumerate(sentences):
        length = len(tokenize(sentence, judge))
        if number % 2 == 0:
            hidden = range(position + 2, min(position + length, len(labels)))
            labels[position + 2 : position + length] = [IGNORED] * len(hidden)
        position += length
    return ids, labels


def original_nvgpt(turns: Turns, judge: Judge) -> Labels:
    """NeVA's preprocess_nvgpt; its pieces are tokenised without BOS, and count from where the text begins."""
    separator = "<extra_id_1>"
    text = f"<extra_id_0>System\n{USER_ASSISTANT}\n\n{separator}" + "".join(
        f"User\n{q}\n{separator}Assistant\n{LABELS}\n{a}\n{separator}" for q, a in turns
    )
    parts = text.split(separator)
    joined = [separator.join(parts[:3]), *(separator.join(parts[n : n + 2]) for n in range(3, len(parts) - 1, 2))]
    rounds = []
    for turn in joined:
        question = turn[: turn.index(f"{LABELS}\n") + len(f"{LABELS}\n")]
        rounds.append((len(without_bos(turn + separator, judge)), len(without_bos(question, judge))))
    return counted(tokenize(text, judge), rounds, 1 if judge.bos else 0, wipe=False)


def original_llama_3(turns: Turns, judge: Judge) -> Labels:
    """NeVA's preprocess_llama_3, counted in the same way."""
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    text = f"<|start_header_id|>system<|end_header_id|>\n\n{LANGUAGE_AND_VISION}<|eot_id|>" + "".join(
        f"{user}{q}<|eot_id|>{assistant}{a}<|eot_id|>" for q, a in turns
    )
    parts = text.split(user)
    rounds = []
    for turn in [user.join(parts[:2]), *(user + part for part in parts[2:])]:
        question = turn.split(assistant)[0] + assistant
        rounds.append((len(without_bos(turn, judge)), len(without_bos(question, judge))))
    return counted(tokenize(text, judge), rounds, 1 if judge.bos else 0, wipe=False)


def without_bos(text: str, judge: Judge) -> list[int]:
    """NeMo's text_to_ids."""
    return tokenize(text, judge)[1 if judge.bos else 0 :]


CELLS: dict[str, tuple[Callable, Callable | None]] = {
    # template: (by hand, original)
    "plain": (marked_plain, original_plain),
    "v0": (marked_v0, original_v0),
    "v1": (marked_v1, original_two(USER_ASSISTANT, ("USER", "ASSISTANT"))),
    "llama_2": (marked_llama_2, original_llama_2(LANGUAGE_AND_VISION, second_bos=True)),
    "llama_3": (marked_llama_3, original_llama_3),
    "mistral": (marked_mistral, original_llama_2("", second_bos=False)),
    "chatml": (marked_chatml, None),
    "chatml_direct": (marked_chatml_direct, original_mpt),
    "qwen": (marked_qwen, None),
    "nvgpt": (marked_nvgpt, original_nvgpt),
    "japanese_v1": (marked_japanese_v1, original_two(JAPANESE, ("ユーザー", "システム"), japanese=True)),
}


# ------------------------------------------------------------------------------------------------ the golden files


def verdict(rule: Labels, original: Labels | None) -> str:
    """What the original does in this cell."""
    if original is None:
        return "none"
    assert original[0] == rule[0], "the two derivations disagree about the ids"
    if original[1] == rule[1]:
        return "equal"
    if set(original[1]) == {IGNORED}:
        return "masks the whole sample"
    wrong = sum(one != other for one, other in zip(original[1], rule[1], strict=True))
    return f"{wrong} labels differ"


def golden(template: str) -> dict:
    """The content of one golden file."""
    by_hand, original = CELLS[template]
    content: dict = {"template": template, "image_tokens": IMAGE_TOKENS, "conversations": {}}
    for name, turns in conversations().items():
        if template == "plain" and len(turns) > 1:
            continue
        turns = [(question.strip(), answer) for question, answer in turns]
        cell = {"text": by_hand(turns, "{bos}", "{eos}"), "turns": turns, "tokenizers": {}}
        for kind, judge in judges().items():
            rule = by_the_rule(by_hand(turns, judge.bos or "", judge.eos), judge)
            said = verdict(rule, original(turns, judge) if original else None)
            ids, labels = expanded(*rule, judge.special["<image>"])
            cell["tokenizers"][kind] = {"original": said, "ids": words(ids), "labels": words(labels)}
        content["conversations"][name] = cell
    return content


def expanded(ids: list[int], labels: list[int], placeholder: int) -> Labels:
    """Each PICTURE -> IMAGE_TOKENS placeholders, not trained."""
    pairs = [
        pair
        for token, label in zip(ids, labels, strict=True)
        for pair in ([(placeholder, IGNORED)] * IMAGE_TOKENS if token == PICTURE else [(token, label)])
    ]
    return [token for token, _ in pairs], [label for _, label in pairs]


def words(numbers: list[int]) -> str:
    """Numbers in one string, so that a file shows a row per line; `.` is IGNORED."""
    return " ".join("." if number == IGNORED else str(number) for number in numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check = parser.parse_args().check
    different = []
    for template in CELLS:
        path = FOLDER / f"{template}.json"
        text = json.dumps(golden(template), ensure_ascii=False, indent=1) + "\n"
        if not check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            different.append(path.name)
    if different:
        print(f"differ: {', '.join(different)}")
        return 1
    print(f"{len(CELLS)} files {'are as derived' if check else 'written'}: {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes tokenizers/: four tiny tokenizers of the kinds that language models have.

    python -m tests.data.golden.make_tokenizers

sentencepiece_bpe      as Llama's: BPE, bytes as fallback, a space before each text, also behind special tokens
                       (`legacy`)
sentencepiece_unigram  as llm-jp's: Unigram, a space before the first word only
qwen                   as Qwen's: byte-level BPE, no BOS, answers end with <|im_end|>
llama_3                as Llama 3's: byte-level BPE with a BOS, offsets without spaces, answers end with <|eot_id|>
Each knows the special tokens of all templates, so that every template can be tried with every tokenizer.
"""

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from megatron_patch.data.templates import TEMPLATES

FOLDER = Path(__file__).parent / "tokenizers"
LEARNT = (  # templates, in the order in which the tokenizers saw them
    *("plain", "v0", "v1", "llama_2", "llama_3", "mistral", "chatml", "chatml_direct", "qwen", "nvgpt"),
    "japanese_v1",
)
SPECIAL_TOKENS = (
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<extra_id_0>",
    "<extra_id_1>",
    "<extra_id_2>",
)
WORDS = (
    "which digit is it? a seven, written in red ink on blue paper. what colour is the ink? the second one is greater.",
    "これは数字の写真です。赤い色のインク。何色ですか？ 七です。二枚目の方が大きい。",
    "这是一个数字。红色的墨水。",
)
# How Qwen's and Llama 3's tokenizers tell words apart.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """What the tokenizers learn: the words of these templates and of the conversations."""
    texts = [
        getattr(template, name)
        for template in map(TEMPLATES.get, LEARNT)
        for name in ("system", "system_turn", "question", "answer", "opening")
    ]
    return [line for text in (*texts, *WORDS) for line in text.split("\n") if line.strip()]


def make_sentencepiece(kind: str) -> None:
    """tokenizer.model by sentencepiece itself, and what transformers needs beside it."""
    folder = FOLDER / f"sentencepiece_{kind}"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus() * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=900,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    if kind == "bpe":
        tokenizer = LlamaTokenizer.from_pretrained(str(folder), legacy=True)
        tokenizer.add_tokens(added, special_tokens=True)
    else:
        tokenizer = _unigram(folder, added)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if kind == "bpe":
        config["legacy"] = True  # transformers 5.23 does not save it
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _unigram(folder: Path, added: list[AddedToken]) -> PreTrainedTokenizerFast:
    """The tokenizer.json that belongs to a Unigram model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [(model.id_to_piece(number), model.get_score(number)) for number in range(len(model))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    wrapped.add_tokens(added, special_tokens=True)
    return wrapped


def make_byte_level(name: str, bos: str | None, eos: str, pad: str, trim_offsets: bool) -> None:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    if not trim_offsets:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus() * 4, trainer)
    special = [token for token in (pad, bos, *SPECIAL_TOKENS) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    wrapped.save_pretrained(FOLDER / name)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    make_sentencepiece("bpe")
    make_sentencepiece("unigram")
    make_byte_level("qwen", bos=None, eos="<|im_end|>", pad="<|endoftext|>", trim_offsets=False)
    make_byte_level("llama_3", bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|end_of_text|>", trim_offsets=True)


if __name__ == "__main__":
    main()

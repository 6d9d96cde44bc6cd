"""Makers of what the tests of this room need: tokenizers of two kinds, images, LLaVA-format folders."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_patch.data.loading import DataConfig
from megatron_patch.data.preparation.pipeline import Options, PreparationReport, prepare
from megatron_patch.data.preparation.shard_writer import Shard, shard_name, write_meta
from megatron_patch.data.preparation.sources import LlavaSource

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "USER: ASSISTANT: A chat between a curious user [INST] [/INST] what which digit colour is the ink red green blue"
)


def save_tokenizer(folder: Path, kind: str, bos: bool = True) -> str:
    """A real AutoTokenizer folder; kind: sentencepiece-like `metaspace`, `bytelevel` or `trimmed`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token=None, fuse_unk=False))
    if kind == "metaspace":  # as Llama's: a space is put before each piece, spaces become U+2581, unknown bytes <0xXX>
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        specials = SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False, max_token_length=6)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "trimmed":  # as Llama 3's: offsets leave out the spaces of a token
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        **({"bos_token": "<s>"} if bos else {}),
        additional_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )
    wrapped.save_pretrained(folder)
    return str(folder)


def image_bytes(seed: int, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """An encoded image of random colours."""
    random = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def make_records(root: Path, count: int, prefix: str = "r") -> Path:
    """DIR with images/ and data.json: captions, three turns for every third, no image for every fifth."""
    (root / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        turns = [
            {"from": "human", "value": "which digit is it?\n<image>" if number % 5 else "which digit is it?"},
            {"from": "gpt", "value": f"the digit of record {number}"},
        ]
        if number % 3 == 0:
            turns += [
                {"from": "human", "value": "what colour?"},
                {"from": "gpt", "value": "red ink " * (number % 7 + 1)},
            ]
        record = {"id": f"{prefix}{number:04d}", "conversations": turns}
        if number % 5:
            record["image"] = f"{number}.png"
            (root / "images" / record["image"]).write_bytes(image_bytes(number))
        records.append(record)
    (root / "data.json").write_text(json.dumps(records))
    return root


def convert_records(root: Path, output: str = "wds", **options: Any) -> PreparationReport:
    """DIR with images/ and data.json -> energon folder DIR/output; options: of prepare()."""
    source = LlavaSource(root / "data.json", [root / "images"])
    return prepare(source, root / output, Options(**options))


def write_shards(folder: Path, samples: Sequence[Mapping[str, bytes]], per_shard: int) -> None:
    """{part name: bytes} of each sample -> energon folder with the split train, nothing checked."""
    counts = {}
    for number, first in enumerate(range(0, len(samples), per_shard)):
        shard = Shard(folder, name := shard_name("train", number))
        for place, parts in enumerate(samples[first : first + per_shard], first):
            shard.add(place, parts)
        shard.close()
        counts[name] = shard.samples
    write_meta(folder, {"train": counts})


def changed(settings: DataConfig, **changes: object) -> DataConfig:
    """Settings with some fields replaced."""
    return dataclasses.replace(settings, **changes)

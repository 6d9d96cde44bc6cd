"""Makes a tiny LLM and a tiny CLIP tower, untrained, as ordinary Hugging Face directories.

    python -m examples.llava_mcore.quickstart.make_models OUT --texts DIGITS.json ...

OUT/llm/   LlamaForCausalLM with a byte-level BPE tokenizer learnt from the texts
OUT/clip/  CLIPVisionModel of 28x28 images in 16 patches, with its preprocessor_config.json

The tokenizer has no <image> token, like that of every real LLM: the checkpoint converter adds it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from megatron_patch.atomic_files import atomic_folder
from megatron_patch.errors import UserError

HIDDEN = 128
MOST_TOKENS = 1024  # the texts have so few different words that the tokenizer ends below it
# The v1 template's own words (LLaVA-1.5, conversation.py): learnt too, or each would cost several tokens.
V1_WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
)


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text is representable, and words of `texts` become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )


def initialise(model: torch.nn.Module) -> None:
    """Matrices normal with std 1/sqrt(fan_in).

    With the usual 0.02, made for widths of thousands, a model this narrow passes on almost nothing and stays at
    chance for more than a thousand steps.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            embedding = "embed" in name and "patch_embedding" not in name
            fan_in = parameter.shape[-1] if embedding else parameter[0].numel()
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)


def make_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    initialise(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_tower() -> CLIPVisionModel:
    """Four layers run and the fifth does not: LLaVA takes the features of hidden layer -2."""
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        dtype="float32",
    )
    model = CLIPVisionModel(config)
    initialise(model)
    return model


def texts_of(files: list[Path]) -> Iterator[str]:
    """All texts of LLaVA JSON files, without the image marks."""
    yield V1_WORDS
    for file in files:
        for record in json.loads(file.read_text()):
            for turn in record["conversations"]:
                text = turn["value"].replace("<image>", "").strip()
                # With and without a space before: an answer follows "ASSISTANT: ", a caption follows the image.
                yield from (text, f" {text}")


def make_models(out: Path, files: list[Path], seed: int = 1234) -> None:
    """Writes out/llm and out/clip; `out` must not exist. A kill midway leaves only OUT.tmp-<process id>."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it or name another folder")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; make the digits first")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(texts_of(files))
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    with atomic_folder(out) as folder:
        tokenizer.save_pretrained(folder / "llm")
        make_llm(tokenizer).save_pretrained(folder / "llm")
        make_tower().save_pretrained(folder / "clip")
        processor.save_pretrained(folder / "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="LLaVA JSON files to learn the words from")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        make_models(arguments.out, arguments.texts)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{arguments.out}: llm and clip, untrained, {HIDDEN} wide")


if __name__ == "__main__":
    main()

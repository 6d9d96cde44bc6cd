"""Models and records for benchmarks: real structures with random weights, records that all have the same length."""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.llava_kinds import LLAVA_KINDS
from megatron_patch.tile_plan import AnyResolution, read_candidates

ROOT = Path(__file__).resolve().parents[2]
CONVERTER = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
SMOLLM2 = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}
SEVEN_B = {
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False},
}
WORDS = 200  # of the tokenizer, one token each
SPECIALS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """A model and what it is trained on."""

    language: dict[str, object]
    tower: dict[str, object]
    side_px: int
    patch_px: int
    text_tokens: int
    micro_batch: int
    micro_batches: int = 1
    size: str = "tiny"  # MODEL_SIZE of the launcher
    family: str = "Llama"  # of transformers' configs
    weights: bool = True  # written, so that both sides start from the same; false: too many
    all_trained: bool = False  # the tower too
    kind: str = "llava"  # of LLAVA_KINDS; with CLIP's tower
    image_px: tuple[int, int] | None = None  # height and width of each image, of a kind for any resolution

    @property
    def tile_tokens(self) -> int:
        """Of one tile: SEQ_LEN."""
        return (self.side_px // self.patch_px) ** 2

    @property
    def pinpoints(self) -> list[list[int]]:
        """image_grid_pinpoints of the model; none of LLaVA-1.5."""
        return LLAVA_KINDS[self.kind].pinpoints(self.side_px)

    @property
    def image_tokens(self) -> int:
        """Of one image."""
        if self.image_px is None:
            return self.tile_tokens
        candidates = read_candidates(self.pinpoints, self.side_px)
        return AnyResolution(candidates, self.side_px, self.side_px // self.patch_px).plan(self.image_px).tokens


SHAPES = {
    "quickstart": Shape(
        {
            **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False},
        },
        SMALL_TOWER, 28, 7, 16, 64, all_trained=True,
    ),
    "quickstart-next": Shape(  # 4 tiles and 68 tokens of each image
        {
            **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False},
        },
        SMALL_TOWER, 28, 7, 16, 32, all_trained=True, kind="llava_next", image_px=(28, 84),
    ),
    "135M": Shape(SMOLLM2, SMALL_TOWER, 28, 7, 40, 8, size="0.1B"),
    "135M+CLIP-L": Shape(SMOLLM2, CLIP_L, 224, 14, 40, 4, size="0.1B"),
    "0.5B": Shape(
        {
            **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
            **{"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        },
        CLIP_L, 224, 14, 40, 4, family="Qwen2", size="0.5B",
    ),
    "7B-4-layers": Shape(SEVEN_B | {"num_hidden_layers": 4}, SMALL_TOWER, 28, 7, 40, 1, size="1B"),
    "7B-256+40": Shape(SEVEN_B, CLIP_L, 224, 14, 40, 32, 8, size="7B", weights=False),
    "7B-576+40": Shape(SEVEN_B, CLIP_L, 336, 14, 40, 16, 8, size="7B", weights=False),
    "7B-576+300": Shape(SEVEN_B, CLIP_L, 336, 14, 300, 4, 8, size="7B", weights=False),
}  # fmt: skip


def write_model(folder: Path, shape: Shape) -> Path:
    """A LLaVA as a hub folder: config, tokenizer, processor, and weights where the shape says so."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.save_pretrained(folder)
    text = getattr(transformers, f"{shape.family}Config")(
        **shape.language, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2
    )
    row = LLAVA_KINDS[shape.kind]
    config = transformers.AutoConfig.for_model(
        shape.kind,
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(
            **shape.tower, image_size=shape.side_px, patch_size=shape.patch_px, projection_dim=64
        ),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=text.tie_word_embeddings,
        **({"image_grid_pinpoints": shape.pinpoints} if row.any_resolution else {}),
        **({"image_seq_length": shape.tile_tokens} if row.image_seq_length else {}),
    )
    transformers.CLIPImageProcessor(
        size={"shortest_edge": shape.side_px}, crop_size={"height": shape.side_px, "width": shape.side_px}
    ).save_pretrained(folder)
    processor = {
        **{"processor_class": row.processor, "image_token": "<image>", "patch_size": shape.patch_px},
        **{"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    config.architectures = [row.architecture]
    config.save_pretrained(folder)
    if shape.weights:
        torch.manual_seed(0)
        getattr(transformers, row.architecture)(config).save_pretrained(folder)
    return folder


def write_records(folder: Path, shape: Shape, records: int) -> Path:
    """Records of one image and the shape's tokens of text, <s> among them; returns the energon folder."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    numbers, generator = np.random.default_rng(0), random.Random(0)
    height, width = shape.image_px or (shape.side_px, shape.side_px)
    listed = []
    for number in range(records):
        small = numbers.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / f"images/{number}.jpg", quality=90)
        caption = " ".join(f"w{generator.randrange(WORDS)}" for _ in range(shape.text_tokens - 1))
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        listed.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    return convert(folder, listed)


def convert(folder: Path, records: list[dict]) -> Path:
    """Records of images that lie in the folder -> the energon folder.  Raises RuntimeError."""
    (folder / "data.json").write_text(json.dumps(records))
    command = [sys.executable, str(CONVERTER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{CONVERTER.name} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return folder / "wds"

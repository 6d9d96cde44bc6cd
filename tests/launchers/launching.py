"""What the launcher tests share: the scripts, a folder with valid inputs, and a way to start them."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGE_1 = ROOT / "examples/llava_mcore/run_mcore_llava.sh"
STAGE_2 = ROOT / "examples/llava_mcore/run_sft_mcore_llava.sh"
CONVERTER = ROOT / "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"


# Numbers of Mistral-7B-Instruct-v0.1 without its window, of CLIP-L/14 at 336 px, and of something that is no model's.
LLAVA_7B = {
    "model_type": "llava",
    "image_token_index": 32000,
    "text_config": {
        **{"model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32001, "rms_norm_eps": 1e-5},
        "max_position_embeddings": 32768,
    },
    "vision_config": {
        **{"model_type": "clip_vision_model", "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096},
        **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    },
}
# What makes a LLaVA-NeXT of it.
NEXT = {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]]}
TINY = LLAVA_7B | {
    "text_config": LLAVA_7B["text_config"]
    | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "vocab_size": 1000}
}


def start(script: Path | str, words: list[str], shell: str = "bash", cwd: Path = ROOT, **environment: str):
    """Run a launcher with nothing in its environment but PATH, HOME and `environment`; CPU unless told otherwise."""
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "ACCELERATOR": "cpu"}
    command = [shell, str(script), *words]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=100)


def tree(folder: Path) -> list[str]:
    """Every file and folder below, to see that nothing was created."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def value_after(words: list[str], name: str) -> str:
    """The word after `name`, which must be there once."""
    assert words.count(name) == 1, f"{name} stands {words.count(name)} times"
    return words[words.index(name) + 1]


@dataclass
class Inputs:
    """Folders that every check of the launchers accepts, below one folder, and the guide's argument lists on them."""

    folder: Path
    config: dict = field(default_factory=lambda: LLAVA_7B)
    llm: Path = field(init=False)
    clip: Path = field(init=False)
    checkpoint: Path = field(init=False)
    dataset: Path = field(init=False)
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.llm, self.clip = self.folder / "llm", self.folder / "clip"
        self.checkpoint, self.dataset = self.folder / "checkpoint", self.folder / "wds"
        self.output = self.folder / "output"
        for model, kind in ((self.llm, "mistral"), (self.clip, "clip")):
            model.mkdir(parents=True)
            (model / "config.json").write_text(f'{{"model_type": "{kind}"}}\n')
        (self.dataset / ".nv-meta").mkdir(parents=True)
        (self.checkpoint / "release").mkdir(parents=True)
        (self.checkpoint / "latest_checkpointed_iteration.txt").write_text("release")
        llava = self.checkpoint / "llava"
        llava.mkdir()
        (llava / "config.json").write_text(json.dumps(self.config))
        for name in ("preprocessor_config.json", "tokenizer_config.json"):
            (llava / name).write_text("{}\n")

    def training(self, **changes: str) -> list[str]:
        """The guide's 23 arguments, with these values changed."""
        values = {
            "ENV": "dsw",
            "MODEL_SIZE": "tiny" if self.config is TINY else "7B",
            "BATCH_SIZE": "1",
            "GLOBAL_BATCH_SIZE": "256",
            "LR": "0.00015",
            "MIN_LR": "1e-5",
            "SEQ_LEN": "576",
            "DECODER_SEQ_LEN": "1024",
            "PR": "bf16",
            "TP": "4",
            "PP": "1",
            "CP": "1",
            "DO": "true",
            "FL": "true",
            "AC": "true",
            "OPTIMIZER_OFFLOAD": "false",
            "SAVE_INTERVAL": "100000",
            "DATASET_PATH": str(self.dataset),
            "VALID_DATASET_PATH": str(self.dataset),
            "PRETRAIN_CHECKPOINT_PATH": str(self.checkpoint),
            "TRAIN_ITERS": "20000",
            "LR_WARMUP_ITERS": "200",
            "OUTPUT_BASEPATH": str(self.output),
        }
        assert changes.keys() <= values.keys()
        return list((values | changes).values())

    def conversion(self, **changes: str) -> list[str]:
        """The guide's 8 arguments (9 with HF_CKPT_PATH), with these values changed."""
        values = {
            "MODEL_SIZE": "7B",
            "SOURCE_LLM_CKPT_PATH": str(self.llm),
            "SOURCE_CLIP_CKPT_PATH": str(self.clip),
            "TARGET_CKPT_PATH": str(self.output),
            "TP": "4",
            "PP": "1",
            "mg2hf": "false",
            "PR": "bf16",
        }
        assert changes.keys() <= values.keys() | {"HF_CKPT_PATH"}
        return list((values | changes).values())

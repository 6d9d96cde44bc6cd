"""A language model that people use, frozen, learns to see: SmolLM2-135M, a small tower and a projector.

On the quickstart's real handwritten digits.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.llava_mcore.quickstart.make_digits import make_digits
from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from megatron_patch.data.conversation import ConversationEncoder, Exchange
from tests.smollm2 import save_smollm2
from tests.tiny_models import make_tiny_clip
from tests.training.launching import ROOT, Workspace, losses, run

ITERATIONS = 60


@pytest.mark.slow
def test_a_real_language_model_learns_to_answer_about_images(tmp_path: Path) -> None:
    llm, clip = save_smollm2(tmp_path / "llm"), make_tiny_clip(tmp_path / "clip")
    convert_to_megatron(llm, clip, tmp_path / "checkpoint", model_size="0.1B", precision="fp32")
    make_digits(tmp_path / "data", copies=1)
    converter = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
    subprocess.run([sys.executable, str(converter), str(tmp_path / "data/stage2")], check=True, capture_output=True)
    workspace = Workspace(tmp_path / "checkpoint", tmp_path / "data/stage2/wds")
    settings = {
        "MODEL_SIZE": "0.1B",
        "FREEZE_LANGUAGE_MODEL": "true",
        "CONVERSATION_TEMPLATE": "chatml",
        "BATCH_SIZE": 8,
        "TRAIN_ITERS": ITERATIONS,
        "LR": "3e-3",
        "EVAL_ITERS": 0,
        "CHECK": "true",
        "script": "run_sft_mcore_llava.sh",
    }
    words = ["--allow-fresh-projector"]  # both stages in one, for lack of time
    found = list(losses(run(workspace, tmp_path / "out", words=words, limit_s=1800, **settings)).values())
    assert len(found) == ITERATIONS
    first, last = sum(found[:5]) / 5, sum(found[-5:]) / 5
    print(f"loss of the first and the last five iterations: {first:.3f}, {last:.3f}")
    assert last < 0.5 * first

    convert_to_huggingface(
        tmp_path / "out/checkpoint", tmp_path / "hf", model_size="0.1B", precision="fp32", hf_checkpoint=llm
    )
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    encoder = ConversationEncoder(
        processor.tokenizer, "chatml", model.config.image_token_index, model.config.image_seq_length
    )
    records = json.loads((tmp_path / "data/heldout/digits.json").read_text())
    for record in itertools.islice(records, 4):
        question, truth = (turn["value"] for turn in record["conversations"][:2])
        image = Image.open(tmp_path / "data/heldout/images" / record["image"]).convert("RGB")
        prompt = encoder.prompt([Exchange(question, None)])
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question!r}: {answer!r}, true is {truth!r}")
        assert re.fullmatch(r"[\w' .,!?-]+", answer.strip()) and re.search(r"[A-Za-z0-9]", answer), "no words"

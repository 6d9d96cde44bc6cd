"""SmolLM2-135M-Instruct, a language model that people use, goes in and comes out and says the same."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import convert_to_huggingface, convert_to_megatron
from tests.conversion.conftest import tensors_of
from tests.smollm2 import save_smollm2
from tests.tiny_models import make_tiny_clip
from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
STEPS = 32


@pytest.mark.slow
def test_smollm2_goes_in_answers_and_comes_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm, clip = save_smollm2(tmp_path / "llm"), make_tiny_clip(tmp_path / "clip")
    convert_to_megatron(llm, clip, tmp_path / "checkpoint", model_size="0.1B", precision="fp32")

    tokenizer = AutoTokenizer.from_pretrained(llm)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    judge = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    answer = judge.generate(**prompt, do_sample=False, max_new_tokens=STEPS)
    said = answer[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(said) == STEPS
    plan = {"checkpoint": str(tmp_path / "checkpoint"), "tokens": prompt["input_ids"][0].tolist(), "steps": STEPS}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"result": str(tmp_path / "answer.json")}))
    done = subprocess.run(
        [
            *(interpreter.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"),
            *(str(ROOT / "tests/model/greedy_worker.py"), str(tmp_path / "plan.json")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "answer.json").read_text()) == said
    assert "curvature of spacetime" in tokenizer.decode(said), tokenizer.decode(said)

    convert_to_huggingface(
        tmp_path / "checkpoint", tmp_path / "back", model_size="0.1B", precision="fp32", hf_checkpoint=llm
    )
    before, after = tensors_of(llm), tensors_of(tmp_path / "back")
    assert "lm_head.weight" not in before and len(before) == 272
    for name, tensor in before.items():
        mine = after[f"language_model.{name}"][: len(tensor)]  # <image> may have added a row to the embedding
        assert tensor.view(torch.uint8).equal(mine.contiguous().view(torch.uint8)), name

"""One checkpoint, written once: read at TP 1/2/4 x PP 1/2/4 by Megatron, saved again there, exported byte-equal."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import convert, convert_to_huggingface, convert_to_megatron
from megatron_patch.conversion.hub_weights import FileSpan
from megatron_patch.conversion.torch_dist import CheckpointReader
from tests.conversion.conftest import tensors_of
from tests.warm import interpreter

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "parallelisms"),
    [
        (4, "1x1,2x1,1x2,2x2,4x1,1x4"),  # one start serves all: the others are data-parallel replicas
        (16, "4x2,2x4,4x4"),
    ],
)
def test_read_saved_and_exported_at(processes, parallelisms, hub, tmp_path):
    convert_to_megatron(hub("llava_llama"), None, tmp_path / "once", model_size="tiny", precision="fp32")
    done = subprocess.run(
        [
            *(interpreter.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
            *(
                str(Path(__file__).with_name("transforms_worker.py")),
                str(tmp_path / "once"),
                str(tmp_path),
                parallelisms,
            ),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "rank" in line)[-4000:]
    source = tensors_of(hub("llava_llama"))
    for parallelism in parallelisms.split(","):
        tensor = int(parallelism.split("x")[0])
        with CheckpointReader(tmp_path / parallelism / "iter_0000001") as reader:
            embedding = reader.tensors["language_model.embedding.word_embeddings.weight"]
            assert embedding.size[0] == -(-336 // (128 * tensor)) * 128 * tensor  # padded as that TP wants it
            chunks = len(reader.tensors["language_model.decoder.layers.mlp.linear_fc2.weight"].chunks)
            assert chunks == 4 * tensor  # saved in the pieces of that parallelism
        convert_to_huggingface(
            tmp_path / parallelism, tmp_path / f"hf {parallelism}", model_size="tiny", precision="fp32"
        )
        exported = tensors_of(tmp_path / f"hf {parallelism}")
        assert source.keys() == exported.keys()
        assert all(torch.equal(source[name], exported[name]) for name in source), parallelism


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_bytes_copied_by_the_kernel(form, hub, tmp_path, monkeypatch):
    """Large tensors are never read into the process; here small ones are treated so too."""
    monkeypatch.setattr(convert, "SMALL_SPAN", 1)
    copied = []
    copy_to = FileSpan.copy_to
    monkeypatch.setattr(FileSpan, "copy_to", lambda span, *place: (copied.append(span.nbytes), copy_to(span, *place)))
    source = tensors_of(hub("llava_mistral"))
    for precision in ("fp32", "bf16"):
        made, out = tmp_path / precision, tmp_path / f"hf {precision}"
        convert_to_megatron(
            hub("llava_mistral"), None, made, model_size="tiny", precision="fp32", checkpoint_format=form
        )
        copied.clear()
        convert_to_huggingface(made, out, model_size="tiny", precision=precision)
        spanned = form == "torch_dist" and precision == "fp32"
        assert (len(copied) > 100) == spanned, "bytes of another dtype or parallelism cannot be copied as they are"
        exported = tensors_of(out)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert all(torch.equal(source[name].to(dtype), exported[name]) for name in source)

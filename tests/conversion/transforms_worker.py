"""One process of: our model under many TP x PP, through Megatron's own reader and writer.  Started by torchrun.

transforms_worker.py CHECKPOINT OUT 1x1,2x2,...     writes OUT/<TP>x<PP>/, a checkpoint as that parallelism saves it

Processes beyond TP x PP are data-parallel replicas.  Parameters are NaN before they are read.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "toolkits/model_checkpoints_convertor/llava")]

import verify_worker  # noqa: E402, F401 - prepares torch for Megatron first

# isort: split
import torch  # noqa: E402
from megatron.core import dist_checkpointing, mpu, tensor_parallel  # noqa: E402
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator  # noqa: E402

from megatron_patch.training.load_model import build_model, load_weights  # noqa: E402


def read_and_save(checkpoint: Path, out: Path, tensor: int, pipeline: int) -> None:
    """The checkpoint into the model of this rank, and from there into OUT."""
    mpu.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    unset_num_microbatches_calculator()
    model = build_model(checkpoint, 64, tensor, pipeline).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_weights(model, checkpoint)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    if torch.distributed.get_rank() == 0:
        (out / "iter_0000001").mkdir(parents=True)
        shutil.copytree(checkpoint / "llava", out / "llava")
        (out / "latest_checkpointed_iteration.txt").write_text("1")
    torch.distributed.barrier()
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": model.sharded_state_dict(metadata=metadata), "checkpoint_version": 3.0, "iteration": 1}
    dist_checkpointing.save(state, str(out / "iter_0000001"))
    mpu.destroy_model_parallel()


def main() -> None:
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    for parallelism in sys.argv[3].split(","):
        tensor, pipeline = map(int, parallelism.split("x"))
        read_and_save(checkpoint, out / parallelism, tensor, pipeline)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

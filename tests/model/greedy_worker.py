"""The most likely next tokens of a text by the Megatron model in one process, computed anew at each step.

python -m torch.distributed.run --nproc_per_node 1 tests/model/greedy_worker.py PLAN.json

PLAN.json: {"checkpoint": CKPT, "tokens": [ids], "steps": N, "result": FILE.json}; the result is the list of new ids.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# That module prepares the process for Megatron before it imports torch, so torch comes from there.
from tests.model.parity_worker import build, mpu, tensor_parallel, torch


def main() -> None:
    """Run the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    parallelism = {"tensor": 1, "pipeline": 1, "context": 1, "sequence_parallel": False}
    model, tokens = build(Path(plan["checkpoint"]), parallelism), list(plan["tokens"])
    with torch.no_grad():
        for _ in range(plan["steps"]):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    Path(plan["result"]).write_text(json.dumps(tokens[len(plan["tokens"]) :]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

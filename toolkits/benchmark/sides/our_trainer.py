"""This toolkit's trainer as its launcher starts it, with a gate before each step; see gate.py.

A step begins when the trainer draws its first micro-batch; what Megatron does between two steps counts to the first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from megatron_patch import device


def main() -> None:
    """What examples/llava_mcore/pretrain_llava.py does, and the gate."""
    device.install()
    from gate import Gate
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from megatron_patch.data.loading.loader import TrainLoader
    from megatron_patch.training import loss_spikes
    from megatron_patch.training.pretrain import train_llava

    gate, drawn, sums = Gate(), 0, []
    draw, note = TrainLoader.__next__, loss_spikes.note

    def gated(loader: TrainLoader) -> dict:
        nonlocal drawn
        if drawn % get_num_microbatches() == 0:
            if sums:  # of the step before, over its micro-batches
                total, labels = sum(sums).tolist()
                gate.note(loss=total / labels)
                sums.clear()
            gate.before_step()
        drawn += 1
        return draw(loader)

    def noted(record_ids: list[str], of_batch: object) -> None:
        sums.append(of_batch)
        note(record_ids, of_batch)

    TrainLoader.__next__, loss_spikes.note = gated, noted
    train_llava()


if __name__ == "__main__":
    main()

"""This toolkit's trainer as its launcher starts it, with a gate before each step; see gate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from megatron_patch import device


def main() -> None:
    """What examples/llava_mcore/pretrain_llava.py does, and the gate."""
    device.install()
    from gate import Gate
    from megatron.training import training

    gate, train_step = Gate(), training.train_step

    def gated(*args: object, **kwargs: object) -> tuple:
        gate.before_step()
        result = train_step(*args, **kwargs)
        gate.note(loss=float(result[0]["lm loss"]))
        return result

    training.train_step = gated  # innermost: all that the toolkit and Megatron's loop do around a step counts
    from megatron_patch.training.pretrain import train_llava

    train_llava()


if __name__ == "__main__":
    main()

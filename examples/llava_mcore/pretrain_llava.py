"""Train a LLaVA with Megatron's loop: both stages, every parallelism.  Started by processes.py, for the launchers."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.training import graceful_stop  # the toolkit is run from its folder, not installed

if __name__ == "__main__":
    graceful_stop.listen()  # before torch is imported: a signal in these seconds counts
    gc.disable()  # looking for garbage takes an eighth of the time of imports, which make none; train_llava enables it

from megatron_patch import device, parent_process
from megatron_patch.launch import processes

# At import, since asynchronous saves start a process, which imports this file again and must not outlive its parent.
parent_process.end_with_parent()


def main() -> None:
    """Prepare torch for this device before Megatron is imported, then train."""
    if processes.must_check():
        from megatron_patch.training.preflight import check_llava

        check_llava(sys.argv[1:])
        processes.check_has_passed()
    device.install()
    from megatron_patch.training.pretrain import train_llava

    train_llava()


if __name__ == "__mp_main__":
    device.install()  # in the process that writes asynchronous saves, which asks torch for its device, too
if __name__ == "__main__":
    main()

"""All that a run can be refused for, looked at by one process of a node before any creates something."""

import sys

from megatron_patch import device, patches
from megatron_patch.checkpoint_files import newest_iteration
from megatron_patch.data.loading.loader import build_train_loader, build_valid_loader
from megatron_patch.errors import UserError
from megatron_patch.object_storage import StorageError
from megatron_patch.training.config import has_checkpoint, parse_own_arguments, read_config
from megatron_patch.training.loader_state import read_saved_state


def check_llava(argv: list[str]) -> None:
    """Check the arguments of a run, without the program's name.

    Megatron has every symbol that is wrapped, checkpoint, tokenizer, template and datasets fit together, a first sample
    of the records carries labels, and the data position of a run to be resumed belongs to this data.  Lengths that
    packing or grouping need are measured here, so that no rank waits for another.  Exits with code 2 and one sentence
    when something does not fit.
    """
    try:
        settings = read_config(argv)
        patches.check(device.backend().NAME)
        load = parse_own_arguments(argv).load
        state = None
        if has_checkpoint(load):
            newest = newest_iteration(load).name
            state = read_saved_state(load, int(newest.removeprefix("iter_")), 0, 1) if newest != "release" else None
        build_train_loader(settings.train_dataset_path, settings.data, 0, 1, with_pixels=False, state=state)
        if settings.valid_dataset_path:
            build_valid_loader(settings.valid_dataset_path, settings.data, 0, 1, with_pixels=False)
    except (UserError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

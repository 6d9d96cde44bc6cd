"""EMA_DECAY: an exponential moving average of the trained weights, a checkpoint of its own beside each checkpoint.

`checkpoint/average/` has iterations, tracker and `llava` like `checkpoint/` and is exported like it.  The average is
kept in fp32, whatever the weights are in: a step of bf16 is larger than what one iteration adds.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_patch import llava_folder
from megatron_patch.atomic_files import write_text
from megatron_patch.checkpoint_files import TRACKER
from megatron_patch.patches.touch_points import LOOP, wrap
from megatron_patch.training.checkpoint_retention import folder_name

AVERAGE_FOLDER = "average"  # below the folder of checkpoints


class MovingAverage:
    """average = decay * average + (1 - decay) * weight after each step that changed the weights.

    Args:
        model: the chunks of this process; only parameters with gradients are averaged.
        decay: between 0 and 1.
    """

    def __init__(self, model: list[torch.nn.Module], decay: float) -> None:
        self.decay = decay
        self._model = unwrap_model(model)
        self._weights = [weight for part in self._model for weight in part.parameters() if weight.requires_grad]
        self._averages = [weight.detach().float().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into account."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.lerp_(weight.detach().float(), 1.0 - self.decay)

    def _sharded(self) -> dict[str, Any]:
        """The model's sharded state with the averages, fp32, in place of the trained weights."""
        of_weight = {weight.data_ptr(): average for weight, average in zip(self._weights, self._averages, strict=True)}
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        state = {
            f"model{number}": part.sharded_state_dict(metadata={"dp_cp_group": group})
            for number, part in enumerate(self._model)
        }
        for part in state.values():
            for entry in part.values():
                if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, Tensor):
                    average = of_weight.get(entry.data.data_ptr())
                    if average is not None:
                        entry.data = average.view(entry.data.shape)
                        if isinstance(entry, ShardedTensor):
                            entry.dtype = average.dtype
        return state

    def save(self, checkpoints: Path, iteration: int) -> None:
        """Write the averages of `iteration`, finished before the checkpoint they belong to; all ranks call it."""
        folder = checkpoints / AVERAGE_FOLDER
        where = folder / folder_name(iteration)
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(where, ignore_errors=True)  # of a save that was killed
            where.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(self._sharded(), str(where))
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            if not (folder / llava_folder.NAME).is_symlink():
                (folder / llava_folder.NAME).symlink_to(Path("..") / llava_folder.NAME)
            write_text(folder / TRACKER, str(iteration))
            for older in folder.glob("iter_*"):
                if older != where and not (checkpoints / older.name).is_dir():
                    shutil.rmtree(older)

    def load(self, checkpoints: Path, iteration: int) -> bool:
        """Read the averages that belong to a checkpoint; False where there are none, for example on the first resume
        with EMA_DECAY: then they begin with the weights."""
        where = checkpoints / AVERAGE_FOLDER / folder_name(iteration)
        if not (where / "metadata.json").is_file():
            return False
        loaded = dist_checkpointing.load(self._sharded(), str(where))
        for number, part in enumerate(self._model):
            names = {weight.data_ptr(): name for name, weight in part.named_parameters() if weight.requires_grad}
            for average, weight in zip(self._averages, self._weights, strict=True):
                name = names.get(weight.data_ptr())
                if name is not None:
                    average.copy_(loaded[f"model{number}"][name].view(average.shape))
        return True


def track_ema(args: Any) -> None:
    """Wrap loading, steps and saves of Megatron's training loop; nothing without --ema-decay."""
    if not args.ema_decay:
        return
    kept: list[MovingAverage] = []

    def with_loading(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_begin(model: list[torch.nn.Module], *arguments: Any, **named: Any) -> Any:
            result = load_checkpoint(model, *arguments, **named)
            iteration = result[0]
            kept[:] = [MovingAverage(model, args.ema_decay)]
            if iteration > 0 and not kept[0].load(Path(args.load), iteration):
                print_rank_0(f" no average beside the checkpoint of iteration {iteration}: it begins with the weights")
            return result

        return load_and_begin

    def with_update(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_average(forward_step: Callable, iterator: Any, model: Any, *arguments: Any, **named: Any) -> Any:
            result = train_step(forward_step, iterator, model, *arguments, **named)
            if not kept:  # neither resumed nor started from a checkpoint
                kept.append(MovingAverage(model, args.ema_decay))
            elif not result[1]:  # skipped_iter
                kept[0].update()
            return result

        return step_and_average

    def with_saving(save: Callable[..., Any]) -> Callable[..., Any]:
        def save_with_average(iteration: int, *arguments: Any, **named: Any) -> Any:
            if kept:
                kept[0].save(Path(args.save), iteration)
            return save(iteration, *arguments, **named)

        return save_with_average

    wrap(LOOP, "load_checkpoint", "training.ema", with_loading)
    wrap(LOOP, "train_step", "training.ema", with_update)
    wrap(LOOP, "save_checkpoint_and_time", "training.ema", with_saving)

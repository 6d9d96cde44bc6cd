"""megatron-core 0.19.2, core/optimizer/optimizer.py:139: saved parameter groups are found by their learning rates.

A group's key holds max_lr, min_lr and weight decay, so a run cannot be resumed with another LR: "Could not find
parameter group with key".  Groups are found by what they are instead: the module they belong to, and whether they
decay.  What was typed is put back after loading (training/parameter_groups.py).
"""

from megatron_patch.patches import touch_points

KEYS = ("module", "optimizer", "wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def apply() -> None:
    """Replace the key in both files that read it."""
    for module in (touch_points.OPTIMIZER, touch_points.DISTRIBUTED_OPTIMIZER):
        touch_points.replace(module, "param_group_identifier_keys", "patches.parameter_group_keys", KEYS)

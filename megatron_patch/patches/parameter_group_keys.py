"""megatron-core 0.19.2, core/optimizer/optimizer.py:139: saved parameter groups are found by their learning rates.

A group's key holds max_lr, min_lr and weight decay, so a run cannot be resumed with another LR: "Could not find
parameter group with key".  Groups are found by what they are instead: the module they belong to, and whether they
decay.  What was typed is put back after loading (training/parameter_groups.py).
Remove when test_parameter_groups' resume with another learning rate passes without it.
"""

TARGETS = (
    ("megatron.core.optimizer.optimizer", "param_group_identifier_keys"),
    ("megatron.core.optimizer.distrib_optimizer", "param_group_identifier_keys"),
)
KEYS = ("module", "optimizer", "wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def applies(backend: str) -> bool:
    """Everywhere: this is not about the device."""
    del backend
    return True


def apply() -> None:
    """Replace the key in both files that read it."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    optimizer.param_group_identifier_keys = KEYS
    distrib_optimizer.param_group_identifier_keys = KEYS

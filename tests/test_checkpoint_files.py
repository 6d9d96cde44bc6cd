"""What lies in a checkpoint folder, whichever torch wrote it."""

import pickle

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_patch.checkpoint_files import accept_newer_metadata


def test_metadata_of_a_newer_torch_is_read() -> None:
    """torch 2.15 writes one thing more of each tensor than 2.14; any torch must read what a newer one wrote."""
    accept_newer_metadata()
    properties = TensorProperties(dtype=torch.bfloat16, requires_grad=True)
    read = TensorProperties.__new__(TensorProperties)
    read.__setstate__((*properties.__getstate__(), "of a newer torch"))
    assert read == properties == pickle.loads(pickle.dumps(properties))

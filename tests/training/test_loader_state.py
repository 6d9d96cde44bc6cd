"""The data position that a checkpoint holds: any rank may read another's; none or a damaged one is refused."""

from pathlib import Path

import pytest
import torch

from megatron_patch.errors import UserError
from megatron_patch.training.loader_state import DATA_FOLDER, read_saved_state


def test_the_position_is_found_or_refused(tmp_path: Path) -> None:
    file = tmp_path / DATA_FOLDER / "iter_0000010/mp_rank_00_000/train_dataloader_dprank000.pt"
    with pytest.raises(UserError, match="iter_0000010: no data position in the checkpoint"):
        read_saved_state(tmp_path, 10, 0, 4)
    file.parent.mkdir(parents=True)
    state = {"position": 7, "counts": {"kept": 5}, "topology": {"data_parallel_rank": 0, "data_parallel_size": 1}}
    torch.save({"dataloader_state_dict": state}, file)
    assert read_saved_state(tmp_path, 10, 3, 4)["position"] == 7
    for content in (b"no state", file.read_bytes()[:50]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"dprank000\.pt: the data position cannot be read .*resume from an older"):
            read_saved_state(tmp_path, 10, 0, 4)

"""A file of prompts in pieces: the bytes of the whole, and no answer of a node that does not see the images."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from megatron_patch import ray_cluster
from megatron_patch.errors import UserError
from megatron_patch.inference import Engine, Sampling
from megatron_patch.inference.ray_engines import BATCHES, answer_by
from megatron_patch.inference.run import Job, check_job, run, run_by
from megatron_patch.sight import look
from tests.inference.conftest import Folders

LINES = 2 * BATCHES + 3


class Here:
    """Actors, but for the actors."""

    def __init__(self, engine: Engine, most: int = LINES) -> None:
        self._engine, self._most = engine, most

    def in_order(self, pieces: Iterable[Callable]) -> Iterator:
        for number, piece in enumerate(pieces):
            if number == self._most:
                raise KeyboardInterrupt
            yield piece(self._engine)


@pytest.fixture
def job(folders: Folders, tmp_path: Path) -> Job:
    """Lines without an id, one of them none, one whose image no node has."""
    lines = [{"prompt": "What is this?" + " Say more." * (n % 3), "image": f"{n % 4}.png"} for n in range(LINES)]
    lines[BATCHES + 1]["image"] = "none.png"
    texts = [json.dumps(line) for line in lines]
    texts[2] = "{"
    (tmp_path / "prompts.jsonl").write_text("\n".join(texts) + "\n")
    return Job(tmp_path / "prompts.jsonl", folders.images, tmp_path / "whole.jsonl", Sampling(4), 1, {"model": "m"})


def test_pieces_and_one_that_goes_on_give_the_whole(job: Job, engine: Engine) -> None:
    whole = run(job, engine)
    assert len(whole.errors) == 2
    pieces = dataclasses.replace(job, output=job.output.with_name("pieces.jsonl"))
    words = (job.image_root, job.sampling, job.batch_size)
    with pytest.raises(KeyboardInterrupt):
        run_by(answer_by(Here(engine, 1), *words), pieces)
    assert len(pieces.partial.read_text().splitlines()) == BATCHES
    check_job(pieces)
    assert run_by(answer_by(Here(engine), *words), pieces) == whole
    assert pieces.output.read_bytes() == job.output.read_bytes()


def test_a_node_that_lost_its_images_does_not_answer_for_them(
    job: Job, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("token")
    elsewhere = tmp_path / "mount"
    elsewhere.mkdir()
    (elsewhere / "0.png").write_bytes(b"")
    monkeypatch.setattr(ray_cluster, "_here", ray_cluster._Here(engine, look([elsewhere]), (str(token), "token")))
    answer = answer_by(Here(engine), job.image_root, job.sampling, job.batch_size)
    run_by(answer, job)  # an image that is missing everywhere is that line's error
    (elsewhere / "0.png").unlink()
    lost = dataclasses.replace(job, output=job.output.with_name("lost.jsonl"))
    with pytest.raises(UserError, match=r"node .*: .*0.png is there and not here; mount it"):
        run_by(answer, lost)
    assert not lost.output.exists()

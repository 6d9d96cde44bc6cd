"""Engines on the nodes of a Ray cluster: each model in an actor with a GPU of its own, or cores where none has one.

The command reads the prompts, hands them out in pieces of whole batches and writes the answers in their order, so its
files are those of the command without Ray; an answer that a node could not give for a missing image is not taken
before that node has looked whether it sees the images.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

from megatron_patch.data.preparation.ray_workers import MISSING
from megatron_patch.inference.interface import Engine, Sampling
from megatron_patch.inference.run import Told, answer_lines
from megatron_patch.ray_cluster import RayActors, check_sight

BATCHES = 8  # of a piece: a second or more of work, and what is done again when a node dies


@dataclass(frozen=True)
class Model:
    """An engine's arguments, as open_engine() takes them; folders are absolute."""

    folder: Path
    kind: str
    dtype: str
    template: str | None

    def __call__(self) -> Engine:
        """Load it."""
        from megatron_patch.inference.engine import open_engine

        return open_engine(self.folder, self.kind, self.dtype, self.template)


def answer_by(
    actors: RayActors, image_root: Path, sampling: Sampling, batch_size: int
) -> Callable[[Iterable[bytes], int], Iterator[list[Told]]]:
    """As inference.run.run_by() takes it."""

    def answer(texts: Iterable[bytes], first: int) -> Iterator[list[Told]]:
        size = BATCHES * batch_size
        words = {"image_root": image_root.absolute(), "sampling": sampling, "batch_size": batch_size}
        pieces = enumerate(batched(texts, size))
        return actors.in_order(
            partial(_answer_piece, texts=piece, first=first + size * number, **words) for number, piece in pieces
        )

    return answer


def _answer_piece(engine: Engine, **words: Any) -> list[Told]:
    """On a node."""
    return checked([line for lines in answer_lines(engine, **words) for line in lines])


def checked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same lines.  Raises UserError: an image is missing in them, and this node does not see the images."""
    if any(reason in str(line.get("error", "")) for line in lines for reason in MISSING):
        check_sight()
    return lines

"""LLaVA-Video-178K's JSON, and LLaVA-OneVision's of images and videos: LLaVA's records with a `video`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_patch.data.conversation import IMAGE_MARK, VIDEO_MARK
from megatron_patch.data.preparation.json_stream import stream_records
from megatron_patch.data.preparation.sources.base import SourceRecord, as_object
from megatron_patch.data.preparation.sources.image_folders import ImageFolders
from megatron_patch.data.preparation.sources.llava import LlavaSource, read_names
from megatron_patch.data.rejection import RecordError
from megatron_patch.data.video import FrameSampling, check_decoder, read_frames


class LlavaVideoSource(LlavaSource):
    """Records of LLaVA's form whose `video` names a file, a folder of frames, or a list of such.

    Raises UserError where the first video is a file and there is nothing to decode it with.
    """

    def __init__(
        self, path: Path, image_roots: Sequence[Path], video_roots: Sequence[Path], sampling: FrameSampling
    ) -> None:
        super().__init__(path, image_roots)
        self._videos = ImageFolders(video_roots, "video")
        self._sampling = sampling
        self._check_first()

    def describe(self) -> dict[str, Any]:
        """As of LLaVA's JSON; what frames depend on."""
        return {**super().describe(), "video_roots": self._videos.describe(), "frames": asdict(self._sampling)}

    def places(self) -> list[Path]:
        """File and folders."""
        return [*super().places(), *self._videos.places()]

    def read(self, item: Any) -> SourceRecord:
        """The record; where it has videos and no image, and no mark of a video, its image marks are those of videos."""
        record = as_object(item)
        names = read_names(record, "video")
        found = super().read({key: value for key, value in record.items() if key != "video"})
        if not names:
            return found
        turns = found.conversations
        if not found.images:
            turns = _with_video_marks(turns)
        return replace(found, conversations=turns, videos=names, video_names=record["video"])

    def read_video(self, reference: str) -> list[bytes]:
        """Frames of the file or folder of this name."""
        try:
            return read_frames(self._videos.find(reference), self._sampling)
        except RecordError as error:
            raise RecordError(error.reason, f"{reference}: {error.detail}") from None

    def _check_first(self) -> None:
        """Look at the first video alone: the others need not be read for it."""
        for item in stream_records(self._path):
            try:
                names = read_names(as_object(item), "video")
                if names and Path(self._videos.find(names[0])).is_file():
                    check_decoder()
            except RecordError:
                continue
            if names:
                return


def _with_video_marks(turns: Any) -> Any:
    """Turns, as far as they are any, in which VIDEO_MARK stands for IMAGE_MARK unless it stands somewhere already."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    asked = [turn for turn in turns if turn.get("from") == "human" and isinstance(turn.get("value"), str)]
    if any(VIDEO_MARK in turn["value"] for turn in asked):
        return turns
    return [
        {**turn, "value": turn["value"].replace(IMAGE_MARK, VIDEO_MARK)} if any(turn is one for one in asked) else turn
        for turn in turns
    ]

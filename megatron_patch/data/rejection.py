"""The exception that takes one record out, never the run."""

# Every reason for which a record is left out, in converters and in training alike, and what it means.
REASONS = {
    "malformed": "not a record {id, image?, conversations: [{from, value}]}",
    "roles": "the turns do not alternate between human and gpt",
    "no answer": "an answer is missing or empty",
    "image marks": "the <image> marks and the images do not agree",
    "video marks": "the <video> marks and the videos do not agree",
    "video": "a video for a model that sees none (LLaVA-OneVision does, shown images at any resolution), or for a "
    "converter that reads images alone",
    "video missing": "the video's file or folder of frames does not exist or lies outside the video folder",
    "video unreadable": "the video cannot be decoded, or holds no frames",
    "image missing": "the image's file does not exist or lies outside the image folder",
    "image truncated": "the image's bytes end before the image does",
    "not an image": "the file holds no image in a format that Pillow knows",
    "image too large": "so many pixels, or so elongated, that decoding it could exhaust the memory",
    "image unreadable": "the image's bytes cannot be decoded fully",
    "duplicate": "a record with the same id, image and conversation came before",
    "duplicate id": "a record with the same id came before (only where that is asked for)",
    "turns": "the template cannot hold this number of turns",
    "too long": "an image, or with the converters' --max-tokens anything, lies beyond the longest allowed record",
    "no trained token": "nothing of an answer is left within the longest allowed record",
    "excluded": "left out by the folder's own split.yaml",
}


def current_reason(reason: str) -> str:
    """A reason as REASONS spells it, from a journal or a loader state of any age: images were once `pictures`."""
    return reason.replace("not a picture", "not an image").replace("picture", "image")


class RecordError(ValueError):
    """This record cannot be used: a reason of REASONS and the particulars."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

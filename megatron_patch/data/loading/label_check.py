"""Before training: would a first sample of the records teach what it should?

All labels masked is the costliest mistake of LLaVA trainers: the loss is 0 or NaN, hours later.  Records that cannot be
used for other reasons would stop the run after a few batches, with a checkpoint folder made and GPUs waited for.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator

import numpy as np

from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.task_encoder import EncodedText, TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

SAMPLE_RECORDS = 500
SAMPLE_IMAGES = 32  # records of these whose images are decoded too: 4 ms each
ALWAYS_TOLERATED = 10  # unusable records up to this never stop a run, however few it has seen
WITHOUT_LABELS = ("no trained token", "too long")  # reasons that template, tokenizer or length are to blame for
# What to do about a reason; where none is given, the records themselves are to blame.
REMEDIES = {
    "turns": "choose a CONVERSATION_TEMPLATE that holds several turns (plain holds one), or the data of stage 1",
    "image marks": "repair the <image> marks of the records",
    "video marks": "repair the <video> marks of the records",
    "video": "train a LLaVA-OneVision with IMAGE_ASPECT_RATIO=anyres, or leave such records out",
}
REMEDY = "leave such records out (inspect_dataset.py shows them), or convert the data again"


def too_many(count: int, of: int, tolerated_share: float) -> bool:
    """Is that more than training tolerates?  A few are nothing, except where they are most of the data."""
    return count > tolerated_share * of and (count > ALWAYS_TOLERATED or 2 * count > of)


def check_labels(dataset: Dataset, encoder: TaskEncoder, tolerated_share: float) -> None:
    """Look at the texts of records spread over the whole dataset, and at the images of some of them.

    Raises:
        UserError: too many of them carry no label or cannot be used for whatever reason, or all; or the ending of an
            answer is a label in none, so that the model could never learn to stop.
    """
    texts: list[EncodedText] = []
    unusable: list[RecordError] = []
    for outcome in _sample(dataset, encoder):
        (texts if isinstance(outcome, EncodedText) else unusable).append(outcome)
    unlabelled = [error for error in unusable if error.reason in WITHOUT_LABELS]
    seen = len(texts) + len(unlabelled)
    if too_many(len(unlabelled), seen, tolerated_share):
        raise UserError(
            f"{dataset.path}: {len(unlabelled)} of {seen} records looked at carry no label "
            f"(the last one: {unlabelled[-1]}), tolerated are {tolerated_share:.0%}; raise DECODER_SEQ_LEN, choose "
            "another CONVERSATION_TEMPLATE, or leave such records out (inspect_dataset.py shows them)"
        )
    looked_at = len(texts) + len(unusable)
    if unusable and (not texts or too_many(len(unusable), looked_at, tolerated_share)):
        reasons = Counter(error.reason for error in unusable).most_common()
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
        raise UserError(
            f"{dataset.path}: {len(unusable)} of {looked_at} records looked at cannot be used ({counts}; the last one: "
            f"{unusable[-1]}), tolerated are {tolerated_share:.0%}; {REMEDIES.get(reasons[0][0], REMEDY)}"
        )
    ending = encoder.conversation.ending_id
    if texts and ending is not None and not any((text.labels == ending).any() for text in texts):
        raise UserError(
            f"{dataset.path}: the token that ends an answer (id {ending}) is a label in none of {seen} records looked "
            "at, so the model could never learn to stop; raise DECODER_SEQ_LEN, which cuts every last answer"
        )


def _sample(dataset: Dataset, encoder: TaskEncoder) -> Iterator[EncodedText | RecordError]:
    """Records at equal distances, encoded or refused; records that split.yaml leaves out are passed over."""
    count = min(SAMPLE_RECORDS, len(dataset))
    image_step = max(1, count // SAMPLE_IMAGES)
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    whole = [number % image_step == 0 for number in range(count)]
    reads = dataset.reads(indices, [one or encoder.config.sizes_matter for one in whole])
    for with_images, read in zip(whole, reads, strict=True):
        try:
            parts = read()
            if parts is not None:
                yield encoder.encode(parts) if with_images else encoder.encode_text(cook(parts))
        except RecordError as error:
            yield error
        except (OSError, ValueError, tarfile.TarError) as error:
            yield RecordError("malformed", f"shard: {type(error).__name__}: {error}")

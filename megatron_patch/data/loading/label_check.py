"""Before training: would a first sample of the records teach what it should?

All labels masked is the costliest mistake of LLaVA trainers: the loss is 0 or NaN, hours later.
"""

import tarfile
from collections.abc import Iterator

import numpy as np

from megatron_patch.data.loading.dataset import Dataset
from megatron_patch.data.loading.task_encoder import EncodedText, TaskEncoder
from megatron_patch.data.record import cook
from megatron_patch.data.rejection import RecordError
from megatron_patch.errors import UserError

SAMPLE_RECORDS = 500
WITHOUT_LABELS = ("no trained token", "too long")  # reasons that template, tokenizer or length are to blame for


def check_labels(dataset: Dataset, encoder: TaskEncoder, tolerated_share: float) -> None:
    """Look at records spread over the whole dataset, without their images.

    Raises:
        UserError: more than `tolerated_share` of them carry no label, or the ending of an answer is a label in none, so
            that the model could never learn to stop.
    """
    texts: list[EncodedText] = []
    unlabelled: list[RecordError] = []
    for outcome in _sample(dataset, encoder):
        if isinstance(outcome, EncodedText):
            texts.append(outcome)
        elif outcome.reason in WITHOUT_LABELS:
            unlabelled.append(outcome)
    if not texts and not unlabelled:
        return  # unusable for other reasons, each of which training counts and names
    seen = len(texts) + len(unlabelled)
    if len(unlabelled) > tolerated_share * seen:
        raise UserError(
            f"{dataset.path}: {len(unlabelled)} of {seen} records looked at carry no label "
            f"(the last one: {unlabelled[-1]}), tolerated are {tolerated_share:.0%}; raise DECODER_SEQ_LEN, choose "
            "another CONVERSATION_TEMPLATE, or leave such records out (inspect_dataset.py shows them)"
        )
    ending = encoder.conversation.ending_id
    if ending is not None and not any((text.labels == ending).any() for text in texts):
        raise UserError(
            f"{dataset.path}: the token that ends an answer (id {ending}) is a label in none of {seen} records looked "
            "at, so the model could never learn to stop; raise DECODER_SEQ_LEN, which cuts every last answer"
        )


def _sample(dataset: Dataset, encoder: TaskEncoder) -> Iterator[EncodedText | RecordError]:
    """Records at equal distances, encoded or refused."""
    count = min(SAMPLE_RECORDS, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        try:
            parts = dataset.read_text(index)
            if parts is not None:
                yield encoder.encode_text(cook(parts))
        except RecordError as error:
            yield error
        except (OSError, ValueError, tarfile.TarError):
            continue  # a damaged shard: training counts and names it

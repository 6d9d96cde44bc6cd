"""From an energon folder to micro-batches.  Imports nothing of preparation.

config.py        what a loader needs to know
blend.py         one folder, a list of folders, or a YAML that weights them
dataset.py       energon folders, record by record
metadata.py      the shards of a folder's split
lengths.py       the records' lengths in tokens, counted once and kept
sampler.py       which record comes when: a function of folder and seed
packing.py       which records share a packed row, and how rows are kept
row_cache.py     rows of many records, packed once and mapped into memory
balance.py       positions of a rank's micro-batches where ranks get equal work
task_encoder.py  one record -> token ids, labels, pixels
collator.py      encoded records -> one micro-batch, padded or packed
loader.py        micro-batches for one data-parallel rank, with the counts of its records
state.py         the position of a loader, saved and checked
label_check.py   refuses data that could teach nothing
inspection.py    what training makes of records, shown
prompts.py       questions of the validation set, for sample answers
"""

from megatron_patch.data.loading.config import DataConfig

__all__ = ["DataConfig", "build_train_loader", "build_valid_loader"]


def __getattr__(name: str) -> object:
    """Load the loaders on first use: they bring torch and energon, which the other modules do not need."""
    if name in ("build_train_loader", "build_valid_loader"):
        from megatron_patch.data.loading import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

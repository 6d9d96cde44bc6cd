"""Data room: conversations, pictures, shards, batches and loaders.  Imports neither the model nor the training room."""

from megatron_patch.data.settings import DataSettings

__all__ = ["DataSettings", "build_train_loader", "build_valid_loader"]


def __getattr__(name: str) -> object:
    """Load the loaders on first use: they bring torch and energon, which the converters' core does not need."""
    if name in ("build_train_loader", "build_valid_loader"):
        from megatron_patch.data import loaders

        return getattr(loaders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

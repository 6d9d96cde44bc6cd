"""Data room: conversations, images, shards, batches and loaders.  Imports neither the model nor the training room."""

from megatron_patch.data.loading.config import DataConfig

__all__ = ["DataConfig", "build_train_loader", "build_valid_loader"]


def __getattr__(name: str) -> object:
    """Load the loaders on first use: they bring torch and energon, which the converters' core does not need."""
    if name in ("build_train_loader", "build_valid_loader"):
        from megatron_patch.data.loading import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

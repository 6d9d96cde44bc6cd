"""The decoder's last layer, behind its attention at labelled positions alone.

What the last layer makes of a position, the head sees there and no other layer does: behind the attention the
unlabelled positions' part has no effect on the loss.  So output projection, MLP, final norm and head work on the
labelled ones.  Queries come out of one product with keys and values, which are wanted of all, and stay whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_patch.geometry import IGNORE_LABEL


def labelled_positions(labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which positions the loss is of.

    Args:
        labels: int64 [B, S], IGNORE_LABEL where there is none.

    Returns:
        int64 [L], their places in states [S, B, ...] whose first two dimensions are flattened; int64 [L], their
        labels; and how many are labelled.  Where none is, L is 1 all the same: every rank's backward pass must run.
    """
    record, position = (labels != IGNORE_LABEL).nonzero(as_tuple=True)
    count = len(record)
    if count == 0:
        record = position = torch.zeros(1, dtype=torch.int64, device=labels.device)
    return position * labels.shape[0] + record, labels[record, position].clamp(min=0), count


def chosen(states: Tensor, places: Tensor) -> Tensor:
    """states [S, B, H] -> [L, 1, H], of the places int64 [L] in [S * B]."""
    return states.flatten(0, 1).index_select(0, places).unsqueeze(1)


def can_narrow(config: TransformerConfig) -> bool:
    """Whether every rank holds whole records' states there, and a pass is not repeated after the next one began.

    Kernels of fp8 want multiples of 16 rows.  Offloaded states are asked for in the order in which they were kept.
    """
    whole = not config.sequence_parallel and config.recompute_granularity != "full"
    return whole and not (config.fp8 or config.cpu_offloading)


class LastLayer:
    """What narrows a transformer layer while at() is entered; at other times the layer is Megatron's.

    Args:
        layer: of either implementation, changed in place.
    """

    def __init__(self, layer: TransformerLayer) -> None:
        self._places: Tensor | None = None
        layer.self_attention.linear_proj.register_forward_pre_hook(self._narrow_context)
        layer.self_attn_bda = self._narrowing_residual(layer.self_attn_bda)

    @contextmanager
    def at(self, places: Tensor) -> Iterator[None]:
        """Have the layer return states [L, 1, H], of `places` int64 [L] as in chosen()."""
        self._places = places
        try:
            yield
        finally:
            self._places = None

    def _narrow_context(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context, *others = inputs
        return inputs if self._places is None else (chosen(context, self._places), *others)

    def _narrowing_residual(self, build: Callable[..., Callable[..., Tensor]]) -> Callable[..., Callable[..., Tensor]]:
        """Megatron's builder of the function that adds the attention's output to the layer's input."""

        def narrowing(*settings: object) -> Callable[..., Tensor]:
            add = build(*settings)

            def add_chosen(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
                own = residual if self._places is None else chosen(residual, self._places)
                return add(output_and_bias, own, dropout)

            return add_chosen

        return narrowing

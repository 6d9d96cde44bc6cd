"""Head and cross-entropy in one: hidden states of labelled positions -> their losses, in few passes over the logits.

The logits [L, V / TP] are by far the largest tensor of a step.  They become exp(logit - largest) in place, and are
never divided by their sum: that factor goes to the small side of each product of the backward pass.
"""

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_patch import kernels
from megatron_patch.kernels import gradient_buffer
from megatron_patch.model.linear import product

# More logits than this are computed again in the backward pass, a part of the rows at a time, in place of being kept.
MOST_BYTES = 1 << 28
PRODUCT_ROWS = 1 << 11  # of the head's gradient that are held at once, where its dtype is not that of the buffer


def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, group: ProcessGroup) -> Tensor:
    """Cross-entropy of a linear head, in nats.

    Args:
        hidden: [L, H], the same on all ranks of the group.
        weight: [V / TP, H], this rank's rows of the head.
        targets: int64 [L], tokens of the whole vocabulary.
        vocabulary: tokens there are; rows of the head beyond pad it and get no probability.
        group: tensor-parallel ranks.

    Returns:
        float32 [L].
    """
    hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    return _HeadLosses.apply(hidden, weight, targets, vocabulary, group)


def sum_and_number(losses: Tensor, count: int) -> Tensor:
    """losses [L] of `count` labelled positions -> [2]; without one, that of the position which stands in weighs 0."""
    return torch.stack([losses.sum() * (count > 0), losses.new_full((), count)])


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, group: ProcessGroup) -> Tensor:
        width = weight.shape[0]
        first = group.rank() * width
        own = ((targets >= first) & (targets < first + width)).to(torch.float32)  # 1 where the target is this rank's
        columns = (targets - first).clamp(0, width - 1)
        real = min(width, max(0, vocabulary - first))
        rows = max(1, MOST_BYTES // (4 * width))
        losses, largest, total = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
        exponentials = None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = product(hidden[part], weight)
            top = _row_largest(logits, real)
            if group.size() > 1:
                all_reduce(top, ReduceOp.MAX, group=group)
            predicted = (logits.gather(1, columns[part, None])[:, 0].float() - top) * own[part]
            exponentials, sum_of_row = _exponentials(logits, real, top)
            sums = torch.stack([sum_of_row, predicted])
            if group.size() > 1:
                all_reduce(sums, group=group)
            losses[part], largest[part], total[part] = sums[0].log() - sums[1], top, sums[0]
        kept = exponentials if hidden.shape[0] <= rows else None
        ctx.save_for_backward(hidden, weight, columns, own, largest, total, kept)
        ctx.rows, ctx.real = rows, real
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, own, largest, total, kept = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = _gradient_buffer(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            exponentials = kept
            if exponentials is None:
                exponentials, _ = _exponentials(product(hidden[part], weight), ctx.real, largest[part])
            exponentials = exponentials.to(weight.dtype)
            # softmax = exponentials * factor; the loss falls with the target's logit
            factor = (gradient[part] / total[part])[:, None]
            minus = (gradient[part] * own[part]).neg()[:, None]
            if of_hidden is not None:
                multiplied = product(exponentials, weight.t()).mul_(factor)
                of_hidden[part] = multiplied.addcmul_(weight[columns[part]], minus.to(weight.dtype))
            if of_weight is not None:
                _add_product(of_weight, exponentials, (hidden[part] * factor).to(weight.dtype))
                of_weight.index_add_(0, columns[part], (hidden[part] * minus).to(of_weight.dtype))
        if of_weight is not None and of_weight is getattr(weight, "main_grad", None):
            of_weight = None
        return of_hidden, of_weight, None, None, None


def _row_largest(logits: Tensor, real: int) -> Tensor:
    """As kernels.row_largest()."""
    found = kernels.row_largest(logits, real)
    if found is not None:
        return found
    return logits[:, :real].amax(-1).float() if real else logits.new_full(logits.shape[:1], -torch.inf).float()


def _exponentials(logits: Tensor, real: int, largest: Tensor) -> tuple[Tensor, Tensor]:
    """e^(logit - largest), in the logits' place where that can be, and each row's sum, float32."""
    sums = kernels.exponentials(logits, real, largest)
    if sums is not None:
        return logits, sums
    found = logits.float().sub_(largest[:, None]).exp_()
    found[:, real:] = 0
    return found, found.sum(-1)


def _gradient_buffer(weight: Tensor) -> Tensor:
    """Where the gradient of the weight is added up: Megatron's own buffer where that can be, else zeros.

    A tied head is the embedding too, whose gradient comes last and tells Megatron that this weight's is complete.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is not None and getattr(weight, "zero_out_wgrad", False):
        return buffer
    return torch.zeros_like(weight)


def _add_product(total: Tensor, exponentials: Tensor, hidden: Tensor) -> None:
    """total [V / TP, H] += exponentials [L, V / TP]^T hidden [L, H]."""
    first = gradient_buffer.begin(total)
    rows = total.shape[0] if total.dtype == hidden.dtype else PRODUCT_ROWS
    for part, columns in zip(total.split(rows), exponentials.split(rows, 1), strict=True):
        gradient_buffer.add_product(part, columns.t(), hidden, first)

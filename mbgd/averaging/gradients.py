"""Gradients by parameter, and their addition where some parameters have none."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from mbgd.averaging.pieces import in_memory_order, with_strides

Gradients = dict[Tensor, Tensor]
"""Parameter → gradient."""


def flat(gradients: Gradients, places: Gradients) -> Tensor:
    """The gradients as one vector in the layout of a bucket, whose views, in order, are `places`.

    Zeros for a parameter without a gradient.
    """
    vectors = []
    for parameter, place in places.items():
        gradient = gradients[parameter] if parameter in gradients else torch.zeros_like(place)
        vectors.append(in_memory_order(with_strides(gradient, place.stride())))
    return torch.cat(vectors)


def of_bucket(bucket: GradBucket) -> Gradients:
    """The gradients of one of DDP's buckets, as views of it.

    A gradient lies there with its parameter's strides, unless these leave gaps; `bucket.gradients()` takes each for
    contiguous.
    """
    gradients: Gradients = {}
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        strides = parameter.stride()
        has_strides = not parameter.is_contiguous() and torch.empty_like(parameter, device="meta").stride() == strides
        gradients[parameter] = gradient.as_strided(gradient.shape, strides) if has_strides else gradient
    return gradients


def by_themselves(gradients: Gradients) -> Gradients:
    """The gradients, each at the start of its memory; those that begin within other memory are copied.

    On a GPU the order in which a norm adds up, and so its bits, depends on the alignment. DDP's buckets align nothing.
    Source: foreach_reduce.cuh, `is_aligned`; Reduce.cuh, `input_vectorized_thread_reduce_impl`.
    """
    within = {parameter: gradient for parameter, gradient in gradients.items() if gradient.storage_offset()}
    if not within:
        return gradients
    copies = [torch.empty_like(gradient) for gradient in within.values()]
    torch._foreach_copy_(copies, list(within.values()))
    return gradients | dict(zip(within, copies, strict=True))


def separate(parameters: Sequence[Tensor]) -> None:
    """Let whatever computes with `.grad`, such as a norm or an optimizer, find it aligned alike on any worker."""
    for parameter, gradient in by_themselves({p: p.grad for p in parameters if p.grad is not None}).items():
        parameter.grad = gradient


def add_into_right(left: Gradients, right: Gradients) -> Gradients:
    """left + right, in right's memory, for the parameters of right."""
    both = [p for p in right if p in left]
    if both:
        torch._foreach_add_([right[p] for p in both], [left[p] for p in both])
    return right


def add_gradients(left: Gradients, right: Gradients) -> Gradients:
    """left + right, in left's memory; a parameter without a gradient on one side counts as zeros there."""
    both = [p for p in left if p in right]
    if both:
        torch._foreach_add_([left[p] for p in both], [right[p] for p in both])
    return right | left

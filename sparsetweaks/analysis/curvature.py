"""Products of the mean loss's Hessian with flat vectors, over any amount of data in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetweaks.analysis.evaluation import Batches, Loss, check_cut, check_loss, chunk_loss
from sparsetweaks.analysis.subspace import Subspace

Gradient = Sequence[Tensor]


class Curvature:
    """The gradient and Hessian of a network's mean loss, by double backward.

    With `keep_graph` the graph of the gradient of all data is built once and stays; otherwise it is built
    anew, chunk by chunk, for each call of `products`.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[nn.Parameter],
        batches: Batches,
        loss: Loss,
        *,
        keep_graph: bool,
    ) -> None:
        self.products_taken = 0
        self.gradients_taken = 0
        self._twice = False  # whether the graph was seen to have second derivatives
        self._network, self._parameters, self._batches, self._loss = network, list(parameters), batches, loss
        self._graphs: list[tuple[int, Gradient]] = []
        check_cut(network, batches, loss)
        self.loss, self.gradient, self._examples = self._first_pass(keep_graph)

    def _first_pass(self, keep_graph: bool) -> tuple[float, list[Tensor], int]:
        loss, examples = 0.0, 0
        gradient = [torch.zeros_like(parameter.detach()) for parameter in self._parameters]
        for count, value, part in self._chunk_gradients(graph=keep_graph):
            loss, examples = loss + count * value, examples + count
            for total, each in zip(gradient, part, strict=True):
                total.add_(each.detach(), alpha=count)
            if keep_graph:
                self._graphs.append((count, part))
        self.gradients_taken += 1
        return loss / examples, [total.div_(examples) for total in gradient], examples

    def products(self, space: Subspace, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian times each vector, from one pass over the data; pruned weights never enter."""
        directions = [space.tensors(vector) for vector in vectors]
        results = [torch.zeros_like(vector) for vector in vectors]
        for count, gradient in self._graphs or self._fresh_graphs():
            for number, direction in enumerate(directions):
                last = number == len(directions) - 1
                product = self._differentiate(gradient, direction, keep=bool(self._graphs) or not last)
                results[number].add_(space.flat(product), alpha=count / self._examples)
        self.products_taken += len(vectors)
        for result in results:
            if not result.isfinite().all():
                raise ValueError(
                    "the Hessian is not finite here: does the network hold something without a second "
                    "derivative, such as a square root at 0?"
                )
        return results

    def product(self, space: Subspace, vector: Tensor) -> Tensor:
        """`products` of one vector."""
        return self.products(space, [vector])[0]

    def _fresh_graphs(self) -> Iterator[tuple[int, Gradient]]:
        self.gradients_taken += 1
        for count, _, gradient in self._chunk_gradients(graph=True):
            yield count, gradient

    def _chunk_gradients(self, *, graph: bool) -> Iterator[tuple[int, float, Gradient]]:
        """Examples, loss and gradient of each chunk."""
        for chunk in self._batches:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                value = chunk_loss(self._network, chunk, self._loss)
            if not value.requires_grad:
                raise ValueError("the loss does not depend on any trainable parameter: was it detached?")
            check_loss(value.item())
            gradient = _differentiated([value], self._parameters, None, create_graph=graph)
            if graph and not self._twice:
                _check_twice(gradient)
                self._twice = True
            yield chunk.examples, value.item(), gradient

    def _differentiate(self, gradient: Gradient, direction: Gradient, *, keep: bool) -> Gradient:
        pairs = [(g, d) for g, d in zip(gradient, direction, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear in every parameter
            return [torch.zeros_like(parameter.detach()) for parameter in self._parameters]
        outputs, along = zip(*pairs, strict=True)
        return _differentiated(outputs, self._parameters, along, retain_graph=keep)


def _check_twice(gradient: Gradient) -> None:
    """Refuse a graph with a function that is marked `once_differentiable`: torch passes over it, as if it were constant."""
    seen = set()
    left = [part.grad_fn for part in gradient]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                "the network or the loss holds a function that can be differentiated only once (once_differentiable): it "
                "has no Hessian that could be computed. Replace it by torch's own operations"
            )


def _differentiated(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor] | None, **options: bool
) -> Gradient:
    try:
        found = torch.autograd.grad(
            outputs, inputs, along, allow_unused=True, materialize_grads=True, **options
        )
        return tuple(part if part.layout == torch.strided else part.to_dense() for part in found)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        which = "a first" if along is None else "a second"
        raise ValueError(f"the network or the loss has no derivative here, {which} one: {error}") from error

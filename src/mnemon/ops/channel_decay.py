"""What a decay per key channel makes of the queries and keys of a chunk.

The decay between two tokens is the product of the decays exp(g) of the tokens between them. It does not factor into a
part of either token without factors above 1. It does for a query in the second half of a span and a key in the first:
the query's part is the decay from the middle of the span, the key's the decay to it. Spans of two tokens are joined to
spans of four, and so on to the whole chunk; joining multiplies the queries of the second half by the decay over the
first, and the keys of the first half by the decay over the second. So numbers are only ever multiplied by a decay
between 0 and 1, and there is one exponential per token and channel.

The gradient runs the same joins from the chunk down to the tokens.
"""

from torch import Tensor

from mnemon.ops.chunking import add_product, sum_from_token


class ChannelDecay:
    """Queries and keys of chunks under a decay per key channel.

    With b the cumulative sum of g within the chunk, the token itself included:

    Attributes:
        products: for every kind of query, sum over channels c of q_ic k_jc exp(b_ic - b_jc) for j <= i, else 0,
            [..., C, C].
        since_start: for every kind of query, q_i exp(b_i), [..., C, K].
        to_end: k_j exp(b_C - b_j), [..., C, K].
        total: exp(b_C), [..., 1, K].
    """

    def __init__(self, queries: list[Tensor], k: Tensor, g: Tensor, *, keep: bool) -> None:
        """Compute the attributes.

        Args:
            queries: one or several kinds of queries, each [..., C, K], C a power of two.
            k: keys, [..., C, K].
            g: log decay, [..., C, K].
            keep: keep what `backward` needs.
        """
        self._queries, self._k = queries, k
        self._step = g.exp()
        self._levels: list[tuple[list[Tensor], Tensor, Tensor, Tensor]] = []
        size = k.shape[-2]
        self.since_start, self.to_end, self.total = [q * self._step for q in queries], k.clone(), self._step
        self.products = [q.new_zeros(*q.shape[:-1], size) for q in queries]
        for products, q in zip(self.products, queries, strict=True):
            products.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(dim=-1))
        for half in half_sizes(size):
            asking = [halves(q, half)[1] for q in self.since_start]
            written = halves(self.to_end, half)[0]
            for products, q in zip(self.products, asking, strict=True):
                cross_products(products, half).copy_(_scores(q, written))
            first, second = halves(self.total, 1)  # decay over the halves, [..., C / 2 half, 1, K]
            if keep:
                self._levels.append(([q.clone() for q in asking], written.clone(), first, second))
            for q in asking:
                q *= first
            written *= second
            self.total = (first * second).squeeze(-2)

    def backward(
        self, products: list[Tensor], since_start: list[Tensor], to_end: Tensor, total: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the gradients of the queries, the keys and g.

        Args:
            products: gradients of `products`; what stands above the diagonals is ignored.
            since_start: gradients of `since_start`, contiguous; used up.
            to_end: gradient of `to_end`, contiguous; used up.
            total: gradient of `total`.
        """
        through_end = (to_end * self.to_end).sum(dim=-2, keepdim=True).addcmul_(total, self.total)
        for (asking, written, first, second), half in zip(
            reversed(self._levels), reversed(half_sizes(self._k.shape[-2])), strict=True
        ):
            grad_written = halves(to_end, half)[0].mul_(second)
            for grad_products, grad_q, q in zip(products, since_start, asking, strict=True):
                cross = cross_products(grad_products, half)
                add_product(halves(grad_q, half)[1].mul_(first), cross, written)
                add_product(grad_written, cross.mT, q)
        # b_i enters as q_i exp(b_i) and k_i exp(-b_i); what stands at the chunk's end, with the last b also.
        grad_b = self._k * to_end
        grad_b.neg_()
        for grad_products, grad_q, q in zip(products, since_start, self._queries, strict=True):
            own = grad_products.diagonal(dim1=-2, dim2=-1)[..., None]
            grad_b.addcmul_(grad_q.mul_(self._step), q)
            grad_q.addcmul_(own, self._k)
            to_end.addcmul_(own, q)
        grad_b[..., -1:, :] += through_end
        return since_start, to_end, sum_from_token(grad_b)


def half_sizes(size: int) -> list[int]:
    """Return 1, 2, 4, ..., size / 2."""
    return [1 << level for level in range(size.bit_length() - 1)]


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """View [..., C, K] as first and second halves of spans of 2 `half` tokens, each [..., C / 2 half, half, K]."""
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def cross_products(products: Tensor, half: int) -> Tensor:
    """View what second halves see of first halves in [..., C, C]: [..., C / 2 half, half, half]."""
    *batch, row, column = products.stride()
    shape = (*products.shape[:-2], products.shape[-1] // (2 * half), half, half)
    start = products.storage_offset() + half * row
    return products.as_strided(shape, (*batch, 2 * half * (row + column), row, column), start)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return Q K^T; written out for single tokens."""
    return q @ k.mT if q.shape[-2] > 1 else (q * k).sum(dim=-1, keepdim=True)

"""One pass over all keys: lower bounds of their distances to a batch of queries, and the lowest of them.

This is where a search spends its time, so it is where the machine counts: which product is fastest, how much fits the
cache, and which numbers need not be sorted.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import conv2d

_SCORES = 4 * 2**20  # bytes of scores that one block makes: they stay in the cache while the lowest are picked
_CONVERTED = 8 * 2**20  # bytes of keys that one block converts to another dtype
_IMAGES = 64  # what a block of keys is cut into for a convolution
_WIDE = 512  # for more factors (the outputs of a head; queries come in smaller batches) MKL is as fast
_FEW = 2**16  # scores that are sorted at once: less than the many small operations that spare it
_TILE = 8  # the largest number of scores of which first only the smallest is looked at

_HALF = 1.01 * 2.0**-8  # how far rounding to bfloat16 can move a number, as a part of the result


class Scan(NamedTuple):
    """What one batch of queries needs to bound its distance to every entry from below.

    With a center c near the keys, ``|h - q|^2 = |h - c|^2 - 2 (q - c).h + |q - c|^2 + 2 (q - c).c``. The *score* is
    the first two terms and ``base`` the others, both lowered by as much as rounding can have raised them.

    A coarse scan computes its products in bfloat16, twice as fast, from keys that are centered on the way:
    ``|h - q|^2 = |h - c|^2 - 2 (q - c).(h - c) + |q - c|^2``.
    """

    keys: Shaped[Tensor, "n d"]
    written: Int[Tensor, " n"]
    norms: Float[Tensor, " n"]
    factors: Float[Tensor, "b d"]  # -2 (q - c)
    base: Float[Tensor, " b"]
    before: Int[Tensor, " b"] | None
    coarse: bool = False
    center: Float[Tensor, " d"] | None = None  # of a coarse scan; None stands for zero
    span: int | None = None  # where given, entries written before `before - span` are not seen

    def only(self, rows: Tensor | slice) -> "Scan":
        """Returns the scan for some of the queries."""
        before = None if self.before is None else self.before[rows]
        return self._replace(factors=self.factors[rows], base=self.base[rows], before=before)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "m b"]]]:
        """Yields, block by block, the first slot and the scores of a block of slots; infinite where none is seen."""
        size = _SCORES // (self.norms.element_size() * len(self.factors))
        if self.coarse or self.keys.dtype != self.factors.dtype:
            size = min(size, _CONVERTED // (self.norms.element_size() * self.keys.shape[1]))
        size = max(_IMAGES, size)
        multiply = self._coarse_products(size) if self.coarse else self._products
        for start in range(0, len(self.norms), size):
            block = slice(start, start + size)
            scores = multiply(self.keys[block], self.norms[block].unsqueeze(1))
            if self.before is not None:
                times = self.written[block].unsqueeze(1)
                scores.masked_fill_(times >= self.before, torch.inf)
                if self.span is not None:
                    scores.masked_fill_(times < self.before - self.span, torch.inf)
            yield start, scores

    def _products(self, keys: Shaped[Tensor, "m d"], norms: Float[Tensor, "m 1"]) -> Float[Tensor, "m b"]:
        return products(keys.to(self.factors.dtype), self.factors).add_(norms)

    def _coarse_products(self, size: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns what makes coarse scores of up to ``size`` keys at a time."""
        factors = self.factors.bfloat16().mT
        # Room that is made once: fresh memory costs more than the arithmetic.
        room = self.factors.new_empty(size, self.keys.shape[1])
        half = torch.empty_like(room, dtype=torch.bfloat16)
        scores = self.factors.new_empty(size, len(self.factors))

        def multiply(keys: Tensor, norms: Tensor) -> Tensor:
            if self.center is not None:
                keys = torch.sub(keys, self.center, out=room[: len(keys)])
            product = scores[: len(keys)].copy_(torch.mm(half[: len(keys)].copy_(keys), factors))
            return torch.add(norms, product, alpha=1 + _HALF, out=product)

        return multiply

    def lowest(self, count: int) -> tuple[Float[Tensor, "b m"], Int[Tensor, "b m"]]:
        """Returns the ``count`` lowest scores of each query, in any order, and their slots."""
        lowest = _Lowest(len(self.factors), count, self.norms)
        for start, scores in self.blocks():
            if scores.numel() <= _FEW and len(scores) == len(self.norms):
                return scores.mT.topk(count, largest=False)
            lowest.offer(start, scores)
        return lowest.pick()

    def proven(self, score: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns what no distance lies below whose score is at least ``score``.

        With the product P in bfloat16, a coarse score is ``s = n + (1 + e) P``, where e is bfloat16's relative error.
        For P <= 0 that bounds ``n + P'`` (P' the product before it was rounded) from below. For P > 0 the bound is
        ``n + (1 - e) P = s - 2 e P >= s - 2 e (s - n)``, which grows with s.
        """
        if self.coarse:
            smallest = self.norms.amin().clamp(max=0)
            score = score - 2 * _HALF * (score.clamp(min=0) - smallest)
        return score + self.base

    def within(self, radius: Float[Tensor, " b"], most: int) -> tuple[Int[Tensor, " m"], ...] | None:
        """Returns, for each query, the slots whose distance may be ``radius`` or less; not for a coarse scan.

        None if those of several queries are more than ``most`` in all.
        """
        found = [torch.empty(0, 2, dtype=torch.long, device=self.keys.device)]
        limit, count = radius - self.base, 0
        for start, scores in self.blocks():
            found.append((scores <= limit).nonzero())
            found[-1][:, 0] += start
            count += len(found[-1])
            if count > most and len(radius) > 1:
                return None
        slots, rows = torch.cat(found).unbind(1)
        return slots[rows.argsort(stable=True)].split(rows.bincount(minlength=len(radius)).tolist())


class _Lowest:
    """The ``count`` lowest scores of each query, found without sorting those that cannot be among them.

    After the first block there is a limit below which ``count`` scores lie; of later blocks only what lies below it
    is kept. A tile of scores is passed over at once where its smallest lies above the limit.
    """

    def __init__(self, batch: int, count: int, norms: Tensor) -> None:
        self._batch = batch
        self._count = count
        self._most = torch.finfo(norms.dtype).max  # infinite scores are never kept
        self._limit = norms.new_full((batch,), self._most)
        self._scores = norms.new_full((batch, count), torch.inf)
        self._slots = torch.zeros(batch, count, dtype=torch.long, device=norms.device)
        self._found: list[tuple[Tensor, ...]] = []  # scores, rows and slots since they were last picked
        self._held = 0

    def offer(self, start: int, scores: Float[Tensor, "m b"]) -> None:
        """Takes the scores of the slots from ``start`` on."""
        first = start == 0
        size = min(_TILE, max(1, len(scores) // (4 * self._count))) if first else _TILE
        tiles = len(scores) // size
        whole = scores[: tiles * size].view(size, tiles * self._batch)  # one column is one tile of one query
        smallest = whole.amin(0) if size > 1 else whole[0]
        if first and tiles >= self._count:
            # As many tiles hold a score at or below this one as are wanted.
            by_query = smallest.view(tiles, self._batch).mT
            self._limit = by_query.topk(self._count, largest=False).values[:, -1].clamp(max=self._most)
        columns = (smallest.view(tiles, self._batch) <= self._limit).view(-1).nonzero().squeeze(1)
        near = whole[:, columns]
        rows = columns % self._batch
        inside, column = (near <= self._limit[rows]).nonzero().unbind(1)
        self._keep(near[inside, column], rows[column], start + inside * tiles + columns[column] // self._batch)
        rest = scores[tiles * size :]
        if len(rest):
            inside, rows = (rest <= self._limit).nonzero().unbind(1)
            self._keep(rest[inside, rows], rows, start + tiles * size + inside)
        if self._held > 2 * self._count * self._batch:
            self.pick()

    def _keep(self, scores: Tensor, rows: Tensor, slots: Tensor) -> None:
        self._found.append((scores, rows, slots))
        self._held += len(rows)

    def pick(self) -> tuple[Float[Tensor, "b m"], Int[Tensor, "b m"]]:
        """Returns the lowest scores so far and their slots; from now on the limit is the highest of them."""
        scores, rows, slots = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        order = rows.argsort(stable=True)
        rows = rows[order]
        held = rows.bincount(minlength=self._batch)
        place = torch.arange(len(rows), device=rows.device) - (held.cumsum(0) - held)[rows]
        width = self._count + int(held.max())
        all_scores = scores.new_full((self._batch, width), torch.inf)
        all_slots = slots.new_zeros(self._batch, width)
        all_scores[:, : self._count], all_slots[:, : self._count] = self._scores, self._slots
        all_scores[rows, self._count + place], all_slots[rows, self._count + place] = scores[order], slots[order]
        self._scores, kept = all_scores.topk(self._count, largest=False)
        self._slots = all_slots.gather(1, kept)
        self._limit = self._scores[:, -1].clamp(max=self._most)
        self._found, self._held = [tuple(part[:0] for part in (scores, rows, slots))], 0
        return self._scores, self._slots


def products(keys: Float[Tensor, "m d"], factors: Float[Tensor, "b d"]) -> Float[Tensor, "m b"]:
    """Returns ``keys @ factors.mT`` by the fastest way that torch has for it.

    On a CPU a plain product goes to MKL. As a 1x1 convolution over "images" of keys the same product goes to oneDNN,
    which is up to twice as fast (AMD Zen 5); with one query, two columns take less time than one.
    """
    if keys.device.type != "cpu" or keys.dtype != torch.float32 or len(factors) == 2:
        return torch.mm(keys, factors.mT)
    if len(factors) == 1:
        return torch.mm(keys, factors.repeat(2, 1).mT)[:, :1].contiguous()
    rows = len(keys) // _IMAGES
    if rows == 0 or len(factors) > _WIDE:
        return torch.mm(keys, factors.mT)
    images = keys[: rows * _IMAGES].view(_IMAGES, 1, rows, keys.shape[1]).permute(0, 3, 1, 2)  # channels last
    product = conv2d(images, factors[:, :, None, None]).permute(0, 2, 3, 1).reshape(rows * _IMAGES, len(factors))
    if rows * _IMAGES == len(keys):
        return product
    return torch.cat([product, torch.mm(keys[rows * _IMAGES :], factors.mT)])


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 here, and summed in float32."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        found = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch, which does not say
        return False
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def slack(queries: Float[Tensor, "b d"]) -> float:
    """Returns what part of ``A + S^2 + S |c|`` rounding can amount to, with ``A = |h - c|^2`` and ``S = |q - c|``.

    A sum of d products is wrong by at most d eps / 2 times the sum of their absolute values. The four sums in score
    and base are bounded by ``A + 2 S |h| + S^2 + 2 S |c| <= 2 (A + S^2 + 2 S |c|)``, as ``|h|`` is at most
    ``|h - c| + |c|``; the distance by differences adds ``|h - q|^2 <= 2 (A + S^2)``. That makes 2 d eps; 8 stands for
    the few operations around the sums.
    """
    part = 2 * torch.finfo(queries.dtype).eps * (queries.shape[1] + 8)
    if queries.dtype == torch.float32 and _rounds_factors():
        part += 2.0**-6
    return part


def _rounds_factors() -> bool:
    """Whether this process allows float32 products to round their factors, to bfloat16 at worst (8 bits)."""
    if any(os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT").upper() != "STRICT" for name in ("DNNL", "ONEDNN")):
        return True
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return True
    except RuntimeError:  # the settings of the backends differ
        return True
    convolution = getattr(torch.backends.mkldnn, "conv", None)  # an older torch has no such setting
    return convolution is not None and convolution.fp32_precision not in {"none", "ieee"}

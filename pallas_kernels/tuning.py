"""Block sizes, and the order of blocks."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How a table is cut into tiles, and how many blocks share them, each a warpgroup.

    A vector is what 128 threads move with one 16-byte access each, 512 columns; fewer where a row's
    stride does not allow 16 bytes.

    Attributes:
      vectors: vectors of a tile, which a block loads before it stores any.
      scalars: columns of a tile that is copied one by one, in tables narrower than a vector.
      blocks: blocks of a table that has vectors. Where there are more tiles, a block strides over
        them, with tail "keep" as far as its request's live columns reach.
    """

    vectors: int
    scalars: int = 8
    blocks: int = 8192

    @classmethod
    def heuristic(cls, requests: int, rows: int, columns: int, num_backends: int) -> "BlockConfig":
        """For tables of which so many columns are written.

        The more vectors, the fewer blocks, each of which takes 0.6 nanoseconds of a Hopper GPU even
        if its columns are dead, and the fewer lookups of a request, which are two dependent loads.
        But tiles have to spread evenly over 132 multiprocessors: those of a small table do not, nor
        do those that are stored many times, in several rows or backends. The bounds lie between
        shapes that an H200 ran: 32 x 8,192 columns are faster in ones, 32 x 16,384 and 64 x 16,384
        in twos, 32 and 64 x 65,536 in fours, 128 x 131,072 in twos again. With several rows for
        each request 32 x 65,536 columns, an eighth of them live, are fastest with 16 blocks for
        each request, and 128 x 16,384 with as many where all are live.
        """
        elements = rows * columns
        if elements < 2**19 or num_backends >= 8:
            return cls(vectors=1)
        if rows >= 2 * requests and elements <= 2**23:
            return cls(vectors=1, blocks=min(max(16 * requests, 512), 2048))
        few_copies = rows * num_backends <= 4 * requests and requests <= 128
        return cls(vectors=4 if few_copies and 2**21 <= elements <= 2**22 else 2)

    @classmethod
    def of_pages(cls, requests: int, pages: int) -> "BlockConfig":
        """For page starts alone: four vectors in long rows of many requests, otherwise one.

        Each page start is a memory access of its own, and four in flight hide each other's latency.
        Rows that are not that long leave too few blocks, and small tables too few for 132
        multiprocessors.
        """
        four = requests * pages >= 132 * 2048 and pages >= 16 * 128
        return cls(vectors=4 if four else 1)


def place(index: jax.Array, requests: int, blocks: int) -> tuple[jax.Array, jax.Array]:
    """Of the index of a block the request, and which of its `blocks` the block is.

    Most rows are shorter than their table, and the blocks of its last columns have nothing to do.
    Where a GPU of 132 multiprocessors holds all blocks at once, the first columns of all requests
    come first, and blocks without work are launched while the others store. Where it does not,
    the blocks of a request follow each other, lest those without work all come at the end.
    """
    if requests * blocks <= 132 * 32:
        block = lax.div(index, jnp.int32(requests))
        return index - block * requests, block
    request = lax.div(index, jnp.int32(blocks))
    return request, index - request * blocks

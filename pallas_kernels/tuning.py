"""Block sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How a table is cut into tiles, and how many blocks share them, each a warpgroup.

    A vector is what 128 threads move with one 16-byte access each, 512 columns; fewer where a row's
    stride does not allow 16 bytes.

    Attributes:
      vectors: vectors of a tile, which a block loads before it stores any.
      scalars: columns of a tile that is copied one by one, in tables narrower than a vector.
      blocks: blocks of a table. Where there are more tiles, a block strides over them, as far as
        its request's live columns reach.
    """

    vectors: int
    scalars: int = 8
    blocks: int = 8192

    @classmethod
    def heuristic(cls, rows: int, columns: int, num_backends: int) -> "BlockConfig":
        """Two vectors, or one in small tables and where there are many backends.

        Two share one lookup of their request, which is two dependent loads. One spreads a small
        table over the 132 multiprocessors of a Hopper GPU; and the stores to many backends hide the
        lookup, so that more blocks do better than larger tiles.
        """
        one = rows * columns < 132 * 2048 * 4 or num_backends >= 8
        return cls(vectors=1 if one else 2)

    @classmethod
    def of_pages(cls, requests: int, pages: int) -> "BlockConfig":
        """For page starts alone: four vectors in long rows of many requests, otherwise one.

        Each page start is a memory access of its own, and four in flight hide each other's latency.
        Rows that are not that long leave too few blocks, and small tables too few for 132
        multiprocessors.
        """
        four = requests * pages >= 132 * 2048 and pages >= 16 * 128
        return cls(vectors=4 if four else 1)

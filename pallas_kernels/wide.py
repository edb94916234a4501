"""Sums that do not fit int32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Wide(NamedTuple):
    """Integers from 0 to 2^46, scalars or vectors: `high * 2^16 + low`, 0 <= low < 2^16."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, low: jax.Array, high: jax.Array | int = 0) -> "Wide":
        """`high * 2^16 + low`, where low may be any int32 that is not negative."""
        return cls((low >> 16) + high, low & 0xFFFF)

    def __add__(self, other: Any) -> "Wide":  # type: ignore[override]
        """The sum with another, or with an int32 below 2^30 that is not negative."""
        if isinstance(other, Wide):
            return Wide.of(self.low + other.low, self.high + other.high)
        return Wide.of(self.low + other, self.high)

    def times(self, factor: jax.Array | int) -> "Wide":
        """The product with an integer from 0 to 2^14."""
        return Wide.of(self.low * factor, self.high * factor)

    def divided(self, divisor: int) -> tuple["Wide", jax.Array]:
        """Quotient and remainder of the division by an integer from 1 to 2^14."""
        high, rest = quotient_and_rest(self.high, divisor)
        low, rest = quotient_and_rest((rest << 16) + self.low, divisor)
        return Wide(high, low), rest

    def minus(self, other: "Wide") -> jax.Array:
        """The difference, which fits int32."""
        return ((self.high - other.high) << 16) + (self.low - other.low)

    def up_to(self, other: "Wide") -> jax.Array:
        """Whether this is at most the other."""
        is_equal = (self.high == other.high) & (self.low <= other.low)
        return (self.high < other.high) | is_equal


def quotient_and_rest(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Of the division of an int32 that is not negative by one that is positive."""
    quotient = lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor

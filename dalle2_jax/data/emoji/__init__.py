"""A data set of captioned emoji: one concept in several styles, made from npm packages.

`write` makes it; `packages` has the packages and their checksums, `concepts` their captions, `styles` their images, and
`selection` the splits.
"""

from dalle2_jax.data.emoji.selection import Selection
from dalle2_jax.data.emoji.styles import STYLES
from dalle2_jax.data.emoji.write import write

__all__ = ["STYLES", "Selection", "write"]

"""The measures of `evaluate`: functions from a `Context` and a number of examples to figures by name."""

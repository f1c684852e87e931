"""``python -m dalle2_jax``: the command line without its console script."""

from dalle2_jax import cli

if __name__ == "__main__":
    cli.start()

"""Reports: what training and evaluation wrote in the folders of systems, as one HTML file that needs no network."""

from dalle2_jax.report.write import write_report

__all__ = ["write_report"]

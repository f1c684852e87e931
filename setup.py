"""Builds the package with its config pages: configs/*.py become dalle2_jax/configs/*.py in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PAGES = sorted(Path("configs").glob("*.py"))


class BuildWithPages(build_py):
    """Adds the config pages, which the repository has outside the package."""

    def run(self):
        super().run()
        if self.editable_mode:  # an editable installation reads them from the repository
            return
        for page, target in self._pages():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(page), str(target))

    def get_outputs(self, *args, **kwargs):
        pages = [] if self.editable_mode else [str(target) for _, target in self._pages()]
        return [*super().get_outputs(*args, **kwargs), *pages]

    def get_source_files(self):
        return [*super().get_source_files(), *map(str, PAGES)]

    def _pages(self):
        return [(page, Path(self.build_lib, "dalle2_jax", "configs", page.name)) for page in PAGES]


setup(cmdclass={"build_py": BuildWithPages})

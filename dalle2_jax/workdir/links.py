"""Links from a system to the stages of another one."""

import os
import pathlib
from collections.abc import Container

from dalle2_jax.workdir.folder import StageFolder


def link_stages(system: pathlib.Path, root: pathlib.Path, except_for: Container[str] = ()) -> None:
    """Links each stage of ``system`` into ``root``, where ``root`` has none of that name.

    The links are relative, so that both systems may be moved together.

    Args:
      system: the system whose stages are linked.
      root: the system that gets the links.
      except_for: names of stages that are not linked.
    """
    root.mkdir(parents=True, exist_ok=True)
    for folder in sorted(system.iterdir()):
        link = root / folder.name
        if StageFolder(system, folder.name).exists() and folder.name not in except_for and not link.exists():
            link.unlink(missing_ok=True)  # a dangling link
            link.symlink_to(os.path.relpath(folder.resolve(), root.resolve()), target_is_directory=True)

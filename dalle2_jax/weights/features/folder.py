"""The folder of an imported feature network: ``features.json`` and ``weights.safetensors`` with its published names."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dalle2_jax.errors import UsageError, WeightsError, shown
from dalle2_jax.reading import parse_json, read_bytes
from dalle2_jax.types import Params
from dalle2_jax.weights.features import names
from dalle2_jax.weights.features.table import NETWORKS, PublishedNetwork, rules, shapes
from dalle2_jax.weights.kinds import FEATURE_KINDS
from dalle2_jax.weights.rules import check_keys, from_tensors, to_tensors
from dalle2_jax.weights.rules import shapes as tensor_shapes
from dalle2_jax.weights.stage_writer import write_folder, write_json
from dalle2_jax.weights.tensor import Tensor
from dalle2_jax.weights.tensors import open_tensors, write_safetensors
from dalle2_jax.workdir import digests

DESCRIPTION, WEIGHTS = "features.json", "weights.safetensors"

_MAX_DESCRIPTION = 100_000


class FoundNetwork(NamedTuple):
    """A feature network in published files, not read yet.

    Attributes:
        name: a key of ``table.NETWORKS``.
        where: its files, for messages.
        tensors: its tensors under their published names.
    """

    name: str
    where: str
    tensors: Mapping[str, Tensor]

    @property
    def published(self) -> PublishedNetwork:
        """What the network is."""
        return NETWORKS[self.name]


class StoredNetwork(NamedTuple):
    """An imported feature network.

    Attributes:
        name: a key of ``table.NETWORKS``.
        variables: its arrays.
        fingerprint: hash of the arrays, as 16 hex digits.
    """

    name: str
    variables: Params
    fingerprint: str


def find(sources: Sequence[Path], kind: str) -> FoundNetwork | None:
    """Returns the feature network in files; None if they hold none.

    Args:
        sources: files, whose tensors are joined. A folder holds none.
        kind: "auto", or one of `FEATURE_KINDS`; a network of another kind is an error. Any other gives None.

    Raises:
        WeightsError: a file is damaged, or only some of the files belong to a feature network, or not to the kind.
    """
    if kind not in ("auto", *FEATURE_KINDS):
        return None
    tensors: dict[str, Tensor] = {}
    for path in sources:
        tensors |= names.published_names(open_tensors(path)) if path.is_file() else {}
    where = " and ".join(map(str, sources))
    name = names.network_name(tensors, where)
    if name is None and kind == "auto":
        return None
    if name is None or not (kind == "auto" or name.startswith(kind)):
        found = "no feature network" if name is None else NETWORKS[name].family
        raise WeightsError(f"{where} holds {found}, not one of kind {kind}", where)
    return FoundNetwork(name, where, tensors)


def check(found: FoundNetwork) -> list[str]:
    """Returns the names of a network's tensors. WeightsError if some are missing or unexpected."""
    published = found.published
    table = rules(shapes(published), published.layers)
    return check_keys(table, found.tensors, found.where, published.ignored)


def write(found: FoundNetwork, target: Path, dtype: str = "float32") -> None:
    """Reads a network and writes its folder.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; or the folder exists or cannot be written.
        UsageError: a dtype other than float32, which the published figures are computed in.
    """
    if dtype != "float32":
        raise UsageError(
            f"a feature network is stored in float32, not in {dtype}: published figures are computed in it"
        )
    published, abstract = found.published, shapes(found.published)
    table = rules(abstract, published.layers)
    tree = from_tensors(table, found.tensors, abstract, found.where, published.ignored)
    check_finite(tree, found.where)
    description = {"network": found.name, "family": published.family, "files": found.where}

    def write_content(folder: Path) -> None:
        write_safetensors(folder / WEIGHTS, tensor_shapes(table, tree), to_tensors(table, tree))
        write_json(folder / DESCRIPTION, {**description, "fingerprint": fingerprint(tree)})

    write_folder(target, write_content)


def check_finite(tree: Params, where: str) -> None:
    """Raises WeightsError if an array has values that are not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not np.isfinite(leaf).all():
            what = f"{jax.tree_util.keystr(path, simple=True, separator='/')} has values that are not finite"
            raise WeightsError(f"{where}: {what}: download it again", where)


def fingerprint(tree: Params) -> str:
    """Returns a hash of arrays and their names, as 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def holds_network(folder: Path) -> bool:
    """Whether a folder is that of an imported feature network."""
    return (folder / DESCRIPTION).is_file()


def read(folder: Path) -> StoredNetwork:
    """Reads an imported feature network.

    Raises:
        WeightsError: a file is missing or damaged, or was changed.
    """
    try:
        if digests.verifying():
            digests.check(folder)
        description: Any = parse_json(read_bytes(folder / DESCRIPTION, _MAX_DESCRIPTION))
        name, hashed = description["network"], description["fingerprint"]
        published = NETWORKS[name]
    except (digests.Damaged, OSError, ValueError, LookupError, TypeError) as error:
        what = f"{folder} holds no readable feature network ({shown(str(error))})"
        raise WeightsError(f"{what}: remove it and import the network again", folder) from error
    abstract, file = shapes(published), folder / WEIGHTS
    tree = from_tensors(rules(abstract, published.layers), open_tensors(file), abstract, str(file))
    return StoredNetwork(name, tree, str(hashed))


def count_parameters(found: FoundNetwork) -> int:
    """Returns the number of a network's parameters and statistics. UserError as `check`."""
    return sum(int(np.prod(found.tensors[key].shape)) for key in check(found))

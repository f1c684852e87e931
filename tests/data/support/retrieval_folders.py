"""Writes embeddings in the folder layout of clip-retrieval."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet

CONTRACT = {"clip": "12345678", "dim": 4, "normalisation": "unit", "scale": 3.0}


def embedding(key, shift=0):
    """Returns the stored embedding of record ``key`` (float16[4]): distinct for each key, never of unit length."""
    return np.array([1.0 + shift, key + 1.0, -2.0, 0.5 * key], np.float16)


def write(folder, parts, kinds=("img_emb", "text_emb"), column="key"):
    """Writes parts, each a list of (key, caption), as clip-retrieval does; returns the folder."""
    for kind in (*kinds, "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        keys, captions = [f"{key:09d}" for key, _ in part], [caption for _, caption in part]
        named = [f"/data/{key}.jpg" for key in keys] if column == "image_path" else keys
        table = pyarrow.table({column: named, "caption": pyarrow.array(captions, pyarrow.string())})
        pyarrow.parquet.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
        for kind in kinds:
            rows = np.stack([embedding(key, shift=10 * (kind == "text_emb")) for key, _ in part])
            np.save(folder / kind / f"{kind}_{number}.npy", rows)
    (folder / "clip").mkdir(exist_ok=True)
    (folder / "clip" / "contract.json").write_text(json.dumps(CONTRACT))
    return folder

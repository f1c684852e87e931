"""CLIP tokenizers in the folders of public checkpoints.

Hugging Face writes ``vocab.json`` and ``merges.txt``, or one ``tokenizer.json`` that holds both, and names the
begin, end, pad and unknown tokens in ``tokenizer_config.json`` and ``special_tokens_map.json``. OpenAI has a list
of merges, ``bpe_simple_vocab_16e6.txt.gz``.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.reading import parse_json
from dalle2_jax.text.byte_pair import BEGIN, CLIP_VOCAB_SIZE, END, ClipTokenizer
from dalle2_jax.text.merges import BYTE_LETTERS, Merge, decompress, read_merges
from dalle2_jax.text.storage import read_file

_OPENAI = "bpe_simple_vocab_16e6.txt"
_ROLES = {"begin": "bos_token", "end": "eos_token", "pad": "pad_token", "unknown": "unk_token"}


def read_clip_tokenizer(folder: str | Path) -> ClipTokenizer:
    """Reads the CLIP tokenizer in a folder: vocab.json with merges.txt, else OpenAI's list, else tokenizer.json.

    Of OpenAI's list, which is longer, the 48,894 merges that CLIP uses are read. The pad token is the one that the
    files name; by default it has id 0. Captions are normalised as in OpenAI's code, including HTML entities, which
    ``ClipTokenizer.with_html_unescape`` can disable.

    Raises:
        UserError: there is no tokenizer, or its files are damaged or do not belong together.
    """
    folder = Path(folder)
    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            merges = _merges(folder / "merges.txt")
            return _tokenizer(_json(folder / "vocab.json"), merges, _roles(folder))
        for name in (f"{_OPENAI}.gz", _OPENAI):
            if (folder / name).is_file():
                return ClipTokenizer.from_merges(_merges(folder / name)[: CLIP_VOCAB_SIZE - 514])
        if (folder / "tokenizer.json").is_file():
            vocabulary, merges = _fast(_json(folder / "tokenizer.json"))
            return _tokenizer(vocabulary, merges, _roles(folder))
    except UserError as error:
        raise UserError(f"the tokenizer in {folder}: {error}") from None
    raise UserError(f"{folder} has no CLIP tokenizer (vocab.json and merges.txt, {_OPENAI}.gz or tokenizer.json)")


def _tokenizer(vocabulary: Any, merges: tuple[Merge, ...], roles: dict[str, str]) -> ClipTokenizer:
    """Returns a tokenizer of a vocabulary {token: id}; ``roles`` maps roles to the control tokens in the files."""
    if not isinstance(vocabulary, dict) or {*map(repr, vocabulary.values())} != {*map(repr, range(len(vocabulary)))}:
        raise UserError("the vocabulary is damaged: its ids are not 0, 1, 2, ...")
    named = {"begin": BEGIN, "end": END, **roles}
    for role, token in named.items():
        if token not in vocabulary:
            raise UserError(f"the vocabulary lacks {token[:60]!r}, the {role} token")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    ids = {role: vocabulary[token] for role, token in named.items()}
    tokenizer = ClipTokenizer(tokens, merges, literal=tuple(dict.fromkeys(roles.values())), **ids)
    _check_made(tokens, merges, named.values())
    return tokenizer


def _check_made(tokens: Sequence[str], merges: Sequence[Merge], named: Iterable[str]) -> None:
    """Raises UserError if merges are missing: a truncated list would silently give other tokens."""
    made = {*named, *BYTE_LETTERS, *(f"{letter}</w>" for letter in BYTE_LETTERS), *map("".join, merges)}
    unmade = [token for token in tokens if token not in made and not (token.startswith("<") and token.endswith(">"))]
    if unmade:
        raise UserError(f"the merges are cut short: none makes the token {unmade[0][:60]!r} ({len(unmade)} such)")


def _merges(path: Path) -> tuple[Merge, ...]:
    try:
        return read_merges(read_file(path))
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def _fast(content: Any) -> tuple[Any, tuple[Merge, ...]]:
    """Returns vocabulary and merges of a ``tokenizer.json``, whose merges are pairs, or "left right" in older files."""
    try:
        model = content["model"]
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        return model["vocab"], tuple((left, right) for left, right in pairs)
    except (KeyError, TypeError, ValueError):
        raise UserError("tokenizer.json has no byte-pair vocabulary and merges") from None


def _roles(folder: Path) -> dict[str, str]:
    """Returns the control tokens in the folder's files; ``special_tokens_map.json`` has precedence."""
    named: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            content = _json(folder / name)
            if not isinstance(content, dict):
                raise UserError(f"{name} is damaged: it is not a JSON object")
            named |= content
    tokens = {role: named.get(key) for role, key in _ROLES.items()}
    contents = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    return {role: token for role, token in contents.items() if isinstance(token, str)}


def _json(path: Path) -> Any:
    try:
        return parse_json(read_file(path))
    except ValueError:  # UnicodeDecodeError among them
        raise UserError(f"{path.name} is damaged: it is not JSON") from None


def write_clip_tokenizer(folder: str | Path, tokenizer: ClipTokenizer, context_length: int) -> None:
    """Writes a tokenizer in the format of Hugging Face's CLIPTokenizer: the inverse of `read_clip_tokenizer`.

    Hugging Face recognises the pad token anywhere in a caption. Therefore OpenAI's pad token "!" is replaced by the end
    token, which changes no model output, because padding is masked. The format has no field for ``html_unescape``:
    Hugging Face does not decode HTML entities.

    Args:
        folder: the folder; created if missing.
        tokenizer: the tokenizer.
        context_length: length to which captions are padded and truncated.
    """
    fields = json.loads(decompress(tokenizer.to_bytes()))
    tokens, unknown = fields["tokens"], fields["unknown"]
    ids = {"begin": fields["begin"], "end": fields["end"]}
    ids["unknown"] = fields["end"] if unknown is None else unknown
    ids["pad"] = fields["pad"] if tokens[fields["pad"]] in fields["literal"] else fields["end"]
    roles = {_ROLES[role]: tokens[number] for role, number in ids.items()}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "errors": "replace", **roles}
    contents = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *fields["merges"], ""]),
        "special_tokens_map.json": json.dumps(roles, indent=2, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }
    for name, content in contents.items():
        write_atomically(Path(folder) / name, content)

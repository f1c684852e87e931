"""Words that this project does not use, each with the field's word for it.

`IDENTIFIERS` are matched against a Python name and its words (`text_emb` has two), `PROSE` against comments,
docstrings, strings and pages. Every entry has an example that it must match.
"""

import functools
import re
from typing import NamedTuple


class Word(NamedTuple):
    """A regular expression for a word, what to write instead, and a text that it matches."""

    pattern: str
    instead: str
    example: str

    def found(self, text: str) -> list[re.Match]:
        """Returns all matches in a text."""
        return list(re.finditer(self.pattern, text, re.IGNORECASE))


PROSE = (
    Word(r"\bpictures?\b", "image", "draws four pictures"),
    Word(r"\bborrow\w*|\blent\b", "requires, frozen variables", "what is borrowed from CLIP"),
    Word(r"\b(told|spoken|telling|unsaid)\b", "conditioning, inputs", "a decoder told nothing"),
    Word(r"\bsa(id|ys) (of|nothing|so)\b", "predicts, states", "what CLIP says of an image"),
    Word(r"\banew\b", "again, newly sampled", "drawn anew"),
    Word(r"\bmend(s|ed|ing)?\b", "correct, clip", "the mended x_0"),
    Word(r"\bstrangers?\b", "incompatible stages", "the strangers among the stages"),
    Word(r"\bwitness\w*\b", "checksum", "a witness of the file"),
    Word(r"\brefusals?\b|(?<!connection )\brefus(e|es|ed|ing)\b", "reject, rejections", "a refused record"),
    Word(r"\bbeside\b", "next to, in addition to", "runs beside ours"),
    Word(r"\bobey\w*\b", "match", "the image obeys its caption"),
    Word(r"\bitinerary\b|\bclimbs?\b", "step plan, renoise", "the itinerary of a sampler"),
    Word(r"\bleft out\b", "rejected, omitted", "what is left out"),
    Word(r"\bpatience\b", "retry", "the patience of a reader"),
    Word(r"\b(the|this|every) room\b|\brooms\b", "package, space", "the rooms of the house"),
    Word(r"\bfront door\b|\bthe hall\b|\bthe house\b", "entry point, package", "comes in at the front door"),
    Word(r"\bdraws?\b (an? )?(image|sample|picture|timestep|noise)", "sample, generate", "draws a sample"),
    Word(r"\bdrawn\b", "sampled", "noise is drawn from a key"),
)

IDENTIFIERS = (
    Word(r"^pictures?$", "image", "pictures"),
    Word(r"^borrow(s|ed)?$", "requires, frozen", "borrows"),
    Word(r"^(said|told|spoken|telling|unsaid)$", "inputs, conditioning, reported", "told"),
    Word(r"^(draw|draws|drawn)$", "sample, fetch", "draw"),
    Word(r"^(?-i:Member)$", "LoadedStage", "Member"),
    Word(r"^course$", "guidance_schedule", "course"),
    Word(r"^(itinerary|climbs?)$", "step_plan, renoise", "itinerary"),
    Word(r"^mended$", "clipped, corrected", "mended"),
    Word(r"^strangers?$", "incompatible_stages", "strangers"),
    Word(r"^witness$", "checksum", "witness"),
    Word(r"^(beside|rooms?)$", "cache_path, allocate", "beside"),
    Word(r"^landing$", "stage_writer", "landing"),
    Word(r"^(patience|pulse)$", "retry, heartbeat", "patience"),
    Word(r"^refus(al|als|ed|es|e)$", "rejections, rejected", "refusals"),
    Word(r"^(guarded|worth|obeys?)$", "run_cli, measure, match", "guarded"),
    Word(r"^(?-i:SPREADING|STACKED)$", "FAN_OUT_KERNELS, SCANNED_KERNELS", "SPREADING"),
    Word(r"^shop$", "command_runner", "shop"),
    Word(r"\b(noise|measured?)_moments", "noise_statistics", "noise_moments"),
)

STORED_KEYS = ('"pictures"', "'pictures'")
"""Keys of files that earlier versions wrote and that are still read."""

NAMES_OF_LIBRARIES = ("ImageDraw", "Draw")
"""Names of Pillow."""


_ANY_PROSE = re.compile("|".join(word.pattern for word in PROSE), re.IGNORECASE)


def instead_of_prose(text: str) -> list[tuple[str, str]]:
    """Returns (words found, what to write instead) for a comment, docstring, string or line of a page."""
    if text in STORED_KEYS or not _ANY_PROSE.search(text):
        return []
    return [(match[0], word.instead) for word in PROSE for match in word.found(text)]


@functools.cache
def instead_of_name(identifier: str) -> tuple[str, ...]:
    """Returns what to use instead of a Python name; nothing if it is fine."""
    if identifier in NAMES_OF_LIBRARIES:
        return ()
    parts = (identifier, *words_of(identifier))
    return tuple(word.instead for word in IDENTIFIERS if any(word.found(part) for part in parts))


def words_of(identifier: str) -> list[str]:
    """Returns the lower-case words of a name: ``["text", "emb"]`` of ``text_emb``, ``["step", "plan"]`` of StepPlan."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]

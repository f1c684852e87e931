"""OpenAI's Python package against a server of one's own.

dalle2 serve --system shapes
pip install openai
python examples/openai_client.py
"""

import argparse
import base64
import io
import pathlib

from openai import OpenAI
from PIL import Image


def transparent_half(png: bytes) -> bytes:
    """Returns an image whose right half is transparent: what an edit regenerates."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    width, height = image.size
    image.paste((0, 0, 0, 0), (width // 2, 0, width, height))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def main() -> None:
    """Generates an image, edits it and varies it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", default="none", help="the key, for a server with --api_keys")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    options.out.mkdir(parents=True, exist_ok=True)

    made = client.images.generate(
        prompt="a large red circle", response_format="b64_json", extra_body={"seed": 0, "decoder": {"guidance": 3.0}}
    )
    image = base64.b64decode(made.data[0].b64_json)
    edited = client.images.edit(
        image=transparent_half(image), prompt="a large red circle", response_format="b64_json", extra_body={"seed": 1}
    )
    varied = client.images.create_variation(image=image, n=2, response_format="b64_json", extra_body={"seed": 2})

    for name, answer in (("generated", made), ("edited", edited), ("varied", varied)):
        for number, item in enumerate(answer.data):
            path = options.out / f"{name}_{number}.png"
            path.write_bytes(base64.b64decode(item.b64_json))
            print(path)


if __name__ == "__main__":
    main()

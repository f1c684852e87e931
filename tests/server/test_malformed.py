"""Sixty malformed requests: each gets the right status and OpenAI's error shape, none a traceback."""

import base64
import gzip
import io
import json
import struct
import zlib

import pytest
from PIL import Image
from served import FEW, png

GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
OK = {"prompt": "a", **FEW}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
JSON = {"Content-Type": "application/json"}
ENCODED, CLEAR = (base64.b64encode(png(clear=clear)).decode() for clear in (False, True))


def chunk(kind, data):
    """Returns a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side=60_000):
    """Returns a small PNG file whose header promises billions of pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zip_bomb():
    """Returns a small PNG file with a text chunk that is 100 MB when it is decompressed."""
    image, text = png(), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    return image[:33] + text + image[33:]  # after the signature and IHDR


def gif():
    content = io.BytesIO()
    Image.new("P", (16, 16)).save(content, "GIF")
    return content.getvalue()


def generation(param=None, status=400, **fields):
    """Returns a case: a generation with some fields replaced; None removes one."""
    body = {name: value for name, value in {**OK, **fields}.items() if value is not None}
    return GENERATIONS, {"content": json.dumps(body).encode(), "headers": JSON}, status, param


def raw(content, status=400, headers=JSON, path=GENERATIONS, param=None):
    return path, {"content": content, "headers": headers}, status, param


def form(charset):
    """Returns a case: a form in another charset, with a lone surrogate where the charset can have one."""
    field = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\\ud800\r\n--x--\r\n'
    return raw(field, headers={"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}, path=EDITS)


def edit(image, mask=None, status=400, param="image", **fields):
    files = {"image": image} if mask is None else {"image": image, "mask": mask}
    return EDITS, {"data": {"prompt": "a", **fields}, "files": files}, status, param


def variation(image, status=400, param="image", **fields):
    return VARIATIONS, {"data": fields, "files": {"image": image}}, status, param


def command(name, status=400, param=None, **fields):
    return f"/dalle2/{name}", {"json": fields}, status, param


CASES = {
    "no prompt": generation("prompt", prompt=None),
    "empty prompt": generation("prompt", prompt=""),
    "number as prompt": generation("prompt", prompt=5),
    "list as prompt": generation("prompt", prompt=["a"]),
    "long prompt": generation("prompt", prompt="a" * 1001),
    "10 MB prompt": generation(status=413, prompt="a" * 10_000_000),
    "control characters": generation("prompt", prompt="a\x00\x1b[2J"),
    "lone surrogate": raw(b'{"prompt": "\\ud800"}', param="prompt"),
    "lone surrogate in a name": raw(b'{"prompt": "a", "\\ud800": 1}', param="\\ud800"),
    "lone surrogate in a setting": raw(b'{"prompt": "a", "decoder": {"\\udfff": 1}}', param="decoder"),
    "lone surrogate as model": raw(b'{"prompt": "a", "model": "\\ud800"}', param="model"),
    "lone surrogate to embed": raw(b'{"texts": ["\\ud800"]}', path="/dalle2/embed", param="texts"),
    "lone surrogate as image": raw(b'{"image": "\\ud800"}', path="/dalle2/variations", param="image"),
    "lone surrogate in UTF-16": raw('{"prompt": "\ud800"}'.encode("utf-16", "surrogatepass"), param="prompt"),
    "n zero": generation("n", n=0),
    "n negative": generation("n", n=-1),
    "n huge": generation("n", n=10**6),
    "n beyond all integers": raw(b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}"),
    "n fractional": generation("n", n=1.5),
    "n as text": generation("n", n="2"),
    "n true": generation("n", n=True),
    "n infinite": raw(b'{"prompt": "a", "n": 1e999}'),
    "n not a number": raw(b'{"prompt": "a", "n": NaN}'),
    "size no size": generation("size", size="big"),
    "size not square": generation("size", size="16x8"),
    "size that is not generated": generation("size", size="1024x1024"),
    "size zero": generation("size", size="0x0"),
    "size as number": generation("size", size=16),
    "unknown response format": generation("response_format", response_format="jpeg"),
    "unknown model": generation("model", status=404, model="dall-e-9"),
    "path as model": generation("model", status=404, model="../../etc/passwd"),
    "absolute path as model": generation("model", status=404, model="/etc"),
    "address as model": generation("model", status=404, model="http://169.254.169.254/"),
    "unknown parameter": generation("promt", promt="a"),
    "seed negative": generation("seed", seed=-1),
    "seed too large": generation("seed", seed=2**32),
    "unknown setting": generation("decoder.speed", decoder={"speed": 1}),
    "setting of a wrong type": generation("decoder.steps", decoder={"steps": [1.0]}),
    "setting out of range": generation("decoder.guidance", decoder={"guidance": 1e9}),
    "settings no object": generation("decoder", decoder=5),
    "too many steps": generation("decoder.steps", decoder={"steps": 100_000}),
    "too many steps in sections": generation("decoder.steps", decoder={"steps": "200,200"}),
    "settings of an absent stage": generation("upsampler_2", upsampler_2={"steps": 2}),
    "too many candidates": generation("candidates", candidates=1000),
    "no JSON": raw(b"prompt=a"),
    "truncated JSON": raw(b'{"prompt": "a"'),
    "JSON list": raw(b"[1]"),
    "empty body": raw(b""),
    "deep JSON": raw(b'{"prompt": ' + b"[" * 40_000),
    "invalid UTF-8": raw(b'{"prompt": "\xff\xfe"}'),
    "gzip bomb": raw(gzip.compress(b" " * 10_000_000), headers={**JSON, "Content-Encoding": "gzip"}),
    "form as JSON": raw(b"prompt=a", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    "no content type": raw(b"{}", headers={}),
    "truncated multipart": raw(b'--x\r\nContent-Disposition: form-data; name="pro', headers=FORM, path=EDITS),
    "multipart without boundary": raw(b"--x", headers={"Content-Type": "multipart/form-data"}, path=EDITS),
    "multipart in escapes": form("unicode_escape"),
    "multipart in a charset that decodes nothing": form("undefined"),
    "multipart in a charset that is no name": form("a\0b"),
    "empty multipart": raw(b"--x--\r\n", headers=FORM, path=EDITS),
    "edit as JSON": (EDITS, {"json": {"prompt": "a"}}, 400, None),
    "edit without image": (EDITS, {"data": {"prompt": "a"}, "files": {"mask": png(clear=True)}}, 400, "image"),
    "edit without prompt": (EDITS, {"files": {"image": png(clear=True)}}, 400, "prompt"),
    "edit without alpha or mask": edit(png()),
    "edit with opaque mask": edit(png(), png(mode="RGBA"), param="mask"),
    "edit with mask of another size": edit(png(16), png(32, clear=True), param="mask"),
    "edit with n as text": edit(png(clear=True), n="many", param="n"),
    "two images": (EDITS, {"data": {"prompt": "a"}, "files": [("image", png()), ("image", png())]}, 400, "image"),
    "image not square": variation(png(16, width=24)),
    "image empty": variation(b""),
    "SVG": variation(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'),
    "HTML": variation(b"<!doctype html><script>alert(1)</script>"),
    "GIF": variation(gif()),
    "truncated PNG": variation(png(64)[:600]),
    "pixel bomb": variation(bomb()),
    "large pixel bomb": variation(bomb(5000), status=413),
    "zip bomb": variation(zip_bomb()),
    "image of 5 MB": variation(png() + b"\0" * 5_000_000, status=413),
    "upload of 30 MB": variation(b"\0" * 30_000_000, status=413, param=None),
    "field as file": (VARIATIONS, {"files": {"image": png(), "n": b"1"}}, 400, "n"),
    "file as field": (VARIATIONS, {"files": {"n": (None, "1")}, "data": {"image": "x"}}, 400, "image"),
    "bad base64": command("variations", param="image", image="no base64!"),
    "address as image": command("variations", param="image", image="http://localhost/x.png"),
    "file as image": command("variations", param="image", image="file:///etc/passwd"),
    "data URL of text": command("variations", param="image", image="data:text/html;base64,AAAA"),
    "one image to interpolate": command("interpolate", param="images", images=[ENCODED]),
    "too many frames": command("interpolate", param="frames", images=[ENCODED, ENCODED], frames=1000),
    "eta out of range": command("variations", param="eta", image=ENCODED, eta=2.0),
    "too many steps of an inversion": command("reconstruct", param="steps", image=ENCODED, steps=10_000),
    "resample longer than the steps": command("inpaint", image=CLEAR, resample=[90, 2]),
    "nothing to embed": command("embed", param="texts"),
    "previews without a job": command("text2image", param="previews", prompt="a", previews=True),
    "unknown command": command("explode", status=404),
    "unknown route": ("/v1/chat/completions", {"json": {}}, 404, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_malformed_request(client, case):
    path, request, status, param = CASES[case]
    done = client.post(path, **request)
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in done.text and "\n" not in error["message"] and "site-packages" not in done.text
    if param is not None:
        assert error["param"] == param, error


def test_there_are_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("method", "path"), [("GET", GENERATIONS), ("PUT", EDITS), ("DELETE", "/v1/models")])
def test_wrong_methods(client, method, path):
    done = client.request(method, path)
    assert done.status_code in (404, 405) and done.json()["error"]["message"]

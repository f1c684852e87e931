"""OpenAI's routes in process: images, files, models, determinism and provenance."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from served import FEW, FEW_WITHOUT_PRIOR, png

PROMPT = {"prompt": "a red circle", **FEW}


def generate(client, **fields):
    done = client.post("/v1/images/generations", json={**PROMPT, "response_format": "b64_json", **fields})
    assert done.status_code == 200, done.text
    return done.json()


def opened(item):
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def test_generations_are_the_images_of_the_system(client, tiny):
    answer = generate(client, n=2, seed=3)
    expected = tiny.text2image("a red circle", num=2, seed=3, **FEW)
    found = np.stack([np.asarray(opened(item)) for item in answer["data"]])
    np.testing.assert_array_equal(found, expected.numpy)
    assert answer["size"] == "16x16" and answer["created"] > 0
    theirs = {**expected.provenance, "system": "tiny"}
    assert answer["dalle2"] == json.loads(json.dumps(theirs))


def test_each_image_has_its_provenance(client):
    answer = generate(client, n=2, seed=3)
    for j, item in enumerate(answer["data"]):
        about = json.loads(opened(item).text["dalle2"])
        assert about["pictures"] == [{"file": f"0_{j}.png", "prompt": "a red circle", "index": 0, "sample": j}]
        assert about["seed"] == 3 and about["sampling"]["decoder"]["steps"] == 2


def test_without_a_seed_images_differ_and_the_seed_is_in_the_answer(client):
    first, second = generate(client), generate(client)
    assert first["data"] != second["data"]
    again = generate(client, seed=first["dalle2"]["seed"])
    assert again["data"] == first["data"]


def test_urls_give_the_file(client):
    answer = client.post("/v1/images/generations", json={**PROMPT, "seed": 1}).json()
    [item] = answer["data"]
    assert item["url"].startswith("http://localhost/v1/images/files/")
    file = client.get(item["url"])
    assert file.headers["content-type"] == "image/png" and file.headers["x-content-type-options"] == "nosniff"
    assert base64.b64encode(file.content).decode() == generate(client, seed=1)["data"][0]["b64_json"]


def test_sizes(client):
    assert opened(generate(client, size="8x8")["data"][0]).size == (8, 8)
    assert opened(generate(client, size="16x16")["data"][0]).size == (16, 16)
    unknown = client.post("/v1/images/generations", json={**PROMPT, "size": "256x256"})
    error = unknown.json()["error"]
    assert unknown.status_code == 400 and error["param"] == "size"
    assert "8x8" in error["message"] and "16x16" in error["message"]
    answer = generate(client, size="256x256", resize=True)
    assert opened(answer["data"][0]).size == (256, 256) and answer["size"] == "256x256"


@pytest.mark.parametrize("mask", [True, False])
def test_edits_keep_what_is_opaque(client, mask):
    image = png(clear=not mask)
    files = {"image": image, "mask": png(clear=True)} if mask else {"image": image}
    fields = {"prompt": "a star", "n": "2", "seed": "4", "response_format": "b64_json", "decoder[steps]": "2"}
    fields["upsampler_1"], fields["prior"] = '{"steps": 2}', '{"steps": 2}'
    done = client.post("/v1/images/edits", data=fields, files=files)
    assert done.status_code == 200, done.text
    given = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    for item in done.json()["data"]:
        edited = np.asarray(opened(item))
        np.testing.assert_allclose(edited[9:].astype(int), given[9:], atol=1)
        assert np.abs(edited[:7].astype(int) - given[:7]).mean() > 20
    assert done.json()["dalle2"]["sampling"]["decoder"]["steps"] == 2


def test_variations(client, tiny):
    fields = {"n": "2", "seed": "4", "response_format": "b64_json", "decoder[steps]": "2", "upsampler_1[steps]": "2"}
    done = client.post("/v1/images/variations", data=fields, files={"image": png(40)})
    assert done.status_code == 200, done.text
    found = np.stack([np.asarray(opened(item)) for item in done.json()["data"]])
    expected = tiny.variations(png(40), num=2, seed=4, **FEW_WITHOUT_PRIOR).numpy
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=1)


def test_models(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "second"]
    assert client.get("/v1/models/second").json()["id"] == "second"
    assert generate(client, model="second", seed=1)["dalle2"]["system"] == "second"


def test_the_documentation_describes_the_requests(client):
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "mask", "prompt", "n", "seed", "decoder"} <= set(body["properties"])
    assert set(body["required"]) == {"image", "prompt"}

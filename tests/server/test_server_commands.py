"""The routes under /dalle2: the commands, embeddings, jobs and their events."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from served import FEW, FEW_WITHOUT_PRIOR, png

IMAGE, OTHER, CLEAR = (base64.b64encode(png(*args)).decode() for args in ((16,), (24,), (16, None, True)))
B64 = {"response_format": "b64_json", "seed": 5}


def images_of(answer):
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(i["b64_json"])))) for i in answer["data"]])


def array(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


COMMANDS = {
    "text2image": ({"prompt": "a", **FEW}, lambda s: s.text2image("a", num=1, seed=5, **FEW)),
    "variations": (
        {"image": f"data:image/png;base64,{IMAGE}", "eta": 0.5},
        lambda s: s.variations(array(IMAGE), eta=0.5, num=1, seed=5, **FEW_WITHOUT_PRIOR),
    ),
    "reconstruct": ({"image": IMAGE, "steps": 2}, lambda s: s.reconstruct(array(IMAGE), steps=2, seed=5)),
    "interpolate": (
        {"images": [IMAGE, OTHER], "frames": 3},
        lambda s: s.interpolate([array(IMAGE), array(OTHER)], frames=3, seed=5, **FEW_WITHOUT_PRIOR),
    ),
    "text_diff": (
        {"image": IMAGE, "before": "one two three", "after": "four", "frames": 2},
        lambda s: s.text_diff(array(IMAGE), "one two three", "four", frames=2, seed=5, **FEW_WITHOUT_PRIOR),
    ),
    "inpaint": (
        {"image": CLEAR},
        lambda s: s.inpaint(array(CLEAR), np.arange(16)[:, None].repeat(16, 1) < 8, num=1, seed=5, **FEW_WITHOUT_PRIOR),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_of_the_system(client, tiny, command):
    fields, expected = COMMANDS[command]
    settings = {} if command == "reconstruct" else FEW_WITHOUT_PRIOR
    done = client.post(f"/dalle2/{command}", json={**B64, **settings, **fields})
    assert done.status_code == 200, done.text
    assert done.json()["dalle2"]["command"] == command
    np.testing.assert_allclose(images_of(done.json()).astype(int), expected(tiny).numpy.astype(int), atol=1)


def test_embeddings(client, tiny):
    done = client.post("/dalle2/embed", json={"texts": ["a", "b"], "images": [IMAGE]}).json()
    np.testing.assert_allclose(done["text"], tiny.embed_text(["a", "b"]), rtol=1e-6)
    np.testing.assert_allclose(done["image"], tiny.embed_image(array(IMAGE)), rtol=1e-6)


def start(client, **fields):
    started = client.post("/dalle2/text2image", json={"prompt": "a", **B64, **FEW, "background": True, **fields})
    assert started.status_code == 202, started.text
    return started.json()["id"]


def wait(client, job):
    for _ in range(200):
        state = client.get(f"/dalle2/jobs/{job}").json()
        if state["status"] not in ("queued", "running"):
            return state
        time.sleep(0.05)
    raise AssertionError(state)


def events_of(client, job):
    """Returns the (name, value) of each event of a job."""
    text = client.get(f"/dalle2/jobs/{job}/events")
    assert text.headers["content-type"].startswith("text/event-stream")
    parts = [part.split("\n") for part in text.text.strip().split("\n\n") if not part.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def test_a_job_has_the_answer_of_the_request(client, tiny):
    state = wait(client, start(client, n=2))
    assert state["status"] == "done" and state["images"] == 2
    expected = tiny.text2image("a", num=2, seed=5, **FEW).numpy
    # Rows are batches of another size, so that the last bit of a sum may differ.
    np.testing.assert_allclose(images_of(state["result"]).astype(int), expected.astype(int), atol=1)


def test_events_show_the_denoising(client):
    job = start(client, previews=True, decoder={"steps": 4})
    found = events_of(client, job)
    assert found[-1][0] == "done" and found[-1][1]["result"]["data"]
    progress = [value for name, value in found if name == "progress"]
    assert progress and all(value["index"] == 0 and value["step"] <= value["steps"] for value in progress)
    previews = [array(value["preview"]) for value in progress if "preview" in value]
    assert previews and previews[-1].shape in ((8, 8, 3), (16, 16, 3))
    final = images_of(found[-1][1]["result"])[0]
    if previews[-1].shape == final.shape and progress[-1]["step"] == 2:
        np.testing.assert_allclose(previews[-1].astype(int), final.astype(int), atol=1)


def test_events_of_a_finished_job(client):
    job = start(client)
    wait(client, job)
    assert events_of(client, job)[-1][0] == "done"


def test_a_failed_job_has_the_error(client):
    job = start(client, decoder={"speed": 3})
    state = wait(client, job)
    assert state["status"] == "failed" and state["error"]["param"] == "decoder.speed"
    assert events_of(client, job)[-1][0] == "failed"


def test_a_cancelled_job(client):
    job = start(client, n=10, decoder={"steps": 50})
    assert client.delete(f"/dalle2/jobs/{job}").json()["cancelled"]
    assert wait(client, job)["status"] == "cancelled"

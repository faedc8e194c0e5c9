"""Labels over HTTP: the values, who may ask, and what every answer carries."""

import base64
import io
import re

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.checks import raises_saying, run_python
from support.models import trained_folder
from support.serving import RAW, ask, assert_labels, assert_refused, calibrated, client, metric, picture

from deit.cli import main
from deit.serve.limits import Service, read_keys

# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fused", "class", "distillation", "softmax"])
def test_all_ways_of_sending_give_what_the_predictor_gives(folder, head):
    images = [
        picture(0, "JPEG", (90, 160)),
        picture(1),
        picture(2, "WEBP"),
        picture(3, "GIF"),
        picture(4, "TIFF"),
        picture(5, "BMP"),
    ]
    with client(folder, head) as web:
        expected = web.predictor(images, top_k=3)
        form = [("image", (f"../../{i}.png", image, "image/png")) for i, image in enumerate(images)]
        texts = [base64.b64encode(image).decode() for image in images]
        for answer in (
            web.post("/v1/classify?top_k=3", files=form),
            web.post("/v1/classify", files=form, data={"top_k": "3"}),
            web.post("/v1/classify", json={"images": texts, "top_k": 3}),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "m"
            for result, labels in zip(answer.json()["results"], expected, strict=True):
                assert list(result) == ["labels"]
                assert_labels(result["labels"], labels)
        for kind in ("image/jpeg", "application/octet-stream"):
            for image, labels in zip(images, expected, strict=True):
                [result] = ask(web, image, {"Content-Type": kind}, params={"top_k": 3}).json()["results"]
                assert_labels(result["labels"], labels)
        assert len(ask(web, images[0]).json()["results"][0]["labels"]) == 5
        assert web.get("/model").json()["head"] == head


def test_a_calibrated_model_says_whether_it_is_sure(tmp_path):
    images = [picture(i) for i in range(12)]
    with client(calibrated(trained_folder(tmp_path))) as web:
        expected = list(web.predictor.stream(images))
        results = web.post("/v1/classify", files=[("i", ("x", image)) for image in images]).json()["results"]
        assert [result["sure"] for result in results] == [answer.sure for answer in expected]
        assert {answer.sure for answer in expected} == {True, False}
        card = web.get("/model").json()
        assert card["calibration"] == {"error_rate": 0.05, "images": 400, "temperature": 2.0, "threshold": 0.3}
        assert (card["labels"], card["image_size"]) == (list("abcde"), [16, 16])


def test_an_unreadable_image_among_others_is_a_row(folder):
    with client(folder) as web:
        good = picture(1)
        results = web.post("/v1/classify", files=[("i", ("a", b"no")), ("i", ("b", good))]).json()["results"]
        assert "the image is not a JPEG, PNG, WebP, GIF, TIFF or BMP file; convert" in results[0].pop("error")
        assert results[0] == {}
        assert_labels(results[1]["labels"], web.predictor([good])[0])
        assert metric(web, 'deit_images_total{result="unreadable"}') == 1
        assert metric(web, 'deit_images_total{result="labelled"}') == 1


# ---- keys, headers, numbers --------------------------------------------------------------------------------------


def test_keys(folder, tmp_path):
    (tmp_path / "keys").write_text("first-key\n\n  second-key \n")
    keys = read_keys(tmp_path / "keys")
    assert keys == ("first-key", "second-key")
    with client(folder, keys=keys) as web:
        for given in (None, "Bearer wrong", "Bearer ", "first-key", "Basic first-key", "Bearer first-ke\u00fc"):
            headers = {**RAW, **({"Authorization": given.encode("latin-1")} if given else {})}
            answer = ask(web, picture(0), headers)
            assert_refused(answer, 401, "this needs a key; send it as Authorization: Bearer KEY")
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in keys:
            assert ask(web, picture(0), {**RAW, "Authorization": f"Bearer {key}"}).status_code == 200
        assert web.get("/model").json()["key"] is True
        for path in ("/", "/healthz", "/readyz", "/metrics"):
            assert web.get(path).status_code == 200
    (tmp_path / "none").write_text("\n")
    with raises_saying(ValueError, "none holds no key; write one on each line"):
        read_keys(tmp_path / "none")


def test_keys_that_not_every_client_can_send(folder, tmp_path):
    """In a file they are refused. Another text of as many characters must never open the server in their place."""
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst-key\r\nsecond-key\r\n")  # as an editor of Windows saves it
    assert read_keys(file) == ("first-key", "second-key")
    for content in ("first-key\n\u5bc6\u7801\n".encode(), b"first-key\nke\xff\n", b"\nke\x00y\n"):
        file.write_bytes(content)
        with raises_saying(ValueError, "keys, line 2: expected a key of printable ASCII characters", "another key"):
            read_keys(file)
    file.write_bytes("first-key\n".encode("utf-16"))
    with raises_saying(ValueError, "keys, line 1: expected a key of printable ASCII", "save the file in UTF-8"):
        read_keys(file)
    with client(folder, keys=("\u5bc6\u7801",)) as web:
        for given, status in ((b"??", 401), ("\u5bc6\u7801".encode(), 200)):
            assert ask(web, picture(0), {**RAW, "Authorization": b"Bearer " + given}).status_code == status


def test_every_answer_has_the_security_headers(web):
    for answer in (
        web.get("/"),
        web.get("/nowhere"),
        ask(web, picture(0)),
        ask(web, b"x"),
        web.get("/openapi.json"),
        web.get("/api"),
    ):
        policy = answer.headers["content-security-policy"]
        assert policy == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
            "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_pages_ask_nobody_else(web):
    for path in ("/", "/page.js", "/page.css", "/shown.js", "/words.js", "/shown.css", "/api"):
        answer = web.get(path)
        assert answer.status_code == 200
        assert "//" not in re.sub(r"(?m)^\s*//.*$|\s// .*$", "", answer.text)
        assert " style=" not in answer.text
    listed = web.get("/api").text
    for path in web.get("/openapi.json").json()["paths"]:
        assert path in listed


def test_the_description_names_types_keys_and_limits(folder):
    with client(folder, keys=("one",), max_batch=7) as web:
        described = web.get("/openapi.json").json()
        paths = described["paths"]
        [of_metrics] = paths["/metrics"]["get"]["responses"]["200"]["content"]
        assert web.get("/metrics").headers["content-type"].startswith(of_metrics)
        for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
            schema = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Status"}
            assert web.get(path).json()["status"] == status
            assert status in described["components"]["schemas"]["Status"]["properties"]["status"]["enum"]
        assert described["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
        keyed = [path for path, found in paths.items() if any("security" in each for each in found.values())]
        assert keyed == ["/v1/classify", "/v1/explain"]
        form = paths["/v1/classify"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert (form["required"], form["properties"]["image"]["maxItems"]) == (["image"], 7)
        assert all("421" in each["responses"] for found in paths.values() for each in found.values())


def test_metrics_count(folder):
    with client(folder) as web:
        for i in range(3):
            ask(web, picture(i))
        ask(web, b"x")
        web.get("/nowhere")
        assert metric(web, 'deit_requests_total{route="/v1/classify",status="200"}') == 3
        assert metric(web, 'deit_requests_total{route="/v1/classify",status="422"}') == 1
        assert metric(web, 'deit_requests_total{route="other",status="404"}') == 1
        assert metric(web, 'deit_request_seconds_count{route="/v1/classify"}') == 4
        assert metric(web, "deit_batch_images_sum") == 3
        assert metric(web, 'deit_images_total{result="labelled"}') == 3


def test_settings_that_make_no_sense_are_refused(folder, capsys):
    with raises_saying(ValueError, "a queue of 8 images can't fill a batch of 32"):
        Service(queue=8)
    with raises_saying(ValueError, "max_pixels must be at most 178956970, because Pillow refuses larger images"):
        Service(max_pixels=10**9)
    with raises_saying(ValueError, "timeout must be above 0, found 0"):
        Service(timeout=0)
    with raises_saying(ValueError, "timeout must be above 0, found nan"):
        Service(timeout=float("nan"))
    with raises_saying(ValueError, "timeout must be at most 86400 s, a day, found inf"):
        Service(timeout=float("inf"))
    for milliseconds in (-1.0, float("nan"), float("inf"), 2000.0):
        with raises_saying(ValueError, f"below the timeout, 2000 ms, found {milliseconds:g}; an image that waits"):
            Service(max_wait_ms=milliseconds, timeout=2)
    for host in ("http://models.example", "models.example:8000", "models.example/", "[::1]", "a b", ""):
        with raises_saying(ValueError, f"nothing else, found {host!r}; leave out http:// and the port"):
            Service(hosts=(host,))
    Service(hosts=("models.example", "localhost", "192.0.2.7", "::", "2001:db8::1"))
    assert main(["serve", str(folder), "--queue", "8"]) == 1
    assert "a queue of 8 images can't fill" in capsys.readouterr().err
    for port in ("65536", "-1", "http", "\u0663"):
        with pytest.raises(SystemExit):
            main(["serve", str(folder), f"--port={port}"])
        assert f"expected a port from 0 to 65535, found {port!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--max-bytes", "20MB"])
    assert "expected a size like 500KiB or 20MiB, found '20MB'" in capsys.readouterr().err


def test_what_is_not_installed_is_named():
    assert (
        run_python(
            "import sys; sys.modules['uvicorn'] = None\ntry: import deit.serve.app\n"
            "except ImportError as error: print(error)"
        )
        == 'serving needs uvicorn: pip install "deit[serve]"'
    )


def test_base64_as_any_program_writes_it(folder):
    data = next(data for data in (picture(i) for i in range(100)) if {"+", "/"} <= set(base64.b64encode(data).decode()))
    safe = base64.urlsafe_b64encode(data).decode()
    texts = [
        base64.encodebytes(data).decode(),
        base64.encodebytes(data).decode().replace("\n", "\r\n"),
        safe,
        safe.rstrip("="),
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        f" DATA:image/png;name=a.png;BASE64,\n{safe}",
    ]
    with client(folder) as web:
        [expected] = web.predictor([data])
        answer = web.post("/v1/classify", json={"images": texts})
        assert answer.status_code == 200, answer.text
        for result in answer.json()["results"]:
            assert_labels(result["labels"], expected)


def test_a_large_text_in_a_png_costs_no_answer(folder):
    picture_of, texts = Image.open(io.BytesIO(picture(0))), PngInfo()
    texts.add_text("key", "x" * (3 * 2**20), zip=True)
    file = io.BytesIO()
    picture_of.save(file, "PNG", pnginfo=texts)
    with client(folder) as web:
        [expected] = web.predictor([picture(0)])
        answer = ask(web, file.getvalue())
        assert answer.status_code == 200, answer.text
        assert_labels(answer.json()["results"][0]["labels"], expected)

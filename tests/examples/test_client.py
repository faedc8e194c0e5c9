"""The client of the server, against the server and against one that has no room."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from support.models import trained_folder
from support.serving import calibrated, server

from deit import Predictor


def test_labels_and_a_figure_come_back(examples, photos, tmp_path, capsys):
    folder = calibrated(trained_folder(tmp_path / "m"))
    (tmp_path / "broken.png").write_bytes(b"broken")
    (tmp_path / "keys").write_text("sesame\n")
    with server(folder, "--api-key-file", str(tmp_path / "keys")) as (_, url):
        given = [*photos, tmp_path / "broken.png", "--url", url, "--top-k", "2"]
        examples.run("serve_client", *given, "--key", "sesame", "--explain", "why.png")
        with pytest.raises(SystemExit, match="401: "):
            examples.run("serve_client", *given)
    said = capsys.readouterr().out.splitlines()
    expected = Predictor(folder).stream(photos, top_k=2)
    for line, answer in zip(said, expected, strict=False):
        first, second = answer.labels
        doubt = "" if answer.sure else " (I don't know)"
        assert line == (
            f"{answer.source}: {first['label']} {first['score']:.3f}, {second['label']} {second['score']:.3f}{doubt}"
        )
    assert len(said) == 3
    assert said[2].startswith(f"{tmp_path / 'broken.png'}: ")
    assert "image" in said[2]
    with Image.open("why.png") as figure:
        assert figure.format == "PNG"


class Busy(BaseHTTPRequestHandler):
    """Answers with the next of `answers`: a status and a `Retry-After`."""

    answers: list
    page = b""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, seconds = self.answers.pop(0)
        body = self.page or json.dumps({"results": ["done"]} if status == 200 else {"error": "no room"}).encode()
        self.send_response(status)
        if seconds is not None:
            self.send_header("Retry-After", seconds)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def busy(examples, monkeypatch):
    """A client of a server that gives certain answers, and the seconds that the client waits."""
    client, waits = examples.load("serve_client"), []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    with HTTPServer(("127.0.0.1", 0), Busy) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield client.Client(f"http://127.0.0.1:{found.server_port}", tries=3), waits
        found.shutdown()
        thread.join()


def test_it_asks_again_when_the_server_says(busy, photos):
    client, waits = busy
    Busy.answers = [(503, "2"), (503, "1"), (200, None)]
    assert client.classify(photos[:1]) == ["done"]
    assert waits == [2.0, 1.5]


@pytest.mark.parametrize(("answers", "times"), [([(503, "2")] * 3, 2), ([(503, None)], 0), ([(422, "1")], 0)], ids=str)
def test_it_gives_up_with_the_sentence_of_the_server(answers, times, busy, photos):
    client, waits = busy
    Busy.answers = [*answers]
    with pytest.raises(RuntimeError, match=f"{answers[0][0]}: no room"):
        client.classify(photos[:1])
    assert len(waits) == times
    assert Busy.answers == []


@pytest.mark.parametrize("page", [b"<html>502 Bad Gateway</html>", b"[]", b"{}", b"\xff"])
def test_a_proxy_refuses_with_a_page_of_its_own(page, busy, photos, monkeypatch):
    client, waits = busy
    monkeypatch.setattr(Busy, "page", page)
    for status, seconds, said in ((502, None, "Bad Gateway"), (503, "Fri, 1 Jan 2027 00:00:00 GMT", "Service Unav")):
        Busy.answers = [(status, seconds)]
        with pytest.raises(RuntimeError, match=f"{status}: {said}"):
            client.classify(photos[:1])
    assert waits == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "localhost"])
def test_without_a_server_it_says_how_to_start_one(url, examples, photos):
    with pytest.raises(SystemExit, match=rf"^{url} can't be reached \(.+\); start `deit serve MODEL`, or name its"):
        examples.run("serve_client", photos[0], "--url", url)

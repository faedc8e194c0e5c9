"""Asks a server of `deit serve`, with Python's standard library alone.

    deit serve runs/taught/model
    python examples/serve_client.py photo.jpg other.png
    python examples/serve_client.py photo.jpg --explain why.png
    python examples/serve_client.py photo.jpg --url https://models.example.org --key KEY

If the server has no room, it answers with the status 503 and says after how many seconds to ask again. This client
waits so long, and a little longer each time.
"""

import argparse
import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

parser = argparse.ArgumentParser(description="Asks a server of `deit serve` for labels.")
parser.add_argument("images", nargs="+", type=Path, help="image files, sent in one request")
parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
parser.add_argument("--key", help="a key of the server's --api-key-file")
parser.add_argument("--top-k", type=int, default=3, help="labels for each image")
parser.add_argument("--explain", type=Path, metavar="PICTURE.png", help="also draw what the first answer rests on")
parser.add_argument("--tries", type=int, default=5, help="how often to ask a server that has no room")


class Client:
    def __init__(self, url, key=None, tries=5, timeout=60):
        self.url, self.tries, self.timeout = url.rstrip("/"), tries, timeout
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def ask(self, path, question, accept="application/json"):
        """The body of the answer. Raises `RuntimeError` with the server's sentence if it refuses, or has no room in the
        end, and with one of its own if no server is there."""
        body = json.dumps(question).encode()
        for attempt in range(1, self.tries + 1):
            try:
                request = urllib.request.Request(self.url + path, body, {**self.headers, "Accept": accept})
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    seconds, sentence = error.headers.get("Retry-After", ""), reason(error)
                if error.code != 503 or not seconds.isdigit() or attempt == self.tries:
                    raise RuntimeError(f"{error.code}: {sentence}") from None
            except (urllib.error.URLError, ValueError) as error:
                why = getattr(error, "reason", error)
                raise RuntimeError(
                    f"{self.url} can't be reached ({why}); start `deit serve MODEL`, or name its address with --url "
                    "http://HOST:PORT"
                ) from None
            time.sleep(int(seconds) + 0.5 * (attempt - 1))

    def classify(self, images, top_k=3):
        """For each image file, its labels: `{"label": name, "score": number}`, best first; or an `error`."""
        question = {"images": [encoded(image) for image in images], "top_k": top_k}
        return json.loads(self.ask("/v1/classify", question))["results"]

    def explain(self, image):
        """A PNG of the maps of each token for one image file."""
        return self.ask("/v1/explain", {"images": [encoded(image)]}, accept="image/png")


def reason(error):
    """The server's sentence. A proxy in front of the server may refuse with a page of its own."""
    try:
        return json.loads(error.read())["error"]
    except (ValueError, LookupError, TypeError):
        return error.reason


def encoded(image):
    return base64.b64encode(image.read_bytes()).decode()


def main():
    options = parser.parse_args()
    client = Client(options.url, options.key, options.tries)
    for image, found in zip(options.images, client.classify(options.images, options.top_k), strict=True):
        doubt = "" if found.get("sure", True) else " (I don't know)"
        labels = ", ".join(f"{label['label']} {label['score']:.3f}" for label in found.get("labels", []))
        print(f"{image}: {found.get('error', labels)}{doubt}")
    if options.explain:
        options.explain.write_bytes(client.explain(options.images[0]))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError) as error:
        sys.exit(f"{error}")

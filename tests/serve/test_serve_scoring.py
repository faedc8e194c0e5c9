"""Models whose classes don't exclude each other, as the server answers and describes them."""

import json
import shutil
import subprocess

import pytest
import torch
from support.models import trained_folder
from support.serving import FORM, ask, assert_labels, assert_refused, client, metric, picture

import deit
from deit.explain.maps import deletion_insertion, occlusion
from deit.serve import app as serving
from deit.serve.described import Answers, Explained, ModelCard

PROBLEMS = {
    "several labels": ({"problem_type": "multi_label_classification"}, "sigmoid"),
    "one output": ({"id2label": {0: "ant"}}, "sigmoid"),
    "regression": ({"problem_type": "regression"}, "none"),
    "one regression": ({"problem_type": "regression", "id2label": {0: "age"}}, "none"),
    "one class": ({"problem_type": "single_label_classification"}, "softmax"),
}
KINDS = pytest.mark.parametrize("kind", ["plain", "with_teacher"])


@KINDS
@pytest.mark.parametrize("problem", PROBLEMS)
def test_answers_are_those_of_the_pipeline(tmp_path, kind, problem):
    changes, scoring = PROBLEMS[problem]
    model = trained_folder(tmp_path / "m", kind, **changes)
    whole = deit.pipeline(model=model, top_k=99)
    images = [picture(0), picture(1)]
    expected = whole(images)
    with client(model) as web:
        card = web.get("/model").json()
        assert ModelCard(**card).model_dump() == card
        assert (card["scoring"], card["labels"]) == (scoring, web.predictor.labels)
        body = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n"
            for image in images
        )
        answer = ask(web, body + b"--x--\r\n", FORM, params={"top_k": 99}).json()
        assert Answers(**answer).model_dump(exclude_none=True) == answer
        for result, labels in zip(answer["results"], expected, strict=True):
            assert list(result) == ["labels"]
            assert_labels(result["labels"], labels)
            total = sum(each["score"] for each in result["labels"])
            assert (total == pytest.approx(1)) == (scoring == "softmax")
        for count in (1, 2):
            [result] = ask(web, images[0], params={"top_k": count}).json()["results"]
            assert_labels(result["labels"], expected[0][:count])
        assert metric(web, 'deit_images_total{result="labelled"}') == 4
        assert metric(web, "deit_batch_images_sum") == 4
        described = web.get("/openapi.json").json()["components"]["schemas"]
        assert set(described["ModelCard"]["properties"]) == set(card)
        assert scoring in described["ModelCard"]["properties"]["scoring"]["enum"]
        assert "minimum" not in described["Label"]["properties"]["score"]


@KINDS
def test_an_explanation_of_several_labels_has_their_own_probabilities(tmp_path, kind):
    model = trained_folder(tmp_path / "m", kind, problem_type="multi_label_classification")
    with client(model) as web:
        assert web.get("/model").json()["explain"]
        answer = ask(web, picture(0), path="/v1/explain", params={"target": "b"}).json()
        assert Explained(**answer).model_dump() == answer
        for each in answer["answers"]:
            head = each["token"] if kind == "with_teacher" else "fused"
            expected = {
                found["label"]: found["score"] for found in deit.Predictor(model, head=head)([picture(0)], 99)[0]
            }
            assert each["target_probability"] == pytest.approx(expected["b"], abs=1e-6)
            assert each["probability"] == pytest.approx(expected[each["label"]], abs=1e-6)
            assert each["label"] == max(expected, key=expected.get)


def test_maps_of_several_labels_are_judged_by_their_own_probabilities(tmp_path):
    predictor = deit.Predictor(trained_folder(tmp_path / "m", "plain", problem_type="multi_label_classification"))
    model, pixels = predictor.model, torch.from_numpy(predictor.prepared(picture(0)))[None]
    [values] = occlusion(model, pixels, 1)["class"]
    order = values.flatten().argsort(descending=True, stable=True).tolist()
    assert order[0] != order[-1]

    @torch.no_grad()
    def without(patches):
        """The probability of the label if these patches of 4 by 4 pixels are grey."""
        shown = pixels.clone()
        for patch in patches:
            row, column = divmod(patch, 4)
            shown[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
        return float(model(shown).logits.sigmoid()[0, 1])

    drops = [without([]) - without([patch]) for patch in range(16)]
    assert values.flatten().tolist() == pytest.approx(drops, abs=1e-6)
    curve = [without(order[:count]) for count in range(17)]
    found = deletion_insertion(model, pixels, {"class": values[None]}, 1)["class"]
    assert float(found.deletion) == pytest.approx((sum(curve) - (curve[0] + curve[-1]) / 2) / 16, abs=1e-6)


@pytest.mark.parametrize(
    ("problem", "said"), [("one output", "1 outputs"), ("one regression", "1 outputs"), ("regression", "a regression")]
)
def test_what_has_no_explanation(tmp_path, problem, said):
    model = trained_folder(tmp_path / "m", **PROBLEMS[problem][0])
    with client(model) as web:
        assert web.get("/model").json()["explain"] is False
        assert_refused(ask(web, picture(0), path="/v1/explain"), 501, said)


SHOWN = """
const nodes = new Map();
const made = () => ({ style: {}, children: [], get lastChild() { return this.children.at(-1); },
  get lastElementChild() { return this.list ??= made(); }, setAttribute() {},
  append(child) { child.parent = this; this.children.push(child); },
  remove() { this.parent.children = this.parent.children.filter((each) => each !== this); },
  replaceChildren(...children) { this.children = children; } });
globalThis.document = { createElement: made,
  getElementById: (id) => nodes.get(id) ?? nodes.set(id, made()).get(id) };
const { describe, show } = await import("./shown.js");
const [scoring, labels, names] = JSON.parse(process.argv[2]);
show({ labels, sure: null }, scoring, null);
describe(names, scoring);
const listed = document.getElementById("names");
const rows = document.getElementById("labels").children.map((row) => row.children.map((each) => each.textContent));
console.log(JSON.stringify([document.getElementById("heading").textContent, rows,
  document.getElementById("about").textContent, listed.open, listed.list.children.map((each) => each.textContent)]));
"""


@pytest.mark.parametrize(
    ("scoring", "count", "heading", "shares", "work"),
    [
        ("softmax", 2, "ant", [["ant", "75.0 %", ""], ["bee", "25.0 %", ""]], "This model tells 2 labels apart."),
        (
            "sigmoid",
            2,
            "How likely each label is",
            [["ant", "75.0 %", ""], ["bee", "25.0 %", ""]],
            "This model says how likely each of 2 labels is, by itself.",
        ),
        ("sigmoid", 1, "How likely each label is", [["ant", "75.0 %", ""]], "This model says how likely its label is."),
        ("none", 2, "Measured", [["ant", "1234"], ["bee", "-0.05"]], "This model measures 2 quantities."),
        ("none", 1, "Measured", [["ant", "1234"]], "This model measures 1 quantity."),
    ],
)
def test_the_page_shows_what_the_scores_are(tmp_path, scoring, count, heading, shares, work):
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    for name in ("shown.js", "words.js"):
        shutil.copy(serving._PAGES[f"/{name}"][0], tmp_path / name)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "run.js").write_text(SHOWN)
    scores = [1234.04, -0.05] if scoring == "none" else [0.75, 0.25]
    names = ["ant", "bee"][:count]
    labels = [{"label": name, "score": score} for name, score in zip(names, scores[:count], strict=True)]
    done = subprocess.run(
        ["node", str(tmp_path / "run.js"), json.dumps([scoring, labels, names])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [heading, shares, work, True, names]

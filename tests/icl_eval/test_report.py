"""The report and the W&B table of any task: figures, answers with their pictures, verdicts."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import wandb
from PIL import Image

from icl_eval import write_report
from icl_eval.evaluation import Cell, Results
from icl_eval.examples import LARGE, SIDE, Reader, examples, in_a_row, readable_cell, small, thumbnail
from icl_eval.metrics import METRICS, Figure
from icl_eval.outcomes import Outcome
from icl_eval.tasks import Generation, Task
from icl_eval.weights_and_biases import SCORES, TABLE, answer_row, answered, has_key, record, resolved, score_rows

COLOURS = ["red", "green", "blue", "yellow", "cyan", "magenta", "white", "black"]
CAPTIONS = Task(
    name="colours",
    version=1,
    dataset="paints",
    split="test",
    support="train",
    template="<image>Output:{answer}",
    separator="\n",
    mode="generate",
    generate=Generation(10),
    zero_shot="text_only",
    metric="cider",
    shots=(0, 2),
    file="colours.yaml",
)
CHOICES = replace(
    CAPTIONS,
    name="which",
    template="<image>Which colour is {shade} of this? Say it:{label}",
    mode="rank",
    generate=None,
    zero_shot="honest",
    metric="accuracy",
    chance=0.125,
)


FALLING = ((1, 2), (4, 4), (5, 6))


def picture(colour, side=16):
    made = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(made, "PNG")
    return made.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of one's own: plain colours, by their names."""
    root = tmp_path_factory.mktemp("data")
    (root / "paints").mkdir()
    for split in ("train", "test"):
        lines = []
        for number, colour in enumerate(COLOURS):
            name = f"{split}-{colour}.png"
            (root / "paints" / name).write_bytes(picture(colour, 16 if split == "train" else 17))
            lines.append(
                {
                    "id": f"{split}/{number}",
                    "image": name,
                    "answers": [f"a {colour} <b>square</b>", f"something {colour} here"],
                    "label": colour,
                    "candidates": COLOURS,
                    "shade": "the shade",
                }
            )
        (root / "paints" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def outcome(task, number, shots, said):
    """The answer to a query: of captions a text, of choices a colour."""
    colour = COLOURS[number]
    before = [(number + 1 + each) % len(COLOURS) for each in range(shots or 2 * (task.zero_shot == "text_only"))]
    about = {
        "query_id": f"test/{number}",
        "query": f"test/{number}",
        "demonstrations": tuple(f"train/{each}" for each in before),
        "prompt": f"{number:016x}",
        "answer": said,
    }
    if task.mode == "generate":
        references = [f"a {colour} <b>square</b>", f"something {colour} here"]
        labels = tuple(f"a {COLOURS[each]} <b>square</b>" for each in before)
        return Outcome(**about, labels=labels, prediction=said, target=references, right=references[0])
    chosen, labels = COLOURS.index(said), tuple(COLOURS[each] for each in before)
    scores = tuple(0.0 if each == chosen else -2.0 for each in range(len(COLOURS)))
    candidates = tuple(COLOURS)
    return Outcome(
        **about, labels=labels, prediction=chosen, target=number, right=colour, candidates=candidates, scores=scores
    )


def cell(task, shots, says, control=None):
    outcomes = tuple(outcome(task, number, shots, says(number)) for number in range(len(COLOURS)))
    score = METRICS[task.metric].score([each.prediction for each in outcomes], [each.target for each in outcomes])
    zero_shot = task.zero_shot if shots == 0 else None
    return Cell(task.name, shots, control, score, 0, outcomes, zero_shot)


@pytest.fixture(scope="module")
def results(data):
    cells = [
        cell(CAPTIONS, 0, lambda number: "a thing"),
        cell(CAPTIONS, 2, lambda number: f"a {COLOURS[number - number % 2]} square"),
        cell(CHOICES, 0, lambda number: "red"),
        cell(CHOICES, 2, lambda number: COLOURS[number - number % 2]),
        cell(CHOICES, 4, lambda number: "red", control="gates_at_zero"),
        cell(CHOICES, 4, lambda number: "blue", control="order_1"),
        cell(CHOICES, 4, lambda number: "blue", control="order_2"),
    ]
    facts = {"versions": {"python": "3"}, "commit": None}
    made = Results({"colours": CAPTIONS, "which": CHOICES}, cells, {"colours": 0, "which": 0}, {"colours": 1.0}, facts)
    made.data = data
    made.diagnostics = {"which": {"verdict": "The demonstrations <i>help</i>."}}
    return made


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    path = write_report(tmp_path_factory.mktemp("report") / "report.html", results=results)
    return re.sub('base64,[^"]*', "", path.read_text())


def test_prompts_are_shown_as_they_were_read(results, data):
    """Pictures beside another's text, those of the wrong split, or demonstrations of text with pictures."""
    reader = Reader(CAPTIONS, data)
    shown = reader.answered(results.cell("colours", 2), 3)
    assert shown.demonstrations == tuple(
        (picture(colour), f"Output:a {colour} <b>square</b>") for colour in ("cyan", "magenta")
    )
    assert shown.query == (picture("yellow", 17), "Output:")
    assert (shown.answer, shown.right) == ("a blue square", "a yellow <b>square</b>")
    assert shown.references == ("a yellow <b>square</b>", "something yellow here")
    without = reader.answered(results.cell("colours", 0), 3)
    assert without.demonstrations == (("Output:a cyan <b>square</b>",), ("Output:a magenta <b>square</b>",))
    assert without.query == shown.query
    chosen = Reader(CHOICES, data).answered(results.cell("which", 2), 1)
    assert chosen.query[1] == "Which colour is the shade of this? Say it:"
    assert dict(chosen.candidates)["red"] == pytest.approx(1 / (1 + 7 * np.exp(-2)))
    assert [name for name, _ in chosen.candidates] == ["red", "green", "blue", "yellow", "cyan"], "best first"
    last = Reader(CHOICES, data).answered(results.cell("which", 2), 7)
    assert [name for name, _ in last.candidates][-1] == "black", "the right one, though not of the best"


def test_examples_are_half_wrong_and_of_all_tasks(results):
    """Right answers only; examples of one task only; or captions, of which none is ever whole, all called wrong."""
    found = examples(results, 8)
    assert [each.task for each in found] == ["colours", "which"] * 4
    assert [each.is_right for each in found if each.task == "which"] == [False, False, True, True]
    values = [each.value for each in found if each.task == "colours"]
    assert max(values[:2]) < min(values[2:])
    graded = results.cell("colours", 2)
    high = replace(graded, score=replace(graded.score, per_item=np.linspace(1, 3, len(COLOURS))))
    above = examples(replace(results, tasks={"colours": CAPTIONS}, cells=[high]), 4)
    assert [each.query_id for each in above] == ["test/0", "test/1", "test/4", "test/5"]
    weak = replace(graded, score=replace(graded.score, per_item=np.linspace(0, 0.5, len(COLOURS))))
    poor = examples(replace(results, tasks={"colours": CAPTIONS}, cells=[weak]), 4)
    assert [each.query_id for each in poor] == ["test/0", "test/1", "test/4", "test/5"], "none of which is whole"
    always = cell(CHOICES, 2, lambda number: "red")
    single = examples(replace(results, tasks={"which": CHOICES}, cells=[always]), 6)
    assert [each.is_right for each in single] == [False] * 5 + [True], "where one alone is right"
    never = {
        name: cell(replace(CHOICES, name=name), 2, lambda number: COLOURS[number - 1]) for name in ("never", "nor")
    }
    tasks = {"which": CHOICES} | {name: replace(CHOICES, name=name) for name in never}
    mixed = examples(replace(results, tasks=tasks, cells=[*results.cells, *never.values()]), 4)
    assert sum(each.is_right for each in mixed) == 2, "where two tasks have none"
    few = examples(results, 2)
    assert [(each.task, each.query_id) for each in few] == [("colours", "test/1"), ("colours", "test/0")]


def test_the_prompts_of_examples_can_be_looked_at(results):
    """A page of prompts of a hundred pictures, or of no demonstrations where a few would do."""
    long = cell(CHOICES, 32, lambda number: "red")
    more = replace(results, cells=[*results.cells, long])
    assert readable_cell(more, "which").shots == 2
    only = replace(results, cells=[long])
    assert readable_cell(only, "which").shots == 32


def test_report_of_any_task(page, results):
    """Figures, verdicts, references or answers that the page lacks, or into which data can write markup."""
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    for cell in results.cells:
        for figure in cell.score.figures.values() if cell.control is None else ():
            assert f"{figure.value:.3f}" in page
            assert "{:.3f} – {:.3f}".format(*figure.interval) in page
    for text in ("bleu_4", "rouge_l", "cider against shots", "accuracy against shots", "tokenizer"):
        assert text in page, text
    assert "The demonstrations &lt;i&gt;help&lt;/i&gt;." in page
    assert "<b>square" not in page and "a red &lt;b&gt;square&lt;/b&gt; · something red here" in page
    assert "At 0 shots colours has two demonstrations without their" in page
    assert page.count('class="card example"') == 12
    assert "nan" not in page


def test_report_claims_only_what_holds_for_the_task(page):
    """The embedded world's caveat, or the promise that controls fall to chance, over tasks of which neither is true."""
    assert "emerge from web-scale data" not in page
    assert "must\nfall to chance" not in page and "NOT within" not in page
    assert "<b>order 1, order 2</b>, the demonstrations in other orders" in page
    assert "Shown each of" not in page


def pages(results, tmp_path):
    """The page and its visible text."""
    page = re.sub('base64,[^"]*', "", write_report(tmp_path / "report.html", results=results).read_text())
    return page, re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))


def test_the_right_answer_is_there_though_it_was_not_kept(results, tmp_path):
    """A wrong answer, of a thousand candidates, whose card does not say what would have been right."""
    plain = results.cell("which", 2)
    best = [replace(each, candidates=("red", "blue"), scores=(0.0, -1.0)) for each in plain.outcomes]
    kept = replace(results, tasks={"which": CHOICES}, cells=[replace(plain, outcomes=best)])
    _, text = pages(kept, tmp_path)
    assert "magenta, which is none of the best" in text and "blue, which is none" not in text


def test_many_tasks_are_told_apart(results, tmp_path):
    """Lines of a chart in the same colour."""
    tasks = {f"task-{number}": replace(CHOICES, name=f"task-{number}") for number in range(11)}
    cells = [cell(task, shots, lambda number: "red") for task in tasks.values() for shots in (0, 2)]
    page, _ = pages(replace(results, tasks=tasks, cells=cells, seed=dict.fromkeys(tasks, 0)), tmp_path)
    charts = page.split('class="card beside')[1:]
    shown = [re.findall(r'<li><i class="b(\d)"></i>([^<]*)<', chart) for chart in charts]
    assert [name for chart in shown for _, name in chart] == list(tasks)
    assert [len({colour for colour, _ in chart}) for chart in shown] == [8, 3]
    assert all("aria-label=" in chart and ">accuracy</text>" in chart and ">shots</text>" in chart for chart in charts)


def test_small_things_are_worded_right(results, tmp_path):
    """A page that says 1 shots, or 1 min 60 s, or after 1 pictures of each what it said before."""
    task = replace(CHOICES, name="fast", ways=4, names="fresh", shots=(0, 1), chance=0.25)
    cells = [cell(task, 0, lambda number: "red"), cell(task, 1, lambda number: COLOURS[number])]
    fast = replace(results, tasks={"fast": task}, cells=cells, seed={"fast": 0}, seconds={"fast": 119.7})
    _, text = pages(fast, tmp_path)
    assert "Shown one picture of each of 4 classes, under invented names, the model named" in text
    assert "right in 100.0% of 8 episodes. Guessing gives 25%." in text
    assert "fast at 1 shot " in text and "2 min 0 s" in text
    assert "100.0 – 100.0 % chance 25 %" in text


def test_controls_that_are_not_at_chance_are_told(results, tmp_path):
    """A leak that the page calls within the margin, or one made up of a variant that need not be at chance."""
    task = replace(CHOICES, name="fast", ways=4, names="fresh", chance=0.125)
    cells = [
        cell(task, 4, lambda number: COLOURS[number]),
        cell(task, 4, lambda number: COLOURS[number], control="order_1"),
        cell(task, 4, lambda number: "red", control="gates_at_zero"),
    ]
    near, leak, never = (
        replace(
            cell(task, 4, lambda number: COLOURS[number // 2], control="images_swapped"),
            score=METRICS["accuracy"].score(said, list(range(8))),
        )
        for said in ([0, 1, 2, 0, 0, 0, 0, 0], list(range(8)), [8] * 8)
    )
    about = {"tasks": {"fast": task}, "seed": {"fast": 0}}
    _, text = pages(replace(results, cells=cells, **about), tmp_path)
    assert "In fast binding what gates at zero change is independent" in text
    assert "gates at zero on fast: 0.125, 0.000 away, within the margin of 0.05." in text
    _, text = pages(replace(results, cells=[*cells, leak], **about), tmp_path)
    assert "pictures swapped on fast: 1.000, 0.875 away, NOT within the margin of 0.05, nor is any of its" in text
    _, text = pages(replace(results, cells=[*cells, near], **about), tmp_path)
    assert "0.375, 0.250 away, which is no sign of a leak: 8 queries cannot tell it from the margin of 0.05" in text
    assert "NOT" not in text, "an alarm where chance lies inside the interval"
    _, text = pages(replace(results, cells=[*cells, never], **about), tmp_path)
    assert "0.000, 0.125 away, which is no sign of a leak" in text, "none of 8 has a third of a chance at an eighth"
    sure = replace(near, control="random_query", score=METRICS["accuracy"].score([0] * 72 + [1] * 28, [0] * 100))
    barely = replace(near, score=METRICS["accuracy"].score([0] * 6 + [1] * 2, [0] * 8))
    _, text = pages(replace(results, cells=[*cells, sure, barely], **about), tmp_path)
    assert "random query on fast: 0.720" in text and "NOT within" in text, "an alarm hidden by a wide interval"


def test_cards_agree_with_the_headline_and_the_table(results, tmp_path):
    """A card of 4 shots below a headline of 5; 9e-04 where the table has 0.001."""
    task = replace(CHOICES, name="fast", ways=4, names="fresh", shots=(1, 4, 5), chance=0.25)
    cells = [cell(task, shots, lambda number, most=most: COLOURS[min(number, most)]) for shots, most in FALLING]
    faint = cell(CAPTIONS, 4, lambda number: "a thing")
    faint = replace(faint, score=replace(faint.score, figures={"cider": Figure(9e-4, (0.0, 0.0012))}))
    tasks = {"fast": task, "colours": CAPTIONS}
    _, text = pages(replace(results, tasks=tasks, cells=[*cells, faint], seed=dict.fromkeys(tasks, 0)), tmp_path)
    assert "in 37.5% of 8 episodes; after 4 pictures of each, in 62.5%" in text
    assert "fast 62.5 % 4 ways, 4 per class" in text
    assert "colours 0.001 cider, 4 shots 0.000 – 0.001" in text and "e-04" not in text


def test_a_model_that_says_one_thing_is_found_out(results, tmp_path):
    """A score below chance, without diagnostics, that looks like a bug."""
    plain = replace(results, diagnostics={})
    _, text = pages(plain, tmp_path)
    assert "Answers that hardly vary: which at 0 shots: &#34;red&#34; 8 times of 8." in text
    assert "which at 2 shots:" not in text and "colours at 0 shots:" not in text and "answers: " not in text
    _, text = pages(replace(plain, cells=[*results.cells, cell(CHOICES, 4, lambda number: "red")]), tmp_path)
    assert "chance 12.5 % answers: &#34;red&#34; 8 times of 8" in text


def test_a_phone_shows_the_whole_page(results, data, phone, tmp_path):
    """Cards that are cut off at the right of a narrow screen, or pictures of which only the middle is seen."""
    task = replace(CHOICES, name="a_task_with_a_name_as_long_as_operator_induction_interleaved")
    shutil.copytree(data, tmp_path / "data")
    for place, size in enumerate([(400, 100), (40, 400), (3000, 30)]):
        wide = saved(Image.new("RGB", size, "red"), "PNG")
        (tmp_path / "data" / "paints" / f"test-{COLOURS[place]}.png").write_bytes(wide)
    plain = replace(results.cell("which", 2), task=task.name)
    names = tuple(f"{colour}, which is {'the ' * 20}{'very' * 20} one" for colour in COLOURS)
    asked = [replace(each, candidates=names, query_id=f"{'folder/' * 12}{each.query_id}") for each in plain.outcomes]
    cells = [*results.cells, replace(plain, outcomes=asked), replace(plain, shots=1, control="gates_at_zero")]
    long = replace(results, tasks={**results.tasks, task.name: task}, cells=cells, data=tmp_path / "data")
    page = write_report(tmp_path / "report.html", results=long, training_log=[{"step": 1, "loss": 2.0}])
    measure = "const {scrollWidth, clientWidth} = document.documentElement;"
    measure += "const outside = [...document.querySelectorAll('main *:not(.scroll *)')].filter((each) => {"
    measure += "const card = each.closest('.card'); return card && each.scrollWidth && each !== card &&"
    measure += "each.getBoundingClientRect().right > card.getBoundingClientRect().right + 1});"
    measure += (
        "parent.postMessage(outside.map((each) => `beyond its card: ${each.outerHTML.slice(0, 80)}`).join(), '*');"
    )
    measure += "for (const each of document.images) { const {naturalWidth, naturalHeight, width, height} = each;"
    measure += "const {objectFit} = getComputedStyle(each);"
    measure += "parent.postMessage(`${naturalWidth} by ${naturalHeight} ${objectFit} ${width} by ${height}; `, '*') }"
    measure += "parent.postMessage(`${scrollWidth} of ${clientWidth} pixels wide`, '*')"
    told = phone(page, measure)
    ((needed, there),) = re.findall(r"(\d+) of (\d+) pixels wide", told)
    assert needed == there and 300 < int(there) <= 390
    assert "beyond its card" not in told, told[-1000:]
    assert {"400 by 100 contain 216 by 54", "40 by 400 contain 5 by 54", "3000 by 30 contain 222 by 54"} <= set(
        told.split("; ")
    )


def test_captions_are_marked_by_their_value(page):
    """A caption of CIDEr 0 or 1 among others, called wrong or right."""
    cards = page.split('class="card example"')[1:]
    marks = [re.search(r'class="mark[^>]*>([^<]*)<', card)[1] for card in cards if "colours at 2 shots" in card]
    assert marks and all(re.fullmatch(r"\d+\.\d\d", mark) for mark in marks)


def test_large_pictures_are_made_small():
    """A page of 100 MB because of photographs, or drawings blurred that were small anyway."""
    noise = np.random.default_rng(0).integers(256, size=(400, 300, 3), dtype=np.uint8)
    made = io.BytesIO()
    Image.fromarray(noise).save(made, "PNG")
    found = thumbnail(made.getvalue())
    assert len(found) <= LARGE and max(Image.open(io.BytesIO(found)).size) == SIDE
    assert thumbnail(picture("red")) == picture("red")


def saved(shown, kind, **options):
    made = io.BytesIO()
    shown.save(made, kind, **options)
    return made.getvalue()


def test_pictures_are_shown_as_models_see_them():
    """Photographs that lie on their side, drawings on black, or files that browsers do not show."""
    photo = Image.new("RGB", (40, 20), "red")
    photo.paste("blue", (0, 0, 20, 20))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned to the right: left becomes top
    upright = small(saved(photo, "JPEG", exif=turned))
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[2] > 200 > upright.getpixel((10, 35))[2]
    assert small(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")).getpixel((4, 4)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 200 << 8, np.uint16))
    assert small(saved(deep, "PNG")).getpixel((4, 4)) == (200, 200, 200)
    for kind in ("TIFF", "BMP", "PPM"):
        assert thumbnail(saved(photo, kind)).startswith(b"\xff\xd8\xff"), kind
    assert thumbnail(saved(photo, "WEBP")) == saved(photo, "WEBP")


def test_rows_of_the_table(results):
    """Columns that are shifted against their names, or pictures of the demonstrations in the query's place."""
    rows = [dict(zip(TABLE, answer_row(each), strict=True)) for each in answered(results, 3)]
    assert [(row["task"], row["query"]) for row in rows] == [
        (task, f"test/{number}") for task in ("colours", "which") for number in range(3)
    ]
    row = rows[1]
    assert row["demonstrations"].size == (34, 16) and row["pictures"].size == (17, 17)
    assert row["pictures"].getpixel((0, 0)) == (0, 128, 0)
    assert row["prompt"].splitlines()[-1] == "<image>Output:" and row["prompt"].count("<image>") == 3
    assert (row["right"], row["answer"]) == ("a green <b>square</b> · something green here", "a red square")
    assert rows[4]["is right"] is False and rows[3]["is right"] is True
    assert in_a_row([]) is None
    scores = [dict(zip(SCORES, row, strict=True)) for row in score_rows(results)]
    assert len(scores) == sum(len(cell.score.figures) for cell in results.cells)
    last = scores[-1]
    assert (last["task"], last["control"], last["figure"], last["queries"]) == ("which", "order_2", "accuracy", 8)
    assert last["low"] <= last["value"] <= last["high"]


def test_without_a_key_nothing_is_sent(monkeypatch, tmp_path):
    """A run that asks for a password, or goes online, on a machine without credentials."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key() and resolved("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key() and resolved("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolved("auto") == "disabled" and resolved("online") == "online"


def test_an_evaluation_is_kept_offline(results, tmp_path, monkeypatch):
    """A W&B run without the tables, or one that ends an evaluation where W&B fails."""
    assert record(results, tmp_path, mode="disabled") is None
    run = record(results, tmp_path, mode="offline", answers=2)
    (folder,) = tmp_path.glob(f"wandb/offline-run-*-{run}")
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")}
    assert tables["answers"]["columns"] == list(TABLE) and len(tables["answers"]["data"]) == 4
    assert tables["scores"]["columns"] == list(SCORES)
    staged = [Image.open(path).size for path in tmp_path.glob("wandb/**/staging/*") if path.read_bytes()[1:4] == b"PNG"]
    assert {(17, 17), (34, 16)} <= set(staged)

    def broken(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr("wandb.init", broken)
    assert record(results, tmp_path, mode="online", answers=1) is None


def test_an_evaluation_keeps_to_a_run_of_its_own(results, tmp_path, monkeypatch, caplog):
    """Scores that go into the training's run, or close it; or into one that failed before (with --seeds)."""

    def broken(*_):
        raise RuntimeError("no picture")

    training = wandb.init(dir=tmp_path, mode="offline", settings=wandb.Settings(console="off", silent=True))
    with monkeypatch.context() as patched:
        patched.setattr("icl_eval.weights_and_biases.answer_row", broken)
        assert record(results, tmp_path, mode="offline", answers=1) is None
    assert record(replace(results, data=tmp_path / "gone"), tmp_path, mode="offline") is None
    said = [each.getMessage() for each in caplog.records if each.name.startswith("icl_eval")]
    assert [each.partition(":")[0] for each in said] == ["W&B did not take the evaluation"] * 2
    run = record(results, tmp_path, mode="offline", answers=1)
    assert wandb.run is training and training.id != run
    training.log({"loss": 1.0})
    training.finish()
    files = {path.stem.removeprefix("run-") for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert len(files) == 3 and {run, training.id} < files

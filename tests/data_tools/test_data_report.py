"""The report page: complete, the same twice, harmless whatever the names and captions say, bounded in size."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from data_tools.buckets import assign, make_buckets
from data_tools.clean import Options, examine
from data_tools.errors import UsageError
from data_tools.records import ImageRecord
from data_tools.report import Plan, gather, load_tokenizers, make_thumbnails, render
from data_tools.report.charts import histogram, linear_bins, log_bins
from data_tools.report.facts import steps_per_epoch
from data_tools.report.words import caption_facts
from tests.conftest import ROOT
from tests.data_tools.test_data_clean import FAULTS, fill
from tests.data_tools.test_data_cli import run
from tests.data_tools.test_data_quality import scene

__all__ = ["run"]

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>\'`${alert(3)}'
NAMES = (
    "'><svg onload=alert(4)>.png",
    '" onmouseover="alert(5).png',
    "</script><b>.png",
    "{{ 7*7 }}.png",
    "\u202ecod.png",
)
ELEMENTS = """
html head meta title style body header main section aside footer nav p h1 h2 h3 div span b i em a br ul ol li
table thead tbody tr th td code pre details summary figure figcaption img article script svg g rect text line
circle form label input select option output button
"""
OURS = set(ELEMENTS.split())
"""Every element that the page is made of; a name or caption that adds another one has broken out."""


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.text.append(data)

    def all(self, name: str, **wanted: str) -> list[dict[str, str]]:
        return [a for tag, a in self.tags if tag == name and all(a.get(key) == v for key, v in wanted.items())]


def build(folder: Path, budget: int = 10**7, **plan) -> tuple[dict, Page, str]:
    judged = examine(folder, Options())
    facts = gather(judged, Plan(make_buckets(512, 64), 64, **plan), {})
    text = render(facts, make_thumbnails(judged.scan.folder, judged.judged, budget))
    return facts, Page(text), text


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """One picture per fault, and a file that is none."""
    folder = fill(tmp_path_factory.mktemp("faulty"))
    (folder / "broken.png").write_bytes(b"<html>not found</html>")
    return folder


def test_the_page_shows_every_picture_crop_copy_and_problem(faulty):
    """Whoever reads the page must not need to look at the folder."""
    facts, page, text = build(faulty)
    cards = page.all("article")
    assert [card["data-name"] for card in cards] == [p["file_name"] for p in facts["pictures"]]
    assert len(cards) == len(FAULTS) == facts["summary"]["pictures"] and facts["summary"]["errors"] == 1
    assert len(page.all("span", **{"class": "crop"})) == len(FAULTS)
    assert all(src["src"].startswith("data:image/webp;base64,") for src in page.all("img"))
    words = " ".join(page.text)
    assert "broken.png" in words and "is not a picture we can decode" in words and "limit 6" in words
    bits = facts["clusters"][0]["copies"][2]["bits"]
    assert facts["clusters"] == [
        {"kept": "copy.png", "copies": [
            {"file_name": "good.png", "of": "copy.png", "exact": True, "mirrored": False, "bits": 0},
            {"file_name": "mirrored.png", "of": "copy.png", "exact": False, "mirrored": True, "bits": 0},
            {"file_name": "near.jpg", "of": "copy.png", "exact": False, "mirrored": False, "bits": bits},
        ]}
    ]  # fmt: skip
    assert build(faulty)[2] == text, "the same folder gives the same page"


def test_a_copy_of_a_copy_stands_in_the_same_group(tmp_path):
    """Mirrored and then saved twice: three files, one decision."""
    folder = fill(tmp_path / "set", ("good.png",))
    ImageOps.mirror(Image.open(folder / "good.png")).save(folder / "turned.png")
    shutil.copy(folder / "turned.png", folder / "turned too.png")
    (cluster,) = build(folder)[0]["clusters"]
    assert cluster["kept"] == "good.png" and {copy["file_name"] for copy in cluster["copies"]} == {
        "turned.png", "turned too.png"
    }  # fmt: skip


def test_what_a_mask_leaves_out_is_drawn_over_its_picture(tmp_path):
    """A mask that is upside down or inverted is seen at a glance, or not at all."""
    folder = fill(tmp_path / "set", ("good.png", "small.png"))
    size = Image.open(folder / "good.png").size
    (folder / "masks").mkdir()
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(folder / "masks/good.png")
    facts, page, text = build(folder)
    (veil,) = page.all("img", **{"class": "veil"})
    drawn = Image.open(BytesIO(base64.b64decode(veil["src"].partition(",")[2]))).convert("RGBA").getchannel("A")
    left, right = drawn.getpixel((drawn.width // 4, 9)), drawn.getpixel((drawn.width * 3 // 4, 9))
    assert left == 0 and right > 128
    assert facts["summary"]["masks"] == 1 and "1 of 2 pictures has a mask" in text and "show masks" in text
    assert "show masks" not in build(fill(tmp_path / "plain", ("good.png",)))[2]


def test_weights_are_shares_of_the_loss(tmp_path):
    """Repeats and loss_weight both say how much a picture counts."""
    folder = fill(tmp_path / "set", ("good.png", "good too.png", "small.png"))
    rows = [
        {"file_name": name, "text": "x", "repeats": repeats, "loss_weight": weight}
        for name, repeats, weight in (("good.png", 2, 1.0), ("good too.png", 1, 1.0), ("small.png", 1, 3.0))
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {(row["repeats"], row["loss_weight"]): row["share"] for row in build(folder)[0]["weights"]}
    assert found == pytest.approx({(2, 1.0): 2 / 6, (1, 1.0): 1 / 6, (1, 3.0): 3 / 6})


def test_crop_boxes_are_those_of_the_plan(faulty):
    """A box drawn elsewhere than where training cuts would be worse than none."""
    facts, page, _ = build(faulty)
    narrow = next(p for p in facts["pictures"] if p["file_name"] == "narrow.png")
    placement = assign(1000, 300, make_buckets(512, 64), multiple=64)
    assert narrow["cut"]["bucket"] == [placement.bucket[1], placement.bucket[0]]
    boxes = [style["style"] for style in page.all("span", **{"class": "crop"})]
    left = 100 * placement.crop_top_left[1] / placement.resize[1]
    assert any(box.startswith(f"left:{left:.2f}%") for box in boxes)
    shares = [float(number) for box in boxes for number in re.findall(r"[\d.]+(?=%)", box)]
    assert all(0 <= share <= 100 for share in shares)


def test_names_and_captions_cannot_do_anything(tmp_path):
    """A dataset from the internet is shown by a browser: names and captions are text, nothing else."""
    folder = tmp_path / "x<i>&amp;'\"onload=1"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        scene(300, 300, number).save(folder / name.replace("/", "\u2044"))
        (folder / name.replace("/", "\u2044")).with_suffix(".txt").write_text(EVIL)
    (folder / "<script>alert(9)<").write_bytes(b"odd")
    facts, page, text = build(folder)
    assert len(page.all("script")) == 1 and not page.all("script")[0]
    assert not [a for _, a in page.tags for name in a if name.startswith("on")]
    assert not page.all("b", **{"class": "evil"}) and "alert(1)" not in text.split("<script>")[1].split("</script>")[0]
    assert {tag for tag, _ in page.tags} <= OURS
    assert {card["data-name"] for card in page.all("article")} == {p["file_name"] for p in facts["pictures"]}
    assert "{{ 7*7 }}.png" in " ".join(page.text)
    assert EVIL in " ".join(page.text)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)


def test_thumbnails_stay_in_their_budget_and_the_page_says_what_is_left_out(tmp_path):
    """Thousands of pictures must not become a page that no browser opens."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        scene(320, 320, number).save(folder / f"{number:03}.png")
    Image.new("RGB", (320, 320)).save(folder / "zz flat.png")
    facts, page, text = build(folder, budget=60_000)
    drawn = page.all("article")
    assert 3 < len(drawn) < 20 and sum(len(src["src"]) for src in page.all("img")) <= 60_000
    assert f"{41 - len(drawn)} of 41 pictures are not drawn" in " ".join(" ".join(page.text).split())
    assert "zz flat.png" in {card["data-name"] for card in drawn}, "what needs a look comes first"
    assert len(facts["pictures"]) == 41 and len(text) < 200_000
    none, page, _ = build(folder, budget=0)
    assert not page.all("img") and none["summary"]["pictures"] == 41


def test_repeats_roles_and_steps_are_counted_as_training_does():
    """The estimate is the sampler's own arithmetic."""
    records = [
        ImageRecord("3_a/1.png", 512, 512, ("x",), repeats=3),
        ImageRecord("3_a/2.png", 800, 500, ("x",), repeats=3),
        ImageRecord("b.png", 512, 512, ("x",)),
    ]
    cuts = [assign(r.width, r.height, make_buckets(512, 64)) for r in records]
    assert [steps_per_epoch(records, cuts, size) for size in (1, 2, 4)] == [7, 4, 2]
    prior = [*records, ImageRecord("c.png", 512, 512, ("x",), role="class")]
    assert steps_per_epoch(prior, [*cuts, cuts[0]], 1) == 14


def test_captions_in_numbers(tmp_path):
    """Lengths, words, tags, repetitions; tokens with the very tokenizer of the base, the cut-off included."""
    records = [
        ImageRecord("1", 9, 9, ("sks dog, grass, sun", "sks dog")),
        ImageRecord("2", 9, 9, ("Sks dog, snow, sun",)),
        ImageRecord("3", 9, 9, ("",)),
        ImageRecord("4", 9, 9, ()),
    ]
    tokenizers = load_tokenizers(str(ROOT / "finetune/demo/base"))
    facts = caption_facts(records, tokenizers)
    assert (facts["captions"], facts["empty"], facts["pictures_without"]) == (4, 1, 1)
    assert facts["words"] == [4, 2, 4, 0]
    assert facts["frequent_words"][0] == {"text": "dog", "pictures": 2, "share": 2 / 3}
    assert {tag["text"]: tag["pictures"] for tag in facts["frequent_tags"]}["sun"] == 2
    counted = facts["tokens"]["tokenizer"]
    assert counted["room"] == 32 and counted["counts"][3] == 2 and min(counted["counts"][:3]) > 2
    assert load_tokenizers(str(ROOT / "finetune/demo/base/tokenizer/tokenizer.json"))["tokenizer"].count("") == 2
    for wrong in ("nowhere", str(tmp_path), str(ROOT / "README.md")):
        with pytest.raises(UsageError, match="--tokenizer"):
            load_tokenizers(wrong)


def test_charts_hold_every_value_and_draw_their_limit():
    """A histogram that loses its extremes hides exactly what one looks for."""
    bins = log_bins([1, 10, 99, 100, 5000], (10, 100, 1000), 31.6, "limit")
    assert list(bins.counts) == [1, 2, 1, 1] and bins.limit == pytest.approx(1.5, abs=0.01)
    assert sum(linear_bins([0, 3, 77, 78, 400], 77).counts) == 5 and len(linear_bins([400]).counts) <= 25
    drawn = str(histogram(bins, "<b>"))
    assert 'class="limit"' in drawn and "&lt;b&gt;" in drawn and "<b>" not in drawn
    assert "svg" in str(histogram(linear_bins([]), "empty"))


def test_the_command_writes_page_and_json_and_tells_ci(run, tmp_path, faulty, monkeypatch):
    """Exit codes: 0 ready, 3 errors, and with --strict anything that deserves a look."""
    monkeypatch.chdir(tmp_path)
    good = fill(tmp_path / "good", ("good.png", "good too.png"))
    result = run("report", good, "--resolution", 512, "--strict")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["summary"]["keep"] == 2 and "Open report.html" in result.stdout
    first = (tmp_path / "report.html").read_bytes()
    inside = run("report", good, "--resolution", 512, "-o", good / "report.html")
    again = run("report", good, "--resolution", 512, "-o", good / "report.html", "--strict")
    assert inside.returncode == again.returncode == 0 and (good / "report.html").read_bytes() == first
    broken = run("report", faulty, "--resolution", 512, "-o", tmp_path / "bad.html", "--json")
    assert broken.returncode == 3 and "not ready: 1 error;" in broken.stderr and (tmp_path / "bad.html").exists()
    assert json.loads(broken.stdout)["summary"]["errors"] == 1
    (good / "good.txt").write_text("a very long caption " * 20)
    cut = run("report", good, "--resolution", 512, "--tokenizer", "demo", "--strict")
    assert cut.returncode == 3 and "1 caption longer than is read" in cut.stderr, "words without effect deserve a look"
    assert "1 caption is longer than a text encoder reads" in (tmp_path / "report.html").read_text()
    (good / "flat.png").write_bytes((faulty / "flat.png").read_bytes())
    (good / "flat.txt").write_text("nothing")
    assert run("report", good).returncode == 0 and run("report", good, "--strict").returncode == 3
    (good / "flat.png").write_bytes((good / "good.png").read_bytes())
    unstored = run("report", good, "--strict")
    assert unstored.returncode == 3 and "not yet in the manifest" in unstored.stderr
    assert run("clean", good, "--write").returncode == 0
    assert run("report", good, "--strict").returncode == 0, "a copy that is dropped asks for nothing any more"
    for options in (("-o", tmp_path), ("-o", tmp_path / "no" / "x.html"), ("--preset", "x"), ("--tokenizer", "no"),
                    ("--preset", "512", "--resolution", "64")):  # fmt: skip
        assert run("report", good, *options).returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_works_in_a_browser(tmp_path, faulty):
    """Filter, sort and decisions, driven inside a real browser; a script of the page that fails shows here."""
    _, _, text = build(faulty)
    drive = """
    <script>
    const out = {errors: [], scripts: document.scripts.length};
    addEventListener("error", (event) => out.errors.push(event.message));
    const put = (id, value) => {
      const field = document.getElementById(id);
      field.value = value;
      field.dispatchEvent(new Event("input"));
    };
    const shown = () => [...document.querySelectorAll(".card")].filter((c) => !c.hidden).map((c) => c.dataset.name);
    put("verdict", "drop"); out.dropped = shown(); put("verdict", "");
    put("search", "narrow"); out.searched = shown(); put("search", "");
    put("check", "blur"); out.blurred = shown(); put("check", "");
    put("sort", "sharpness"); out.first = shown()[0];
    document.querySelector(".card[data-name='good too.png'] .drop").click();
    out.command = document.getElementById("command").textContent;
    out.wide = document.documentElement.scrollWidth - innerWidth;
    document.title = JSON.stringify(out);
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", drive), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=390,844", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1].replace("&amp;", "&"))
    assert found["errors"] == [] and found["scripts"] == 2
    assert found["dropped"] == ["good.png"] and found["searched"] == ["narrow.png"]
    assert found["blurred"] == ["blurred.png"] and found["first"] == "flat.png"
    assert "--drop='good too.png'" in found["command"] and found["command"].endswith("--write")
    assert found["wide"] <= 0, "no sideways scrolling on a phone"

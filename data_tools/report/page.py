"""Facts and thumbnails -> one HTML page: no network, no framework; every name and caption is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from data_tools.errors import Problem, alike, counted, parts
from data_tools.report import charts
from data_tools.report.facts import Facts
from data_tools.report.thumbnails import Thumbnails

HERE = files("data_tools.report")
SIDES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
SHARPNESS = (4, 8, 15, 30, 60, 120, 250, 500, 1000, 2000, 4000)


def render(facts: Facts, thumbnails: Thumbnails) -> str:
    """The page of `facts.gather`'s facts; pictures without a thumbnail are counted and not drawn.

    The same facts give the same text, byte for byte.
    """
    # keep: escaping is on for everything; only our own style sheet and script are taken as they are.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - only a page needs it, and --help must be quick

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    environment.filters["count"] = "{:,}".format
    environment.filters["counted"] = counted
    template = environment.from_string(_text("page.html"))
    shown = [picture for picture in facts["pictures"] if picture["file_name"] in thumbnails.urls]
    return template.render(
        facts=facts,
        style=Markup(_text("style.css")),
        script=Markup(_text("script.js")),
        urls=thumbnails.urls,
        veils=thumbnails.veils,
        pictures=shown,
        left_out=len(facts["pictures"]) - len(shown),
        problems={severity: _grouped(facts["problems"], severity) for severity in ("error", "warning", "note")},
        charts=_charts(facts),
        box=crop_box,
    )


def _text(name: str) -> str:
    return HERE.joinpath(name).read_text(encoding="utf-8")


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _grouped(problems: Sequence[dict[str, Any]], severity: str) -> list[tuple[str, str]]:
    """Names and words, once for all problems that share their words."""
    return [parts(group) for group in alike(Problem(**each) for each in problems if each["severity"] == severity)]


def _charts(facts: Facts) -> dict[str, Any]:
    pictures, limits = facts["pictures"], {check["check"]: check["limit"] for check in facts["checks"]}
    captions = facts["captions"]
    ratios = [picture["size"][0] / picture["size"][1] for picture in pictures]
    sharpness = charts.log_bins(
        [picture["sharpness"] for picture in pictures], SHARPNESS, limits["blur"], f"blurred below {limits['blur']:g}"
    )
    sides = charts.log_bins(
        [min(picture["size"]) for picture in pictures], SIDES, limits["small"], f"small below {limits['small']:g}"
    )
    return {
        "sizes": charts.size_chart(pictures, facts["buckets"]),
        "buckets": charts.bucket_chart(facts["buckets"]),
        "sides": charts.histogram(sides, "Shorter side of the pictures, pixels"),
        "shapes": charts.histogram(charts.shape_bins(ratios), "Shapes of the pictures"),
        "sharpness": charts.histogram(sharpness, "Sharpness of the pictures"),
        "words": charts.histogram(charts.linear_bins(captions["words"]), "Words per caption"),
        "tokens": {
            name: charts.histogram(
                charts.linear_bins(counted["counts"], counted["room"], f"{counted['room']} are read"),
                f"Tokens per caption, {name}",
            )
            for name, counted in captions["tokens"].items()
        },
    }


def crop_box(cut: dict[str, Any]) -> str:
    """Where the crop lies in the picture, as a style of an element laid over it; numbers only."""
    (width, height), (wide, tall), (left, top) = cut["resize"], cut["bucket"], cut["crop_left_top"]
    shares = (left / width, top / height, wide / width, tall / height)
    return "left:{:.2f}%;top:{:.2f}%;width:{:.2f}%;height:{:.2f}%".format(*(100 * share for share in shares))

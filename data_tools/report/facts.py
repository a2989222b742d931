"""Everything the report says, as plain values: what the page draws and what report.json holds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_tools import buckets
from data_tools.buckets import Placement, Size
from data_tools.captioners.kohya import top_folder
from data_tools.clean import Cleaning, Judged
from data_tools.errors import SEVERITIES, Problem
from data_tools.records import ImageRecord
from data_tools.report.tokens import Tokenizers
from data_tools.report.words import caption_facts

Facts = dict[str, Any]
BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """How the pictures are to be cut and batched."""

    sizes: Sequence[Size]
    """(height, width) of the buckets."""
    multiple: int | None = None
    """Step of the extra buckets of small pictures."""
    upscale: bool = False
    name: str = ""
    """How the page calls it, such as "1024 px in steps of 64"."""
    batch_sizes: tuple[int, ...] = BATCH_SIZES


def gather(cleaning: Cleaning, plan: Plan, tokenizers: Tokenizers) -> Facts:
    """Everything about a judged folder; sizes are [width, height] and points [left, top], pixels.

    Buckets, weights, steps and captions are those of the pictures that training sees: with a caption, and not dropped.
    """
    everything = (each.record for each in cleaning.judged)
    placements, misfits = buckets.fit(everything, plan.sizes, upscale=plan.upscale, multiple=plan.multiple)
    waiting = {record.file_name for record in cleaning.scan.uncaptioned}
    used = [
        (each.record, placement)
        for each, placement in zip(cleaning.judged, placements, strict=True)
        if placement is not None and each.record.verdict != "drop" and each.record.file_name not in waiting
    ]
    # keep: a folder without any captions yet is looked at as if it had them.
    if len(waiting) == len(cleaning.judged):
        used = [
            (each.record, placement)
            for each, placement in zip(cleaning.judged, placements, strict=True)
            if placement is not None and each.record.verdict != "drop"
        ]
    records = [record for record, _ in used]
    cuts = [placement for _, placement in used]
    dropped = {each.record.file_name for each in cleaning.judged if each.record.verdict == "drop"}
    zoomed = buckets.zoom_notes(records, cuts)
    problems = [_settled(problem, dropped) for problem in (*cleaning.scan.problems, *misfits, *zoomed)]
    counts = cleaning.counts()
    captions = caption_facts(records, tokenizers)
    return {
        "folder": cleaning.scan.folder.name,
        "summary": {
            "pictures": len(cleaning.judged),
            "used": len(used),
            **{verdict: counts[verdict] for verdict in ("keep", "review", "drop")},
            "by_hand": sum(each.by_hand for each in cleaning.judged),
            "not_stored": sum((each.record.verdict == "drop") != (each.stored == "drop") for each in cleaning.judged),
            "without_caption": len(waiting),
            "cut": captions["cut"],
            "samples": sum(record.repeats for record in records),
            "masks": sum(record.mask_file is not None for record in records),
            "buckets": len({cut.bucket for cut in cuts}),
            "mean_lost": sum(cut.lost for cut in cuts) / max(1, len(cuts)),
            **{f"{severity}s": sum(p.severity == severity for p in problems) for severity in SEVERITIES},
        },
        "plan": {"name": plan.name, "upscale": plan.upscale},
        "checks": _checks(cleaning),
        "buckets": _buckets(records, cuts, plan),
        "steps_per_epoch": {str(size): steps_per_epoch(records, cuts, size) for size in plan.batch_sizes},
        "weights": _weights(records),
        "clusters": _clusters(cleaning.judged),
        "captions": captions,
        "problems": [asdict(problem) for problem in problems],
        "pictures": [
            _picture(each, placement, waiting, tokenizers)
            for each, placement in zip(cleaning.judged, placements, strict=True)
        ],
    }


def _settled(problem: Problem, dropped: Iterable[str]) -> Problem:
    """A warning about a picture that is left out anyway asks for nothing any more."""
    if problem.severity == "warning" and problem.file_name in dropped:
        return replace(problem, severity="note")
    return problem


def _checks(cleaning: Cleaning) -> list[Facts]:
    found = Counter(finding.check for each in cleaning.judged for finding in each.findings)
    return [{"check": name, **asdict(rule), "pictures": found[name]} for name, rule in cleaning.rules.items()]


def _buckets(records: Sequence[ImageRecord], cuts: Sequence[Placement], plan: Plan) -> list[Facts]:
    sizes = set(plan.sizes)
    return [{**row.as_json(), "small": row.bucket not in sizes} for row in buckets.plan_table(records, cuts)]


def steps_per_epoch(records: Sequence[ImageRecord], cuts: Sequence[Placement], batch_size: int) -> int:
    """Batches in one pass: batches share a bucket, a bucket's last one may be smaller, nothing is left out.

    Class pictures are drawn as often as instance pictures, going round; how they fall on the buckets changes from
    epoch to epoch, so with them this is the mean.
    """
    subject: Counter[Size] = Counter()
    prior: Counter[Size] = Counter()
    for record, cut in zip(records, cuts, strict=True):
        if record.role == "class":
            prior[cut.bucket] += 1
        else:
            subject[cut.bucket] += record.repeats
    draws = sum(subject.values()) / max(1, sum(prior.values()))
    return sum(math.ceil((subject[size] + prior[size] * draws) / batch_size) for size in {*subject, *prior})


def _weights(records: Sequence[ImageRecord]) -> list[Facts]:
    """Pictures that weigh the same, by folder, role, repeats and loss weight, and their share of an epoch's loss."""
    groups = Counter(
        (top_folder(record.file_name), record.role, record.repeats, record.loss_weight) for record in records
    )
    total = sum(count * repeats * weight for (_, _, repeats, weight), count in groups.items()) or 1.0
    return [
        {
            "folder": folder or ".",
            "role": role,
            "repeats": repeats,
            "loss_weight": weight,
            "pictures": count,
            "samples": count * repeats,
            "share": count * repeats * weight / total,
            "share_each": repeats * weight / total,
        }
        for (folder, role, repeats, weight), count in sorted(groups.items())
    ]


def _clusters(judged: Sequence[Judged]) -> list[Facts]:
    """Pictures that show the same, each cluster with the one to keep; a copy of a copy belongs to the same cluster."""
    groups: dict[int, list[Facts]] = defaultdict(list)
    for each in judged:
        if each.copy is None:
            continue
        kept = each.copy.of
        while (further := judged[kept].copy) is not None:
            kept = further.of
        groups[kept].append(
            {
                "file_name": each.record.file_name,
                "of": judged[each.copy.of].record.file_name,
                "exact": each.copy.exact,
                "mirrored": each.copy.mirrored,
                "bits": each.copy.distance,
            }
        )
    return [
        {"kept": judged[kept].record.file_name, "copies": copies}
        for kept, copies in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _picture(each: Judged, cut: Placement | None, waiting: Iterable[str], tokenizers: Tokenizers) -> Facts:
    record = each.record
    return {
        "file_name": record.file_name,
        "size": [record.width, record.height],
        "captions": list(record.captions),
        "role": record.role,
        "repeats": record.repeats,
        "source": record.source,
        "notes": list(record.notes),
        "verdict": record.verdict,
        "suggested": each.suggested,
        "by_hand": each.by_hand,
        "reasons": list(record.verdict_reasons),
        "checks": [finding.check for finding in each.findings],
        "without_caption": record.file_name in waiting,
        "sharpness": each.measures.sharpness,
        "luma_low": each.measures.luma_low,
        "luma_high": each.measures.luma_high,
        "bars": each.measures.bars,
        "scores": dict(each.scores),
        "tokens": {
            name: max((tokenizer.count(caption) for caption in record.captions), default=0)
            for name, tokenizer in tokenizers.items()
        },
        "mask": record.mask_file,
        "focus": list(record.focus) if record.focus else None,
        "cut": cut and cut.as_json(),
    }

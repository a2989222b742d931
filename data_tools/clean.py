"""Verdicts on the pictures of a folder: kept, to be looked at, or left out; each with its number and its limit.

Nothing is deleted or moved. `write` puts the verdicts into the manifest, where people change them by hand: a verdict
that differs from what was last suggested is a person's, and stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_tools import manifest, scan
from data_tools.captioners import AUTO
from data_tools.dedupe import Copy, find_copies, find_shared
from data_tools.errors import UsageError
from data_tools.folder import list_folder, order
from data_tools.images import WHITE, Color
from data_tools.inspection import Looking, Progress, inspect_share
from data_tools.measuring import measure_all
from data_tools.memory import remembering
from data_tools.processes import ALONE, Share
from data_tools.quality import Measures
from data_tools.records import ImageRecord, Verdict
from data_tools.rules import RULES, Rule
from data_tools.scan import ScanResult
from data_tools.verdicts import BETWEEN, REASONS, SUGGESTED, VERDICT, WORDS

Stage = Callable[[str], Progress | None]
"""From the name of a task to what shows its progress."""
Score = Callable[[Path, Sequence[ImageRecord]], Sequence[Mapping[str, float]]]
"""Asks models for numbers about every picture of a folder, by name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check that spoke about one picture."""

    check: str
    verdict: Verdict
    text: str
    """With the number and the limit; free of `BETWEEN`."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One picture, what was measured in it, and what follows."""

    record: ImageRecord
    """With the verdict that counts and its reasons."""
    measures: Measures
    findings: tuple[Finding, ...]
    suggested: Verdict
    by_hand: bool
    """A person decided otherwise than what is suggested."""
    copy: Copy | None = None
    """Of which picture of the same folder it is a copy; indices into the judged pictures."""
    scores: Mapping[str, float] = field(default_factory=dict)
    stored: Verdict = "keep"
    """What the manifest says, which is what training goes by."""


@dataclass(frozen=True)
class Cleaning:
    """A folder judged: every picture that decodes, and the problems of its scan."""

    scan: ScanResult
    judged: list[Judged]
    rules: Mapping[str, Rule]

    def counts(self) -> Counter[str]:
        """How many pictures each verdict has."""
        return Counter(each.record.verdict for each in self.judged)


@dataclass(frozen=True)
class Options:
    """How a folder is read and judged."""

    rules: Mapping[str, Rule] = field(default_factory=lambda: RULES)
    captions: str = AUTO
    template: str | None = None
    background: Color = WHITE
    workers: int | None = None
    against: tuple[Path, ...] = ()
    """Folders whose pictures must not appear in this one, such as the validation set."""
    share: Share = ALONE
    """Which of several processes this is."""
    stage: Stage = lambda title: None
    """Asked at the start of each long task."""


def examine(folder: Path, options: Options, score: Score | None = None) -> Cleaning:
    """Scan a folder, measure its pictures and judge them; nothing is written.

    Pictures without a caption are judged as well.

    Args:
        folder: the dataset folder.
        options: how it is read and judged.
        score: asks models for more numbers about every picture, by name; a rule of the same name judges them. Scores
            that stand in the manifest need not be asked again.

    Raises:
        UsageError, DataToolsError: see `scan.scan`; and a manifest that cannot be read.
    """
    with remembering(folder, options.background, options.share) as memory:
        found = scan.scan(
            folder,
            captions=options.captions,
            template=options.template,
            background=options.background,
            workers=options.workers,
            progress=options.stage("looking at pictures"),
            memory=memory,
        )
    by_name = {record.file_name: record for record in (*found.records, *found.uncaptioned)}
    records = [by_name[name] for name in order(by_name)]
    measures = _measured(found.folder, records, options)
    rows = manifest.read_columns(found.folder)
    scores = [_stored_scores(rows.get(record.file_name, {}), record, options.rules) for record in records]
    if score is not None:
        new = score(found.folder, records)
        scores = [old | dict(fresh) for old, fresh in zip(scores, new, strict=True)]
    scored = {name for each in scores for name in each}
    rules = {name: rule for name, rule in options.rules.items() if name in RULES or name in scored}
    decided = [_by_hand(rows.get(record.file_name, {}), record) for record in records]
    shared = _shared(records, measures, options)
    judged = judge(records, measures, rules, decided=decided, scores=scores, shared=shared)
    return Cleaning(found, judged, rules)


def assist(folder: Path, options: Options, score: Score | None = None) -> None:
    """What `examine` asks of a process that is not the first: its share, left in the memories for the first one."""
    for place in (folder, *options.against):
        listing = list_folder(place)
        with remembering(place, options.background, options.share) as memory:
            seen = inspect_share(listing, Looking(options.background, options.workers, memory=memory))
        records = list(seen.records())
        _measured(listing.root, records, options)
        if score is not None and place == folder:
            score(listing.root, records)


def _measured(root: Path, records: Sequence[ImageRecord], options: Options) -> list[Measures]:
    return measure_all(
        root,
        records,
        background=options.background,
        workers=options.workers,
        progress=options.stage("measuring"),
        share=options.share,
    )


def _stored_scores(row: Mapping[str, Any], record: ImageRecord, rules: Mapping[str, Rule]) -> dict[str, float]:
    """Scores that an earlier run wrote into the manifest for this very file; models are slow to ask again."""
    if row.get("sha256") != record.sha256:
        return {}
    stored = {name: row.get(f"{SCORE}{name}") for name in rules}
    return {name: float(value) for name, value in stored.items() if isinstance(value, int | float)}


def _by_hand(row: Mapping[str, Any], record: ImageRecord) -> Verdict | None:
    """The verdict of a person: one that `clean` did not suggest; None when the row holds none."""
    if not row.get(VERDICT) or row.get(SUGGESTED) == row[VERDICT]:
        return None
    return record.verdict


def _shared(records: Sequence[ImageRecord], measures: Sequence[Measures], options: Options) -> dict[int, str]:
    """Pictures that other folders hold as well: {index: finding}."""
    rule = options.rules["leak"]
    found: dict[int, str] = {}
    for folder in options.against if rule.verdict != "keep" else ():
        progress = options.stage(f"looking at {folder.name}")
        with remembering(folder, options.background, options.share) as memory:
            theirs = scan.inspect(
                folder, background=options.background, workers=options.workers, progress=progress, memory=memory
            )
        theirs.raise_for_errors()
        others = _measured(theirs.folder, theirs.records, options)
        for copy in find_shared(records, measures, theirs.records, others, int(rule.limit)):
            name = f"{folder.name}/{theirs.records[copy.of].file_name}"
            found.setdefault(copy.index, _likeness(copy, name, rule.limit))
    return found


def judge(
    records: Sequence[ImageRecord],
    measures: Sequence[Measures],
    rules: Mapping[str, Rule] = RULES,
    *,
    decided: Sequence[Verdict | None] | None = None,
    scores: Sequence[Mapping[str, float]] | None = None,
    shared: Mapping[int, str] = MappingProxyType({}),
) -> list[Judged]:
    """The verdict on each picture: the gravest of its findings, or what a person decided.

    Args:
        records, measures: the pictures, in the same order.
        rules: what is checked.
        decided: verdicts of a person, None where there is none; what a person drops is no reason to drop its copy.
        scores: numbers of models, by the name of the rule that judges them.
        shared: findings about pictures that another folder holds as well.
    """
    hands = decided or [None] * len(records)
    numbers = scores or [{} for _ in records]
    near = rules["near_copy"]
    distance = -1 if near.verdict == "keep" else int(near.limit)
    preference = [int(hand == "drop") for hand in hands]
    copies = {
        copy.index: copy
        for copy in find_copies(records, measures, distance, preference)
        if hands[copy.of] != "drop" and rules["copy" if copy.exact else "near_copy"].verdict != "keep"
    }
    judged = []
    for index, record in enumerate(records):
        findings = [*_single(record, measures[index], numbers[index], rules)]
        copy = copies.get(index)
        if copy is not None:
            check = "copy" if copy.exact else "near_copy"
            text = _likeness(copy, records[copy.of].file_name, near.limit)
            findings.insert(0, Finding(check, rules[check].verdict, text))
        if index in shared:
            findings.insert(0, Finding("leak", rules["leak"].verdict, shared[index]))
        judged.append(_judged(record, measures[index], findings, hands[index], copy, numbers[index]))
    return judged


def _judged(
    record: ImageRecord,
    measures: Measures,
    findings: list[Finding],
    hand: Verdict | None,
    copy: Copy | None,
    scores: Mapping[str, float],
) -> Judged:
    gravity = list(WORDS)
    suggested = max((finding.verdict for finding in findings), key=gravity.index, default=WORDS["keep"])
    verdict = suggested if hand is None else hand
    reasons = tuple(finding.text for finding in findings)
    if hand is not None and hand != suggested:
        reasons = ("set by hand", *reasons)
    settled = replace(record, verdict=verdict, verdict_reasons=reasons)
    by_hand = verdict != suggested
    return Judged(settled, measures, tuple(findings), suggested, by_hand, copy, scores, record.verdict)


def _likeness(copy: Copy, name: str, limit: float) -> str:
    turned = "the mirror image of " if copy.mirrored else ""
    name = name.replace(BETWEEN, ";")
    if copy.exact:
        return f"shows exactly the pixels of {name}"
    return f"looks like {turned}{name}, {copy.distance} bits apart, limit {limit:g}"


def _single(
    record: ImageRecord, measures: Measures, scores: Mapping[str, float], rules: Mapping[str, Rule]
) -> Iterable[Finding]:
    """Findings about one picture alone."""
    short, long = sorted((record.width, record.height))
    spread = measures.luma_high - measures.luma_low
    numbers: dict[str, tuple[float, str]] = {
        "small": (short, "shorter side {:g} px"),
        "aspect": (long / short, "{:.1f} to 1"),
        "blur": (measures.sharpness, "sharpness {:.1f}"),
        "dark": (measures.luma_high, "brightest parts at grey {:.0f}"),
        "bright": (measures.luma_low, "darkest parts at grey {:.0f}"),
        "flat": (spread, "contrast of {:.0f} grey levels"),
        "bars": (measures.bars, "{:.1%} in plain bars"),
    }
    numbers |= {name: (value, "score {:.3f}") for name, value in scores.items()}
    crossed = {
        check
        for check, (number, _) in numbers.items()
        if (number > rules[check].limit if rules[check].above else number < rules[check].limit)
        and rules[check].verdict != "keep"
    }
    # keep: sharpness is contrast from pixel to pixel, so what takes the contrast takes it too; one reason is enough.
    if crossed & {"dark", "bright", "flat"}:
        crossed.discard("blur")
    for check, (number, words) in numbers.items():
        rule = rules[check]
        if check in crossed:
            side = "above" if rule.above else "below"
            limit = f"{rule.limit:.1%}" if check == "bars" else f"{rule.limit:g}"
            yield Finding(check, rule.verdict, f"{check}: {words.format(number)}, {side} {limit}")


NUMBERS = ("sharpness", "luma_low", "luma_high", "bars")
"""Measures that are written into the manifest."""
SCORE = "score_"


def write(cleaning: Cleaning) -> Path:
    """Put the verdicts, their reasons and the measured numbers into the folder's manifest.

    Raises:
        DataToolsError: the folder has errors, so that it has no whole manifest; or it cannot be written.
    """
    cleaning.scan.raise_for_errors()
    columns = {each.record.file_name: _columns(each) for each in cleaning.judged}
    return manifest.write(cleaning.scan.folder, [each.record for each in cleaning.judged], columns)


def _columns(each: Judged) -> dict[str, Any]:
    return {
        VERDICT: each.record.verdict,
        REASONS: BETWEEN.join(each.record.verdict_reasons),
        SUGGESTED: each.suggested,
        **{name: getattr(each.measures, name) for name in NUMBERS},
        **{f"{SCORE}{name}": round(value, 4) for name, value in each.scores.items()},
    }


def reset(folder: Path, records: Sequence[ImageRecord]) -> Path:
    """Take all verdicts and measured numbers out of the manifest, those of people as well."""
    rows = manifest.read_columns(folder)
    ours = (VERDICT, REASONS, SUGGESTED, *NUMBERS)
    plain = [replace(record, verdict="keep", verdict_reasons=()) for record in records]
    columns = {
        record.file_name: {
            name: None for name in rows.get(record.file_name, {}) if name in ours or name.startswith(SCORE)
        }
        for record in plain
    }
    return manifest.write(folder, plain, columns)


def decide(cleaning: Cleaning, wanted: Mapping[str, Verdict]) -> Cleaning:
    """The same with verdicts of a person, by file name.

    Raises:
        UsageError: naming every file that is not among the pictures.
    """
    known = {each.record.file_name for each in cleaning.judged}
    wrong = [f"{name!r} is not among the pictures" for name in wanted if name not in known]
    if wrong:
        raise UsageError("These verdicts cannot be given:", wrong)
    hands = [
        wanted.get(each.record.file_name, each.record.verdict if each.by_hand else None) for each in cleaning.judged
    ]
    judged = judge(
        [replace(each.record, verdict=each.stored) for each in cleaning.judged],
        [each.measures for each in cleaning.judged],
        cleaning.rules,
        decided=hands,
        scores=[each.scores for each in cleaning.judged],
        shared={
            index: finding.text
            for index, each in enumerate(cleaning.judged)
            for finding in each.findings
            if finding.check == "leak"
        },
    )
    return replace(cleaning, judged=judged)

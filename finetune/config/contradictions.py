"""Combinations of fields that cannot work together, each with the remedy. To add one, write and list its function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.config.adapter import RANK

if TYPE_CHECKING:
    from finetune.config.run import Run


LONGEST_NAME = 200
"""Bytes of an export's name; file systems take 255 with what is put behind it."""


def has_word(text: str, word: str) -> bool:
    """Whether a word or phrase stands in a text as such: sks in "a sks, running", but not in "desks"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def warm_up(run: Run) -> list[str]:
    """The learning rate must reach its value, and warm-up has one length."""
    steps, share = run.optimizer.warmup_steps, run.optimizer.warmup_share
    if steps and share:
        return [f"optimizer.warmup_steps={steps} and optimizer.warmup_share={share:g} are both given; keep one"]
    if steps < run.train.steps:
        return []
    return [
        f"optimizer.warmup_steps={steps} is not below train.steps={run.train.steps}, so the "
        "learning rate would never reach its value; lower warmup_steps or raise steps"
    ]


def template(run: Run) -> list[str]:
    """Captions from a template need one, and captions from elsewhere read none."""
    source, sentence = run.data.captions, run.data.caption_template
    if source == "template" and not sentence:
        return ["data.captions=template needs data.caption_template, e.g. \"a photo of sks dog\""]
    if source not in ("template", "auto") and sentence is not None:
        return [
            f"data.caption_template={sentence!r} is never used with data.captions={source}; set "
            "data.caption_template=null, or data.captions=auto, which takes the template where there is no caption"
        ]
    return []


def adapters_without_rank(run: Run) -> list[str]:
    """A rank that no layer has was meant for another method."""
    sections = (("adapter", run.adapter), ("text_encoder_adapter", run.text_encoder_adapter))
    return [
        f"{name}.rank={section.rank} has no meaning for {name}.method={section.method}; leave it out"
        for name, section in sections
        if section is not None and section.method in ("ia3", "full") and section.rank != RANK
    ]


def samples_of_something(run: Run) -> list[str]:
    """Sample sheets need prompts."""
    if run.samples.prompts or not run.samples.every:
        return []
    return [
        f"samples.every={run.samples.every} renders nothing, because samples.prompts is empty; set "
        'samples.prompts=["a photo of ..."], or samples.every=0'
    ]


def trigger(run: Run) -> list[str]:
    """The subject's word stands where the subject is, and nowhere else."""
    word, sentence = run.data.trigger, run.data.caption_template
    if not word:
        return []
    problems = []
    if sentence and not has_word(sentence, word):
        problems.append(
            f"data.trigger={word!r} is not in data.caption_template={sentence!r}, so the trigger would not "
            "be learned; put it into the template or drop data.trigger"
        )
    if run.data.prior:
        problems += [
            f"data.prior.prompts has {prompt!r}, which contains the trigger {word!r}: class pictures would teach "
            "the ordinary class under the subject's name; take the trigger out of the class prompt"
            for prompt in run.data.prior.prompts
            if has_word(prompt, word)
        ]
    return problems


def export_name(run: Run) -> list[str]:
    """The file for ComfyUI and A1111 must not take the diffusers file's name."""
    name = run.export.name
    if len(run.export_name().encode()) > LONGEST_NAME:
        return [
            f"exports would be called {run.export_name()[:40]}..., which is too long for a file; set export.name to at "
            f"most {LONGEST_NAME} letters"
        ]
    if not name or not (name == "pytorch_lora_weights" or name.endswith(".")):
        return []
    return [
        f"export.name={name} is the name of the diffusers file or ends in a dot; choose another, it "
        "becomes the file for ComfyUI and A1111"
    ]


def betas(run: Run) -> list[str]:
    """Running means need a decay below one."""
    return [
        f"optimizer.betas holds {beta}, but all must be in [0, 1); 0.9,0.999 is usual"
        for beta in run.optimizer.betas or ()
        if not 0 <= beta < 1
    ]


def one_prior(run: Run) -> list[str]:
    """The class is kept by its pictures or by the teacher."""
    teacher, word = run.objective.teacher, run.data.trigger
    if teacher is None:
        return []
    problems = [
        f"objective.teacher.prompts has {prompt!r}, which contains the trigger {word!r}: the subject would be taught "
        "and untaught in one step; take the trigger out of the class prompt"
        for prompt in teacher.prompts
        if word and has_word(prompt, word)
    ]
    if run.data.prior:
        problems.append(
            "data.prior and objective.teacher both keep the class; choose one: class pictures (data.prior) or the base "
            "as teacher (objective.teacher)"
        )
    return problems


def learning_rates(run: Run) -> dict[str, float]:
    """The learning rate of everything that is trained, by the field that decides it."""
    usual = {"optimizer.learning_rate": run.optimizer.learning_rate}
    rates: dict[str, float] = {}
    for name, section in (("adapter", run.adapter), ("text_encoder_adapter", run.text_encoder_adapter)):
        if section is None:
            continue
        own = {f"{name}.learning_rate": section.learning_rate} if section.learning_rate else usual
        rates |= own
        if section.lora_plus_ratio != 1:
            rates[f"{name}.lora_plus_ratio"] = section.lora_plus_ratio * min(own.values())
        rates |= {
            f"{name}.blocks[{i}].learning_rate": block.learning_rate
            for i, block in enumerate(section.blocks)
            if block.learning_rate and block.rank != 0
        }
    if run.text_encoder_adapter is not None:
        rates |= {
            f"text_encoder_adapter.per_encoder.{name}.learning_rate": encoder.learning_rate
            for name, encoder in run.text_encoder_adapter.per_encoder.items()
            if encoder is not None and encoder.learning_rate
        }
    if run.tokens is not None:
        rates |= {"tokens.learning_rate": run.tokens.learning_rate} if run.tokens.learning_rate else usual
    return rates


def step_size(run: Run) -> list[str]:
    """Optimizers that choose the step size or the curve themselves must be let."""
    name, schedule = run.optimizer.name, run.optimizer.schedule
    problems = []
    if FINDS_STEP_SIZE.match(name.rpartition(".")[2]):
        rates = learning_rates(run)
        problems += [
            f"{field} comes to {rate:g} with {name}, which chooses its own step size and multiplies it by this: it "
            "would hardly move; use 1"
            for field, rate in rates.items()
            if rate < SMALLEST_FACTOR
        ]
        if len(set(rates.values())) > 1:
            named = ", ".join(f"{field} ({rate:g})" for field, rate in rates.items())
            problems.append(
                f"{name} chooses one step size for all parameters, but there are several learning rates: {named}; keep "
                "only optimizer.learning_rate=1"
            )
    if name == "schedulefree_adamw" and schedule != "constant":
        problems.append(
            f"optimizer.schedule={schedule} with schedulefree_adamw, whose running mean replaces a schedule; "
            "use optimizer.schedule=constant"
        )
    if name == "schedulefree_adamw" and run.train.ema_decay:
        problems.append(
            "train.ema_decay with schedulefree_adamw, which already keeps a running mean; use train.ema_decay=null"
        )
    return problems


FINDS_STEP_SIZE = re.compile("prodigy|dadapt", re.IGNORECASE)
"""Classes of this kind, in whatever package: Prodigy, ProdigyPlusScheduleFree, DAdaptAdam, DAdaptLion, ..."""
SMALLEST_FACTOR = 0.05
"""Below this somebody has taken an AdamW rate along."""


def best_needs_validation(run: Run) -> list[str]:
    """The best checkpoint, and stopping early, need something to judge by."""
    asked = [("checkpoint.keep_best=true", run.checkpoint.keep_best), ("validation.patience", run.validation.patience)]
    return [
        f"{name} needs validation, and validation.every=0 turns it off; set validation.every"
        for name, wanted in asked
        if wanted and not run.validation.every
    ]


def one_validation(run: Run) -> list[str]:
    """Validation pictures are set aside, or come from a folder of their own."""
    folder, holdout = run.validation.folder, run.validation.holdout
    if folder is None or not holdout:
        return []
    return [
        f"validation.folder={folder} and validation.holdout={holdout} both say what to validate on; set holdout=0, or "
        "drop the folder"
    ]


def kept_tags(run: Run) -> list[str]:
    """Tags are kept from something."""
    data = run.data
    if not data.keep_tokens or data.shuffle_caption or data.tag_dropout:
        return []
    return [
        f"data.keep_tokens={data.keep_tokens} keeps tags from being shuffled or dropped, but neither is on; set "
        "data.shuffle_caption=true or data.tag_dropout, or keep_tokens=0"
    ]


def something_is_trained(run: Run) -> list[str]:
    """A run without anything to train would only warm the room."""
    if run.adapter is not None or run.trains_text():
        return []
    return [
        "adapter, text_encoder_adapter and tokens are all null, so nothing would be trained; set adapter={} for an "
        'adapter, or tokens={words: {"<my-word>": "toy"}} to learn a word'
    ]


def words_stand_in_captions(run: Run) -> list[str]:
    """A learned word must be in the template, and in no picture of the ordinary class."""
    if run.tokens is None:
        return []
    sentence = run.data.caption_template
    problems = [
        f"tokens.words has {word}, which is not in data.caption_template={sentence!r}, so it would "
        "not be learned; put it into the template"
        for word in run.tokens.words
        if sentence and word not in sentence
    ]
    prior = [("data.prior.prompts", run.data.prior.prompts)] if run.data.prior else []
    teacher = [("objective.teacher.prompts", run.objective.teacher.prompts)] if run.objective.teacher else []
    return problems + [
        f"{field} has {prompt!r} with the learned word {word}: it would learn the ordinary class; take it out there"
        for field, prompts in (*prior, *teacher)
        for prompt in prompts
        for word in run.tokens.words
        if word in prompt
    ]


def merged_into_packed_weights(run: Run) -> list[str]:
    """Adapters are merged into weights that can hold the sum."""
    if run.adapter is None or not run.adapter.merge_first or run.model.storage == "full":
        return []
    return [
        f"adapter.merge_first and model.storage={run.model.storage} are both set, but packed weights would round the "
        "merged adapters away; set model.storage=full, or merge them into a base of its own with "
        "`finetune merge ... --into BASE -o FOLDER`"
    ]


def something_trains_to_the_end(run: Run) -> list[str]:
    """Every step moves something."""
    shares = [part.train_share for part in (run.text_encoder_adapter, run.tokens) if part is not None]
    if run.adapter is not None or not shares or max(shares) >= 1:
        return []
    return [
        f"adapter=null and everything else stops early (train_share at most {max(shares):g}), so the last steps would "
        "train nothing; set one train_share to 1, or lower train.steps"
    ]


def validation_that_looks(run: Run) -> list[str]:
    """Pictures are set aside only for a validation that happens."""
    if run.validation.every or not (run.validation.holdout or run.validation.folder):
        return []
    return [
        "validation.holdout or validation.folder holds pictures out that are never used, because "
        "validation.every=0; set validation.every, or use holdout=0 and folder=null"
    ]


READ_WITH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("objective.density_mean", "objective.density", ("logit_normal",)),
    ("objective.density_std", "objective.density", ("logit_normal",)),
    ("objective.density_scale", "objective.density", ("mode",)),
    ("objective.density_alpha", "objective.density", ("beta",)),
    ("objective.density_beta", "objective.density", ("beta",)),
    ("objective.snr_gamma", "objective.weighting", ("min_snr", "soft_min_snr")),
    ("objective.p2_gamma", "objective.weighting", ("p2",)),
    ("objective.p2_k", "objective.weighting", ("p2",)),
    ("objective.huber_delta", "objective.loss", ("huber", "smooth_l1", "log_cosh")),
    ("optimizer.schedule_cycles", "optimizer.schedule", ("cosine_restarts",)),
    ("optimizer.schedule_power", "optimizer.schedule", ("polynomial",)),
    ("optimizer.schedule_decay", "optimizer.schedule", ("wsd",)),
    ("optimizer.schedule_floor", "optimizer.schedule", (
        "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "rex"
    )),
    ("train.spike_deviations", "train.on_spike", ("warn", "stop")),
    ("train.ema_power", "train.ema_decay", ()),
)  # fmt: skip
"""A field, the one that decides whether it is read, and the values with which it is; none: anything but off."""


def read_by_something(run: Run) -> list[str]:
    """A value that was set changes something; what another field leaves unread was meant to turn that on."""
    problems = []
    for field, decider, values in READ_WITH:
        section, name = field.split(".")
        part, deciding = getattr(run, section), decider.split(".")[1]
        value, chosen = getattr(part, name), getattr(part, deciding)
        # keep: a whole document sets every field; who wrote this one alone has forgotten the other.
        alone = {name, deciding} & part.model_fields_set == {name}
        if value == type(part).model_fields[name].default and not alone:
            continue
        # keep: a function of one's own, by import path, may read everything.
        if values and chosen not in values and "." not in chosen:
            problems.append(
                f"{field}={value} is only used with {decider}={' or '.join(values)}, and {decider} is {chosen}; change "
                f"{decider}, or remove {field}"
            )
        elif not values and not chosen:
            problems.append(f"{field}={value} is only used if {decider} is set; set it, or remove {field}")
    return problems


CHECKS: tuple[Callable[[Run], list[str]], ...] = (
    warm_up, template, adapters_without_rank, samples_of_something,
    trigger, export_name, betas, one_prior, step_size, best_needs_validation,
    one_validation, kept_tags,
    something_is_trained, words_stand_in_captions, merged_into_packed_weights, something_trains_to_the_end,
    validation_that_looks, read_by_something,
)  # fmt: skip


def contradictions(run: Run) -> list[str]:
    """Every combination of fields of this run that cannot work, one text each."""
    return [problem for check in CHECKS for problem in check(run)]

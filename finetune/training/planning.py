"""`finetune plan`: what a run will do, take and leave, before any of it is paid for. Nothing is trained or saved.

Cheap things come first: the folder of pictures, the run that may be there already, trackers and launcher. Then the base
is loaded and the rest is counted; memory is predicted on the meta device (`memory`), time only by measuring.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from data_tools.errors import counted
from data_tools.images import SUFFIXES
from finetune.config import Run
from finetune.data.dataset import Picture, dataset_changes, fingerprint
from finetune.data.sampler import Item, Sampler
from finetune.families.base import Conditioning, SizeConditioning
from finetune.families.frozen import host_bytes
from finetune.tracking import Reporter, Rows
from finetune.training import build, plan, preflight, resume, setup
from finetune.training.build_data import encoded_at_once
from finetune.training.checkpoint import Found
from finetune.training.lock import hold
from finetune.training.loop import one_step
from finetune.training.lr_schedules import learning_rates
from finetune.training.memory import CUDA_OVERHEAD, META, Memory, on_meta, pass_bytes, predict, resident_bytes
from finetune.training.optimizers import build_optimizer, rehearse
from finetune.training.setup import Loaded

DOCUMENTS = 100_000
"""Bytes of a checkpoint's documents, roughly."""
GIB = 2**30
Told = tuple[Conditioning | None, dict[str, Tensor] | None]


def plan_run(run: Run, reporter: Reporter, measure: int = 0) -> None:
    """Say what `run` will do; with `measure`, encode the pictures and time so many real steps that are thrown away.

    Raises:
        UserError: for everything that would stop the run before its first step.
    """
    preflight.check(run)
    program = resident_bytes()
    found = resume.find(run, resume.Resume())
    accelerator, dtype = build.build_accelerator(run.model.dtype, run.train.trackers)
    rehearse(run.optimizer, accelerator.device)
    loaded = setup.load(run, dtype, reporter, fresh=found is None)
    optimizer = build_optimizer(run.optimizer, loaded.adapters.parameter_groups(), accelerator.device)
    processes = accelerator.num_processes
    sampler = Sampler(_items(run, loaded), run.train.batch_size * processes, run.train.seed)
    rows = [("Base model", f"{loaded.components.source} ({loaded.family.name}), {dtype} on {accelerator.device.type}")]
    rows += [*plan.data_rows(run, loaded.cut, loaded.pictures), *_class_rows(run), *loaded.adapters.describe()]
    rows += plan.step_rows(run, sampler, processes, optimizer, loaded.adapters.told_rates())
    rows += loaded.exports
    if found is not None:
        rows.append(("There already", _already(run, found, loaded)))
    reporter.table("Plan", rows)
    plan.tell_problems(reporter, loaded.pictures)
    for note in [*build.emulated(dtype), *optimizer.notes]:
        reporter.warn(note)
    reporter.table("Memory of one process", memory_rows(run, loaded, accelerator.device, program))
    reporter.table("Disk", disk_rows(run, loaded))
    preflight.check_disk(run, loaded.adapters)
    # keep: measuring loads the base again; two of them do not fit where one just does.
    del loaded, optimizer, sampler
    if measure:
        reporter.table("Time", _measured(run, reporter, measure))
    else:
        reporter.note("Time depends on the machine: `finetune plan ... --measure 5` times five real steps.")


def _already(run: Run, found: Found, loaded: Loaded) -> str:
    """What `finetune train` will do with the run that is there."""
    # keep: a plan does not read the class folder.
    before = {key: value for key, value in found.documents["dataset"].items() if not key.startswith("class/")}
    changes = dataset_changes(before, fingerprint(loaded.pictures.training))
    if changes:
        return f"{found.path.name}; `finetune train` refuses it, for the pictures have changed: {'; '.join(changes)}"
    left = run.train.steps - found.state.step
    return f"{found.path.name}; `finetune train` goes on from it, {counted(left, 'step')} left"


def _items(run: Run, loaded: Loaded) -> Iterator[Item]:
    """What the sampler will see, class pictures that are still to be rendered included."""
    pictures = loaded.pictures
    yield from (picture.item() for picture in pictures.training)
    if run.data.prior is not None:
        missing = max(0, run.data.prior.images - (len(pictures.training) - len(pictures.subject)))
        rendered = (pictures.subject[i % len(pictures.subject)].item() for i in range(missing))
        yield from (replace(item, repeats=1, is_class=True) for item in rendered)


def _class_rows(run: Run) -> Rows:
    prior = run.data.prior
    if prior is None:
        return plan.teacher_rows(run)
    folder = prior.folder or run.output_dir / "class_images"
    have = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir()) if folder.is_dir() else 0
    there = f"{have} of them in {folder}"
    return [("Class", f"{counted(prior.images, 'picture')}, weight {prior.prior_loss_weight:g}; {there}")]


def memory_rows(run: Run, loaded: Loaded, device: torch.device, program: int) -> Rows:
    """The predicted peak of a step at the largest bucket, by parts, and of encoding the pictures before.

    Args:
        program: bytes of main memory that Python and its libraries hold before anything is loaded.
    """
    model = setup.trainable(run, loaded)
    largest = max(loaded.pictures.training, key=lambda p: p.placement.bucket[0] * p.placement.bucket[1])
    try:
        encoding = max(_encoding_bytes(loaded, largest.placement.bucket), _reading_bytes(run, loaded))
        step = _pass(run, loaded, largest, run.train.batch_size)
        memory = predict(model, step, run.optimizer, mean=run.train.ema_decay is not None)
    except RuntimeError as error:
        return [("Not predicted", f"this base cannot be played without its content: {str(error).splitlines()[0]}")]
    return [*_memory_table(memory, encoding, device, program), *_host_rows(run, loaded.components.denoiser)]


def _host_rows(run: Run, denoiser: nn.Module) -> Rows:
    """What model.storage=host costs."""
    size = host_bytes(denoiser)
    passes = "three times" if run.train.gradient_checkpointing else "twice"
    cost = f"{_size(size)}; every picture batch fetches all of it {passes} (forwards, backwards)"
    return [("Base in main memory", cost)] if size else []


def _encoding_bytes(loaded: Loaded, bucket: tuple[int, int]) -> int:
    """The autoencoder at work, at its peak."""
    family, vae = loaded.family, loaded.components.vae
    assert vae is not None, "the autoencoder is loaded with the base"
    pixels = torch.empty(encoded_at_once(bucket[0] * bucket[1]), 3, *bucket, device=META)
    return _weight_bytes(vae) + pass_bytes(vae, lambda twin: family.encode_images(twin, pixels))


def _reading_bytes(run: Run, loaded: Loaded) -> int:
    """The text encoders that encode captions before training; what their passes add is little beside them."""
    return 0 if run.trains_text() else sum(map(_weight_bytes, loaded.components.text_encoders.values()))


def _weight_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _memory_table(memory: Memory, encoding: int, device: torch.device, program: int) -> Rows:
    on_card = device.type != "cpu"
    overhead = CUDA_OVERHEAD if on_card else program
    # keep: an accelerator holds the autoencoder alone while it encodes; in main memory the base lies beside it.
    beside = overhead if on_card else overhead + memory.weights
    rows = [
        ("Base, frozen", _size(memory.weights)),
        ("Trained parameters", _size(memory.trained)),
        ("Optimizer state", _size(memory.optimizer)),
        *([("Running mean", _size(memory.mean))] if memory.mean else []),
        ("Activations and gradients", f"{_size(memory.step)} at the peak, counted on the meta device"),
        ("The accelerator itself" if on_card else "Python and its libraries", f"{_size(overhead)}, roughly"),
        ("Together", _size(memory.total() + overhead)),
        ("Encoding, before", _size(encoding + beside)),
    ]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        rows.append(("On this device", f"{_size(free)} free of {_size(total)}"))
    return rows


def _pass(run: Run, loaded: Loaded, picture: Picture, count: int) -> Callable[[nn.Module], Tensor]:
    """One pass of `count` of the largest pictures, without content; what they are told is there before."""
    return partial(_forward, loaded, picture, count, _text(run, loaded, count))


def _forward(loaded: Loaded, picture: Picture, count: int, told: Told, model: nn.Module) -> Tensor:
    """The loss of one pass."""
    dtype = next(p.dtype for p in loaded.components.denoiser.parameters())
    vae = loaded.components.vae
    assert vae is not None, "the autoencoder is loaded with the base"
    stride = loaded.family.vae_stride(vae)
    height, width = picture.placement.bucket
    channels = int(vae.config.latent_channels)
    latents = torch.empty(count, channels, height // stride, width // stride, device=META)
    objective = loaded.objective.to(META)
    timesteps = objective.timesteps(torch.empty(count, device=META))
    pairs = torch.empty(count, 2, dtype=torch.long, device=META)
    conditioning, tokens = told
    noisy = objective.add_noise(latents, latents, timesteps).to(dtype)
    beside = loaded.family.input_channels(loaded.components.denoiser) - channels
    shown = torch.nn.functional.pad(noisy, (0, 0, 0, 0, 0, beside))
    answer = model(shown, timesteps, conditioning, tokens, SizeConditioning(pairs, pairs, pairs))
    return objective.loss(answer.float(), latents, latents, timesteps).mean()


def _text(run: Run, loaded: Loaded, count: int) -> Told:
    """Captions without content, encoded or as tokens, as they lie on the device before the step."""
    ids = loaded.family.tokenize(loaded.components.tokenizers, ["a"] * count)
    tokens = {name: tensor.to(META) for name, tensor in ids.items()}
    if run.trains_text():
        return None, tokens
    encoders = {name: on_meta(encoder) for name, encoder in loaded.components.text_encoders.items()}
    with torch.no_grad():
        return loaded.family.encode_prompts(encoders, tokens), None


def disk_rows(run: Run, loaded: Loaded) -> Rows:
    """What the run writes at most, and what is free."""
    one = preflight.checkpoint_bytes(run, loaded.adapters) + DOCUMENTS
    kept = run.checkpoint.keep + run.checkpoint.keep_best
    if run.checkpoint.keep_every:
        kept += run.train.steps // run.checkpoint.keep_every
    place = next(path for path in (run.output_dir, *run.output_dir.absolute().parents) if path.exists())
    return [
        ("Checkpoints", f"{kept} of {_size(one)} at most, and one more while it is written: {_size((kept + 1) * one)}"),
        ("Free", f"{_size(shutil.disk_usage(place).free)} in {place}"),
    ]


def _measured(run: Run, reporter: Reporter, count: int) -> Rows:
    """Time `count` real steps after one that warms up; they are thrown away, rendered and encoded pictures stay."""
    begun = time.perf_counter()
    with hold(run.output_dir):
        accelerator, dtype = build.build_accelerator(run.model.dtype, ())
        loop, _ = setup.build_loop(run, accelerator, dtype, reporter, fresh=True)
    prepared, drawn = time.perf_counter() - begun, loop.pictures.generated
    loop.model.train()
    cuda = accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    seconds, rate_at = [], learning_rates(run.optimizer, run.train.steps)
    with reporter.progress("Measuring steps", count + 1) as advance:
        for step in range(count + 1):
            started = time.perf_counter()
            one_step(loop, step % run.train.steps, rate_at(step))
            if cuda:
                torch.cuda.synchronize(accelerator.device)
            seconds.append(time.perf_counter() - started)
            advance(step + 1, f"{seconds[-1]:.2f} s")
    typical = statistics.median(seconds[1:])
    rendering = f", render {counted(drawn, 'class picture')}" if drawn else ""
    rows = [
        ("Before the first step", f"{_duration(prepared)} to load{rendering} and encode what was not there yet"),
        ("One step", f"{typical:.3f} s, the median of {count}"),
        ("All steps", f"{_duration(typical * run.train.steps)} for {run.train.steps}, without validation and samples"),
    ]
    if cuda:
        rows.append(("Memory, measured", _size(torch.cuda.max_memory_allocated(accelerator.device))))
    return rows


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""`finetune sample`: pictures that say how they were made, and can be made again."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune.demo import BASE_DIR
from finetune.errors import ConfigError
from finetune.families import load_family
from finetune.families.original_keys import to_original
from finetune.interchange.commands import convert_adapter
from finetune.prompt_lines import prompt_problems
from finetune.sampling.again import OF_MODEL, SAME, model_again, wanted_again
from finetune.sampling.generate import build_pipeline, generate
from finetune.sampling.guides import Guides, SteadyVae
from finetune.sampling.papers import A1111_KEY, KEY, Shot, shot_of
from finetune.sampling.weighting import emphasise, parse, plain
from tests.conftest import command
from tests.sampling.test_controlnet import controlnet_for
from tests.tiny import BUILDERS, random_adapter, write_twin

QUICK = ("--steps", "2", "--guidance", "3")


@pytest.fixture
def sample(capsys, monkeypatch, tmp_path):
    """`finetune sample` in this process: what it printed, and the folder it drew into."""
    folder = tmp_path / "pictures"

    def run(*arguments, expect=0):
        quick = () if "--from" in arguments else QUICK
        return command(capsys, monkeypatch, "sample", *arguments, *quick, "-o", folder, expect=expect), folder

    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A strong random adapter of the embedded base, as a file."""
    family, parts = load_family("demo")
    file = random_adapter(family, parts, rank={"unet": 4}, alpha={"unet": 4.0}, preset="attention", strength=0.3)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    file.save(path)
    return path


def bytes_of(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_a_picture_is_made_again_from_what_it_says(sample, adapter, tmp_path):
    """The same bytes on the same machine, with nothing but the picture, the base and the adapter."""
    text, folder = sample("a sks toy (box:1.3)", "-a", f"{adapter}@0.7", "--seed", 5, "--scheduler", "dpm++_2m_sde")
    (made,) = folder.glob("*.png")
    assert "trained with the word 'sks toy'" not in text
    first = made.read_bytes()
    made.unlink()
    sample("--from", _kept(tmp_path, first), "-a", adapter)
    (again,) = folder.glob("*.png")
    assert again.read_bytes() == first


def _kept(folder, content):
    path = folder / "kept.png"
    path.write_bytes(content)
    return path


def test_papers_name_everything_but_where_it_was_made(sample, adapter, tmp_path):
    """Other programs read the settings; nobody reads the user's folders."""
    _, folder = sample("a box", "-a", adapter, "--negative", "red")
    (made,) = folder.glob("*.png")
    with Image.open(made) as image:
        text = dict(image.text)
    assert {KEY, A1111_KEY} <= text.keys()
    assert text[A1111_KEY].startswith("a box <lora:adapter:1>\nNegative prompt: red\nSteps: 2, Sampler: ")
    assert str(tmp_path) not in str(text) and str(adapter.parent) not in str(text)
    assert json.loads(text[KEY])["adapters"][0]["name"] == "adapter.safetensors"


def test_pictures_that_are_there_are_kept(sample):
    """A request that was cut short goes on; nothing is drawn twice and nothing of the user's is overwritten."""
    _, folder = sample("a box", "-n", 2)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("a-box*.png")}
    text, _ = sample("a box", "-n", 3)
    assert "1 to make, 2 there" in text
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("a-box*.png")}
    assert len(after) == 3 and before.items() <= after.items()
    assert (folder / "sheet.png").is_file()


def test_strengths_make_rows_from_the_base_to_the_adapter(sample, adapter):
    """Strength 0 is the base to the bit; 1 is another picture, and the trigger that is missing is mentioned."""
    text, folder = sample("a box", "-a", adapter, "--strengths", "0,1")
    assert "'sks toy'" in text
    shots = {shot_of(path).adapters[0].strength: path for path in folder.glob("a-box*.png")}
    family, parts = load_family("demo")
    base = generate(family, parts, ["a box"], seeds=[0], steps=2, guidance_scale=3)[0]
    assert bytes_of(shots[0.0]) == base.tobytes() != bytes_of(shots[1.0])


def test_words_have_no_strength_and_folders_of_any_layout_draw(sample, adapter, tmp_path):
    """The plan says what is not scaled; a PEFT folder of folders, ours too, and a word of one plain vector are read."""
    convert_adapter(adapter, tmp_path / "peft", to="peft", base=BASE_DIR)
    save_file({"<zog>": torch.linspace(-1, 1, 128)}, tmp_path / "zog.safetensors")
    text, folder = sample("a <zog>", "-a", f"{tmp_path / 'zog.safetensors'}@0.5", "-a", tmp_path / "peft")
    assert "zog.safetensors teaches <zog>, which has no strength" in text and "peft at 1" in text
    (made,) = folder.glob("*.png")
    first, kept = made.read_bytes(), made.rename(tmp_path / "first.png")
    sample("--from", kept, "-a", tmp_path / "zog.safetensors", "-a", tmp_path / "peft")
    assert made.read_bytes() == first


def test_everything_wrong_is_said_at_once(sample, tmp_path):
    """One run of the command shows all problems."""
    wrong = ("--mask", tmp_path / "no.png", "--count", 0, "--upscale", 9, "--scheduler", "eular")
    text, folder = sample(*wrong, expect=2)
    told = ("there is no prompt", "did you mean euler?", "count=0", "upscale=9", "a picture to repaint is needed")
    for words in told:
        assert words in text
    assert not folder.exists()


def test_another_adapter_is_not_taken_for_the_one_that_was_used(sample, adapter, tmp_path):
    """A picture made again with other weights would be a lie."""
    _, folder = sample("a box", "-a", adapter)
    (made,) = folder.glob("*.png")
    family, parts = load_family("demo")
    other = tmp_path / "adapter.safetensors"
    random_adapter(family, parts, rank={"unet": 2}, alpha={"unet": 2.0}, preset="attention").save(other)
    assert "not the adapter.safetensors it was made with" in sample("--from", made, "-a", other, expect=2)[0]
    assert "made with 1: adapter.safetensors" in sample("--from", made, expect=2)[0]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", None])
def test_a_picture_without_papers_is_refused(sample, tmp_path, content):
    """Empty, cut off, or from another program: exit code 2 and a reason."""
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path)
    if content is not None:
        path.write_bytes(content)
    text, _ = sample("--from", path, expect=2)
    assert "cannot be read" in text or "does not say how it was made" in text


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_picture_to_change_steers_every_family(name, tmp_path):
    """A weak change stays nearer to the given picture than a strong one."""
    family, parts = load_family(str(BUILDERS[name](tmp_path / "base")))
    generator = torch.Generator().manual_seed(0)
    levels = (torch.rand(64, 64, 3, generator=generator) * 255).to(torch.uint8)
    given = Image.fromarray(levels.numpy())
    drawn = [
        generate(family, parts, ["a cat"], seeds=[0], steps=10, guidance_scale=1.0, height=64, width=64,
                 guides=Guides(image=given, strength=strength))[0]
        for strength in (0.1, 1.0)
    ]  # fmt: skip
    assert all(picture.size == (64, 64) for picture in drawn)
    assert drawn[0].tobytes() != drawn[1].tobytes()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_a_mask_keeps_what_is_black(name, tmp_path):
    """Inpainting repaints the white half and leaves the black half as the autoencoder shows it."""
    family, parts = load_family(str(BUILDERS[name](tmp_path / "base")))
    given, mask = Image.new("RGB", (64, 64), "#808080"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    common = {"seeds": [0], "steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64}
    guides = Guides(image=given, strength=1.0, mask=mask)
    painted = generate(family, parts, ["a cat"], guides=guides, **common)[0]
    other = generate(family, parts, ["a dog on a hill"], guides=guides, **common)[0]
    assert painted.size == (64, 64)
    left, right = (0, 0, 16, 64), (48, 0, 64, 64)
    assert painted.crop(left).tobytes() != other.crop(left).tobytes()
    assert apart(painted.crop(right), other.crop(right)) < apart(painted.crop(left), other.crop(left))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheduler"), [("sd1", "ddim"), ("sd1", "euler_a"), ("sd1", "dpm++_2m"), ("sdxl", None), ("sd3", None),
                            ("flux", None)],
)  # fmt: skip
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_mask_is_diffusers_inpainting(name, scheduler, strength, tmp_path):
    """The picture of the public pipeline, though none is used for it; the ControlNet's alike."""
    family, parts = load_family(str(BUILDERS[name](tmp_path / "base")))
    given, mask = Image.radial_gradient("L").convert("RGB").resize((64, 64)), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    control, network = Image.linear_gradient("L").convert("RGB").resize((64, 64)), controlnet_for(name, parts)
    common = {"height": 64, "width": 64, "guidance_scale": 3.0}
    for extra in ({}, {"controlnet": network}) if name != "sd3" and scheduler in {None, "ddim"} else ({},):
        public = diffusers.AutoPipelineForInpainting.from_pipe(build_pipeline(family, parts, scheduler), **extra)
        public.vae = SteadyVae(parts.vae)
        told = {"control_image": control, "controlnet_conditioning_scale": 1.0} if extra else {}
        told |= {"max_sequence_length": 512} if name == "flux" else {}
        latents = public(
            "a cat", image=given, mask_image=mask, strength=strength, num_inference_steps=5, output_type="latent",
            generator=torch.Generator().manual_seed(1), **told, **common,
        ).images  # fmt: skip
        pixels = family.decode_latents(parts.vae, family.as_picture(latents, 8, 8))[0]
        guides = Guides(given, strength, mask, control if extra else None, **extra)
        own = generate(family, parts, ["a cat"], seeds=[1], steps=5, scheduler=scheduler, guides=guides, **common)[0]
        wanted = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert abs(np.asarray(own) - wanted).max() <= 1


def test_the_embedded_base_repaints_under_a_mask(sample, tmp_path):
    """Its autoencoder has other channels than published ones, for which diffusers has no inpainting pipeline."""
    ball = Image.new("RGB", (64, 64), "#3050d0")
    ball.save(tmp_path / "ball.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    _, folder = sample("a red ball", "--image", tmp_path / "ball.png", "--mask", tmp_path / "mask.png", "--strength", 1)
    (made,) = folder.glob("*.png")
    with Image.open(made) as image:
        assert apart(image.crop((40, 0, 64, 64)), ball.crop((40, 0, 64, 64))) < 12
        assert apart(image.crop((0, 0, 24, 64)), ball.crop((0, 0, 24, 64))) > 25


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_a_mask_works_in_half_precision(name, tmp_path):
    """GPUs compute in it while the autoencoder stays in fp32; SD3's and Flux's pipelines feed it themselves."""
    family, parts = load_family(str(BUILDERS[name](tmp_path / "base")), dtype=torch.bfloat16)
    guides = Guides(image=Image.new("RGB", (64, 64), "#f0f0f0"), strength=0.8, mask=Image.linear_gradient("L"))
    drawn = generate(family, parts, ["a cat"], guides=guides, seeds=[0], steps=2, height=64, width=64)[0]
    assert drawn.size == (64, 64)
    assert {parameter.dtype for parameter in parts.vae.parameters()} == {torch.float32}


def apart(first, second):
    a, b = (torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() for picture in (first, second))
    return float((a - b).abs().mean())


def test_emphasis_is_read_as_a1111_reads_it():
    """Nested brackets multiply, a backslash makes a bracket plain, an open one holds to the end."""
    assert parse("a (red:1.3) hat") == [("a ", 1.0), ("red", 1.3), (" hat", 1.0)]
    assert parse("(a (b:2) c") == [("a ", 1.1), ("b", 2.2), (" c", 1.1)]
    assert parse(r"a \(b\) 10:30") == [("a (b) 10:30", 1.0)]
    assert plain("((x)) [y]") == "x y"
    (text, weight), = parse("[x]")
    assert (text, round(weight, 6)) == ("x", 0.909091)


def test_emphasis_keeps_the_mean():
    """Louder words, not a louder prompt."""
    states = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[1.0, 1.5, 1.0, 1.0, 1.0]])
    louder = emphasise(states, factors)
    assert torch.allclose(louder.mean(), states.mean(), atol=1e-6)
    assert louder[0, 1].norm() / louder[0, 0].norm() > states[0, 1].norm() / states[0, 0].norm()
    assert torch.equal(emphasise(states, torch.ones(1, 5)), states)


def test_emphasis_inside_a_word_is_refused():
    """It belongs to no token."""
    family, parts = load_family("demo")
    with pytest.raises(ConfigError, match="inside a word"):
        generate(family, parts, ["a bo(x:1.5)"], seeds=[0], steps=1, emphasis=True)


def test_a_prompt_may_have_its_own_settings_as_in_kohyas_files(sample, tmp_path):
    """People have such files; a setting that is not understood must not become part of the picture."""
    lines = tmp_path / "prompts.txt"
    star = "a blue star --w 96 --h 64 --d 7 --s 3 --l 2.5 --n blurry, low quality"
    lines.write_text(f"# ours\na red circle\n\n{star}\n", "utf-8")
    text, folder = sample("--prompts", lines, "-n", 2, "--batch", 4)
    shots = {path.name.split("-s")[0]: shot_of(path) for path in folder.glob("a-*s7-*.png")}
    shot = shots["a-blue"] if "a-blue" in shots else next(iter(shots.values()))
    assert (shot.prompt, shot.negative_prompt) == ("a blue star", "blurry, low quality")
    assert (shot.width, shot.height, shot.seed, shot.steps, shot.guidance_scale) == (96, 64, 7, 3, 2.5)
    assert len(list(folder.glob("a-*.png"))) == 4
    assert "64 x 64 and 96 x 64" in text
    with Image.open(next(folder.glob("a-blue-star-s8-*.png"))) as image:
        assert image.size == (96, 64)


def test_what_only_other_programs_read_in_a_prompt_is_refused(sample):
    """Drawn as words it would be believed; a backslash says that brackets are meant."""
    told = ("a cat BREAK a dog", "a cat <lora:ink:0.7>", "a [cat:dog:0.5]")
    text, folder = sample(*told, expect=2)
    for words in ("new chunk of tokens", "--adapter FILE@0.8", "change of prompt in mid-drawing"):
        assert words in text
    assert not folder.exists()
    assert prompt_problems(["a break [cat] (dog:0.5)", r"a \[cat:dog:0.5\]"]) == []


def test_settings_behind_a_prompt_are_all_checked_before_the_base_is_loaded(sample):
    text, folder = sample("a cat --ar 16:9 --s none", "a dog", " --w 64", expect=2)
    assert "--ar" in text and "'none', which must be a whole number from 1 up" in text and "no prompt before" in text
    assert not folder.exists()


def test_nothing_is_dropped_beside_from_and_nothing_steers_without_a_picture(sample, tmp_path):
    """What cannot be heeded is refused; a picture of other settings than asked for would be believed."""
    _, folder = sample("a red circle")
    (made,) = folder.glob("*.png")
    kept = _kept(tmp_path, made.read_bytes())
    text, _ = sample("--from", kept, "a dog", "--seed", 3, expect=2)
    assert "prompts" in text and "--seed" in text and "cannot be chosen beside it" in text
    text, _ = sample("a dog", "--strength", "0.2", "--control-scale", "0.3", expect=2)
    assert "--image" in text and "--control" in text


def test_a_file_where_the_folder_should_be_is_said_before_the_base_is_loaded(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    text = command(capsys, monkeypatch, "sample", "a dog", "-o", tmp_path / "file" / "x", expect=2)
    assert "is a file" in text and "Loading" not in text


PAPERS = Shot(
    prompt="a box", negative_prompt="red", seed=7, steps=3, guidance_scale=2.5, width=64, height=96, scheduler="euler",
    base="demo", base_digest="0" * 64, dtype="fp32", strength=0.4, control_scale=0.7, control_from="canny", upscale=1.5,
    upscale_strength=0.3,
)  # fmt: skip


def test_papers_become_the_request_they_came_from():
    """Every setting that a picture tells of comes back under its name; a new one must not be forgotten on the way."""
    wanted = wanted_again(PAPERS, [], {"low_memory": True})
    assert wanted.prompts == ("a box",) and wanted.count == 1 and wanted.low_memory
    assert {name: getattr(wanted, name) for name in SAME} == {name: getattr(PAPERS, name) for name in SAME}
    own = {"prompt", "base", "base_digest", "pictures", "adapters", "refiner", "refiner_start", *OF_MODEL}
    assert set(Shot.model_fields) == SAME | own
    assert model_again(PAPERS, None).dtype == "fp32"
    with pytest.raises(ConfigError, match="say where it lies with --base"):
        model_again(PAPERS.model_copy(update={"base": "gone.safetensors"}), None)


def test_a_base_in_parts_draws_and_is_found_again(sample, tmp_path):
    """A file without text encoders, autoencoder or T5's tokenizer draws with what --set names, as in a recipe."""
    folder = write_twin("flux", tmp_path / "flux")
    family, parts = load_family(str(folder))
    tensors = to_original(family.original["transformer"], "transformer", parts.denoiser, parts.denoiser.state_dict())
    save_file(tensors, tmp_path / "unet-only.safetensors")
    base = ("--base", tmp_path / "unet-only.safetensors")
    told = [("vae", folder / "vae"), ("skeleton", folder)]
    told += [(f"text_encoders.{name}", folder / name) for name in family.text_encoders]
    said = [word for key, value in told for word in ("--set", f"model.{key}={value}")]
    text, _ = sample("a cat", *base, expect=2)
    assert "give one as model.vae=FILE_OR_FOLDER" in text
    text, _ = sample("a cat", *base, "--set", "model.vea=x", "--set", "model.storage=host", "--set", "vae", expect=2)
    assert "model.vea cannot be set here (did you mean model.vae?)" in text
    assert "- fields that can be set: model.vae" in text
    assert "model.storage cannot be set" in text and "--set vae: vae cannot be set" in text
    assert "nor a hub id" in sample("a cat", "--set", "model.vae=no/vae.safetensors", expect=2)[0]
    _, out = sample("a cat", *base, *said)
    (made,) = out.glob("*.png")
    first, kept = made.read_bytes(), made.rename(tmp_path / "first.png")
    sample("--from", kept, *base, *said)
    assert made.read_bytes() == first
    text, _ = sample("--from", kept, *base, *said, "--set", "model.t5_tokens=30", expect=2)
    assert "model.t5_tokens cannot be set here" in text
    sample("a cat", "--base", folder)
    (whole,) = (path for path in out.glob("*.png") if path != made)
    # keep: weights that lie at other addresses may round differently in the last bit.
    assert apart(Image.open(whole), Image.open(kept)) <= 1


def test_files_beside_from_must_be_those_of_the_papers(tmp_path):
    """What was not given then would be dropped in silence, and what is missing could not be drawn; all at once."""
    shot = PAPERS.model_copy(update={"pictures": {"image": "0" * 64, "controlnet": "1" * 64}})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    given = {"image": tmp_path / "a.png", "mask": tmp_path / "a.png", "refiner": "demo", "depth_model": "x"}
    with pytest.raises(ConfigError) as refused:
        wanted_again(shot, [tmp_path / "cat.safetensors"], given)
    text = str(refused.value)
    assert "1 adapter is given, the picture was made with 0: none" in text
    assert "not the image it was made with" in text and "--mask was not given then" in text
    assert "--controlnet is missing" in text
    assert "--refiner was not given then" in text and "--depth-model was not given then" in text

# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach Stable Diffusion your subject
#
# From a folder of pictures to an adapter file for ComfyUI, A1111, Forge, InvokeAI and diffusers, on a free Colab T4.
#
# First choose a GPU: *Runtime > Change runtime type > T4 GPU*. Then run the cells from top to bottom.
#
# **Nothing is lost.** All that is made lies on your Drive. To stop, press the stop button of the training cell: the
# step ends and everything is saved. After that, after a disconnect or on another day, run the cells again from the top:
# training goes on where it stopped, from the last checkpoint if Colab went away without a word.

# %% [markdown]
# ## 1. What to train
#
# Change these. The trigger is a word the model does not know; the class is what your subject is.

# %% tags=["parameters"]
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id, a diffusers folder, or "demo" for the tiny embedded base
VARIANT = "fp16"  # None when the base has no fp16 files
PICTURES = "/content/drive/MyDrive/photos"  # 5 to 20 pictures of your subject
TRIGGER = "sks"
CLASS = "dog"
OUTPUT = "/content/drive/MyDrive/finetune/sks-dog"  # on Drive, so that a disconnect loses nothing
CACHE = "/content/finetune-cache"  # encoded pictures, on Colab's own disk: fast, and made again when it is gone
STEPS = 800
CLASS_PICTURES = 100
HOURS = 3.5  # stop and save by yourself before Colab's patience ends; None: no limit
INSTALL_FROM = "/content/finetune"  # the toolkit: a folder you uploaded or cloned, or git+https://...

# %% [markdown]
# ## 2. Install, once per session
#
# Colab's own torch is kept. If `INSTALL_FROM` does not exist yet, clone the repository there first
# (`!git clone ADDRESS /content/finetune` in a cell of its own) or put its git+https address into `INSTALL_FROM`.

# %%
import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

IN_COLAB = "google.colab" in sys.modules
PIP = [sys.executable, "-m", "pip", "--quiet"]
ADDRESS = INSTALL_FROM if "://" in INSTALL_FROM else Path(INSTALL_FROM).resolve().as_uri()
try:  # asked of pip's records: a clone that lies in the working folder can be imported, but holds nothing
    version("finetune")
except PackageNotFoundError:
    subprocess.run([*PIP, "install", f"finetune[heic] @ {ADDRESS}"], check=True)
    if IN_COLAB:  # its own may be too old for PEFT, and nothing here uses it
        subprocess.run([*PIP, "uninstall", "--yes", "torchao"], check=True)
    importlib.invalidate_caches()
if IN_COLAB and "/drive/" in PICTURES + OUTPUT:
    from google.colab import drive

    drive.mount("/content/drive")

import torch

from finetune.errors import ConfigError

if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
elif BASE != "demo":
    raise ConfigError("This runtime has no GPU, and training would take days: Runtime > Change runtime type > T4 GPU.")

# %% [markdown]
# ## 3. Look at the pictures before paying for training
#
# Everything that could go wrong is listed here: unreadable or tiny files, rotated photos, duplicates.

# %%
from data_tools.scan import scan

result = scan(Path(PICTURES), captions="template", template=f"a photo of {TRIGGER} {CLASS}")
for record in result.records:
    print(f"{record.file_name:<32} {record.width} x {record.height}  {record.captions[0]}")
for problem in result.problems:
    print(f"{problem.severity}: {problem.file_name}: {problem.what}; {problem.remedy}")

# %% [markdown]
# ## 4. Watch
#
# Loss, validation, sample pictures and the time left, from here on. Elsewhere `finetune watch OUTPUT` shows this page.

# %%
import threading

from finetune.live.server import serve

page = serve(Path(OUTPUT), "127.0.0.1", 0)
threading.Thread(target=page.serve_forever, daemon=True).start()
if IN_COLAB:
    from google.colab import output

    output.serve_kernel_port_as_iframe(page.server_port, height="720")
else:
    print(f"http://127.0.0.1:{page.server_port}/, or .../proxy/{page.server_port}/ behind a notebook server")

# %% [markdown]
# ## 5. Train
#
# The recipe with your values. Every field: `!finetune show sd15-dreambooth-lora`.

# %%
from finetune import exported_rows, export_run, load_run, train
from finetune.console import ConsoleReporter

overrides = {
    "model.base": BASE,
    "model.variant": VARIANT,
    "data.folder": PICTURES,
    "data.cache_folder": f"{CACHE}/encoded",
    "data.caption_template": f"a photo of {TRIGGER} {CLASS}",
    "data.trigger": TRIGGER,
    "data.prior.prompts": [f"a photo of a {CLASS}"],
    "data.prior.images": CLASS_PICTURES,
    "samples.prompts": [f"a photo of {TRIGGER} {CLASS} on a beach", f"a photo of a {CLASS} on a beach"],
    "train.steps": STEPS,
    "train.max_hours": HOURS,
    "checkpoint.every": 50,  # what a disconnect costs at most
    "output_dir": OUTPUT,
}
run = load_run("sd15-dreambooth-lora", values=overrides)
reporter = ConsoleReporter()
trained = train(run, reporter)

# %% [markdown]
# ## 6. Look: before and after, same prompts, same seeds

# %%
from IPython.display import Image, display

for sheet in sorted(Path(OUTPUT, "samples").glob("step-*.png")):
    print(sheet.stem)
    display(Image(filename=str(sheet)))
print(f"validation loss over the base model's: {trained.validation}")

# %% [markdown]
# ## 7. Export and take it home
#
# Each file is read back the way its readers do and compared with what was trained. They stay on your Drive; the one for
# ComfyUI, A1111, Forge and InvokeAI comes to your computer as well.

# %%
exported = export_run(run.output_dir, run, run.output_dir / "exports", reporter)
reporter.table("Ready to use", exported_rows(exported))
if IN_COLAB:
    from google.colab import files

    files.download(str(exported[-1].path))

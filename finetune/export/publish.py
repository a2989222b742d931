"""Publishing on the Hugging Face hub: what goes is checked and shown first; the token is never seen here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id
from PIL import ExifTags, Image

from finetune.errors import ConfigError, UserError, first_few
from finetune.export.errors import ExportError
from finetune.export.manifest import NAME as MANIFEST
from finetune.export.manifest import check_manifest
from finetune.export.privacy import private_parts
from finetune.header import read_header
from finetune.tracking import file_size

TEXTS = {".md", ".json", ".jsonl", ".txt", ".yaml"}
CARD = "README.md"
CLIENT_ERROR: Any = HfHubHTTPError.__bases__[0]
"""What everything is that the hub's HTTP client raises, whichever client the installed version has."""
LARGEST_FILE = 50 * 10**9
"""Bytes; the hub takes no larger file (huggingface.co/docs/hub/storage-limits)."""
LARGEST_TEXT = 20 * 2**20
"""Text files up to this many bytes are looked through; a larger one is refused."""


@dataclass(frozen=True)
class Sent:
    """What went to the hub, or would go.

    Attributes:
        files: (name in the repository, bytes).
        address: of the commit; of the repository for a dry run.
        notes: what the sender should know.
    """

    files: tuple[tuple[str, int], ...]
    address: str
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        total = sum(size for _, size in self.files)
        listed = [(name, file_size(size)) for name, size in self.files]
        notes = [("", note) for note in self.notes]
        return [*listed, ("all", f"{file_size(total)} to {self.address}"), *notes]


def push_folder(folder: Path, repository: str, *, dry_run: bool = False, public: bool = False) -> Sent:
    """Send a built folder to the hub.

    Args:
        folder: with a model card; if it has a manifest, every file but the card must still be what the manifest says.
        repository: "owner/name".
        dry_run: check everything and send nothing.
        public: for a new repository; otherwise it is private.

    Raises:
        ConfigError: if there is nothing to send, the name is none, or nobody is logged in.
        ExportError: if a file would give away something private, or the hub refuses.
    """
    files = _files(folder, repository)
    sent = Sent(tuple((name, (folder / name).stat().st_size) for name in files),
                f"https://huggingface.co/{repository}", _edited(folder))  # fmt: skip
    if dry_run:
        return sent
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=files,
                                   commit_message="Upload adapter")  # fmt: skip
    except LocalTokenNotFoundError as error:
        raise ConfigError("You are not logged in to the hub.", ["run `hf auth login`, or set HF_TOKEN."]) from error
    except (CLIENT_ERROR, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        told = [f"{type(error).__name__}: {first}"]
        told += [] if isinstance(error, HfHubHTTPError) else ["run the same command again with a network connection."]
        raise ExportError(f"{repository} could not be uploaded.", told) from error
    return replace(sent, address=str(commit.commit_url))


def _edited(folder: Path) -> tuple[str, ...]:
    """What to say of a model card that somebody changed by hand."""
    edited = (folder / MANIFEST).is_file() and len(check_manifest(folder)) > len(check_manifest(folder, {CARD}))
    return (f"{CARD} was edited after the build; {MANIFEST} still lists the original",) * edited


def _files(folder: Path, repository: str) -> list[str]:
    """Names of what goes, all checks passed."""
    problems = []
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        problems.append(f"{repository!r} is not a repository name: {str(error).splitlines()[0]}")
    if repository.count("/") != 1:
        problems.append(f"{repository!r} is not OWNER/NAME.")
    if not (folder / CARD).is_file():
        problems.append(f"{folder} has no model card; `finetune build RUN -o DIST` creates one, "
                        "without training again if the run is finished.")  # fmt: skip
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) \
        if folder.is_dir() else []  # fmt: skip
    files = [name for name in files if not any(part.startswith(".") for part in Path(name).parts)]
    if not any(name.endswith(".safetensors") for name in files):
        problems.append(f"{folder} holds no .safetensors file; give the folder that `finetune build` made.")
    problems += [
        f"{name} has {size / 10**9:.0f} GB, but the hub accepts at most {LARGEST_FILE / 10**9:.0f} GB per file; build "
        "it again with --set export.dtype=fp16."
        for name in files
        if (size := (folder / name).stat().st_size) > LARGEST_FILE
    ]
    if problems:
        raise ConfigError("Nothing can be uploaded:", problems)
    changed = check_manifest(folder, {CARD}) if (folder / MANIFEST).is_file() else []
    if changed:
        raise ConfigError(f"{folder} has changed since it was built; build it again.", first_few(changed))
    if private := [f"{name} holds {part}." for name in files for part in _private(folder / name)]:
        raise ExportError("These files would reveal something private; nothing was uploaded.", first_few(private))
    return files


def _private(path: Path) -> list[str]:
    """What a file would give away, in words."""
    if path.name in {"vocab.json", "tokenizer.json", "merges.txt"}:
        return []
    if path.suffix in TEXTS and path.stat().st_size > LARGEST_TEXT:
        return ["too much text to check"]
    try:
        return list(dict.fromkeys(READ[path.suffix](path))) if path.suffix in READ else []
    except (OSError, UserError) as error:
        return [f"content that cannot be checked ({str(error).splitlines()[0]})"]


def _in_text(path: Path) -> list[str]:
    """Anywhere in the file."""
    return private_parts(path.read_text(encoding="utf-8", errors="replace"))


def _in_header(path: Path) -> list[str]:
    """In the metadata; tensors tell nothing."""
    # Thumbnails are base64, in which everything looks like a path.
    told = {key: value for key, value in read_header(path).metadata.items() if key != "modelspec.thumbnail"}
    return [f"{part} in {key}" for key, value in told.items() for part in private_parts(value)]


def _in_picture(path: Path) -> list[str]:
    """In text entries, EXIF and XMP; phones write into a photo where it was taken."""
    with Image.open(path) as image:
        exif = image.getexif()
        xmp = image.info.get("xmp", b"")
        told = [*image.info.values(), *exif.values(), xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp]
    found = ["the place where it was taken"] if exif.get_ifd(ExifTags.IFD.GPSInfo) else []
    return found + [part for text in told if isinstance(text, str) for part in private_parts(text)]


READ: dict[str, Callable[[Path], list[str]]] = {
    **dict.fromkeys(TEXTS, _in_text),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), _in_picture),
    ".safetensors": _in_header,
}
"""Ending of a name -> what such a file gives away."""

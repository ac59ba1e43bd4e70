"""A checkpoint's files: whole or not there, hard links where they are equal to others, and the disk that they take."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnb.ledger import file_sha256, write_atomic
from qnb.precision import Precision

if TYPE_CHECKING:
    import torch

    from qnb.quantize.sources import Source

CONFIG, MANIFEST = "config.json", "manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, add a manifest and put the folder in `folder`'s place.

    A block that fails leaves `folder` as it was. The caller keeps other processes from the same folder.
    """
    draft = folder.parent / f".{folder.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        _share(draft)
        manifest = {
            path.relative_to(draft).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(draft.rglob("*")) if path.is_file()
        }  # fmt: skip
        write_atomic(draft / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:  # drives that cannot rename a folder, or a mount in its place
            shutil.copytree(draft, folder, dirs_exist_ok=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def damage(folder: Path, manifest_sha256: str = "") -> str:
    """Return the first file of a folder of `replacing` that is not as its manifest says; empty where all are.

    Every byte is read: about a second a GiB. With `manifest_sha256` the manifest has to be that one.
    """
    name = MANIFEST
    try:
        if manifest_sha256 and file_sha256(folder / MANIFEST) != manifest_sha256:
            return MANIFEST
        manifest = read_json(folder / MANIFEST)
        for name, entry in manifest.items():
            if file_sha256(folder / name) != entry["sha256"]:
                return str(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return str(name)
    return ""


def weight_files(folder: Path) -> list[str]:
    """Return the safetensors files that transformers reads: one file where there is one, else those of the index."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [WEIGHTS]
    return sorted(set(read_json(folder / INDEX)["weight_map"].values()))


# Weights that are the same in several checkpoints


def _share(draft: Path) -> None:
    """Replace weight files by hard links to equal files of the folders beside `draft`."""
    spare = draft / ".link"
    for path in draft.glob("*.safetensors"):
        for other in draft.parent.glob("*/*.safetensors"):
            with suppress(OSError):  # the drive has no links, or another process removed the file
                if other.parent != draft and not other.samefile(path) and filecmp.cmp(other, path, shallow=False):
                    os.link(other, spare)
                    spare.replace(path)
                    break


def link_weights(source: Path, folder: Path, dtype: torch.dtype, size_bytes: int) -> bool:
    """Link a source's weight files into `folder` if they hold what would be saved; return whether they do.

    A model of `size_bytes` in `dtype` was loaded from them, so they have each of its tensors. They may have more, or
    other types. A drive that refuses links gets copies.
    """
    from safetensors.torch import load_file

    files = [source / name for name in weight_files(source)]
    tensors = [tensor for path in files for tensor in load_file(path).values()]  # mapped, not read
    is_same = {tensor.dtype for tensor in tensors} == {dtype} and sum(each.nbytes for each in tensors) == size_bytes
    files += [] if (source / WEIGHTS).exists() else [source / INDEX]
    if not is_same or {path.parent for path in files} != {source}:
        return False
    for path in files:
        try:
            os.link(path.resolve(), folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    return True


def disk_shortage(source: Source, folder: Path, precisions: Iterable[Precision]) -> str:
    """Return a line where the checkpoints that `folder` lacks, and their source if it is to be fetched, lack disk.

    Empty where they do not, and for a source to be fetched whose size is not known.
    """
    missing = [each for each in precisions if not (folder / each.checkpoint / MANIFEST).exists()]
    needed_bits, config = sum(each.file_bits for each in missing), Path(source.path) / CONFIG
    is_here, (there, here) = config.is_file(), (_nearest(path) for path in (config, folder))
    if there.stat().st_dev == here.stat().st_dev:  # so that equal files are links; a fetch to another disk is not seen
        settings = read_json(config) if is_here else {"dtype": "bfloat16"}
        released = "" if "text_config" in settings else settings.get("dtype", settings.get("torch_dtype"))
        saved = [each for each in missing if each.quantized or each.dtype != released]
        shared = {each.dtype: each.shared_bits for each in saved}
        needed_bits = sum(each.file_bits - each.shared_bits for each in saved) + sum(shared.values())
        needed_bits += 0 if is_here else 16
    needed_gib = source.parameters * needed_bits / 8 / 2**30
    free_gib = shutil.disk_usage(here).free / 2**30
    line = f"about {needed_gib:.1f} GiB are needed, {free_gib:.1f} are free in {folder.parent}; make room there"
    return line if needed_gib > free_gib else ""


def _nearest(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))

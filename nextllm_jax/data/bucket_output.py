"""Publishes prepared data in a bucket: index.json, whose presence marks it as complete, is written last.

The other files are written in any order, and those that an interrupted upload has written are kept. settings.json is
written first, only if it is absent, so data of other settings is never mixed with it.
"""

import concurrent.futures
import re
from pathlib import Path
from typing import Any

from etils import epath

from nextllm_jax.data.data_directory import INDEX, SETTINGS, is_prepared, read_settings
from nextllm_jax.errors import InputError
from nextllm_jax.progress import progress_bar
from nextllm_jax.storage.interface import BucketFiles, Identity
from nextllm_jax.storage.open_storage import open_bucket

_UPLOADS = 8
_NAME = r"index\.json|settings\.json|tokenizer/[^/]+|(train|validation)-(documents\.npy|\d+\.bin|mask-\d+\.bits)"


def check_bucket(output: epath.Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise InputError unless data with these settings can be written to `output`.

    It must be empty or an interrupted upload of such data, or hold only prepared data and `overwrite` is true.
    """
    names = open_bucket(output).files()
    if not names:
        return
    found = read_settings(output)
    others = [name for name in names if not re.fullmatch(_NAME, name)]
    if not found or others:
        raise InputError(
            f"{output} holds files other than prepared data ({others[0] if others else next(iter(names))}); name "
            "another directory"
        )
    if not overwrite and (is_prepared(output) or found != settings):
        raise InputError(
            f"{output} was prepared, at least in part, with other settings; name another directory, or pass --overwrite"
        )


def publish_in_bucket(source: Path, output: epath.Path, *, overwrite: bool) -> None:
    """Write the prepared directory `source` to `output`, which `check_bucket` has accepted.

    Raises InputError if another process writes other data there.
    """
    bucket = open_bucket(output)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    ours = {name: (source / name).read_bytes() for name in (SETTINGS, INDEX)}
    if overwrite and bucket.read(INDEX) != ours[INDEX]:
        bucket.delete(INDEX)
        bucket.write(SETTINGS, ours[SETTINGS])
    if bucket.create(SETTINGS, ours[SETTINGS]) is None and bucket.read(SETTINGS) != ours[SETTINGS]:
        raise _written_by_others(output)
    for name in filter(re.compile(_NAME).fullmatch, bucket.files().keys() - {*names}):  # others came meanwhile
        bucket.delete(name)
    names.remove(INDEX)
    missing = _missing(bucket, source, names, {})
    with concurrent.futures.ThreadPoolExecutor(_UPLOADS) as pool:
        done = pool.map(lambda name: bucket.upload(name, source / name), missing)
        done = progress_bar(done, desc=f"uploading to {output}", total=len(missing), unit=" files")
        uploaded = dict(zip(missing, done, strict=True))
    if _missing(bucket, source, names, uploaded):
        raise _written_by_others(output)
    if bucket.create(INDEX, ours[INDEX]) is None:
        if not overwrite or _missing(bucket, source, names, uploaded):
            raise _written_by_others(output)
        bucket.write(INDEX, ours[INDEX])  # instead of that of a process whose files these have replaced


def _missing(bucket: BucketFiles, source: Path, names: list[str], uploaded: dict[str, Identity | None]) -> list[str]:
    """The files that are in the bucket neither as `uploaded` nor with the same content."""
    found = bucket.files()

    def is_there(name: str) -> bool:
        return name in found and (found[name] == uploaded.get(name) or bucket.matches(found[name], source / name))

    return [name for name in names if not is_there(name)]


def _written_by_others(output: epath.Path) -> InputError:
    return InputError(
        f"another process prepares other data in {output}, or was interrupted; if none runs, pass --overwrite"
    )

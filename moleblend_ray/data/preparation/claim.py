"""The claim on an output directory: it holds one data set, made of stated sources with stated options.

The plan is the claim, and is written before anything else. It names settings and source files, not the content of
the files: where a damaged file was replaced, the chunks that did not change are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moleblend_ray.data.dataset.dataset_files import (
    LEASES_DIR,
    PLAN_NAME,
    RECEIPTS_DIR,
    STAGED_DIR,
    is_prepared,
    listed,
    listed_shards,
    wrong_files,
)
from moleblend_ray.data.dataset.differences import differences, with_defaults
from moleblend_ray.data.dataset.manifest import (
    Manifest,
    SourceInfo,
    format_version_of,
    load_manifest,
)
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import Receipt, valid_receipts
from moleblend_ray.data.sources import SourceFile, SourceSet
from moleblend_ray.errors import ConfigError, DataError, without_credentials
from moleblend_ray.vocabulary import FEATURIZER_VERSION


class PreparedOtherwiseError(ConfigError):
    """A finished data set was made of other sources, or with other options."""

    def __init__(self, message: str, problems: str = "") -> None:
        """``problems`` say how they differ."""
        super().__init__(message)
        self.problems = problems


def finished_manifest(
    out: str, files: Sequence[SourceFile], options: ConvertOptions
) -> Manifest | None:
    """The manifest of ``out``, None if it is not finished; PreparedOtherwiseError if sources or options were
    others."""
    if not is_prepared(out):
        return None
    manifest = load_manifest(out)
    # A setting that the manifest lacks was introduced later: its default is what the data set was made with.
    there = with_defaults(manifest.options, ConvertOptions().to_json())
    problems = _changes(there, options.to_json())
    if manifest.featurizer_version != FEATURIZER_VERSION:
        problems.append(
            f"featurizer version: there {manifest.featurizer_version}, now {FEATURIZER_VERSION}"
        )
    if (changed := changed_files(manifest.sources, files)) is not None:
        problems.append(f"sources: {changed}")
    if problems:
        listed = "; ".join(problems)
        raise PreparedOtherwiseError(
            f"out: {out} holds a data set prepared otherwise. {listed}. "
            f"Give another `out`, or delete {out} to prepare it anew.",
            listed,
        )
    _check_shards(out, manifest)
    return manifest


def changed_files(made_of: Sequence[SourceInfo], files: Sequence[SourceFile]) -> str | None:
    """How the files that molecules were ``made_of`` differ from ``files``, as words; None if they do not."""
    # Manifests of before do not say which members of an archive were read.
    tells_members = all(source.members is not None for source in made_of)
    there = [_identity(source, with_members=tells_members) for source in made_of]
    now = [_identity(file, with_members=tells_members) for file in files]
    return None if there == now else f"there {_shown(there)}; now {_shown(now)}"


def rows_per_chunk_of(out: str) -> int | None:
    """Rows per chunk of the data set in ``out``, finished or begun; None if there is none."""
    uri = storage.join(out, PLAN_NAME)
    if is_prepared(out):
        options = load_manifest(out).options
    elif storage.exists(uri):
        options = storage.read_object(uri, {"options": dict[str, Any]})["options"]
    else:
        return None
    return int(with_defaults(options, ConvertOptions().to_json())["rows_per_chunk"])


def check_output(out: str, sources: SourceSet, options: ConvertOptions) -> bool:
    """Whether a data set of these sources and options was begun in ``out``; ConfigError if another one was."""
    uri = storage.join(out, PLAN_NAME)
    if storage.exists(uri):
        _check_plan(out, storage.read_object(uri), _plan(sources, options))
        return True
    if listed_shards(out):
        raise ConfigError(
            f"out: {out} holds shards of which neither a manifest nor a plan tells anything. "
            f"Give another `out`, or delete {out}."
        )
    return False


def claim_output(
    out: str, sources: SourceSet, options: ConvertOptions
) -> dict[tuple[int, int], Receipt]:
    """Claim ``out`` for a data set of these sources and options, or continue one that an earlier run has begun. No other
    command may work there meanwhile (:mod:`~moleblend_ray.data.dataset.lease`).

    Returns the receipts of the chunks that are finished, by file and chunk. ConfigError if ``out`` belongs to another
    data set.
    """
    if not check_output(out, sources, options):
        storage.write_json(storage.join(out, PLAN_NAME), _plan(sources, options))
    return valid_receipts(out, listed(out))


def _plan(sources: SourceSet, options: ConvertOptions) -> dict[str, Any]:
    return {
        "format_version": format_version_of(sources.labels),
        "featurizer_version": FEATURIZER_VERSION,
        "options": options.to_json(),
        "sources": [without_credentials(layout.file.uri) for layout in sources.layouts],
    }


def remove_work_files(out: str) -> None:
    """Delete what only an unfinished data set needs: the plan, receipts, staged molecules and leases."""
    for directory in (STAGED_DIR, RECEIPTS_DIR, LEASES_DIR):
        storage.delete_tree(storage.join(out, directory))


def _check_shards(out: str, manifest: Manifest) -> None:
    """DataError if a file of a finished data set is missing or has another size."""
    wrong = wrong_files(out, manifest.shards, listed_shards(out))
    if wrong:
        shown = [f"{path} {reason}" for path, reason in wrong.items()]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise DataError(
            f"{out} was prepared, but since then {len(shown)} of its {len(manifest.shards)} files changed: "
            f"{'; '.join(shown[:3])}{more}. Restore them, or delete all of {out} and prepare it again."
        )


def _identity(source: SourceFile | SourceInfo, *, with_members: bool) -> tuple[str, int, str]:
    # Another signature or password in the URI does not make another file; other members of an archive do.
    some = f"!{source.members}" if with_members and source.members != "*" else ""
    return (without_credentials(source.uri) + some, source.size, source.probe)


def _shown(identities: Sequence[tuple[str, int, str]]) -> str:
    texts = [f"{uri} ({size} bytes, probe {probe[:8]})" for uri, size, probe in identities[:3]]
    more = f" and {len(identities) - 3} more" if len(identities) > 3 else ""
    return ", ".join(texts) + more


def _check_plan(out: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changes = _changes(with_defaults(there, {"options": ConvertOptions().to_json()}), now)
    if changes:
        raise ConfigError(
            f"out: {out} holds an unfinished data set begun otherwise. {'; '.join(changes)}. "
            "Give another `out`, the former settings to finish it, or delete it."
        )


def _changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: there {old!r}, now {new!r}" for key, (old, new) in differences(there, now).items()
    ]

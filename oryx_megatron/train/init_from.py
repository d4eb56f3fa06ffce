"""Where a run starts: its own newest checkpoint, another run's (`init_from`), a Hugging Face folder, or new weights.

`find` runs before there are datasets and a model, because the order of samples depends on where their count begins;
`Start.take` then fills the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oryx_megatron.checkpoint import Manifest, check_whole, read_manifest, safe, store
from oryx_megatron.checkpoint.average import NO_AVERAGE, has_average
from oryx_megatron.checkpoint.manager import Checkpoints
from oryx_megatron.checkpoint.manifest import NAME, file_digest
from oryx_megatron.checkpoint.remote import fetch_model, list_remote, mirror
from oryx_megatron.checkpoint.state import has_optimizer
from oryx_megatron.config.batch_sizes import SampleCount, planned
from oryx_megatron.config.schema import ENGINES, InitFromConfig, ModelConfig, RopeScalingConfig, RunConfig
from oryx_megatron.data.files import temporary_name
from oryx_megatron.data.loader import Blend, BlendPreview, check_resume
from oryx_megatron.data.tokenizer import Tokenizer, difference
from oryx_megatron.errors import (
    WEIGHTS_ALONE,
    CheckpointError,
    ClosedCheckpointError,
    ConfigError,
    ConversionError,
    DataError,
)
from oryx_megatron.parallel.wait import first_rank_alone, on_all_ranks
from oryx_megatron.paths import is_url
from oryx_megatron.storage import StorageError, named
from oryx_megatron.train import resume
from oryx_megatron.train.differences import SHAPES, as_override, differences, foreign_optimizer, to_text, told, unlike
from oryx_megatron.train.guard import Guard
from oryx_megatron.train.remote import run_folder

if TYPE_CHECKING:
    from oryx_megatron.hf.folders import Weights

log = logging.getLogger(__name__)

NOT_LISTED = (
    *("output_dir", "init_from", "license", "parallel", "checkpoint", "evaluation", "faults", "logging", "kernels"),
    *("engine", *(name for name in ENGINES if name != "megatron"), "train.exit_after"),
)
"""Parts of a run that change nothing of what it learns."""
DATA_PATHS = tuple(f"data.{name}" for name in ("tokenizer", "blend", "stages", "validation", "cache_dir"))
"""Of which an export keeps the last part alone; its tokenizer is compared by content."""
NO_EFFECT = "init_from: has no effect: this run has checkpoints of its own"


@dataclass
class Start:
    """Where a run starts, the same on all ranks."""

    count: SampleCount
    """Samples of every step, past and to come."""
    record: dict[str, Any] | None = None
    """For the manifests of this run's checkpoints."""
    settings: InitFromConfig | None = None
    """None: nothing is taken from elsewhere."""
    checkpoint: tuple[Path, Manifest] | None = None
    """What to take; None: a Hugging Face folder, of which `take` makes one."""
    weights: Weights | None = None
    """That folder, opened, on rank 0."""

    def take(
        self, run: RunConfig, checkpoints: Checkpoints, blend: Blend, tokenizer: Tokenizer, guard: Guard
    ) -> int | None:
        """Fill model, optimizer and guard; the iteration to begin at, or None when there is nothing to take.

        Raises:
            CheckpointError: it does not fit.
            ConversionError: a Hugging Face folder cannot be read, or there is no room to convert it.
            DataError: the data position is of other data.
        """
        settings = self.settings
        if settings is None:
            return None
        with self._source(run) as (folder, manifest):
            check_data(settings, manifest, blend)
            if settings.data:
                guard.load_state(manifest.guard)
            kept = None if self.weights is None else self.weights.kept
            for line in describe(run, folder, manifest, kept):
                log.info("%s", line)
            for line in warnings(run, kept or manifest, tokenizer):
                log.warning("%s", line)
            checkpoints.start_from(folder, manifest, optimizer=settings.optimizer, weights=settings.weights)
            torch.distributed.barrier()  # until no rank reads any more
        return self.count.iteration

    @contextlib.contextmanager
    def _source(self, run: RunConfig) -> Iterator[tuple[Path, Manifest]]:
        """The checkpoint to take; one that is made of a Hugging Face folder goes again."""
        if self.checkpoint is not None:
            yield self.checkpoint
            return
        made = first_rank_alone(lambda: str(_converted(run, self.weights)), "converts init_from", ConversionError)
        try:
            yield Path(made), _read_whole(Path(made))
        finally:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(made, ignore_errors=True)


def find(run: RunConfig, root: Path, before: int | None = None) -> Start:
    """Where a run with its checkpoints under `root` starts; collective.

    Args:
        run: Validated config.
        root: Its own checkpoints.
        before: Only own checkpoints of earlier iterations count.

    Raises:
        ConfigError: the source does not fit this run.
        CheckpointError: no whole checkpoint there.
        ConversionError: a Hugging Face folder that cannot be read.
    """
    opened: list[Weights] = []
    found = first_rank_alone(lambda: _look(run, root, before, opened), "looks for checkpoints", CheckpointError)
    if "count" in found:
        if run.init_from is not None:
            log.info(NO_EFFECT)
        return Start(SampleCount.read(*found["count"]), found["record"])
    new, settings = SampleCount.of(run.train), run.init_from
    if settings is None:
        return Start(new)
    taken = {name: getattr(settings, name) for name in ("weights", "optimizer", "schedule", "data")}
    if "folders" not in found:
        return Start(new, found["record"] | taken, settings, weights=opened[0] if opened else None)
    folder, manifest = _newest_whole(found["folders"])
    check(run, folder, manifest)
    record = {
        "path": named(folder),
        "iteration": manifest.iteration,
        "manifest_sha256": file_digest(folder / NAME)["sha256"],
    }
    return Start(_count(run, settings, manifest), record | taken, settings, (folder, manifest))


def _count(run: RunConfig, settings: InitFromConfig, manifest: Manifest) -> SampleCount:
    """Samples by iteration of a run that takes from a checkpoint."""
    kept = int(manifest.guard.get("skipped_samples", 0))
    count = SampleCount.of(
        run.train,
        manifest.iteration if settings.schedule else 0,
        manifest.consumed_samples - kept if settings.data else 0,
    )
    if settings.schedule and settings.data:  # what the source read before lies where it read it
        sizes = manifest.count().continued(manifest.iteration, planned(run.train)).sizes
        count = dataclasses.replace(count, sizes=sizes)
    return count


def expected_count(run: RunConfig, root: Path) -> SampleCount:
    """For --dry-run: the samples by iteration that `find` would give, from manifests alone."""
    if (own := _own(run, root, None)) is not None:
        return SampleCount.read(*own["count"])
    if run.init_from is None or _hugging_face(run.init_from.path) is not None:
        return SampleCount.of(run.train)
    return _count(run, run.init_from, _newest(run.init_from.path, logging.DEBUG)[1])  # `preview` tells


def preview(run: RunConfig, tokenizer: Tokenizer, blend: BlendPreview) -> list[str]:
    """For --dry-run of a run without checkpoints: what `find` and `take` would say, and their errors.

    Without ranks; files are not compared.
    """
    if run.init_from is None:
        return []
    if (path := _hugging_face(run.init_from.path)) is not None:
        opened = _open(run, path)
        lines = _headline(run, run.init_from.path, None) + _heads(opened.model, run.model)
        lines += _of_folder(opened.model, opened.kept, run)
        return lines + (_reach(run) if opened.kept is None else warnings(run, opened.kept, tokenizer))
    folder, manifest = _newest(run.init_from.path)
    check(run, folder, manifest)
    check_data(run.init_from, manifest, blend)
    return describe(run, folder, manifest) + warnings(run, manifest, tokenizer)


def check_data(settings: InitFromConfig, manifest: Manifest, blend: Blend | BlendPreview) -> None:
    """Raise DataError when a run takes the position in data that are not its own."""
    if not settings.data:
        return
    assert manifest.trained_on is not None
    try:
        check_resume(manifest.trained_on, blend)
    except DataError as error:
        why = str(error).replace(WEIGHTS_ALONE, "set init_from.data to false")
        raise DataError(f"init_from.data: {why}") from None


def warnings(run: RunConfig, manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """What of a checkpoint to start from may not be meant: lines for a terminal."""
    found = []
    made = manifest.data.get("tokenizer")
    if made and (why := difference(made, tokenizer.describe())) is not None:
        found.append(f"init_from: the source was trained with {why}: its embeddings mean other tokens")
    assert run.init_from is not None
    if run.init_from.schedule and (text := resume.jump(manifest.run(), run, manifest.iteration)):
        found.append(text)
    return found + _pretraining(manifest.run().model.rope_scaling, run.model.rope_scaling) + _reach(run)


def _pretraining(then: RopeScalingConfig | None, now: RopeScalingConfig | None) -> list[str]:
    """Whether a scaling of a scaled model counts from another length: frequencies would be divided twice, or less."""
    lengths = [scaling and scaling.original_max_position_embeddings for scaling in (then, now)]
    if None in lengths or lengths[0] == lengths[1]:
        return []
    return [
        f"model.rope_scaling: original_max_position_embeddings {lengths[0]} → {lengths[1]}: it is the length of "
        f"pretraining, which stays over a chain of runs; set it to {lengths[0]}, and factor to the whole extension"
    ]


def _reach(run: RunConfig) -> list[str]:
    """Whether sequences are longer than YaRN extends to, as when its factor counts from the run before."""
    scaling, length = run.model.rope_scaling, run.data.sequence_length
    if scaling is None or scaling.rope_type != "yarn":
        return []
    original = scaling.original_max_position_embeddings
    assert original is not None
    if length <= scaling.factor * original:
        return []
    return [
        f"model.rope_scaling: factor {scaling.factor:g} × original_max_position_embeddings {original} = "
        f"{scaling.factor * original:.0f} tokens, and data.sequence_length is {length}; a factor of "
        f"{length / original:g} reaches it"
    ]


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is of Hugging Face's form."""
    return (path / "config.json").is_file() and not (path / NAME).is_file()


def check(run: RunConfig, folder: Path, manifest: Manifest) -> None:
    """Raise ConfigError when a run cannot start from a checkpoint in the way it asks for."""
    settings = run.init_from
    assert settings is not None
    with _field_named():
        store.check_format(folder, manifest.files)
    sizes = {name: facts["bytes"] for name, facts in manifest.files.items()}
    written = manifest.run()
    check_shapes(written.model, run.model, settings.path)
    if settings.weights == "ema" and not has_average(safe.read_metadata(folder, sizes).state_dict_metadata):
        raise ConfigError(f"init_from.weights: {folder} {NO_AVERAGE}; set it to trained")
    if settings.optimizer:
        if not has_optimizer(safe.read_metadata(folder, sizes).state_dict_metadata):
            raise ConfigError(f"init_from.optimizer: {folder} holds weights alone; set it to false")
        if (why := foreign_optimizer(written, run)) is not None:
            raise ConfigError(f"init_from.optimizer: {folder} was {why}; set it back, or init_from.optimizer to false")
    if settings.optimizer and written.model.mtp_layers != run.model.mtp_layers:
        raise ConfigError(
            f"init_from.optimizer: {folder} has state of {written.model.mtp_layers} heads of multi-token prediction, "
            f"and the model has {run.model.mtp_layers} (model.mtp); set it to false"
        )
    if settings.schedule and manifest.iteration >= run.train.iterations:
        raise ConfigError(
            f"init_from.schedule: {folder} is at iteration {manifest.iteration} of train.iterations="
            f"{run.train.iterations}; increase that, or set init_from.schedule to false"
        )
    if settings.data and manifest.trained_on is None:
        raise ConfigError(f"init_from.data: {folder} has read no data; set it to false")


def check_shapes(then: ModelConfig, now: ModelConfig, path: str) -> None:
    """Raise ConfigError unless the models have the same parameters."""
    if changed := unlike(then, now, SHAPES):
        settings = " ".join(as_override(f"model.{name}", before) for name, before, _ in changed)
        raise ConfigError(
            f"init_from: {path} holds model {then.name}, whose weights do not fit {now.name}: {told(changed)}; set "
            f"{settings}"
        )


def describe(run: RunConfig, folder: Path, manifest: Manifest, kept: Manifest | None = None) -> list[str]:
    """What a run takes from a checkpoint, and in what it differs from that one's run: lines for a terminal.

    `kept`: of a Hugging Face folder that is an export, the manifest of the checkpoint that it was made of.
    """
    assert run.init_from is not None
    written = manifest.run()
    heads = _heads(written.model, run.model)
    if _hugging_face(run.init_from.path) is not None:
        return _headline(run, run.init_from.path, None) + heads + _of_folder(written.model, kept, run)
    return _headline(run, named(folder), manifest) + heads + _differences(written, run)


def _of_folder(model: ModelConfig, kept: Manifest | None, run: RunConfig) -> list[str]:
    """In what a run differs from a Hugging Face folder's model or, of an export, from the run that made it."""
    if kept is None:
        return _differences(model, run.model)
    return _differences(dataclasses.replace(kept.run(), model=model), run, hidden=DATA_PATHS)


# ----------------------------------------------------------------------------------------------------- internals


def newest_own(root: Path) -> Manifest | None:
    """Of a run's checkpoints, the manifest of the newest whose manifest can be read.

    Raises:
        ClosedCheckpointError: the newest is of a newer version, or may not be read.
    """
    for folder in reversed(store.list_folders(root)):
        try:
            return store.read_own(folder)
        except ClosedCheckpointError:
            raise
        except CheckpointError as error:
            log.warning("%s", error)
    return None


def _own(run: RunConfig, root: Path, before: int | None) -> dict[str, Any] | None:
    """What the newest own checkpoint that can be read says of the run's start; None when there is no checkpoint.

    Those from `before` on are not loaded, but know with which batch sizes the steps before them were done.
    """
    if is_url(run.output_dir):
        mirror(f"{run.output_dir}/checkpoints", root)
    folders = store.list_folders(root)
    if not any(before is None or store.iteration_of(path) < before for path in folders):
        return None
    for folder in reversed(folders):
        with contextlib.suppress(CheckpointError):  # told when it is loaded
            manifest = store.read_own(folder)
            return {"count": dataclasses.astuple(resume.sample_count(manifest, run)), "record": manifest.init_from}
    return {"count": dataclasses.astuple(SampleCount.of(run.train)), "record": None}


def _look(run: RunConfig, root: Path, before: int | None, opened: list[Weights]) -> dict[str, Any]:
    """On rank 0: the own start, or the checkpoints to start from, newest first, or a Hugging Face folder, `opened`."""
    if (own := _own(run, root, before)) is not None:
        return own
    settings = run.init_from
    if settings is None:
        return {}
    if (path := _hugging_face(settings.path)) is not None:
        opened.append(weights := _open(run, path))
        return {"record": _record(path, weights)}
    return {"folders": _folders(settings.path)}


@contextlib.contextmanager
def _field_named() -> Iterator[None]:
    """Errors of a source begin with the field that names it."""
    try:
        yield
    except (CheckpointError, ConversionError, StorageError) as error:
        if str(error).startswith("init_from"):
            raise
        told = type(error)(f"init_from: {error}")
        told.rank_local = error.rank_local
        raise told from error


def _hugging_face(path: str) -> Path | None:
    """The folder at a path or URL, on this machine, if it is of Hugging Face's form."""
    with _field_named():
        folder = fetch_model(path) if is_url(path) else Path(path)
    return folder if folder is not None and is_hugging_face(folder) else None


def _folders(path: str) -> list[str]:
    """The checkpoint at a path or URL, or those of a run, newest first."""
    with _field_named():
        if is_url(path):
            return list_remote(path)
        newest = store.find_checkpoint(path)
    folders = [newest] if newest == Path(path) else store.list_checkpoints(newest.parent)[::-1]
    return [str(folder.resolve()) for folder in folders]


def _newest_whole(folders: list[str]) -> tuple[Path, Manifest]:
    """The first of some checkpoints that is whole; collective, each rank reads a share of the files."""

    def read(name: str) -> tuple[Path, Manifest]:
        folder = _on_this_machine(name)
        return folder, _read_whole(folder)

    return _first(folders, read)


def _newest(path: str, level: int = logging.WARNING) -> tuple[Path, Manifest]:
    """For --dry-run: the checkpoint at a path, or a run's newest whose manifest can be read; without its tensors."""

    def read(name: str) -> tuple[Path, Manifest]:
        folder = store.find_checkpoint(name, only=(safe.METADATA,))
        return folder, read_manifest(folder)

    return _first(_folders(path), read, level)


def _first(
    folders: list[str], read: Callable[[str], tuple[Path, Manifest]], level: int = logging.WARNING
) -> tuple[Path, Manifest]:
    """The first of some checkpoints that `read` takes; says of the others why it did not."""
    for number, name in enumerate(folders):
        try:
            with _field_named():
                return read(name)
        except ClosedCheckpointError:
            raise
        except CheckpointError as error:
            if number + 1 == len(folders):
                raise
            why = str(error).removesuffix("; use another checkpoint")
            log.log(level, "%s; trying the checkpoint before it", why)
    raise AssertionError("no folder")


def _on_this_machine(name: str) -> Path:
    """A checkpoint's folder, or a copy of the one at a URL; an error is that of all ranks."""
    return on_all_ranks(lambda: store.find_checkpoint(name))


def _read_whole(folder: Path) -> Manifest:
    manifest = on_all_ranks(lambda: read_manifest(folder))
    check_whole(folder, manifest)
    return manifest


def _open(run: RunConfig, path: Path) -> Weights:
    """A Hugging Face folder whose weights fit this run."""
    from oryx_megatron.hf.convert import open_folder  # transformers takes its time

    assert run.init_from is not None
    for name in ("optimizer", "schedule", "data"):
        if getattr(run.init_from, name):
            raise ConfigError(f"init_from.{name}: {path} is a Hugging Face folder, of weights alone; set it to false")
    if run.init_from.weights == "ema":
        raise ConfigError(f"init_from.weights: {path} is a Hugging Face folder, of one kind of weights; remove it")
    with _field_named():
        weights = open_folder(path, mixer=run.model.mixer, seed=run.seed)
    check_shapes(weights.model, run.model, str(path))
    return weights


def _record(path: Path, weights: Weights) -> dict[str, Any]:
    from oryx_megatron.hf.folders import MANIFEST

    described = path / (MANIFEST if weights.kept is not None else "config.json")
    return {
        "path": named(path) if named(path) != str(path) else str(path.resolve()),
        "iteration": None if weights.kept is None else weights.kept.iteration,
        "manifest_sha256": file_digest(described)["sha256"],
    }


def _converted(run: RunConfig, weights: Weights | None) -> Path:
    """A Hugging Face folder as a checkpoint in the run's folder."""
    from oryx_megatron.hf.convert import write_weights

    assert weights is not None
    if is_url(run.output_dir) and os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        raise ConversionError(
            f"init_from: with output_dir {run.output_dir} a Hugging Face folder is converted on one machine only; make "
            "a checkpoint of it first (oryx convert from-hf), and name that"
        )
    home = run_folder(run)
    for left in home.glob(".init_from.*.tmp"):  # by a start that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = temporary_name(home / "init_from")
    try:
        folder.mkdir(parents=True)
        write_weights(weights, folder, run)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConversionError(f"{folder}: cannot be written ({error.strerror})") from error
        raise
    return folder


def _headline(run: RunConfig, source: str, manifest: Manifest | None) -> list[str]:
    settings = run.init_from
    assert settings is not None
    weights = "averaged weights" if settings.weights == "ema" else "weights"
    taken = [weights]
    if manifest is not None:
        taken += ["optimizer"] if settings.optimizer else []
        taken += [f"schedule (iteration {manifest.iteration})"] if settings.schedule else []
        taken += [f"data (sample {manifest.consumed_samples})"] if settings.data else []
    return [f"init_from: {', '.join(taken) if len(taken) > 1 else f'{weights} alone'} of {source}"]


def _heads(then: ModelConfig, now: ModelConfig) -> list[str]:
    """Which heads of multi-token prediction only one of the models has."""
    first, last = sorted((then.mtp_layers, now.mtp_layers))
    names = ", ".join(f"mtp.layers.{number}" for number in range(first, last))
    if now.mtp_layers > first:
        return [f"init_from: {names}: not in the source; starts from new weights"]
    return [f"init_from: {names}: left out; the model has no such head (model.mtp)"] if names else []


def _differences(then: Any, now: Any, hidden: tuple[str, ...] = ()) -> list[str]:
    """`field before → after` for everything that differs, of runs or of models."""
    prefix = "model." if isinstance(now, ModelConfig) else ""
    return [
        f"init_from: {prefix}{name} {to_text(before)} → {to_text(after)}"
        for name, before, after in differences(then, now, (*NOT_LISTED, *hidden))
    ]

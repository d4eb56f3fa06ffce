"""Samples for training and evaluation: megatron-core's GPTDataset under blends, stages and a checked cache.

megatron-core cuts each dataset into samples of `sequence_length` tokens and shuffles them (GPTDataset), and its C++
helper interleaves datasets by weight. Ours is what lies around it:
- every dataset is verified before; one rank builds the sample indices and a failure there is every rank's failure;
- caches are keyed by the contents of the data, and appear only whole (cache.py);
- stages: a blend that takes over at an iteration continues each dataset at the sample where the last one left it;
- each rank reads its microbatches in an order that does not depend on the layout (stream.py).
Shapes: s sequence.
"""

from __future__ import annotations

import errno
import logging
import resource
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split

from oryx_megatron import platform
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import BlendEntry, RunConfig
from oryx_megatron.data.cache import cached
from oryx_megatron.data.indexed import WHOLE, Dataset, open_dataset
from oryx_megatron.data.samples import cache_root, open_samples
from oryx_megatron.data.tokenizer import Tokenizer, difference
from oryx_megatron.errors import WEIGHTS_ALONE, DataError
from oryx_megatron.parallel.wait import first_rank_alone

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
Order = tuple[np.ndarray, np.ndarray]
"""[samples] number of the dataset that each sample of a blend is from, and its number there."""
FILES = 12
"""Files that a dataset keeps open: its tokens, its index and three arrays of samples, for training and validation."""


@dataclass(frozen=True)
class BlendPart:
    """One dataset's share of a blend."""

    path: str
    samples: int
    """Samples the run takes from it."""
    epochs: float
    """How often that is its whole."""


@dataclass(frozen=True)
class BlendPreview:
    """What a run would read of one split or validation set, without indices of samples."""

    name: str
    parts: tuple[BlendPart, ...]
    identity: dict[str, Any]
    """See Blend; without `epochs`."""


class Blend(torch.utils.data.Dataset):
    """Samples of one split or validation set, in the order of the run."""

    def __init__(
        self,
        name: str,
        datasets: Sequence[GPTDataset],
        order: Order | None,
        size: int,
        parts: tuple[BlendPart, ...],
        identity: dict[str, Any],
        counted: int | None = None,
    ) -> None:
        """`counted`: samples that are read; those after it fill the last batch up and have no loss. None: all."""
        self.name = name
        self.datasets = datasets
        self.order = order
        self.size = size
        self.parts = parts
        self.counted = size if counted is None else counted
        self.identity = identity
        """What decides the order of samples; kept in checkpoints, see `check_resume`."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """tokens and labels [s] int64, loss_mask [s] float32, position_ids [s] of one sample."""
        if index >= self.counted:
            sample = self[index % self.counted]
            return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}
        if self.order is None:
            return self.datasets[0][index]
        return self.datasets[int(self.order[0][index])][int(self.order[1][index])]


@dataclass(frozen=True)
class _Stage:
    start: int  # sample
    stop: int
    blend: tuple[BlendEntry, ...]


@dataclass(frozen=True)
class _Source:
    """What one split or validation set is read from."""

    name: str
    stages: tuple[_Stage, ...]
    share: tuple[float, float, float]
    split: Split
    opened: dict[str, Dataset]
    """By path, others' too."""

    @property
    def paths(self) -> list[str]:
        """Paths of its datasets, each once."""
        return list(dict.fromkeys(entry.path for stage in self.stages for entry in stage.blend))

    @cached_property
    def sequences(self) -> dict[str, tuple[int, int]]:
        """First and last + 1 sequence of the split in each dataset, rounded as megatron-core's builder does."""
        edges = np.concatenate([[0.0], np.cumsum(np.array(self.share) / sum(self.share))])
        begin, end = float(edges[self.split.value]), float(edges[self.split.value + 1])
        counts = {path: len(self.opened[path].index.lengths) for path in self.paths}
        return {path: (round(begin * count), round(end * count)) for path, count in counts.items()}

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens of the split in each dataset."""
        return {
            path: int(self.opened[path].index.lengths[first:stop].sum(dtype=np.int64))
            for path, (first, stop) in self.sequences.items()
        }


EVERY = 0
"""Instead of a number of samples: all of a validation set, each once."""


def evaluation_samples(run: RunConfig) -> int:
    """Samples of a validation set that an evaluation of this run reads, or EVERY."""
    return EVERY if run.evaluation.batches is None else run.evaluation.batches * run.train.global_batch_size


def sample_counts(run: RunConfig, count: SampleCount | None = None) -> dict[str, int]:
    """Samples a run needs: `train`, `valid` when the split has a validation part, and each further validation set."""
    evaluation = evaluation_samples(run)
    counts = {"train": (count or SampleCount.of(run.train)).samples_at(run.train.iterations)}
    if run.data.split[1] > 0:
        counts["valid"] = evaluation
    return counts | dict.fromkeys(run.data.validation, evaluation)


def build_datasets(
    run: RunConfig,
    tokenizer: Tokenizer,
    samples: dict[str, int] | None = None,
    *,
    once: bool | None = None,
    count: SampleCount | None = None,
) -> dict[str, Blend]:
    """Blends by name: `train`, `valid`, `test` and the names of data.validation.

    Arguments: `samples` to build per name (default `sample_counts(run)`); names left out are not built. `once`: what is
    not for training has no more samples than its data hold, each read once, and the last batch is filled up with
    samples without loss; default: with the default `samples` only, else there are as many samples as asked for.
    `count`: training samples by iteration; default: as the config has it.
    Under torch.distributed all ranks must call it: rank 0 verifies and builds, the others then map the finished cache.
    Raises DataError, on every rank, for a missing, damaged, empty or foreign dataset.
    """
    once = samples is None if once is None else once
    count = count or SampleCount.of(run.train)
    samples = sample_counts(run, count) if samples is None else samples
    named = [run.data.blend, *(stage.blend for stage in run.data.stages), *run.data.validation.values()]
    _allow_files(sum(map(len, named)))
    blends: dict[str, Blend] = {}

    def build() -> dict[str, Any]:
        try:
            blends.update(_build(run, tokenizer, samples, once, count))
        except (DataError, OSError) as error:
            raise _as_data_error(error) from error
        return {name: blend.identity for name, blend in blends.items()}

    identities = first_rank_alone(build, "builds sample indices", DataError)
    if not blends:
        try:
            blends.update(_build(run, tokenizer, samples, once, count, identities))
        except (DataError, OSError) as error:
            raise DataError.of_one_rank(str(_as_data_error(error))) from error  # rank 0 saw no fault
    return blends


def _as_data_error(error: Exception) -> DataError:
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return DataError(
            f"too many open files: each dataset of a blend needs up to {FILES} and this process may have {hard}; raise "
            "the limit (ulimit -Hn), or merge datasets (oryx data merge)"
        )
    if isinstance(error, DataError):
        return error
    return DataError(f"cannot build sample indices: {error}; see data.cache_dir")


def _allow_files(datasets: int) -> None:
    """Raise this process' limit of open files, as far as it may, to what so many datasets need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES * datasets + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _build(
    run: RunConfig,
    tokenizer: Tokenizer,
    samples: dict[str, int],
    once: bool,
    count: SampleCount,
    expected: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Blend]:
    """Blends by name.

    `expected`: identities that rank 0 found; None on rank 0, which alone may build and checks more.
    """
    blends = {}
    for source in _sources(run, tokenizer, samples, count, expected):
        blend = blends[source.name] = _blend(run, tokenizer, source, once and source.name != "train")
        if expected is not None:
            blend.identity = expected[source.name]
    return blends


def preview_datasets(run: RunConfig, tokenizer: Tokenizer, count: SampleCount) -> dict[str, BlendPreview]:
    """What a run would read of each dataset, by blend: opened and checked as `build_datasets` does; writes nothing.

    `samples` of a part are its share by weight: the exact order is drawn when the run starts.
    Raises DataError for a missing, damaged, empty or foreign dataset.
    """
    found = {}
    for source in _sources(run, tokenizer, sample_counts(run, count), count, None):
        name, stages, wanted = source.name, source.stages, dict[str, float]()
        for stage in stages:
            whole = sum(entry.weight for entry in stage.blend)
            for entry in stage.blend:
                part = (stage.stop - stage.start) * (entry.weight / whole if len(stage.blend) > 1 else 1.0)
                wanted[entry.path] = wanted.get(entry.path, 0.0) + part
        tokens = source.tokens
        if name != "train" and stages[-1].stop == EVERY:
            wanted = {path: float(_held(tokens[path], run)) for path in wanted}
        parts = (
            BlendPart(path, round(part), part * run.data.sequence_length / tokens[path])
            for path, part in wanted.items()
        )
        found[name] = BlendPreview(name, tuple(parts), _identity(run, tokenizer, source))
    return found


def _sources(
    run: RunConfig,
    tokenizer: Tokenizer,
    samples: dict[str, int],
    count: SampleCount,
    expected: dict[str, dict[str, Any]] | None,
) -> Iterator[_Source]:
    """What each split and validation set is read from, once all its checks have passed; `expected` as for `_build`.

    The first rank of a node compares the content of its files too: they may be a copy of their own.
    """
    first = expected is None
    content = first or platform.local_rank() == 0
    known = {file["path"]: data for identity in (expected or {}).values() for data, file in identity["files"].items()}
    if tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{run.model.vocab_size}: make the model's vocabulary at least as large"
        )
    unknown = set(samples) - set(SPLITS) - set(run.data.validation)
    if unknown:
        names = ", ".join([*SPLITS, *run.data.validation])
        raise DataError(f"no dataset is called {sorted(unknown)[0]!r}; known: {names}")
    opened: dict[str, Dataset] = {}
    for name, size in samples.items():
        if name == "train":
            stages = _stages(run, size, count)
        else:
            entries = run.data.validation.get(name) or first_blend(run)
            stages = (_Stage(0, size, entries),)
        share = (0.0, 1.0, 0.0) if name in run.data.validation else run.data.split
        split = Split.valid if name in run.data.validation else Split[name]
        for entry in (entry for stage in stages for entry in stage.blend):
            if entry.path not in opened:
                dataset = open_dataset(
                    entry.path,
                    vocab_size=tokenizer.vocab_size if first else None,
                    tokenizer=tokenizer.describe(),
                    content=content,
                    known=None if content else known[entry.path],
                )
                opened[entry.path] = dataset
                if not first and dataset.identity() != known[entry.path]:
                    raise DataError(
                        f"dataset {entry.path} on {socket.gethostname()} is not the one that rank 0 reads: its content "
                        "is another; copy it again"
                    )
                if first and run.data.documents == "isolated":
                    _check_boundaries(opened[entry.path], tokenizer)
        source = _Source(name, stages, share, split, opened)
        if first:
            _check_weights(stages)
            _check_names(source)
            _check_ends(name, [opened[entry.path] for stage in stages for entry in stage.blend], tokenizer)
        _check_tokens(source)
        yield source


def first_blend(run: RunConfig) -> tuple[BlendEntry, ...]:
    """What a run trains on from its first step; `data.split`'s second part of it is the validation set.

    Raises:
        DataError: there is none.
    """
    blend = run.data.blend or next((stage.blend for stage in run.data.stages if stage.start == 0), ())
    if not blend:
        raise DataError("data.blend is empty: name at least one dataset")
    return blend


def _stages(run: RunConfig, size: int, count: SampleCount) -> tuple[_Stage, ...]:
    """The training blend over samples. A stage's `start` is an iteration."""
    starts = {0: first_blend(run)} | {stage.start: stage.blend for stage in run.data.stages}
    blends: dict[int, tuple[BlendEntry, ...]] = {}
    for start in sorted(starts):  # of stages that began before the first sample, the last one counts
        begin = max(count.samples_at(start), 0) if start else 0
        if begin < size or not start:
            blends[begin] = starts[start]
    begins = list(blends)
    return tuple(_Stage(begin, end, blends[begin]) for begin, end in zip(begins, [*begins[1:], size], strict=True))


def _check_boundaries(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Refuse a dataset of which `documents: isolated` would find no document."""
    ended, looked = dataset.ends(tokenizer.eod_id)
    if ended == 0 and not dataset.holds(tokenizer.eod_id):
        made = dataset.manifest is None or dataset.manifest.get("append_eod", True)
        why = (
            f"none of the documents looked at ({looked} of {dataset.documents}) ends with token {tokenizer.eod_id}, "
            f"which ends documents for tokenizer {tokenizer.name}"
            if made
            else "it was made without end-of-document tokens"
        )
        raise DataError(
            f"dataset {dataset.prefix}: {why}, so data.documents: isolated cannot find its documents; tokenize it "
            "again without --no-eod, or set data.documents: joined"
        )
    if ended < looked:
        logger.warning(
            "dataset %s: %d of %d documents looked at end with the end-of-document token %d; data.documents: isolated "
            "joins the others to what follows", dataset.prefix, ended, looked, tokenizer.eod_id,
        )  # fmt: skip


def _check_ends(name: str, datasets: Sequence[Dataset], tokenizer: Tokenizer) -> None:
    """Refuse a blend of datasets with and without end-of-document tokens."""
    marked: dict[bool, Dataset] = {}
    for dataset in datasets:
        known = dataset.facts.get("append_eod")
        marked.setdefault(dataset.ends(tokenizer.eod_id)[0] > 0 if known is None else known, dataset)
    if len(marked) == 2:
        raise DataError(
            f"the {name} blend: the documents of {marked[True].prefix} end with the end-of-document token "
            f"{tokenizer.eod_id}, those of {marked[False].prefix} do not (--no-eod); tokenize one of them again"
        )


def _check_weights(stages: tuple[_Stage, ...]) -> None:
    """Refuse weights by which nothing is drawn from one of several datasets."""
    entries = [entry for stage in stages for entry in stage.blend]
    for entry in entries:
        if len({entry.path for entry in entries}) > 1 and not entry.weight > 0:
            raise DataError(f"weight of dataset {entry.path} is {entry.weight}; it must be above 0")


def _check_names(source: _Source) -> None:
    """Refuse a blend that names one dataset twice: by a link, another path, or a copy. It would be repeated."""
    seen: dict[str, str] = {}
    for path in source.paths:
        other = seen.setdefault(source.opened[path].digests["bin"], path)
        if other != path:
            raise DataError(
                f"the {source.name} blend: {other} and {path} are one dataset (the same tokens), which would be read "
                "twice; give it one name, with the sum of the weights"
            )


def _check_tokens(source: _Source) -> None:
    """Refuse a dataset of which the split has nothing."""
    for path, (first, stop) in source.sequences.items():
        if source.tokens[path] == 0:
            raise DataError(
                f"dataset {path}: its {source.split.name} part is empty ({stop - first} of "
                f"{source.opened[path].documents} documents); use more documents or change data.split"
            )


def _blend(run: RunConfig, tokenizer: Tokenizer, source: _Source, once: bool) -> Blend:
    """The samples of a source in the order of the run; `once`: each is read at most once (see `build_datasets`)."""
    paths, size = source.paths, source.stages[-1].stop
    identity = _identity(run, tokenizer, source)
    tokens = source.tokens
    held = [_held(tokens[path], run) for path in paths]
    every = once and size == EVERY
    size = counted = sum(held) if every else size
    order = _order(run, source, identity, held if every else None)
    if once:
        order, counted = _read_once(source.name, paths, order, held, size)
    counts = {paths[0]: counted}
    if order is not None:
        counts = dict(zip(paths, np.bincount(order[0], minlength=len(paths)).tolist(), strict=True))
    datasets, parts = [], []
    for path in paths:
        datasets.append(
            open_samples(
                run,
                tokenizer,
                path,
                source.opened[path],
                split=source.split,
                share=source.share,
                sequences=source.sequences[path],
                count=counts[path],
            )
        )
        parts.append(BlendPart(path, counts[path], counts[path] * run.data.sequence_length / tokens[path]))
    identity["epochs"] = {source.opened[p.path].identity(): [p.samples, bool(p.epochs > 1)] for p in parts}
    for part in parts:
        logger.info("%s: %d samples (%.2f epochs) of %s", source.name, part.samples, part.epochs, part.path)
    if once:
        batch = run.train.global_batch_size
        filled = -(-counted // batch) * batch
        size = filled if every else min(size, filled)
    return Blend(source.name, datasets, order, size, tuple(parts), identity, min(counted, size))


def _order(run: RunConfig, source: _Source, identity: dict[str, Any], held: list[int] | None) -> Order | None:
    """Dataset and sample in it, of each sample of a blend; None where there is one dataset.

    By the weights of the stages, or, where `held` gives their numbers of samples, all of the datasets one by one.
    """
    paths = source.paths
    if len(paths) == 1:
        return None
    if held is not None:
        return np.repeat(np.arange(len(held), dtype=np.int16), held), np.concatenate([*map(np.arange, held)])
    root, shared = cache_root(run, source.opened[paths[0]].place, "blends")
    key = {"paths": [source.opened[path].identity() for path in paths], "stages": identity["stages"]}
    folder = cached(root, key, lambda target: _write_order(target, source.stages, paths), shared=shared)
    return np.load(folder / "dataset.npy", mmap_mode="r"), np.load(folder / "sample.npy", mmap_mode="r")


def _identity(run: RunConfig, tokenizer: Tokenizer, source: _Source) -> dict[str, Any]:
    """What decides the order of samples, but for how many of each dataset there are (`epochs`)."""
    opened = source.opened
    return {
        "sequence_length": run.data.sequence_length,
        "seed": run.seed,
        "share": list(source.share),
        "split": source.split.name,
        "eod": tokenizer.eod_id,
        "fingerprint": tokenizer.fingerprint,
        "tokenizer": tokenizer.describe(),
        "files": {opened[path].identity(): {"path": path, **opened[path].record()} for path in source.paths},
        "stages": [
            {"start": s.start, "stop": s.stop, "blend": [[opened[e.path].identity(), e.weight] for e in s.blend]}
            for s in source.stages
        ],
    }


def _read_once(
    name: str, paths: list[str], order: Order | None, held: list[int], size: int
) -> tuple[Order | None, int]:
    """The order and number of samples of an evaluation without those read before; `held`: samples of each dataset."""
    if order is None:
        short, counted = paths, min(size, held[0])
    else:
        again = np.asarray(order[1]) >= np.array(held)[np.asarray(order[0])]
        short = [paths[number] for number in np.unique(order[0][again])]
        order = (order[0][~again], order[1][~again])
        counted = len(order[0])
    if counted < size:
        more = f" and {len(short) - 3} more" if len(short) > 3 else ""
        logger.warning(
            "%s: evaluation reads %d samples, not the %d that evaluation.batches asks for: %s%s hold no more, and "
            "nothing is read twice", name, counted, size, ", ".join(short[:3]), more,
        )  # fmt: skip
    return order, counted


def _held(tokens: int, run: RunConfig) -> int:
    """Samples in so many tokens."""
    return max((tokens - 1) // run.data.sequence_length, 1)


def _write_order(target: Path, stages: tuple[_Stage, ...], paths: list[str]) -> None:
    """Which dataset, and which of its samples, each sample of the run is."""
    size = stages[-1].stop
    dataset_of = np.zeros(size, np.int16)
    sample_of = np.zeros(size, np.int64)
    used = np.zeros(len(paths), np.int64)
    for stage in stages:
        number = stage.stop - stage.start
        weights = np.array([entry.weight for entry in stage.blend], np.float64)
        chosen, sample = np.zeros(number, np.int16), np.zeros(number, np.int64)
        helpers.build_blending_indices(chosen, sample, (weights / weights.sum()).tolist(), len(weights), number, False)
        names = np.array([paths.index(entry.path) for entry in stage.blend], np.int16)
        dataset_of[stage.start : stage.stop] = names[chosen]
        sample_of[stage.start : stage.stop] = sample + used[names[chosen]]
        used += np.bincount(names[chosen], minlength=len(paths))
    np.save(target / "dataset.npy", dataset_of)
    np.save(target / "sample.npy", sample_of)


def check_resume(state: dict[str, Any], blend: Blend | BlendPreview) -> None:
    """Compare a checkpoint's data state with the blend about to be read.

    Raises DataError when samples before `consumed` were drawn from other data or in another order than now; warns when
    only the length of the run changed the order of what is still to come.
    """
    then, now, consumed = state["identity"], blend.identity, state["consumed"]
    for field in ("sequence_length", "seed", "share", "split", "eod"):
        if then[field] != now[field]:
            raise DataError(
                f"the checkpoint's {blend.name} data had {field} {then[field]}, now it is {now[field]}: "
                f"set it back, or {WEIGHTS_ALONE}"
            )
    # Earlier versions wrote down no more than the fingerprint.
    made = then.get("tokenizer")
    if made is None:
        made = {**now["tokenizer"], "fingerprint": then["fingerprint"]}
        made.pop("file", None)
    if (why := difference(made, now["tokenizer"])) is not None:
        raise DataError(f"the checkpoint's {blend.name} data had {why}: set data.tokenizer back, or {WEIGHTS_ALONE}")
    # Earlier versions knew datasets without manifest by size and time.
    by_time = {file["written"]: data for data, file in now["files"].items()}
    then = _renamed(then, by_time)
    started = [[s["start"], s["blend"]] for s in then["stages"] if s["start"] < max(consumed, 1)]
    if started != [[s["start"], s["blend"]] for s in now["stages"] if s["start"] < max(consumed, 1)]:
        raise DataError(
            f"the {blend.name} blend of the first {consumed} samples is not the checkpoint's: restore data.blend and "
            "data.stages up to there and put changes into a stage that starts later; a dataset there may hold other "
            "tokens than it did"
        )
    for data, file in then.get("files", {}).items():
        found = now["files"].get(data, file)
        if file["content"] != found["content"]:
            raise DataError(
                f"{found['path']}.bin is not the file that the checkpoint's {blend.name} data were read from: its "
                f"content is another; restore it, or {WEIGHTS_ALONE}"
            )
        if file["size"] > WHOLE and file["written"] != found["written"]:
            logger.warning(
                "dataset %s was written or copied again since the checkpoint; what is compared of its content is the "
                "same (to compare all of it: oryx data inspect %s --verify)", found["path"], found["path"],
            )  # fmt: skip
    epochs = now.get("epochs", {})  # not known before indices are built
    for data, (samples, repeats) in then["epochs"].items():
        if data in epochs and epochs[data] != [samples, repeats] and (repeats or epochs[data][1]):
            logger.warning("the run's length changed: samples still to come may repeat some of those already seen")
            return


def _renamed(then: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """An identity with the datasets that `names` knows called by their new names."""
    if not names.keys() & then["epochs"].keys():
        return then
    logger.info("this checkpoint knows datasets without manifest by size and time alone: their content is not compared")
    stages = [
        stage | {"blend": [[names.get(data, data), weight] for data, weight in stage["blend"]]}
        for stage in then["stages"]
    ]
    return then | {"stages": stages, "epochs": {names.get(data, data): n for data, n in then["epochs"].items()}}

"""Saving and loading during a run: in the foreground or background, verified, with fallback to older checkpoints."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from oryx_megatron import compat, platform
from oryx_megatron.checkpoint import safe, store
from oryx_megatron.checkpoint.average import Averages
from oryx_megatron.checkpoint.manifest import Digests, MakeManifest, Manifest, file_digest, write_manifest
from oryx_megatron.checkpoint.remote import RemoteCheckpoints
from oryx_megatron.checkpoint.state import gather_weights, has_stepped, load_sharded_state, sharded_state
from oryx_megatron.checkpoint.writers import SaveStrategy, end_writers, look_at, renew_reports
from oryx_megatron.config.schema import CheckpointConfig, WeightsKind
from oryx_megatron.errors import NO_ROOM, CheckpointError, ClosedCheckpointError
from oryx_megatron.storage import StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class _Pending:
    folder: Path
    manifest: MakeManifest
    deadline: float
    digests: Future[Digests | OSError] | None = None
    """Of this rank's files, from when the writers are done."""
    final: Future[Path] | None = None
    """On rank 0, from when all digests are known; elsewhere it is done at once and without meaning."""


class Checkpoints:
    """The folders of one run's checkpoints; what they hold is the subclass's matter. Every method is collective.

    Args:
        root: Folder that holds the checkpoints.
        config: Interval, retention, background writing, timeout.
        remote: Object storage that keeps them; `root` is then a folder of each machine for itself.
    """

    def __init__(self, root: Path, config: CheckpointConfig, remote: RemoteCheckpoints | None = None) -> None:
        self.root, self.config, self.remote = root, config, remote
        self._damaged: set[str] = set()
        """Checkpoints found damaged at load; they count for nothing."""
        self._staying: set[str] = set()
        """Old checkpoints that retention could not remove, each of which was logged once."""

    @property
    def name(self) -> str:
        """Where the checkpoints are kept, for messages."""
        return str(self.root if self.remote is None else self.remote.remote)

    def save(self, iteration: int, manifest: MakeManifest) -> Path | None:
        """Write a checkpoint and return it, or None when `poll` is to complete it.

        Args:
            iteration: Optimizer steps done.
            manifest: Makes the manifest from the digests of the files.

        Raises:
            CheckpointError: the save, or an unfinished one before it, failed; older checkpoints are untouched.
        """
        raise NotImplementedError

    def poll(self) -> Path | None:
        """Complete a background save if its writers are done; returns the new checkpoint then."""
        return None

    def wait(self) -> Path | None:
        """Complete the save in progress, if any."""
        return None

    def load(
        self, check: Callable[[Manifest], None] = lambda manifest: None, *, before: int | None = None
    ) -> Manifest | None:
        """Load the newest checkpoint that is whole; None when there is none at all.

        Files are compared with the manifest's checksums, each rank reading its share. A damaged checkpoint is named
        in the log and the one before it is used.

        Args:
            check: Raises when the run cannot resume from this manifest; called before any tensor is read.
            before: Only checkpoints of earlier iterations count.

        Raises:
            CheckpointError: there are checkpoints but none is whole, the newest is of a newer version, or it does not
                fit the model.
        """
        damaged = []
        for folder in self._candidates(before):
            manifest, bad = self._verify(folder)
            if manifest is None or bad:
                damaged.append(folder.name)
                self._damaged.add(folder.name)
                place = f"{self.name}/{folder.name}"
                log.warning("%s is damaged (%s); trying the checkpoint before it", place, ", ".join(bad[:3]))
                continue
            check(manifest)
            self._fill(folder, manifest)
            return manifest
        if damaged:
            raise store.all_damaged(self.name, damaged)
        if foreign := self._foreign():
            raise store.not_ours(self.name, foreign[0])
        return None

    def start_from(self, folder: Path, manifest: Manifest, *, optimizer: bool, weights: WeightsKind) -> None:
        """Fill the model, and the optimizer with averages if asked, from a whole checkpoint of another run.

        Heads of multi-token prediction that it has not stay as they are.

        Raises:
            CheckpointError: it does not fit the model or the optimizer.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- internals

    def _fill(self, folder: Path, manifest: Manifest) -> None:
        """Fill model and optimizer from a checkpoint; CheckpointError when it does not fit."""
        raise NotImplementedError

    def _probe(self, folder: Path) -> None:
        """CheckpointError when what describes the tensors of a checkpoint cannot be read."""

    def _settle(self, folder: Path) -> None:
        """On rank 0, when all tensors are written and before checksums are made."""

    def _finish(
        self,
        folder: Path,
        manifest: MakeManifest,
        mine: Digests | OSError,
    ) -> Path:
        """Make `folder`, whose tensors are all written, a complete checkpoint; `mine` are this rank's digests."""
        with self._clearing(folder):
            files = self._gather(folder, mine)
            return self._on_main_rank(lambda: self._complete(folder, manifest, files))

    def _foreign(self) -> list[str]:
        if self.remote is None:
            return store.foreign_files(self.root)
        return self._on_main_rank(self.remote.foreign)

    def _begin(self, iteration: int) -> Path:
        """The folder of a new save, on all machines that have one of their own."""
        remote = self.remote
        if remote is None:
            return self._on_main_rank(lambda: store.begin(self.root, iteration))
        remote.target = self._on_main_rank(lambda: remote.begin(iteration, self._damaged))
        folder = self.root / f"{store.WRITING}{iteration:07d}"
        failure: OSError | None = None
        if self._first_here():
            try:
                if store.begin(self.root, iteration) != folder:
                    failure = FileExistsError(f"{folder} is in the way")
            except OSError as error:
                failure = error
        if failures := self._failures(failure):
            raise CheckpointError(f"{self.root}: cannot be written ({failures})")
        return folder

    def _first_here(self) -> bool:
        """Whether this rank does what is done once for every folder that ranks share."""
        return torch.distributed.get_rank() == 0 if self.remote is None else self.remote.shard == 0

    @contextlib.contextmanager
    def _clearing(self, folder: Path) -> Iterator[None]:
        """Remove what a save wrote when it fails, as it does on all ranks: it would keep a full disk full."""
        try:
            yield
        except CheckpointError:
            torch.distributed.barrier()  # until no rank writes any more
            if self._first_here():
                store.discard(folder)
            raise

    @staticmethod
    def _gather(folder: Path, mine: Digests | OSError) -> Digests:
        """Digests of the files of all ranks."""
        digests: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(digests, mine)
        for part in digests:
            if isinstance(part, StorageError):
                raise CheckpointError(f"the checkpoint is not saved: {part}")
            if isinstance(part, OSError):
                raise CheckpointError(f"{folder}: could not read back what was written ({part})")
        return {name: digest for part in digests for name, digest in part.items()}

    def _complete(
        self,
        folder: Path,
        manifest: MakeManifest,
        files: Digests,
    ) -> Path:
        """On rank 0: what turns written tensors into a checkpoint, and the removal of old ones."""
        self._settle(folder)
        mine = {path.name: file_digest(path) for path in folder.iterdir() if path.name not in files}
        write_manifest(folder, manifest(dict(sorted((files | mine).items()))))
        if self.remote is not None:
            self.remote.publish(folder, mine)
        final = store.commit(folder)
        self._damaged.discard(final.name)
        config = self.config
        try:
            rules: dict[str, Any] = {"steps": config.steps, "best": config.keep_best}
            rules |= {"damaged": self._damaged, "told": self._staying}
            if self.remote is not None:
                self.remote.retain(config.keep, config.keep_every, **rules)
            else:
                store.apply_retention(self.root, config.keep, config.keep_every, **rules)
        except OSError as error:  # the new checkpoint is whole all the same
            log.warning("old checkpoints stay: %s", error)
        return final

    def _candidates(self, before: int | None) -> list[Path]:
        """Folders to try, newest first, as rank 0 sees them: on shared storage others may see them later."""

        def find() -> list[Path]:
            if self.remote is not None:
                self.remote.mirror()
            folders = store.list_folders(self.root)
            return [folder for folder in reversed(folders) if before is None or store.iteration_of(folder) < before]

        found = self._on_main_rank(find)
        return found if self.remote is None else [self.root / folder.name for folder in found]

    def _verify(self, folder: Path) -> tuple[Manifest | None, list[str]]:
        """Manifest and what is wrong; every rank reads a share of the files, and all learn of all faults."""
        rank, world, remote = torch.distributed.get_rank(), torch.distributed.get_world_size(), self.remote
        manifest = None

        def compare() -> list[str]:
            nonlocal manifest
            manifest = store.read_own(folder)
            if remote is not None:
                return remote.bring(folder, manifest)
            bad = store.damaged_files(folder, manifest, shard=rank, shards=world)
            if not bad:
                self._probe(folder)
            return bad

        def probe() -> list[str]:
            self._probe(folder)
            return []

        if remote is not None:
            self._on_all(lambda: remote.bring_manifest(folder) if remote.shard == 0 else None)
        found = self._on_all(compare)
        if remote is not None and not any(found):
            found = self._on_all(probe)  # it reads a file that another rank has brought
        return manifest, list(dict.fromkeys(name for part in found for name in part))

    @staticmethod
    def _on_all(action: Callable[[], list[str] | None]) -> list[list[str]]:
        """What `action` found wrong on each rank; storage that fails and a closed checkpoint are every rank's error."""
        try:
            mine: Any = action() or []
        except (ClosedCheckpointError, StorageError) as error:
            mine = error
        except CheckpointError as error:
            mine = [str(error)]
        except OSError as error:
            mine = StorageError(str(error))
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        for part in found:
            if isinstance(part, StorageError):
                raise CheckpointError(str(part))
            if isinstance(part, ClosedCheckpointError):
                raise part
        return found

    @staticmethod
    def _failures(mine: BaseException | None) -> str:
        """Failures of all ranks in one text, `rank 3: …; rank 5: …`; empty when there are none."""
        causes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(causes, mine and _cause(mine))
        return "; ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause)

    @staticmethod
    def _on_main_rank(action: Callable[[], T]) -> T:
        """Run on rank 0 and give its result to all; a failure there is a CheckpointError everywhere."""
        outcome: list[Any] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                outcome = [action()]
            except CheckpointError as error:
                outcome = [error]
            except OSError as error:
                outcome = [CheckpointError(f"could not write a checkpoint: {error}")]
        torch.distributed.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], CheckpointError):
            raise outcome[0]
        return outcome[0]


class CheckpointManager(Checkpoints):
    """Checkpoints in megatron-core's distributed format, which load under any layout.

    Args:
        root: Folder that holds the checkpoints.
        config: Interval, retention, background writing, timeout.
        chunks: Model chunks of this rank.
        optimizer: Their optimizer.
        remote: See Checkpoints.
        average: Of the weights (train/ema.py); None: none is kept.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        chunks: list[Any],
        optimizer: MegatronOptimizer,
        remote: RemoteCheckpoints | None = None,
        average: Averages | None = None,
    ) -> None:
        super().__init__(root, config, remote)
        self.chunks, self.optimizer, self.average = chunks, optimizer, average
        self._queue = AsyncCallsQueue()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        """Thread for what runs beside training: reading files for their digests, and rank 0's last steps."""
        safe.install()
        compat.megatron.keep_common_failures()
        compat.megatron.keep_causes()
        renew_reports()
        self._strategy = SaveStrategy()
        self._pending: _Pending | None = None

    def save(self, iteration: int, manifest: MakeManifest) -> Path | None:
        """See Checkpoints; when configured the save is only started, and `poll` completes it.

        The writers are processes of their own in either case: a writer that dies or hangs leaves this rank able to
        notice and to continue.
        """
        if self._pending is not None:
            raise RuntimeError("a save is in progress: poll or wait first")
        folder = self._begin(iteration)
        with self._clearing(folder):
            self._start(folder, iteration, manifest)
        return None if self.config.asynchronous else self.wait()

    def start_from(self, folder: Path, manifest: Manifest, *, optimizer: bool, weights: WeightsKind) -> None:
        """See Checkpoints."""
        if optimizer:
            self._fill(folder, manifest)
        else:
            load_sharded_state(folder, self.chunks, self.optimizer, weights_only=True, weights=weights, new_heads=True)

    def _start(self, folder: Path, iteration: int, manifest: MakeManifest) -> None:
        """Start the writers of all ranks."""
        started = time.monotonic()
        gather_weights(self.chunks)
        # An optimizer that never stepped has no state, and starts after loading as it does now.
        held = self.average.parts if self.average is not None and self.average.begun else None
        state = sharded_state(self.chunks, self.optimizer if has_stepped(self.optimizer) else None, averages=held)
        failure: BaseException | None = None
        try:
            request = compat.megatron.save(state, folder, self._strategy, validate=iteration <= 1)
            # Its last step, rank 0 writing metadata.json, is done in `_settle`, where a failure is every rank's.
            request.finalize_fns.pop()
            failure = compat.megatron.common_failure()
            if failure is None:
                self._queue.schedule_async_request(request)
        except (CheckpointException, CheckpointingException) as error:  # raised on all ranks
            self._strategy.forget()
            raise CheckpointError(f"{folder}: could not start to save ({_cause(error)})") from error
        except OSError as error:  # this rank could not start its writer
            failure = error
        if failures := self._failures(failure):
            self._abandon()
            raise CheckpointError(f"{folder}: could not start to save ({failures})")
        self._pending = _Pending(folder, manifest, started + self.config.timeout)

    def poll(self) -> Path | None:
        """See Checkpoints.

        Raises:
            CheckpointError: a writer failed or the timeout passed.
        """
        if self._pending is None:
            return None
        with self._clearing(self._pending.folder):
            return self._poll(self._pending)

    def _poll(self, pending: _Pending) -> Path | None:
        try:
            if pending.digests is None:
                done, died = look_at(call.async_caller for call in self._queue.async_calls)
                if not self._all_done(done, died=died):
                    return None
                self._queue.maybe_finalize_async_calls(blocking=False)
                # Hashing takes as long as reading the files: it runs beside training, too.
                pending.digests = self._background.submit(
                    _digests, pending.folder, torch.distributed.get_rank(), self.remote
                )
        except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
            # CheckpointException, torch's report of what the writers ran into, is no subclass of Exception.
            self._pending = None
            raise CheckpointError(f"{pending.folder}: a writer failed ({_cause(error)})") from error
        if pending.final is None:
            if not self._all_done(pending.digests.done()):
                return None
            self._pending = None  # should a rank's digests be an error, which ends this save on all
            files = self._gather(pending.folder, pending.digests.result())
            self._pending = pending
            if torch.distributed.get_rank() == 0:
                pending.final = self._background.submit(self._complete, pending.folder, pending.manifest, files)
            else:
                pending.final = Future()
                pending.final.set_result(pending.folder)
        if not self._all_done(pending.final.done(), abandon=False):
            return None
        self._pending = None
        final = self._on_main_rank(pending.final.result)
        if self.remote is None:
            return final
        final = self.root / final.name
        if self.remote.shard == 0:
            if torch.distributed.get_rank() != 0:
                store.commit(pending.folder)
            self.remote.tidy(final)
        return final

    def _all_done(self, mine: bool, *, died: str = "", abandon: bool = True) -> bool:
        """Whether all ranks are done with the present part of the save, in one small exchange.

        Raises:
            CheckpointError: some are not although its time is up, or a writer `died`; the save is abandoned.
        """
        pending = self._pending
        assert pending is not None
        state = [not mine, time.monotonic() > pending.deadline, bool(died)]
        flags = torch.tensor(state, device=platform.device()).int()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        busy, late, dead = flags.tolist()
        if dead:
            failures = self._failures(RuntimeError(died) if died else None)
            self._abandon()
            raise CheckpointError(f"{pending.folder}: a writer failed ({failures})")
        if busy and late and abandon:
            self._abandon()
            raise CheckpointError(
                f"{pending.folder}: not written within checkpoint.timeout = {self.config.timeout:g} s"
            )
        return not busy

    def wait(self) -> Path | None:
        """See Checkpoints."""
        while self._pending is not None:
            if final := self.poll():
                return final
            time.sleep(0.02)
        return None

    def _probe(self, folder: Path) -> None:
        if not store.by_another_engine(folder):
            safe.read_metadata(folder)

    def _fill(self, folder: Path, manifest: Manifest) -> None:
        held = None if self.average is None else self.average.parts
        found = load_sharded_state(folder, self.chunks, self.optimizer, averages=held)
        if self.average is not None:
            self.average.loaded(manifest.iteration, found=found)

    def _settle(self, folder: Path) -> None:
        self._strategy.describe()
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(folder))

    def _abandon(self) -> None:
        end_writers(call.async_caller for call in self._queue.async_calls)
        self._queue.async_calls.clear()
        self._pending = None
        self._strategy.forget()
        renew_reports()


def _digests(folder: Path, rank: int, remote: RemoteCheckpoints | None) -> Digests | OSError:
    """Sizes and checksums of the files that this rank wrote, uploaded; an error is a value, for all ranks to learn."""
    try:
        found = {path.name: file_digest(path) for path in folder.glob(f"__{rank}_*.distcp")}
        if remote is not None:
            remote.upload(folder, found)
        return found
    except OSError as error:
        return error


def _cause(error: BaseException) -> str:
    """The last line of a message: there torch's reports name the error itself."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    # What torch's writer of zip files says when not all bytes could be written, and what a system says.
    numbers = (f"[Errno {number}]" for number in NO_ROOM)
    full = any(text in line for text in ("inline_container", "iostream error", *numbers))
    return f"{line}; is the disk full, or a quota used up?" if full else line

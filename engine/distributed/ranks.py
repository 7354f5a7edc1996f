"""The processes of one run: ranks, flags and values that they share, and the loss of a rank.

``torchrun`` starts the processes and sets their ranks in the environment; without it a run is one
process and nothing here opens a connection.  There are three process groups: the default one for
gradients (NCCL on GPUs, gloo on CPUs), one of gloo for flags and values on the host, and one of
gloo for the threads that write checkpoints, which call at any time.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..utils.errors import InputError, LostRankError
from ..utils.json_text import dump_json

_MOST_RANKS = 1 << 16
_GLANCE = 1e-3  # seconds between two looks at an event
_PAUSE = 0.1  # seconds between attempts to reach the first process
_BEAT, _SILENCE = 2.0, 30.0  # seconds between signs of life, and without any
_CHUNK = 16 << 20  # bytes that a rank sends at once, so that copies take little memory
_GRACE = 3.0  # seconds for ranks that notice a loss a little later than this one


class Ranks:
    """The N processes of a run, seen from one of them.

    Attributes:
        rank: this process, from 0.
        size: N.
        local_rank: the number of the process on its machine, and of its GPU.
        local_size: the number of processes on its machine.
        group: for values on the host; None when there is one process only.
        checkpoint_group: for the threads that write checkpoints, likewise.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1
    ) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.group: dist.ProcessGroup | None = None
        self.checkpoint_group: dist.ProcessGroup | None = None
        self._store: Store | None = None
        self._broadcasts = self._turns = 0
        self._timeout = 0.0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Return the ranks that ``torchrun`` set in the environment; one process without them.

        Raises:
            InputError: its variables make no sense.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not dist.is_available() or not all(name in os.environ for name in names[:2]):
            return cls()
        try:
            rank, size, local_rank, local_size = (
                int(os.environ.get(name, default))
                for name, default in zip(names, ("0", "1", "0", "1"), strict=True)
            )
        except ValueError as error:
            raise InputError(f"{', '.join(names)}: expected whole numbers ({error})") from None
        if not (0 <= rank < size <= _MOST_RANKS and 0 <= local_rank < size >= local_size):
            raise InputError(
                f"{', '.join(names)}: {rank}, {size}, {local_rank}, {local_size} make no sense; "
                f"let torchrun set them, for at most {_MOST_RANKS} ranks"
            )
        return cls(rank, size, local_rank, max(1, local_size))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, N)."""
        return self.rank, self.size

    @property
    def restarted(self) -> bool:
        """Whether ``torchrun`` started this process again after a failure."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def device(self, kind: torch.device) -> torch.device:
        """Return this process's own device of a kind: a GPU for each process of a machine.

        Raises:
            InputError: the machine has fewer GPUs than processes.
        """
        if kind.type != "cuda" or self.size == 1:
            return kind
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs, "
                f"process {self.local_rank} has none"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process of each machine do the block before the others.

        It may take any time, as preparing large data does, as long as that process is alive.
        """
        if self._store is None:
            yield
            return
        self._turns += 1
        if self.local_rank > 0:
            self._await([0])
            self.barrier()
            yield
            return
        with self._alive():
            yield
            if self.is_main:  # the others wait for it alone
                names = {
                    rank: self._store.get(_local_rank_of(rank)) for rank in range(1, self.size)
                }
                self._await(rank for rank, local in names.items() if int(local) == 0)
        self._await([0])
        self.barrier()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Let other ranks know that this one is at work in the block, and when it is done."""
        store, key, done = self._store, self._work_of(self.rank), threading.Event()
        assert store is not None, "there are other ranks"

        def beat() -> None:
            with suppress(RuntimeError):  # the store is gone, which the main thread notices
                while not done.wait(_BEAT):
                    store.add(key, 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with suppress(RuntimeError):
                store.set(f"{key}/done", "")

    def _await(self, ranks: Iterable[int]) -> None:
        """Wait for ranks that are at work, or silent, which the next exchange then shows."""
        store, seen = self._store, {rank: (0, time.monotonic()) for rank in ranks}
        assert store is not None, "there are other ranks"
        while True:
            for rank, (beats, since) in list(seen.items()):
                key, now = self._work_of(rank), time.monotonic()
                if store.check([f"{key}/done"]) or now - since > _SILENCE:
                    del seen[rank]
                elif (found := store.add(key, 0)) != beats:
                    seen[rank] = (found, now)
            if not seen:
                return
            time.sleep(_PAUSE)

    def _work_of(self, rank: int) -> str:
        return f"superbert/work/{self._turns}/{rank}"

    @contextmanager
    def init(self, device: torch.device, timeout: float) -> Iterator[None]:
        """Connect the processes for the block.

        Args:
            device: where gradients are.
            timeout: seconds after which a rank that does not answer is given up.

        Raises:
            LostRankError: a rank died or hangs; the message names it.
        """
        if self.size == 1:
            yield
            return
        patience, self._timeout = timedelta(seconds=timeout), timeout
        # NCCL's watchdog aborts the process without a word of which rank it waits for, so gloo's
        # groups, whose errors can be caught, give up first.
        backend, longer = ("gloo", 1) if device.type == "cpu" else ("cpu:gloo,cuda:nccl", 2)
        try:
            store = _open_store(patience)
            name, all_came = _name_attempt(store, self.rank, self.size, patience)
            # Addresses of the processes before a restart are no longer answered.
            self._store = PrefixStore(f"superbert/attempt-{name}", store)
            if not all_came:
                raise self._lost(TimeoutError("timed out"))
            self._store.set(_local_rank_of(self.rank), str(self.local_rank))
            dist.init_process_group(
                backend,
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=longer * patience,
                device_id=device if device.type == "cuda" else None,
            )
            self.group = dist.new_group(backend="gloo", timeout=patience)
            self.checkpoint_group = dist.new_group(backend="gloo", timeout=patience)
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _is_about_a_peer(error):
                raise
            # Nothing is destroyed here: that would wait for the lost rank.
            raise self._lost(error) from error
        dist.destroy_process_group()
        self.group = self.checkpoint_group = self._store = None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank; all must ask."""
        if self.group is None:
            return flag
        voice = torch.tensor(int(flag))
        dist.all_reduce(voice, dist.ReduceOp.MAX, group=self.group)
        return bool(voice)

    def all(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on every rank; all must ask."""
        return not self.any(not flag)

    def sum_(self, values: torch.Tensor) -> None:
        """Add up a CPU tensor over all ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)

    def have_equal(self, numbers: Sequence[int]) -> bool:
        """Return whether all ranks call this with the same numbers, equally many of 64 bits."""
        if self.group is None:
            return True
        own = torch.tensor(numbers)
        bounds = torch.stack([own, ~own])  # unlike -own, ~own never overflows
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.group)
        return torch.equal(bounds[0], ~bounds[1])

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return every rank's numbers, equally many of 64 bits; all must call."""
        own = torch.tensor(numbers)
        if self.group is None:
            return [own.tolist()]
        of_ranks = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(of_ranks, own, group=self.group)
        return [each.tolist() for each in of_ranks]

    def gather_array(self, own: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return every rank's array, of one dtype, of any length and equal further dimensions.

        All must call.  Each array is sent in pieces, which are padded to the longest.
        """
        if self.group is None:
            return [own]
        own = np.ascontiguousarray(own)
        found = [np.empty((rows, *own.shape[1:]), own.dtype) for (rows,) in self.gather([len(own)])]
        places = [torch.from_numpy(array.reshape(-1).view(np.uint8)) for array in found]
        sent = own.reshape(-1).view(np.uint8)
        for start in range(0, max(map(len, places)), _CHUNK):
            longest = max(len(place[start : start + _CHUNK]) for place in places)
            piece = torch.zeros(longest, dtype=torch.uint8)
            of_own = torch.tensor(sent[start : start + _CHUNK])  # a copy: it may be read-only
            piece[: len(of_own)] = of_own
            pieces = [torch.empty_like(piece) for _ in places]
            dist.all_gather(pieces, piece, group=self.group)
            for place, got in zip(places, pieces, strict=True):
                into = place[start : start + _CHUNK]
                into.copy_(got[: len(into)])
        return found

    def gather_values(self, value: Any) -> list[Any]:
        """Return every rank's ``value``; all must call.  JSON must hold it."""
        own = np.frombuffer(dump_json(value).encode(), dtype=np.uint8)
        return [json.loads(found.tobytes()) for found in self.gather_array(own)]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let bad input of one rank within the block end all of them, with the same line.

        All must enter; none may exchange anything within.

        Raises:
            InputError: of the first rank that has one.
        """
        problem = ""
        try:
            yield
        except InputError as error:
            if self.group is None:
                raise
            problem = str(error)
        said = self.gather_values(problem)
        rank, first = next(((rank, line) for rank, line in enumerate(said) if line), (0, ""))
        if first:
            raise InputError(first if len({*said}) == 1 else f"rank {rank} of {self.size}: {first}")

    def agree(self, number: int) -> None:
        """Check that all ranks call this with the same number; a defect if they do not."""
        if not self.have_equal([number]):
            raise AssertionError(f"rank {self.rank}: batches of a step differ in shape")

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """Return an event at the end of the device's work so far, for :meth:`wait_for`."""
        if self.group is None or device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def wait_for(self, events: Iterable[torch.cuda.Event | None]) -> None:
        """Wait until the device has come to each of some events, one after the other.

        NCCL's watchdog does not see the exchanges of a CUDA graph, and the device waits forever for
        a rank that died within one.

        Raises:
            LostRankError: it took longer than the ranks' timeout from one event to the next.
        """
        for event in events:
            end = time.monotonic() + self._timeout
            while event is not None and not event.query():
                if time.monotonic() > end:
                    raise self._lost(TimeoutError("the device waits for an exchange"))
                time.sleep(_GLANCE)

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's ``value`` on every rank; all must call.  JSON must hold it."""
        if self._store is None:
            return value
        key = f"superbert/broadcast/{self._broadcasts}"
        self._broadcasts += 1
        if self.is_main:
            self._store.set(key, dump_json(value))
        return json.loads(self._store.get(key))

    def _lost(self, error: Exception) -> LostRankError:
        """Return the error that names the ranks that do not answer."""
        reason = " ".join(str(error).split())[:160]
        return LostRankError(f"rank {self.rank} of {self.size}: {self._silent_ranks()} ({reason})")

    def _silent_ranks(self) -> str:
        if self._store is None:
            return "not all ranks could be reached"
        try:
            self._store.set(f"superbert/noticed/{self.rank}", socket.gethostname())
            time.sleep(_GRACE)
            silent = [
                str(rank)
                for rank in range(self.size)
                if not self._store.check([f"superbert/noticed/{rank}"])
            ]
        except RuntimeError:
            return "lost the other ranks and their store"
        names = ", ".join(silent) or "one that came back"
        return f"no answer from rank {names}; it died or hangs"


def _local_rank_of(rank: int) -> str:
    """Return the store's name for the number of a process on its machine."""
    return f"superbert/local-rank/{rank}"


def _open_store(patience: timedelta) -> Store:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if host and port.isdecimal() and os.environ.get("RANK") != "0":
        _await_store(host, int(port), patience)
    try:
        store, *_ = next(rendezvous("env://", timeout=patience))
    except ValueError as error:  # a variable is missing or makes no sense
        raise InputError(f"torchrun's environment: {error}") from error
    return store


def _name_attempt(store: Store, rank: int, size: int, patience: timedelta) -> tuple[str, bool]:
    """Return a name that all ranks have for the processes that torchrun has started now.

    The store may be that of torchrun's agents, which holds what was written before a restart.  The
    agents' numbers of restarts name nothing: each counts for itself, and one that stops healthy
    workers since another lost its own does not count at all.  So each rank asks under a word of
    its own, and rank 0 answers all words until all ranks have its name; an old word harms nothing.

    Returns:
        The name, and whether all ranks came; of other ranks than the first, whether rank 0 did.
    """
    store = PrefixStore("superbert/attempts", store)
    own = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asked/{rank}", own)
        try:
            store.wait([f"answer/{own}"], patience)
        except dist.DistError:
            return "", False
        name = store.get(f"answer/{own}").decode()
        store.set(f"joined/{name}/{rank}", "")
        return name, True
    end, missing = time.monotonic() + patience.total_seconds(), set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"asked/{other}"]):
                store.set(f"answer/{store.get(f'asked/{other}').decode()}", own)
            if store.check([f"joined/{own}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            return own, False
        time.sleep(_GLANCE)
    return own, True


def _await_store(host: str, port: int, patience: timedelta) -> None:
    """Wait until the first process has opened the store.

    torch would wait up to three times as long as it is told to, since it doubles its pauses.
    """
    end = time.monotonic() + patience.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=patience.total_seconds()).close()
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or error
                raise LostRankError(
                    f"rank {os.environ['RANK']}: no answer from rank 0 at {host}:{port} ({reason})"
                ) from error
            time.sleep(_PAUSE)
        else:
            return


_SIGNS = ("gloo", "timed out", "timeout", "connection", "peer", "pair closure", "socket", "pipe")


def _is_about_a_peer(error: RuntimeError) -> bool:
    """Return whether a connection of gloo broke or timed out, which has no exception class."""
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)

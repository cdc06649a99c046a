"""The extension in C. Addresses are ints, of memory that the caller keeps alive and has checked."""

from typing import Any

import numpy.typing as npt

class Batcher:
    """Runs requests of several callers together, each batch as one CUDA graph, in slots that are lent to it.

    Args:
        inputs, outputs: how many there are of each. Every one of them has rows.
        most_delay: seconds for which a batch waits at most for callers who usually come.
        push, pop, upload, launch, synchronize: the addresses of functions with the signatures of cuCtxPushCurrent,
            cuCtxPopCurrent, cuMemcpyHtoDAsync, cuGraphLaunch and cuStreamSynchronize.
        context: the CUDA context.
    """

    wants: int
    """Counts how often a graph was missed, or a second slot."""
    callers: int
    """How many are in here, in the line or in a batch."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        most_delay: float,
        push: int,
        pop: int,
        upload: int,
        launch: int,
        synchronize: int,
        context: int,
        /,
    ) -> None: ...
    def add_route(self, sizes: tuple[int, ...], row_bytes: tuple[int, ...], most_in_graph: int, /) -> int:
        """A number for rows of one kind: the sizes that batches of them run in, and their bytes in each tensor.

        Graphs of so many rows at most upload their inputs; those of larger sizes find them on the GPU.

        Raises ValueError where there are too many.
        """

    def lend(self, slot: int, stream: int, pinned: tuple[int, ...], on_gpu: tuple[int, ...], /) -> None:
        """Lend a slot: its stream, and the addresses of its pinned inputs and outputs, and of the inputs on the GPU."""

    def set_graph(self, slot: int, route: int, size: int, graph: int, /) -> None:
        """The graph of a slot for the size of that index in its route."""

    def open(self) -> None:
        """Let callers in, once the slots are lent."""

    def recall(self) -> None:
        """Let nobody in any more, and wait for those who are. The slots are the caller's again."""

    def run(self, route: int, rows: int, *tensors: npt.NDArray[Any]) -> bool | tuple[int, int]:
        """Run so many rows, from and to these arrays: the inputs, then the outputs.

        Raises ValueError for an array that is not contiguous or not of the rows' bytes.

        Returns True after it has; False where no slot is lent that has a graph for it; the driver's status, and the
        number of requests, where the whole batch failed.
        """

    def runs(self) -> list[tuple[int, int]]:
        """Pairs of a size, and how often it was run."""

    def wanted(self) -> tuple[int, int, int]:
        """What was missed last: a route, the index of a size, and one of three kinds.

        0 is the graph of that size, 1 those of all sizes up to it, 2 the same in a second slot.
        """

class Copying:
    """Copies under way, by a few threads, in their order.

    Args:
        copies: for each copy three numbers: the address to copy to, that to copy from, and how many bytes.
    """

    def __init__(self, copies: list[int]) -> None: ...
    def advance(self, until: int, /) -> int:
        """Take part until the first so many bytes have arrived, and return how many have."""

    def close(self) -> None:
        """Leave the rest, and wait until nobody reads or writes for it any more. May be called more than once."""

def after_fork() -> None:
    """Forget the threads, which a forked process does not have."""

"""One model on several GPUs of this host: a session of its own on each, and work goes where there is room for it.

A batch that takes several runs is shared out piece by piece, so that a GPU that is slower or busier takes fewer. Any
other call goes to the GPU with the least to do.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import ExecutionError
from mlflow_trt.runtime.batching.own_threads import Threads, start_thread
from mlflow_trt.runtime.batching.scheduler import MOST_SLOTS
from mlflow_trt.runtime.batching.shared_work import Work
from mlflow_trt.runtime.batching.submissions import Done, PendingAnswer, Submission
from mlflow_trt.runtime.cuda.device_array import DeviceArray, ordinal_of
from mlflow_trt.runtime.session import Runner, Session

_log = get_logger(__name__)


class ReplicaSession(Session):
    """Sessions on the same model, one for each GPU, as one.

    A GPU on which a call fails leaves it to the others. One that is lost to this process gets no more calls:
    `out_of_service` tells why, and the log does when it happens. After a kernel that crashed, CUDA gives up all GPUs of
    the process.

    Args:
        sessions: at least one, by CUDA device ordinal. They are closed with this one.
    """

    runtime: ClassVar[str] = "tensorrt"

    def __init__(self, sessions: Mapping[int, Session]) -> None:
        first = next(iter(sessions.values()))
        self._sessions = dict(sessions)
        runners = {ordinal: session._runner for ordinal, session in sessions.items()}  # noqa: SLF001  # of its own kind
        self._replicas = Replicas(sessions, runners)
        taken = first._taken  # noqa: SLF001  # as above
        super().__init__(self._replicas, first.inputs, first.outputs, taken=taken)

    @property
    def description(self) -> str:
        ordinals = ", ".join(map(str, self._sessions))
        kinds = dict.fromkeys(session.description for session in self._sessions.values())
        return f"{' and '.join(kinds)} (CUDA devices {ordinals})"

    @property
    def out_of_service(self) -> dict[int, str]:
        """The CUDA device ordinals of GPUs that get no more calls, and why."""
        return dict(self._replicas.out_of_service)

    def broken(self) -> str | None:
        reasons = [session.broken() for session in self._sessions.values()]
        return None if None in reasons else "; ".join(filter(None, reasons))

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Runs on the GPU where the inputs are, and leaves the outputs there."""
        self._check_open()
        ordinals = [ordinal_of(array) for array in inputs.values()]
        here = next((ordinal for ordinal in ordinals if ordinal in self._sessions), next(iter(self._sessions)))
        return self._sessions[here].run_on_device(inputs)

    def warm_up(self) -> None:
        for session in self._sessions.values():
            session.warm_up()


class Replicas:
    """A runner made of those of several sessions, by CUDA device ordinal."""

    def __init__(self, sessions: Mapping[int, Session], runners: Mapping[int, Runner]) -> None:
        self._sessions = dict(sessions)
        self._runners = dict(runners)
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(runners, 0)  # bytes of input under way
        self.out_of_service: dict[int, str] = {}
        self._threads = Threads(MOST_SLOTS)

    @property
    def runs(self) -> dict[int, int]:
        """How often each batch size was run so far, on all GPUs."""
        total: collections.Counter[int] = collections.Counter()
        for runner in self._runners.values():
            total.update(runner.runs)
        return dict(sorted(total.items()))

    def run(self, feeds: Feeds) -> Outputs:
        """New arrays. Raises what the runners raise; ExecutionError where the call fails on every GPU."""
        work = self.work(feeds)
        if work is None:
            return self._run_on_one(feeds)
        self.take_part(work)
        return work.outputs

    def submit(self, feeds: Feeds, done: Done) -> Submission:
        """Raises what the runners raise; their ExecutionError is told only where the call fails on every GPU."""
        work = self.work(feeds)
        answer = PendingAnswer(done)
        if work is not None:
            self._threads.do(lambda: self._answer(answer, feeds))
        else:
            self._submit_to_one(feeds, answer, {})
        return answer

    def _answer(self, answer: PendingAnswer, feeds: Feeds) -> None:
        if not answer.is_wanted:
            return
        try:
            outputs = self.run(feeds)
        except Exception as error:  # noqa: BLE001  # told to whoever submitted it
            answer.give(None, error)
        else:
            answer.give(outputs)

    def _submit_to_one(self, feeds: Feeds, answer: PendingAnswer, failures: dict[int, Exception]) -> None:
        size = sum(array.nbytes for array in feeds.values())
        ordinal = self._take_least_busy(self._usable_devices(failures), size)

        submissions: list[Submission] = []

        def done(outputs: Outputs | None, error: Exception | None) -> None:
            answer.begun = submissions[0].begun if submissions else None
            self._give_back(ordinal, size)
            if not isinstance(error, ExecutionError):
                answer.give(outputs, error)
                return
            failures[ordinal] = error
            self._report(ordinal, error)
            try:
                self._submit_to_one(feeds, answer, failures)
            except Exception as failure:  # noqa: BLE001  # told to whoever submitted it
                answer.give(None, failure)

        try:
            submissions.append(self._runners[ordinal].submit(feeds, done))
        except BaseException:
            self._give_back(ordinal, size)
            raise

    def work(self, feeds: Feeds) -> Work | None:
        return self._runners[self._usable_devices({})[0]].work(feeds)

    def take_part(self, work: Work) -> None:
        failures: dict[int, Exception] = {}
        while not work.is_done:
            # A second time round where one gave back what it had taken, after the others had found nothing left.
            able = self._usable_devices(failures)
            self._share_out(work, able, failures)
            for ordinal in able:
                error = failures.get(ordinal)
                if isinstance(error, ExecutionError):
                    self._report(ordinal, error)
                elif error is not None:
                    raise error

    def close(self) -> None:
        with ExitStack() as stack:  # all of them, whatever one of them raises
            stack.callback(self._threads.close)
            for session in self._sessions.values():
                stack.callback(session.close)
            self._threads.refuse()

    def _run_on_one(self, feeds: Feeds) -> Outputs:
        failures: dict[int, Exception] = {}
        size = sum(array.nbytes for array in feeds.values())
        while True:
            with self._least_busy(self._usable_devices(failures), size) as ordinal:
                try:
                    return self._runners[ordinal].run(feeds)
                except ExecutionError as error:
                    failures[ordinal] = error
                    self._report(ordinal, error)

    def _share_out(self, work: Work, able: Sequence[int], failures: dict[int, Exception]) -> None:
        """Let these take part at the same time, and wait for them. What they raise goes to `failures`."""
        share = sum(array.nbytes for array in work.feeds.values()) // len(able)

        def take_part(ordinal: int) -> None:
            with self._least_busy([ordinal], share):
                try:
                    self._runners[ordinal].take_part(work)
                except Exception as error:  # noqa: BLE001  # raised again in the caller's thread
                    failures[ordinal] = error
                    if not isinstance(error, ExecutionError):
                        work.stop()

        helpers = []
        try:
            for ordinal in able[1:]:
                helper = start_thread("replica", take_part, ordinal)
                if helper is None:  # those that take part do the rest
                    break
                helpers.append(helper)
            take_part(able[0])
        except BaseException:
            work.stop()
            raise
        finally:
            for helper in helpers:
                helper.join()

    def _usable_devices(self, failures: Mapping[int, Exception]) -> list[int]:
        """Those to try next. Raises the first failure where all have failed."""
        in_service = [ordinal for ordinal in self._runners if ordinal not in self.out_of_service]
        # Where none is left, for their errors.
        able = [ordinal for ordinal in in_service or self._runners if ordinal not in failures]
        if not able:
            raise next(iter(failures.values()))
        return able

    @contextmanager
    def _least_busy(self, ordinals: Sequence[int], size: int) -> Iterator[int]:
        """One of these, which is busier by `size` meanwhile."""
        ordinal = self._take_least_busy(ordinals, size)
        try:
            yield ordinal
        finally:
            self._give_back(ordinal, size)

    def _take_least_busy(self, ordinals: Sequence[int], size: int) -> int:
        with self._lock:
            ordinal = min(ordinals, key=self._busy.__getitem__)
            self._busy[ordinal] += size
        return ordinal

    def _give_back(self, ordinal: int, size: int) -> None:
        with self._lock:
            self._busy[ordinal] -= size

    def _report(self, ordinal: int, error: ExecutionError) -> None:
        """Warn of a failure that the caller may not hear of, and take a GPU that is lost out of service."""
        session = self._sessions[ordinal]
        reason = session.broken()
        if reason is None:
            _log.warning(
                "A call failed on %s, CUDA device %d, and is tried on the others: %s",
                session.description,
                ordinal,
                error.message,
            )
            return
        with self._lock:
            is_new = ordinal not in self.out_of_service
            self.out_of_service[ordinal] = reason
        if is_new:
            _log.error(
                "CUDA device %d is out of service until another process loads the model; %d of %d are left: %s",
                ordinal,
                len(self._runners) - len(self.out_of_service),
                len(self._runners),
                reason,
            )

"""Records work as a CUDA graph. Sources: docs/gpu.md.

**No GPU has run this yet**: it follows torch's documentation and source, and `graphed.py` trusts no recording that it
has not compared with an eager computation, bit by bit.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from mbgd.batches.randomness import has_drawn_since, key_reading, undisturbed
from mbgd.step.graph import CannotRecordError, Outputs, first_line

WARM_UPS = 3
"""Passes on the recording stream before the recording, as torch's own `make_graphed_callables` makes them."""


class CudaGraphs:
    """All recordings are made on one stream, and share one pool of memory: they never run at the same time, and their
    outputs are copied before the next one runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """The last pass looks for what no replay can do: waiting for the GPU, and random numbers of the host."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS - 1):
                    work()
                self._look(work)
        finally:  # the work writes to buffers, which are then put back on the current stream
            current.wait_stream(self._stream)

    def _look(self, work: Callable[[], object]) -> None:
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(action="ignore"):  # torch's, that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            with undisturbed():
                key_reading(0)
                work()
                has_drawn = has_drawn_since(0)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise CannotRecordError(
                "the forward or the backward waits for the GPU, for example to read a value"
            ) from None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        if has_drawn:
            raise CannotRecordError("the forward draws random numbers on the host, which a replay would not draw anew")

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        outputs: Outputs | None = None
        reason = ""
        try:
            # The outer context leaves the stream even where the end of a broken capture raises.
            with (
                torch.cuda.stream(self._stream),
                # Other threads, such as one that pins memory, may go on with calls that this one must not make.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    outputs = work()
                except Exception as error:  # the end of the capture would only tell that it is broken
                    reason = first_line(error)
        except Exception as error:
            reason = reason or first_line(error)
        if outputs is None or reason:
            self._clean_up()
            raise CannotRecordError(f"the capture failed: {reason}")
        return outputs, graph.replay

    def _clean_up(self) -> None:
        """After a broken capture: torch's `capture_end` leaves these where the driver refuses to end it."""
        with suppress(RuntimeError):  # where the pool is closed already
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        # Older versions of torch leave the generator in capture, where it cannot draw. The next micro-batch seeds it.
        generator = torch.cuda.default_generators[self._device.index]
        generator.graphsafe_set_state(torch.Generator(device=self._device))

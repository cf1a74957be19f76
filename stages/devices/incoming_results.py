"""The results and reports that arrive for one attempt."""

from __future__ import annotations

from collections.abc import Callable

from bus.errors import ProtocolError
from bus.frames import Frame
from bus.tensors import Array, Assembler
from stages.devices.stage_reports import StageReports


class IncomingResults:
    """Takes frames, and passes on the outputs of each complete sample."""

    def __init__(
        self,
        assembler: Assembler,
        reports: StageReports,
        on_result: Callable[[int, list[Array]], None],
        abort: Callable[[Exception], None],
    ) -> None:
        """`abort` ends the attempt where a frame is unusable."""
        self._assembler, self._reports = assembler, reports
        self._on_result, self._abort = on_result, abort

    def take(self, frame: Frame) -> None:
        """Process a frame of results or a report. Raises `ProtocolError` where the frame is unusable."""
        if frame.kind == "report":
            self._reports.take(frame)
            return
        if frame.kind != "result":
            raise ProtocolError(
                "undecodable", f"a frame of kind {frame.kind} cannot be sent to a device; expected result or report"
            )
        if any(piece.encoded is not None for piece in frame.pieces):
            raise ProtocolError("wrong_codec", "results are not encoded")
        for piece in frame.pieces:
            try:
                whole = self._assembler.add(piece)
            except ProtocolError as error:
                if error.cause == "missing_chunk":
                    continue  # the sending stage sends the sample again
                self._abort(error)
                raise
            if isinstance(whole, list):
                self._on_result(piece.sample, whole)

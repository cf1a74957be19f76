"""The measurement of codecs on a model: sizes and times of each position, and agreements of crossings and pairs of them.

Activations of the calibration samples are computed position by position. At each one, every codec encodes and decodes them;
after a lossy codec, the layers behind it compute what becomes of the outputs. Errors compound, so a task that crosses both
links with lossy codecs needs the agreement of the *pair*: it is measured for all pairs of a small model, and otherwise for
those of the most useful positions (`choice`), as many as a profile may announce.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

from pydantic import Field

from bus.codecs.coding import decode, encode
from bus.tensors import Array, TensorHead
from bus.values import (
    MAX_AGREEMENTS,
    MAX_CODEC_PROFILES,
    Codec,
    CodecProfile,
    Frozen,
    ModelProfile,
    PairAgreement,
    TensorSpec,
)
from stages.calibration.choice import by_usefulness, worth_pairing, worth_using
from stages.calibration.outputs import ReferenceOutputs
from stages.calibration.samples import Calibration
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.slicer import slice_model
from stages.models.verify import run_part

CODECS = tuple(codec for codec in Codec if codec is not Codec.RAW)

TIMED = 64
"""Samples whose encoding and decoding are timed at a position; their median counts."""

MAX_HELD_BYTES = 1 << 30
"""Activations that are held at once; of larger models fewer samples are used."""

Values = list[list[Array]]
"""The tensors at a position, of each sample."""

Step = Callable[[str, int, int], None]
"""Receives what is being measured, the parts done, and the total of parts."""


class MeasuredCodecs(Frozen):
    """What was measured of a model's codecs on this machine."""

    sha256: str  # of the model
    codecs: Annotated[tuple[CodecProfile, ...], Field(max_length=MAX_CODEC_PROFILES)]  # those worth using, by position
    agreements: Annotated[tuple[PairAgreement, ...], Field(max_length=MAX_AGREEMENTS)]  # of pairs of lossy crossings
    samples: Annotated[int, Field(ge=1)]  # behind each agreement
    classes: bool  # whether agreements compare the best class, otherwise the relative error of the outputs
    calibration_file: str | None = None  # None: samples supplied with DeePar

    def added_to(self, profile: ModelProfile) -> ModelProfile:
        """The profile with these codecs."""
        more = {"codecs": self.codecs, "agreements": self.agreements, "calibration_samples": self.samples}
        return profile.model_copy(update=more)


def codec_rows(model: Model, found: MeasuredCodecs) -> list[dict[str, Any]]:
    """One row for each codec at each cut: how much smaller, how fast in raw bytes, and its agreement alone."""
    rows = []
    for one in found.codecs:
        cut = model.manifest.cuts[one.position]
        rows.append(
            {
                "model": model.name,
                "cut": one.position,
                "name": cut.name,
                "codec": one.codec.value,
                "raw_bytes": cut.cut_bytes,
                "ratio": cut.cut_bytes / one.bytes,
                "encode_bytes_per_s": cut.cut_bytes / one.encode_s,
                "decode_bytes_per_s": cut.cut_bytes / one.decode_s,
                "agreement": 1.0 if one.codec.lossless else one.agreement,
            }
        )
    return rows


def measure_codecs(
    model: Model, calibration: Calibration, step: Step | None = None, *, pairs: bool = True
) -> MeasuredCodecs:
    """Measure all codecs at all positions, and the agreements of `pairs`.

    Raises `ModelError` if the model cannot run here.
    """
    with Sandbox(model) as sandbox:
        return _Measuring(model, calibration, sandbox, step or (lambda what, done, total: None)).run(pairs=pairs)


class _Measuring:
    """One measurement."""

    def __init__(self, model: Model, calibration: Calibration, sandbox: Sandbox, step: Step) -> None:
        self._model, self._sandbox, self._step = model, sandbox, step
        graph = model.graph
        fitting = MAX_HELD_BYTES // max(1, *(cut.cut_bytes for cut in model.manifest.cuts))
        self._samples = calibration.samples[: max(1, fitting)]
        self._file = calibration.file
        self._positions = [position for position in range(graph.depth) if position not in graph.blocked]
        self._cuts = model.manifest.cuts
        ends = [*self._positions, graph.depth]
        self._layers = {begin: self._part(begin, end) for begin, end in pairwise(ends)}
        self._tails = {begin: self._part(begin, graph.depth) for begin in self._positions}
        self._reference = ReferenceOutputs(
            self._tails[0](self._samples), self._cuts[-1].tensors, classes=calibration.classes
        )

    def _part(self, begin: int, end: int) -> Callable[[Sequence[Sequence[Array]]], Values]:
        """Computes the values at position `end` from those at `begin`; loads the layers between them on first use."""
        loaded: list[SegmentRunner] = []
        part = slice_model(self._model, begin + 1, end)

        def compute(samples: Sequence[Sequence[Array]]) -> Values:
            if not loaded:
                data = part.to_bytes()
                self._sandbox.admit(part, data)
                title = f"{self._model.name} {begin + 1}..{end}"
                loaded.append(SegmentRunner(data, title=title, renew=part.renew))
            computed = []
            for values in samples:
                if self._model.graph.stateful:
                    loaded[0].reset()
                computed.append(run_part(part, loaded[0], values))
            return computed

        return compute

    def run(self, *, pairs: bool) -> MeasuredCodecs:
        """Measure positions, then pairs."""
        by_position: dict[int, list[CodecProfile]] = {}
        values = [list(sample) for sample in self._samples]
        for number, position in enumerate(self._positions):
            self._step(self._cuts[position].name, number, len(self._positions))
            found = [self._crossing(position, codec, values) for codec in CODECS]
            by_position[position] = worth_using(found, self._cuts[position].cut_bytes)
            values = self._layers[position](values)
        ranked = self._ranked({position: found for position, found in by_position.items() if found})
        codecs = _of_first(ranked, by_position, MAX_CODEC_PROFILES)
        agreements = self._pairs(worth_pairing(codecs, ranked, MAX_AGREEMENTS)) if pairs else ()
        return MeasuredCodecs(
            sha256=self._model.sha256,
            codecs=codecs,
            agreements=agreements,
            samples=len(self._samples),
            classes=self._reference.classes,
            calibration_file=None if self._file is None else str(self._file),
        )

    def _ranked(self, by_position: Mapping[int, Sequence[CodecProfile]]) -> list[int]:
        """The positions with codecs, the most useful first."""
        work = list(accumulate(cut.work for cut in self._cuts))
        positions = list(by_position)
        smallest = [min(one.bytes for one in found) for found in by_position.values()]
        return [positions[at] for at in by_usefulness([work[position] for position in positions], smallest)]

    def _crossing(self, position: int, codec: Codec, values: Values) -> CodecProfile:
        """One codec at one position: mean size, median times, and what becomes of the outputs."""
        specs = self._cuts[position].tensors
        crossed = _cross(codec, values, specs)
        return CodecProfile(
            position=position,
            codec=codec,
            bytes=round(statistics.fmean(crossed.sizes)),
            encode_s=_rounded(statistics.median(crossed.encode_s)),
            decode_s=_rounded(statistics.median(crossed.decode_s)),
            agreement=None if codec.lossless else self._agreement(position, crossed.values),
        )

    def _agreement(self, position: int, values: Values) -> float:
        return round(self._reference.agreement(self._tails[position](values)), 6)

    def _pairs(self, crossings: Sequence[CodecProfile]) -> tuple[PairAgreement, ...]:
        """The agreements of all pairs of crossings, in the order of their first one."""
        found = []
        for number, first in enumerate(crossings):
            self._step(f"pairs of {self._cuts[first.position].name} {first.codec}", number, len(crossings))
            seconds = [second for second in crossings if second.position > first.position]
            if not seconds:
                continue
            values, at = self._values_after(first), first.position
            for second in seconds:
                while at < second.position:
                    values, at = self._layers[at](values), self._next(at)
                crossed = _cross(second.codec, values, self._cuts[second.position].tensors)
                found.append(
                    PairAgreement(
                        position1=first.position,
                        codec1=first.codec,
                        position2=second.position,
                        codec2=second.codec,
                        agreement=self._agreement(second.position, crossed.values),
                    )
                )
        return tuple(found)

    def _values_after(self, crossing: CodecProfile) -> Values:
        """The values behind a lossy crossing."""
        values, at = [list(sample) for sample in self._samples], 0
        while at < crossing.position:
            values, at = self._layers[at](values), self._next(at)
        return _cross(crossing.codec, values, self._cuts[at].tensors).values

    def _next(self, position: int) -> int:
        return self._positions[self._positions.index(position) + 1]


@dataclass(frozen=True)
class _Crossed:
    """What became of the tensors of all samples at one crossing."""

    values: Values
    sizes: list[int]  # encoded, in bytes
    encode_s: list[float]  # of the first `TIMED` samples
    decode_s: list[float]


def _cross(codec: Codec, values: Values, specs: Sequence[TensorSpec]) -> _Crossed:
    """Encode and decode the tensors of each sample."""
    heads = [TensorHead(spec.dtype, tuple(spec.shape)) for spec in specs]
    limit_bytes = sum(head.size_bytes for head in heads)
    crossed = _Crossed([], [], [], [])
    for number, tensors in enumerate(values):
        began_s = time.thread_time()
        payload = encode(codec, tensors, specs)
        encoded_s = time.thread_time()
        crossed.values.append(decode(codec, heads, payload, limit_bytes))
        if number < TIMED:
            crossed.encode_s.append(encoded_s - began_s)
            crossed.decode_s.append(time.thread_time() - encoded_s)
        crossed.sizes.append(len(payload))
    return crossed


def _of_first(
    ranked: Sequence[int], by_position: Mapping[int, Sequence[CodecProfile]], most: int
) -> tuple[CodecProfile, ...]:
    """The codecs of as many of the first `ranked` positions as have at most `most` codecs, in the order of the positions."""
    kept, count = [], 0
    for position in ranked:
        count += len(by_position[position])
        if count > most:
            break
        kept.append(position)
    return tuple(one for position in sorted(kept) for one in by_position[position])


def _rounded(seconds: float) -> float:
    """Four digits, so that messages stay small; at least a nanosecond, for clocks with coarse ticks."""
    return max(float(f"{seconds:.3e}"), 1e-9)

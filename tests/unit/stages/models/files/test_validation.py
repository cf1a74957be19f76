"""Broken model files: refused with a typed error that names file and fault, quickly, and the process lives on."""

from __future__ import annotations

import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import stages
from bus.errors import CutError, DeeparError, ModelError
from stages.models.files.flatbuffer_writer import tflite_bytes
from stages.models.files.validation import validated
from stages.models.model import Model
from stages.models.runtime.trial_run import ChildProgram, trial
from stages.models.slicer import slice_model
from stages.models.verify import pairs_of, random_inputs, verify
from stages.zoo.registry import load_model
from tests.unit.stages import built_models

SEEDS = 1500
PATIENCE_S = 1.0
NASTY = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@pytest.fixture(scope="module")
def originals(lenet: Model) -> list[bytes]:
    return [bytes(lenet.data), *(make().to_bytes() for make in built_models.IDENTICAL.values())]


def mutated(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, a few numbers replaced by nasty ones, or the end cut off. Mostly in the structure."""
    changed = bytearray(data)
    head = min(len(changed) - 4, 8000)
    match generator.randrange(4):
        case 0:
            return bytes(changed[: generator.randrange(len(changed))])
        case 1:
            for _ in range(generator.choice([1, 2, 8])):
                changed[generator.randrange(head)] = generator.randrange(256)
        case 2:
            for _ in range(generator.choice([1, 1, 3])):
                nasty = generator.choice([*NASTY, len(changed), generator.randrange(1 << 32)])
                struct.pack_into("<I", changed, generator.randrange(head), nasty)
        case _:
            changed[generator.randrange(head)] ^= 1 << generator.randrange(8)
    return bytes(changed)


def test_mutated_files_are_refused_or_sound_and_never_slow(originals: list[bytes]) -> None:
    verdicts: Counter[str] = Counter()
    for seed in range(SEEDS):
        generator = random.Random(seed)
        data = mutated(generator.choice(originals), generator)
        began_s = time.process_time()
        try:
            validated(data, "mutant.tflite")
        except ModelError as error:
            verdicts["refused" if error.path == "mutant.tflite" else "nameless"] += 1
        else:
            verdicts["sound"] += 1
            model = Model("mutant", Path("mutant.tflite"), "0" * 64, data)
            try:
                for layer in (1, model.graph.depth):
                    validated(slice_model(model, layer, layer).to_bytes(), "slice")
                assert model.manifest.layers == model.graph.depth
            except (CutError, ModelError):
                verdicts["not cut"] += 1
        assert time.process_time() - began_s < PATIENCE_S, seed
    # both kinds must occur often, or nothing was tested
    assert not verdicts["nameless"]
    assert verdicts["refused"] > SEEDS / 5
    assert verdicts["sound"] > SEEDS / 10


def test_what_passes_validation_is_tried_before_it_is_run_here(originals: list[bytes], tmp_path: Path) -> None:
    """Load and run mutants as a user would. This process is the witness: a crash of the runtime would end it."""
    ran = refused = 0
    for seed in range(3000, 3040):
        generator = random.Random(seed)
        path = tmp_path / f"{seed}.tflite"
        path.write_bytes(mutated(generator.choice(originals), generator))
        try:
            model = load_model(path)
            verify(model, pairs_of(model, "single", 0)[:2], [random_inputs(model, np.random.default_rng(seed))])
            ran += 1
        except DeeparError:
            refused += 1
    assert ran >= 3
    assert refused >= 3


def edited(make: Callable[[], object], edit: Callable[[schema.ModelT], None]) -> bytes:
    model = schema.ModelT.InitFromPackedBuf(make().to_bytes(), 0)  # type: ignore[attr-defined]
    for buffer in model.buffers:
        if not isinstance(buffer.data, np.ndarray):
            buffer.data = None
    edit(model)
    return tflite_bytes(model, {})


def main(model: schema.ModelT) -> schema.SubGraphT:
    return model.subgraphs[0]


def set_at(vector: object, index: int, value: int) -> np.ndarray:
    changed = np.array(vector)
    changed[index] = value
    return changed


def outside(model: schema.ModelT) -> None:
    """Its first weights stand where the file has ended."""
    model.buffers[1].offset, model.buffers[1].size = 1 << 40, 8


FAULTS: dict[str, tuple[Callable[[schema.ModelT], None], str]] = {
    "huge shape": (
        lambda m: setattr(main(m).tensors[0], "shape", np.array([1 << 20, 1 << 20, 4, 4], np.int32)),
        r"declares input of the shape \[1048576, 1048576, 4, 4\]",
    ),
    "negative shape": (lambda m: setattr(main(m).tensors[0], "shape", np.array([1, -5, 4, 4], np.int32)), "shape"),
    "weights too short": (
        lambda m: setattr(m.buffers[1], "data", m.buffers[1].data[:-4]),
        r"with \d+ bytes instead of \d+",
    ),
    "buffer not there": (lambda m: setattr(main(m).tensors[1], "buffer", 99), "in buffer 99, which is not there"),
    "buffer outside": (outside, "points outside itself: buffer 1"),
    "unknown type": (lambda m: setattr(main(m).tensors[0], "type", 77), "of the unknown type 77"),
    "unknown operator": (lambda m: setattr(m.operatorCodes[0], "builtinCode", 9999), "of unknown code 9999"),
    "operator code not there": (
        lambda m: setattr(main(m).operators[0], "opcodeIndex", 9),
        "of code 9, which is not there",
    ),
    "tensor not there": (
        lambda m: setattr(main(m).operators[0], "inputs", set_at(main(m).operators[0].inputs, 0, 4000)),
        "read tensor 4000",
    ),
    "read before made": (
        lambda m: main(m).operators.reverse(),
        "before anything makes it",
    ),
    "made twice": (
        lambda m: setattr(main(m).operators[1], "outputs", main(m).operators[0].outputs),
        "which is there already",
    ),
    "output nothing makes": (lambda m: setattr(main(m), "operators", main(m).operators[:-1]), "which nothing makes"),
    "old version": (lambda m: setattr(m, "version", 2), "schema version 2"),
    "no subgraph": (lambda m: setattr(m, "subgraphs", []), "no subgraph"),
    "name not UTF-8": (lambda m: setattr(main(m).tensors[0], "name", b"\xff\xfe"), "not UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str, tmp_path: Path) -> None:
    edit, words = FAULTS[fault]
    path = tmp_path / "broken.tflite"
    path.write_bytes(edited(built_models.residual, edit))
    began_s = time.process_time()
    with pytest.raises(ModelError, match=words) as caught:
        load_model(path)
    assert time.process_time() - began_s < PATIENCE_S
    assert caught.value.path == str(path)
    assert caught.value.fault in str(caught.value)


def test_a_subgraph_that_runs_itself_is_refused(tmp_path: Path) -> None:
    def recurse(model: schema.ModelT) -> None:
        options = [operator.builtinOptions for operator in main(model).operators]
        next(entry for entry in options if isinstance(entry, schema.WhileOptionsT)).bodySubgraphIndex = 0

    path = tmp_path / "broken.tflite"
    path.write_bytes(edited(built_models.looping, recurse))
    with pytest.raises(ModelError, match="run itself"):
        load_model(path)


def blockwise_details(model: schema.ModelT) -> schema.BlockwiseQuantizationT:
    return next(t for t in main(model).tensors if t.name == b"weights_1").quantization.details


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("scales", 99, "weights_1 quantised with scales in tensor 99, which is not there"),
        ("scales", -5, "weights_1 quantised with scales in tensor -5, which is not there"),
        ("scales", -1, "weights_1 quantised with scales in tensor -1, which is not there"),
        ("scales", 0, "weights_1 quantised with scales in tensor 0, which is not a constant"),
        ("scales", 1, "weights_1 quantised with scales in tensor 1, which is itself"),
        ("zeroPoints", 99, "weights_1 quantised with zeroPoints in tensor 99, which is not there"),
        ("zeroPoints", 4, "weights_1 quantised with zeroPoints in tensor 4, which is not a constant"),
        ("blockSize", 0, "6,144 elements with 192 scales for blocks of 0"),
        ("blockSize", 64, "6,144 elements with 192 scales for blocks of 64"),
    ],
)
def test_quantisation_details_name_constants_that_are_there(field: str, value: int, words: str) -> None:
    """The validation, which runs nothing, rejects the file; a trial run would end with another fault."""
    content = edited(built_models.blockwise, lambda m: setattr(blockwise_details(m), field, value))
    with pytest.raises(ModelError, match=words):
        validated(content, "broken.tflite")


@pytest.mark.parametrize("where", ["model", "tensor"])
def test_weights_in_another_file_are_refused(where: str, tmp_path: Path) -> None:
    def outsource(model: schema.ModelT) -> None:
        if where == "model":
            model.externalBufferGroups = [schema.ExternalBufferGroupT(name="weights.bin")]
        else:
            main(model).tensors[1].externalBuffer = 1

    path = tmp_path / "model.tflite"
    path.write_bytes(edited(built_models.residual, outsource))
    with pytest.raises(ModelError, match="keeps weights in another file"):
        load_model(path)


@pytest.mark.parametrize("field", ["arraySegments", "arrayIndices"])
def test_sparse_indices_must_stay_inside(field: str, tmp_path: Path) -> None:
    def poison(model: schema.ModelT) -> None:
        sparse = next(tensor for tensor in main(model).tensors if tensor.sparsity is not None)
        vector = getattr(sparse.sparsity.dimMetadata[1], field)
        vector.values = set_at(vector.values, 3, 1_000_000)

    path = tmp_path / "broken.tflite"
    path.write_bytes(edited(built_models.sparse_weights, poison))
    with pytest.raises(ModelError, match="broken sparse layout"):
        load_model(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too few for a model"),
        (b"hello, this is not a model at all", "not a TensorFlow Lite model"),
        (b"\x1c\0\0\0TFL3" + b"\0" * 64, "points outside itself|broken layout|no subgraph|version"),
        (b"\xff\xff\xff\xffTFL3" + b"\0" * 64, "points outside itself"),
    ],
)
def test_what_is_no_model_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "thing.tflite"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        load_model(path)


def test_truncation_is_noticed_wherever_it_happens(lenet: Model) -> None:
    data = bytes(lenet.data)
    for length in [*range(16, 4000, 37), *range(4000, len(data), 9973), len(data) - 1]:
        with pytest.raises(ModelError):
            validated(data[:length], "short.tflite")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="cannot be opened: No such file"):
        load_model(tmp_path / "nothing.tflite")
    pipe = tmp_path / "pipe.tflite"
    os.mkfifo(pipe)
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(pipe)


def test_a_model_that_kills_the_runtime_kills_only_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = built_models.random_numbers().to_bytes()
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))  # another test may have tried this model already
    crash = ChildProgram("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ModelError, match=r"model\.tflite: a trial run died of SIGSEGV while starting"):
        trial(content, "0" * 64, "model.tflite", crash)
    with pytest.raises(ModelError, match="did not end within"):
        trial(content, "0" * 64, "model.tflite", ChildProgram("import time; time.sleep(60)", longest_s=0.3))
    assert trial(content, "0" * 64, "model.tflite").shapes


def test_a_stride_of_zero_is_refused_by_the_trial(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(
        edited(built_models.residual, lambda m: setattr(main(m).operators[0].builtinOptions, "strideW", 0))
    )
    with pytest.raises(ModelError, match=r"model\.tflite: (the runtime refuses it|a trial run)"):
        load_model(path)


def test_a_folder_of_the_users_called_stages_is_not_taken_for_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))
    content = (Path(stages.__file__).parent / "data" / "lenet.tflite").read_bytes()
    assert trial(content, "0" * 64, "lenet").shapes

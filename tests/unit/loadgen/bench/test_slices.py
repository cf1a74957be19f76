"""The benchmark of the slices measures every cut, and what a serving process occupies."""

from __future__ import annotations

import pytest

from loadgen.bench.slices import run, serve


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def test_every_cut_has_a_ratio_and_the_aim_is_their_median() -> None:
    said: list[str] = []
    found = run(models=("lenet",), memory_model=None, rounds=3, progress=said.append)
    assert [(row["model"], row["cut"]) for row in found["results"]] == [("lenet", cut) for cut in range(1, 7)]
    assert all(0.2 < row["ratio"] < 20 for row in found["results"])
    (aim,) = found["aims"]
    ratios = sorted(row["ratio"] for row in found["results"])
    assert ratios[2] <= aim["value"] <= ratios[3]
    assert aim["pass"] == (aim["value"] <= 1.03)
    assert len(said) == 7


def test_memory_is_read_at_every_pair_of_cuts() -> None:
    rows = serve("lenet", True, 3, 1)
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["anonymous_bytes"] <= row["resident_bytes"]
        assert row["cut1"] <= row["cut2"]

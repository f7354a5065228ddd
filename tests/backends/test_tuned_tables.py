"""Tables of what was measured on a card: one format, which refuses all else; and the file that speaks for a card."""

import json
import os
import re
from dataclasses import replace

import pytest

from nf4kernels.backends import tuned_files
from nf4kernels.backends.tuned_files import HERE, ON_SUCH_A_CARD, PREDICTED, SHIPPED, Card, measured_table
from nf4kernels.backends.tuned_table import ANY_ROWS, Config, CudaOp, Rule, Table, TableError, Tile

CARD = Card("NVIDIA H200", "sm_90", "580.95.05")
TILES = (Tile("32x128x64", cost=1150, blocks=3), Tile("128x128x64", cost=1000, blocks=1))
GROUPED_TILES = (Tile("32x128x64", 32), Tile("64x128x64", 32), Tile("128x128x64", ANY_ROWS))


def table_of(card: Card = CARD, **changes) -> Table:
    table = Table(
        card.architecture, "2026-11-29, 98 s", card.name, card.versions(),
        cuda={"linear": CudaOp(16, 352, TILES), "grouped_linear": CudaOp(ANY_ROWS, ANY_ROWS, GROUPED_TILES)},
        triton={"linear": {4: Config(16, 64, 4, 5, 1024), 65536: Config(128, 64, 8, 3, 8192)}},
        dequantize_gemm_from={"linear": 129, "linear_dgrad": ANY_ROWS},
        rules=(Rule("linear", "bfloat16", 8, "native", "few"), Rule("linear", "bfloat16", ANY_ROWS, "triton", "all")),
    )  # fmt: skip
    return replace(table, **changes)


def test_a_table_is_read_as_it_was_written():
    table = table_of()
    assert Table.from_json(table.to_json()) == table
    assert max(map(len, table.to_json().splitlines())) < 120
    data = json.loads(table.to_json())
    data["backends"].reverse()
    assert Table.from_json(json.dumps(data)) == table, "the first rule that fits is the one of the fewest rows"


def test_every_table_that_is_shipped_is_sound():
    names = sorted(path.name for path in SHIPPED.glob("*.json"))
    assert len(names) >= 8
    for name in names:
        table = tuned_files.read(SHIPPED / name)
        assert table.to_json() == (SHIPPED / name).read_text(encoding="utf-8")
        is_predicted = name == f"{table.architecture}.json"
        assert is_predicted == (table.card == "") == table.origin.startswith("predicted, not measured")
        assert is_predicted or name == Card(table.card, table.architecture, "").file_name


def changed(path: str, value) -> str:
    """The table with another value, or without one, at "cuda.linear.tiled"."""
    data = json.loads(table_of().to_json())
    *folders, last = path.split(".")
    inner = data
    for key in folders:
        inner = inner[int(key) if key.isdigit() else key]
    last = int(last) if last.isdigit() else last
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 2), ("format", True), ("format", "1"), ("card", KeyError), ("more", 1), ("origin", 3),
        ("versions", []), ("versions.torch", 2.13), ("cuda", []), ("cuda.bilinear", {}), ("cuda.linear", 3),
        ("cuda.linear.tiled", KeyError), ("cuda.linear.tiled.up_to", -1), ("cuda.linear.tiled.up_to", 1.5),
        ("cuda.linear.tiled.up_to", 1 << 62), ("cuda.linear.tiles.0.blocks", 0), ("cuda.linear.tiles.0.blocks", 33),
        ("cuda.linear.tiles.0.cost", 0), ("cuda.linear.tiles.0.cost", 1.5), ("cuda.linear.tiles.0.cost", 1000001),
        ("cuda.linear.tiles", []), ("cuda.grouped_linear.tiles.0.up_to", 33), ("cuda.linear.tiles.0.up_to", 33),
        ("cuda.grouped_linear.tiles.0.up_to", True), ("cuda.grouped_linear.tiles.0.cost", 1000),
        ("cuda.linear.tiles.0.tile", "128x128x64"), ("cuda.linear.tiles.0", []), ("triton.linear", []),
        ("triton.grouped_linear", []), ("triton.linear.0.depth", 100), ("triton.linear.0.depth", 16384),
        ("triton.linear.0.BLOCK_M", 48), ("triton.linear.0.warps", 3), ("triton.linear.0.up_to", 65536),
        ("triton.linear.0.up_to", None), ("triton_dequantize_gemm_from.linear", "129"), ("backends", {}),
        ("backends.0.op", "lineal"), ("backends.0.dtype", "bf16"), ("backends.0.backend", "cuda"),
        ("backends.0.why", None),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(path, value):
    with pytest.raises(TableError, match=r"^must .*got "):
        Table.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format": 1}', "{}", "[" * 100_000, '{"format": 1e99}'])
def test_text_that_is_no_table_is_refused(text):
    with pytest.raises(TableError, match=r"^must "):
        Table.from_json(text)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NF4KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned_files, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "cache").mkdir()
    (tmp_path / "shipped").mkdir()
    return tmp_path / "cache" / CARD.file_name


def test_this_machine_s_table_comes_before_the_shipped_one(cache):
    assert measured_table(CARD) == tuned_files.Found(None, PREDICTED, "")
    shipped = table_of(versions={"driver": "1"}, origin="elsewhere")
    (tuned_files.SHIPPED / CARD.file_name).write_text(shipped.to_json(), encoding="utf-8")
    assert measured_table(CARD) == tuned_files.Found(shipped, ON_SUCH_A_CARD, "")
    cache.write_text(table_of().to_json(), encoding="utf-8")
    assert measured_table(CARD) == tuned_files.Found(table_of(), HERE, "")


def written(card: Card = CARD, **changes) -> bytes:
    return table_of(card, **changes).to_json().encode()


def stale(**versions: str) -> bytes:
    return written(versions=CARD.versions() | versions)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "must be text in UTF-8, got other bytes"),
        (table_of().to_json()[:-30].encode(), "must be JSON, got "),
        (b" " * ((1 << 20) + 1), "must have at most 1048576 bytes, got more"),
        (changed("format", 2).encode(), "must have format 1, got 2 of a newer nf4kernels"),
        (
            written(replace(CARD, name="NVIDIA A100")),
            "must be measured on NVIDIA H200 .*got NVIDIA A",
        ),
        (
            stale(driver="550.1"),
            "must be measured with driver 580.95.05, got 550.1: run `nf4kernels",
        ),
        (stale(torch="2.0"), "must be measured with torch .*, got 2.0"),
        (stale(nf4kernels="0.0.1"), "must be measured with nf4kernels .*, got 0.0.1"),
        (stale(triton="1.0"), "must be measured with triton .*, got 1.0"),
        (written(versions={}), "must be measured with nf4kernels .*, got None"),
    ],
    ids=["bytes", "cut", "large", "new", "foreign", "driver", "torch", "library", "triton", "unknown"],
)
def test_a_file_that_cannot_speak_for_the_card_is_ignored_and_said(cache, content, why):
    cache.write_bytes(content)
    found = measured_table(CARD)
    assert (found.table, found.source) == (None, PREDICTED)
    assert found.ignored.startswith(f"{cache} is ignored: it must ")
    assert re.search(why, found.ignored), found.ignored


def test_another_triton_is_nothing_to_what_was_measured_of_cuda_alone(cache):
    table = table_of(versions=CARD.versions() | {"triton": "1.0"}, triton={}, dequantize_gemm_from={}, rules=())
    cache.write_text(table.to_json(), encoding="utf-8")
    assert measured_table(CARD).source == HERE


def test_a_directory_in_its_place_is_ignored(cache):
    cache.mkdir()
    assert measured_table(CARD).ignored == f"{cache} is ignored: it cannot be read: Is a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_ignored(cache):
    cache.write_text(table_of().to_json(), encoding="utf-8")
    cache.chmod(0)
    assert measured_table(CARD).ignored == f"{cache} is ignored: it cannot be read: Permission denied"


def test_a_folder_that_is_none_or_may_not_be_searched_has_no_table(cache, monkeypatch):
    """As the home of a service has, or a user's that another one is given."""
    (cache.parent.parent / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("NF4KERNELS_CACHE", str(cache.parent.parent / "file" / "cache"))
    assert measured_table(CARD) == tuned_files.Found(None, PREDICTED, "")
    monkeypatch.setenv("NF4KERNELS_CACHE", str(cache.parent))
    cache.write_text(table_of().to_json(), encoding="utf-8")
    read, may_search = tuned_files.read, False

    def refused(path):
        if path == cache:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(tuned_files, "read", refused)
    monkeypatch.setattr(tuned_files.os, "access", lambda path, mode: may_search)
    assert measured_table(CARD) == tuned_files.Found(None, PREDICTED, "")
    may_search = True
    assert measured_table(CARD).ignored == f"{cache} is ignored: it cannot be read: Permission denied"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variables, folder in (
        ({}, tmp_path / ".cache" / "nf4kernels"),
        ({"XDG_CACHE_HOME": "/var/xdg"}, tuned_files.Path("/var/xdg/nf4kernels")),
        ({"XDG_CACHE_HOME": "relative"}, tmp_path / ".cache" / "nf4kernels"),
        ({"XDG_CACHE_HOME": "/var/xdg", "NF4KERNELS_CACHE": "/elsewhere"}, tuned_files.Path("/elsewhere")),
        ({"NF4KERNELS_CACHE": ""}, None),
    ):
        for name in ("XDG_CACHE_HOME", "NF4KERNELS_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert tuned_files.folder() == folder
        assert tuned_files.cache_path(CARD) == (folder and folder / "nvidia-h200-sm_90.json")


def test_the_driver_s_release_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned_files, "NVIDIA_DRIVER", tmp_path / "version")
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\n",
    ):
        (tmp_path / "version").write_text(text, encoding="utf-8")
        assert tuned_files.driver_version() == "550.54.14"
    (tmp_path / "version").unlink()
    assert tuned_files.driver_version()

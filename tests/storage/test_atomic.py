"""Files and directories that appear whole or not at all."""

import os

import pytest

from nf4kernels.storage.atomic import replacing_directory


@pytest.mark.parametrize("target_is_there", [False, True])
def test_overwrite_killed_between_its_renames(target_is_there, tmp_path):
    """The old directory stands under another name: it comes back, or goes if the new one was in place already."""
    target, replaced = tmp_path / "out", tmp_path / ".out.replaced"
    replaced.mkdir()
    (replaced / "config.json").write_text("old", encoding="utf-8")
    if target_is_there:
        target.mkdir()
        (target / "config.json").write_text("new", encoding="utf-8")
        (target / "model.safetensors").write_text("", encoding="utf-8")
    with pytest.raises(RuntimeError, match="stop"), replacing_directory(target):
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "config.json").read_text(encoding="utf-8") == ("new" if target_is_there else "old")


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "big").mkdir()
    link = tmp_path / "link"
    link.symlink_to("big")
    for text in ("one", "two"):
        with replacing_directory(link) as staging:
            (staging / "file").write_text(text, encoding="utf-8")
        assert link.is_symlink()
        assert (tmp_path / "big" / "file").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "link"]

"""Folders of models with a damaged file: the error names it."""

import shutil
from functools import partial

import pytest

from flowtracer_plugin.model.loading import load_model, load_tokenizer
from tests.families import quiet_transformers

DAMAGES = {
    b"": "is damaged: Expecting value",
    b'{"a": ': "is damaged: Expecting value",
    b"[1]": r"is damaged: wanted a JSON object, found \[1\]",
    b"5": "is damaged: wanted a JSON object, found 5",
    b"[" * 100_000: "is damaged: wanted plain values, found values nested too deeply",
    b'{"a": "\xe9"}': "is damaged: wanted text in UTF-8, found the byte 0xe9",
    b"\xef\xbb\xbf{}": "begins with a byte order mark; save it without one",
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_settings_is_named(plain_model, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(plain_model, folder)
    load = (
        load_tokenizer if "tokenizer" in name else partial(load_model, device="cpu", dtype="auto")
    )
    for content, problem in DAMAGES.items():
        (folder / name).write_bytes(content)
        message = rf"cannot load '.*model': '.*{name}' {problem}"
        with quiet_transformers(), pytest.raises(ValueError, match=message):
            load(str(folder))


def test_a_setting_of_another_type_is_named(plain_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(plain_model, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"hidden_size": ', '"hidden_size": "x", "y": ')
    )
    with quiet_transformers(), pytest.raises(ValueError, match=r"cannot load .*'hidden_size'"):
        load_model(str(folder), "cpu", "auto")

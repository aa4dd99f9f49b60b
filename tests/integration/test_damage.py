"""Damage to a checkpoint or to a file beside it: passed over, or mended from a checkpoint, and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.runs import MODEL, SCHEDULE, run, succeed

pytestmark = pytest.mark.slow


def test_damage_is_passed_over_by_every_reader_and_side_files_are_mended(corpus: Path, tmp_path: Path) -> None:
    flags = {"--data-glob": corpus / "*.parquet", **MODEL, **SCHEDULE, "--output-dir": tmp_path}
    succeed("pretrain", {**flags, "--stop-at-step": 8}, nproc=1)
    text = succeed("generate", {"--checkpoint-path": tmp_path / "step_00000004"}, nproc=1)
    tokenizer = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    (tmp_path / "run.json").write_text('{"identity": ')
    (tmp_path / "tokenizer" / "trained_on.json").write_text('{"da')
    file = next((tmp_path / "step_00000008").glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(bytes(content))

    found = succeed("generate", {"--checkpoint-path": tmp_path}, nproc=1)
    assert "checkpoint step_00000008 is damaged and was passed over: model-00001" in found
    assert text in found
    refused = run("generate", {"--checkpoint-path": tmp_path / "step_00000008"}, nproc=1)
    assert refused.status == 2
    assert "holds no valid checkpoint" in refused.output
    assert "Traceback" not in refused.output

    output = succeed("pretrain", flags, nproc=1)
    assert "its copy in step_00000008 took its place" in output
    assert "run.json is damaged" in output
    assert "was made again from step_00000008" in output
    assert "continuing from" in output
    assert "step_00000004" in output
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer

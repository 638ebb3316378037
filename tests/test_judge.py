"""What would be lost: a judge that reads every factor of every picture, each on its own."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from models.pixelface.avatars import FACTORS
from models.pixelface.judge import Judge, load_judge


def test_the_judge_reads_the_most_likely_value_of_each_factor() -> None:
    torch.manual_seed(0)
    judge, images = Judge(4).eval(), torch.rand(5, 3, 32, 32) * 2 - 1
    read, logits = judge.read(images), judge(images)
    assert len(read) == 5
    for row, reading in enumerate(read):
        assert reading == {name: values[int(logits[name][row].argmax())] for name, values in FACTORS.items()}


def test_a_loaded_judge_is_the_saved_one_frozen_and_blind_to_a_pictures_company(tmp_path: Path) -> None:
    torch.manual_seed(1)
    saved = Judge()
    saved(torch.rand(8, 3, 32, 32))  # batch statistics, so that they matter
    save_file(saved.state_dict(), tmp_path / "judge.safetensors")
    judge, images = load_judge(tmp_path / "judge.safetensors"), torch.rand(6, 3, 32, 32)
    assert not any(p.requires_grad for p in judge.parameters())
    assert judge.read(images) == saved.eval().read(images)
    for name, logits in judge(images).items():
        torch.testing.assert_close(judge(images[2:3])[name], logits[2:3], rtol=1e-4, atol=1e-4)

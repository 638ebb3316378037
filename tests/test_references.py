"""What would be lost: one way to write where weights are, whatever keeps them, and messages without passwords in them."""

from pathlib import Path

import pytest

from models.references import Place, WeightsError, absolute, beside, inside, offline, place_of, public, public_text, told_in

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/models/celeba", Place("local", "/models/celeba")),
        ("celeba", Place("local", "celeba")),
        ("deep/er/celeba", Place("local", "deep/er/celeba")),
        ("./org/name", Place("local", "org/name")),
        ("file:///a/b%20c", Place("local", "/a/b c")),
        (f"/a/b.safetensors#sha256={DIGEST.upper()}", Place("local", "/a/b.safetensors", sha256=DIGEST)),
        ("google/ddpm-ema-celebahq-256", Place("hub", "", repo="google/ddpm-ema-celebahq-256", bare=True)),
        ("hf://google/ddpm", Place("hub", "", repo="google/ddpm")),
        ("hf://google/ddpm@v1.0/sub/a.json", Place("hub", "sub/a.json", repo="google/ddpm", revision="v1.0")),
        ("hf://google/ddpm@refs/pr/3/a.json", Place("hub", "a.json", repo="google/ddpm", revision="refs/pr/3")),
        ("hf://google/ddpm@refs%2Fpr%2F3", Place("hub", "", repo="google/ddpm", revision="refs/pr/3")),
        ("https://huggingface.co/google/ddpm", Place("hub", "", repo="google/ddpm")),
        ("https://huggingface.co/google/ddpm/blob/main/a/b.ckpt", Place("hub", "a/b.ckpt", repo="google/ddpm", revision="main")),
        (
            "https://huggingface.co/google/ddpm/resolve/main/b.ckpt?download=true",
            Place("hub", "b.ckpt", repo="google/ddpm", revision="main"),
        ),
        ("s3://bucket/edits", Place("remote", "s3://bucket/edits")),
        (f"https://host/a.pt?id=1#sha256={DIGEST}", Place("remote", "https://host/a.pt?id=1", sha256=DIGEST)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_reference_is_understood(text: str, place: Place) -> None:
    assert place_of(text) == place


def test_a_local_folder_wins_over_a_hugging_face_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of("org/name").kind == "hub"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert place_of("org/name") == Place("local", "org/name")
    assert place_of("hf://org/name").kind == "hub", "written out it is never a path"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://key:secret@bucket/a#sha256=12", "s3://bucket/a ends with #sha256=12, which must have 64 hexadecimal digits"),
        ("a.safetensors#sha256=", "must have 64 hexadecimal digits"),
        ("hf://name", "write hf://org/name"),
    ],
)
def test_what_is_written_wrongly_is_refused_with_the_right_way(text: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        place_of(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host:8080/a/b.pt?X-Amz-Signature=secret#secret", "https://host:8080/a/b.pt"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("zip://unet::https://me:secret@host/a.zip?token=secret", "zip://unet::https://host/a.zip"),
        (f"hf://org/name@v1/a.pt#sha256={DIGEST}", "hf://org/name@v1/a.pt"),
        (f"/models/a@b?.pt#sha256={DIGEST}", "/models/a@b?.pt"),
    ],
)
def test_credentials_are_taken_out_of_what_is_shown(text: str, shown: str) -> None:
    assert public(text) == shown
    assert public(shown) == shown


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("/models/celeba", "/models/celeba/unet/config.json"),
        ("org/name", "hf://org/name/unet/config.json"),
        ("hf://org/name@refs/pr/3/deep/", "hf://org/name@refs%2Fpr%2F3/deep/unet/config.json"),
        ("s3://bucket/edits/", "s3://bucket/edits/unet/config.json"),
        ("s3://bucket", "s3://bucket/unet/config.json"),
        ("https://host/a?token=1", "https://host/a/unet/config.json?token=1"),
        ("zip://inner::s3://bucket/a.zip", "zip://inner/unet/config.json::s3://bucket/a.zip"),
    ],
)
def test_a_file_in_a_folder_is_a_reference_like_any_other(folder: str, file: str) -> None:
    assert inside(folder, "unet/config.json") == file
    assert place_of(file).reference == file


@pytest.mark.parametrize(
    ("weights", "card"),
    [
        ("edits/v1.2.safetensors", "edits/v1.2.json"),
        ("hf://org/name@v1.0/a.b.safetensors", "hf://org/name@v1.0/a.b.json"),
        (f"s3://bucket/a.safetensors#sha256={DIGEST}", "s3://bucket/a.json"),
        ("https://host/a.safetensors?token=1.2", "https://host/a.json?token=1.2"),
    ],
)
def test_the_card_lies_beside_the_weights_and_is_not_pinned_by_their_digest(weights: str, card: str) -> None:
    assert beside(weights, ".json") == card


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "DIFFUSIONCLIP_OFFLINE"])
def test_either_variable_means_offline(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("HF_HUB_OFFLINE", "DIFFUSIONCLIP_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    assert not offline()
    monkeypatch.setenv(name, "0")
    assert not offline()
    monkeypatch.setenv(name, "1")
    assert offline()


def test_local_paths_become_absolute_and_nothing_else_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for text in ("org/name", "./org/name", f"file://{tmp_path}/org/name"):
        assert absolute(text) == str(tmp_path / "org" / "name")
    assert absolute("face.pth") == str(tmp_path / "face.pth")
    assert absolute(f"a/face.pth#sha256={DIGEST}") == f"{tmp_path}/a/face.pth#sha256={DIGEST}"
    for text in ("other/name", "hf://org/name@v1/a.pt", "s3://bucket/a", f"https://host/a.pt?id=1#sha256={DIGEST}", "/a/b"):
        assert absolute(text) == text


def test_the_sentence_of_missing_weights_is_found_in_the_traceback_of_another_process() -> None:
    lines = [
        "Worker group failed:",
        "\x1b[36mray::f()\x1b[39m (pid=1)",
        "models.references.MissingError: a.pth does not exist; get it",
        "more",
    ]
    text = "\n".join(lines)
    assert told_in(text) == "a.pth does not exist; get it"
    assert told_in("ValueError: WeightsError") is None


def test_what_other_programs_say_is_told_without_the_secrets_in_its_addresses() -> None:
    said = "403, url='https://me:hunter2@host/a b' of s3://k:hunter2@b/c, <http://h/x?X-Amz-Signature=hunter2> and http://[?hunter2"
    assert public_text(said) == "403, url='https://host/a b' of s3://b/c, <http://h/x> and http://..."
    assert public_text("part-1 of /a/b@c?d cannot be read (1 : 2)") == "part-1 of /a/b@c?d cannot be read (1 : 2)"

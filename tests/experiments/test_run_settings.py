"""What shapes a run: which settings, told by what, and whether a folder is of them."""

import dataclasses
import json
import shutil

import pytest

from experiments.configuration import setting
from experiments.finetune_config import FinetuneConfig
from experiments.models import MODEL_FILE
from experiments.quantize import QuantizeConfig
from experiments.run_settings import SETTINGS_FILE, claim_folder, holds_model, shaping_settings
from experiments.speech import SpeechConfig

MADE = (MODEL_FILE, "calibration.safetensors", "checkpoints/3", "stages/1_2_bits/checkpoints/3")


@dataclasses.dataclass(frozen=True)
class Part:
    rate: float = setting(0.5, "Rate.")


@dataclasses.dataclass(frozen=True)
class Whole:
    workdir: str = setting("", "Folder.", incidental=True)
    names: tuple[str, ...] = setting(("one",), "Names.")
    part: Part = Part()
    test: Part = setting(Part(0.1), "Another.", incidental=True)


def make(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_incidental_settings_and_parts_are_left_out():
    assert shaping_settings(Whole()) == {"names": ("one",), "rate": 0.5}


def test_how_often_a_training_logs_does_not_shape_it_and_its_steps_do():
    one = shaping_settings(FinetuneConfig())
    assert shaping_settings(FinetuneConfig(log_steps=3, save_steps=7, speech=FinetuneConfig().speech)) == one
    assert shaping_settings(FinetuneConfig(steps=7)) == one | {"steps": 7}


def test_a_model_is_told_by_its_content(tmp_path, float_run, monkeypatch):
    shutil.copytree(float_run, tmp_path / "float")
    monkeypatch.chdir(tmp_path)
    one, other = (shaping_settings(QuantizeConfig(pretrained=str(name))) for name in (float_run, "float"))
    assert one == other
    (tmp_path / "float" / MODEL_FILE).write_bytes((float_run / MODEL_FILE).read_bytes()[:-1])
    assert shaping_settings(QuantizeConfig(pretrained="float"))["pretrained"] != one["pretrained"]


@pytest.mark.parametrize("layout", ["folder", "list"])
def test_speech_is_told_by_its_names(tmp_path, speech, layout):
    shutil.copytree(speech.train, tmp_path / "one")
    shutil.copytree(speech.noise, tmp_path / "noise")

    def settings(folder):
        data_dir = folder
        if layout == "list":
            data_dir = tmp_path / f"{folder.name}.txt"
            lines = [f"{path.parent.name} {path}" for path in sorted(speech.train.glob("*/*.wav"))]
            data_dir.write_text("\n".join(lines[: len(list(folder.glob("*/*.wav")))]))
        return shaping_settings(
            SpeechConfig(data_dir=(str(data_dir),), data_layout=layout, noise_dir=(str(folder.parent / "noise"),))
        )

    own = settings(speech.train)
    assert settings(tmp_path / "one") == own
    (tmp_path / "one" / "train0" / "0.wav").unlink()
    assert [name for name, value in settings(tmp_path / "one").items() if value != own[name]] == ["data_dir"]
    (tmp_path / "noise" / "hum.wav").rename(tmp_path / "noise" / "hiss.wav")
    assert settings(tmp_path / "one")["noise_dir"] != own["noise_dir"]


def test_excluded_speakers_are_told_by_their_names(tmp_path, speech):
    files = {"one.txt": "train0\ntrain1\n", "same.txt": "train1\ntrain0", "other.txt": "train0\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    one, same, other = (shaping_settings(SpeechConfig(exclude_speakers=str(tmp_path / name))) for name in files)
    assert one == same != other


@pytest.mark.parametrize("made", MADE)
def test_a_folder_is_of_the_settings_that_something_was_made_with(tmp_path, made):
    settings = {"steps": 300, "names": ("one",), "rate": 0.1}
    claim_folder(tmp_path / "run", settings)
    make(tmp_path / "run", made)
    claim_folder(tmp_path / "run", settings)
    with pytest.raises(
        ValueError,
        match=r"run was made with steps=300, not 100; rate=0.1, not None; choose another --workdir, or delete",
    ):
        claim_folder(tmp_path / "run", {"steps": 100, "names": ("one",)})
    assert json.loads((tmp_path / "run" / SETTINGS_FILE).read_text()) == settings | {"names": ["one"]}


def test_where_nothing_was_made_other_settings_take_the_place(tmp_path):
    claim_folder(tmp_path, {"steps": 300})
    (tmp_path / "checkpoints").mkdir()
    make(tmp_path, "other_run/model.safetensors")
    claim_folder(tmp_path, {"steps": 100})
    make(tmp_path, MODEL_FILE)
    claim_folder(tmp_path, {"steps": 100})


@pytest.mark.parametrize("made", MADE)
def test_what_was_made_nobody_knows_how_is_refused(tmp_path, made):
    make(tmp_path, made)
    with pytest.raises(ValueError, match="holds a run without settings.json"):
        claim_folder(tmp_path, {"steps": 100})


def test_of_many_differences_some_are_named(tmp_path):
    claim_folder(tmp_path, dict.fromkeys("abcdefg", 1))
    make(tmp_path, MODEL_FILE)
    with pytest.raises(ValueError, match="e=1, not 2; 2 more; choose"):
        claim_folder(tmp_path, dict.fromkeys("abcdefg", 2))


def test_a_model_is_reused_with_its_settings_only(tmp_path):
    claim_folder(tmp_path, {"steps": 300})
    assert not holds_model(tmp_path, {"steps": 100})
    make(tmp_path, MODEL_FILE)
    assert holds_model(tmp_path, {"steps": 300})
    with pytest.raises(ValueError, match="steps=300, not 100"):
        holds_model(tmp_path, {"steps": 100})

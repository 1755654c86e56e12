"""Noise at an exact ratio, reverberation that keeps place and energy, speed, and purity."""

import numpy as np
import pytest

from qsv.data.augmentation import (
    Augmenter,
    ImpulseResponses,
    NoiseSource,
    change_speed,
    folder_impulse_responses,
    folder_noise,
    mix_at_snr,
    musan_noise,
    reverberate,
)


def gaussian(num_samples, seed=0, level=0.05):
    return np.random.default_rng(seed).normal(0, level, num_samples).astype(np.float32)


def decibels(energy_ratio):
    return 10 * np.log10(energy_ratio)


def energy(waveform):
    return np.sum(np.square(waveform, dtype=np.float64))


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5, 60.0])
def test_mixing_is_exact(snr_db):
    speech, noise = gaussian(16000, level=0.1), gaussian(16000, seed=1, level=0.003)
    added = mix_at_snr(speech, noise, snr_db).astype(np.float64) - speech
    assert decibels(energy(speech) / energy(added)) == pytest.approx(snr_db, abs=0.01)


def test_mixing_with_silence_changes_nothing():
    speech, silence = gaussian(100), np.zeros(100, np.float32)
    np.testing.assert_array_equal(mix_at_snr(speech, silence, 0.0), speech)
    np.testing.assert_array_equal(mix_at_snr(silence, speech, 0.0), silence)
    with pytest.raises(ValueError, match="expected noise of the waveform's shape"):
        mix_at_snr(speech, silence[1:], 0.0)


def test_reverberation_keeps_energy_and_place():
    speech = np.zeros(4000, np.float32)
    speech[1000:1100] = gaussian(100)
    response = np.zeros(900, np.float32)
    response[300], response[700] = 0.5, 0.2
    wet = reverberate(speech, response)
    assert wet.dtype == np.float32 and wet.shape == speech.shape
    assert energy(wet) == pytest.approx(energy(speech), rel=1e-5)
    assert np.abs(wet[:1000]).max() < 1e-6
    gain = wet[1050] / speech[1050]
    np.testing.assert_allclose(wet[1000:1100], gain * speech[1000:1100], atol=1e-6)
    np.testing.assert_allclose(wet[1400:1500], 0.4 * gain * speech[1000:1100], atol=1e-6)


def test_reverberation_by_one_tap_is_the_identity_and_silence_stays():
    speech = gaussian(500)
    np.testing.assert_allclose(reverberate(speech, np.array([0.0, -0.3], np.float32)), -speech, atol=1e-7)
    silence = np.zeros(500, np.float32)
    np.testing.assert_array_equal(reverberate(silence, np.ones(3, np.float32)), silence)


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_tempo_and_pitch(speed):
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    changed = change_speed(tone, speed)
    assert len(changed) == round(16000 / speed)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed))))
    assert np.argmax(spectrum) * 16000 / len(changed) == pytest.approx(1000 * speed, abs=2)
    assert change_speed(tone, speed, num_samples=100).shape == (100,)
    with pytest.raises(ValueError, match="positive speed"):
        change_speed(tone, 0)


def noise_augmenter(write_audio, **options):
    clips = tuple(write_audio(f"noise/{index}.wav", gaussian(3000, seed=index)) for index in range(4))
    return Augmenter([NoiseSource(clips, **options)], probability=1.0)


def test_augmenter_is_a_pure_function_of_the_generator(write_audio):
    augmenter = noise_augmenter(write_audio)
    speech = gaussian(1000, seed=9)
    before = speech.copy()
    outputs = [augmenter.augment(speech, np.random.default_rng(seed)) for seed in (1, 2, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    np.testing.assert_array_equal(speech, before)


def test_augmenter_draws_the_ratio_over_the_whole_range(write_audio):
    augmenter = noise_augmenter(write_audio, snr_db=(5.0, 15.0))
    speech = gaussian(1000, seed=9)
    rng = np.random.default_rng(0)
    ratios = [decibels(energy(speech) / energy(augmenter.augment(speech, rng) - speech)) for _ in range(200)]
    assert 5.0 <= min(ratios) < 6.0
    assert 14.0 < max(ratios) <= 15.01


def test_babble_sums_clips_of_equal_level(write_audio):
    quiet = write_audio("q.wav", 0.001 * np.sin(np.arange(4000)))
    loud = write_audio("l.wav", 0.5 * np.sin(2 * np.arange(4000)))
    augmenter = Augmenter([NoiseSource((quiet, loud), (0.0, 0.0), (8, 8))], probability=1.0)
    speech = np.full(4000, 0.01, np.float32)
    noise = augmenter.augment(speech, np.random.default_rng(0)) - speech
    spectrum = np.abs(np.fft.rfft(noise))
    first, second = spectrum[round(4000 / (2 * np.pi))], spectrum[round(8000 / (2 * np.pi))]
    assert 0.02 < first / second < 50


def test_probability():
    augmenter = Augmenter(
        impulse_responses=ImpulseResponses(arrays=(np.array([1, 0.5], np.float32),)), probability=0.25
    )
    speech, rng = gaussian(100), np.random.default_rng(0)
    changed = sum(not np.array_equal(augmenter.augment(speech, rng), speech) for _ in range(1000))
    assert 200 < changed < 300


def test_output_is_clipped_not_wrapped(write_audio):
    augmenter = noise_augmenter(write_audio, snr_db=(-10.0, -10.0))
    loud = np.clip(gaussian(1000, level=0.8), -1, 1)
    output = augmenter.augment(loud, np.random.default_rng(0))
    assert output.max() == 1.0 and output.min() == -1.0


def test_silent_crop_stays_silent_and_finite(write_audio):
    silent_clip = write_audio("silent.wav", np.zeros(3000))
    for clip_source in (NoiseSource((silent_clip,)), NoiseSource((silent_clip,), num_mixed=(3, 8))):
        augmenter = Augmenter([clip_source], probability=1.0)
        for speech in (np.zeros(500, np.float32), gaussian(500)):
            np.testing.assert_array_equal(augmenter.augment(speech, np.random.default_rng(0)), speech)


def test_impulse_response_files_use_the_first_channel(write_audio):
    response = np.zeros((400, 2), np.float32)
    response[100, 0], response[300, 0], response[50, 1] = 0.5, 0.25, 0.9
    path = write_audio("rirs/a.wav", response, subtype="FLOAT")
    augmenter = Augmenter(impulse_responses=folder_impulse_responses(path.parent), probability=1.0)
    speech = gaussian(2000)
    for _ in range(2):
        np.testing.assert_allclose(
            augmenter.augment(speech, np.random.default_rng(0)),
            reverberate(speech, response[:, 0]),
            atol=1e-6,
        )


def test_noise_and_rooms_come_equally_often(write_audio):
    clips = (write_audio("n.wav", gaussian(3000)),)
    response = np.array([0.0, 0.0, 1.0, 0.9], np.float32)
    source = NoiseSource(clips, (-20.0, -20.0))
    augmenter = Augmenter([source], ImpulseResponses(arrays=(response,)), probability=1.0)
    speech, rng = gaussian(300, seed=5, level=0.01), np.random.default_rng(0)
    noisy = sum(energy(augmenter.augment(speech, rng)) > 2 * energy(speech) for _ in range(400))
    assert 150 < noisy < 250


def test_musan_parts_and_their_ranges(write_audio, tmp_path):
    for part in ("noise/free", "speech/us", "music/jazz"):
        write_audio(f"musan/{part}/1.wav", gaussian(100))
    noise, speech, music = musan_noise(tmp_path / "musan")
    assert (noise.snr_db, speech.snr_db, music.snr_db) == ((0, 15), (10, 30), (5, 15))
    assert (noise.num_mixed, speech.num_mixed, music.num_mixed) == ((1, 1), (3, 8), (1, 1))
    assert speech.clips == (tmp_path / "musan/speech/us/1.wav",)
    with pytest.raises(ValueError, match=r"no audio files below .*noise"):
        musan_noise(tmp_path)


def test_rirs_noises_leaves_out_noise(write_audio, tmp_path):
    for name in (
        "simulated_rirs/smallroom/Room001/Room001-00001.wav",
        "real_rirs_isotropic_noises/RVB2014_type1_rir_largeroom1_far_angla.wav",
        "real_rirs_isotropic_noises/RVB2014_type1_noise_largeroom1_1.wav",
        "pointsource_noises/noise-free-sound-0000.wav",
    ):
        write_audio(f"RIRS_NOISES/{name}", gaussian(100))
    clips = folder_impulse_responses(tmp_path / "RIRS_NOISES").clips
    assert [clip.name[:7] for clip in clips] == ["RVB2014", "Room001"]
    assert "_rir_" in clips[0].name


def test_errors(write_audio, tmp_path):
    with pytest.raises(ValueError, match="noise sources, impulse responses, or both"):
        Augmenter()
    clip = write_audio("noise/a.wav", gaussian(100))
    with pytest.raises(ValueError, match=r"probability in \[0, 1\]"):
        Augmenter(folder_noise(clip.parent), probability=1.5)
    with pytest.raises(ValueError, match="at least one clip"):
        NoiseSource(())
    with pytest.raises(ValueError, match="snr_db"):
        NoiseSource((clip,), (15.0, 0.0))
    with pytest.raises(ValueError, match="num_mixed"):
        NoiseSource((clip,), num_mixed=(0, 1))
    with pytest.raises(ValueError, match="clips or arrays"):
        ImpulseResponses()
    with pytest.raises(ValueError, match="response 0 of shape"):
        ImpulseResponses(arrays=(np.zeros(10, np.float32),))
    (tmp_path / "noise/b.wav").touch()
    with pytest.raises(ValueError, match=r"1 noise clips are unreadable, such as .*b\.wav: is empty"):
        Augmenter(folder_noise(clip.parent))

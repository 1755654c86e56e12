"""The console command `qsv`: enrol speakers and verify them."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import platformdirs

from qsv.deploy.runtime.backends import BACKENDS
from qsv.deploy.runtime.embedder import OnnxEmbedder, checked_description
from qsv.deploy.runtime.model_file import ModelFileError, read_sealed
from qsv.deploy.runtime.speech import SpeechRequirements
from qsv.deploy.runtime.store import StoreError, VoicePrintStore
from qsv.deploy.runtime.verifier import SpeakerVerifier

FAILED, DIFFERENT_SPEAKERS = 1, 3
MODEL_VARIABLE, STORE_VARIABLE = "QSV_MODEL", "QSV_STORE"

# What a command gives: what `--json` prints, the lines for people, and the exit status.
Result = tuple[dict[str, Any], list[str], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: in place of those of the process.

    Returns:
        The exit status: 0; 1 for an error; 3 where the speakers differ.
    """
    options = _parser().parse_args(arguments)
    try:
        fields, lines, status = options.run(options)
    except (OSError, ValueError, ImportError, StoreError) as error:
        fields, lines, status = {"error": str(error)}, [], FAILED
        if not options.json:
            print(f"qsv: {error}", file=sys.stderr)
    for warning in fields.get("warnings", ()):
        print(f"qsv: warning: {warning}", file=sys.stderr)
    print(json.dumps(fields) if options.json else "\n".join(lines), end="\n" if options.json or lines else "")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qsv", description="Speaker verification by a small network.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(run=run)
        own.add_argument("--json", action="store_true", help="print the result, or the error, as JSON")
        return own

    enrol = command("enrol", _enrol, "Add recordings to a speaker's voice print.")
    enrol.add_argument("name")
    enrol.add_argument("recordings", nargs="+", metavar="WAV")
    enrol.add_argument("--replace", action="store_true", help="forget the speaker's earlier recordings")
    verify = command("verify", _verify, "Decide whether a recording is of an enrolled speaker.")
    verify.add_argument("name")
    verify.add_argument("recording", metavar="WAV")
    identify = command("identify", _identify, "List enrolled speakers, the likeliest for a recording first.")
    identify.add_argument("recording", metavar="WAV")
    for own in (verify, identify):
        own.add_argument("--threshold", type=float, help="score from which on to accept; default: the model's own")
    for own in (enrol, verify, identify):
        _add_model(own)
    listed = command("list", _list, "List the enrolled speakers.")
    forget = command("forget", _forget, "Remove a speaker's voice print.")
    forget.add_argument("name")
    for own in (enrol, verify, identify, listed, forget):
        own.add_argument(
            "--store",
            type=pathlib.Path,
            default=os.environ.get(STORE_VARIABLE) or platformdirs.user_data_path("qsv") / "voiceprints.sqlite",
            help=f"file of the voice prints; default: %(default)s, or what {STORE_VARIABLE} names",
        )
    info = command("info", _info, "Say what a model file holds.")
    info.add_argument("model", type=pathlib.Path)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get(MODEL_VARIABLE)
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        default=default,
        required=default is None,
        help=f"ONNX file of experiments.export; default: what {MODEL_VARIABLE} names",
    )
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="what runs it; default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="0, the default: as many as there are cores")


def _verifier(options: argparse.Namespace) -> SpeakerVerifier:
    # The store first: it is at hand sooner, should it be unusable.
    store = VoicePrintStore(options.store)
    embedder = OnnxEmbedder(
        options.model, threads=options.threads, backend=options.backend, requirements=SpeechRequirements()
    )
    return SpeakerVerifier(embedder, store, threshold=getattr(options, "threshold", None))


def _enrol(options: argparse.Namespace) -> Result:
    made = _verifier(options).enrol(options.name, options.recordings, replace=options.replace)
    text = f"{made.name}: {_recordings(made.added)} added, {made.utterances} in the voice print"
    if made.least_score is not None:
        text += f"; the least like the others scores {made.least_score:.3f}"
    return dataclasses.asdict(made), [text], 0


def _verify(options: argparse.Namespace) -> Result:
    decision = _verifier(options).verify(options.name, options.recording)
    word = "accepted" if decision.accepted else "rejected"
    text = f"{word}: score {decision.score:.4f}, threshold {decision.threshold:.4f}"
    return dataclasses.asdict(decision), [text], 0 if decision.accepted else DIFFERENT_SPEAKERS


def _identify(options: argparse.Namespace) -> Result:
    verifier = _verifier(options)
    candidates = verifier.identify(options.recording)
    best = candidates[0]
    fields = {
        "name": best.name if best.accepted else None,
        "threshold": verifier.threshold,
        "candidates": [dataclasses.asdict(candidate) for candidate in candidates],
    }
    lines = [
        f"{candidate.score:7.4f}  {candidate.name}{'' if candidate.accepted else '  (rejected)'}"
        for candidate in candidates
    ]
    return fields, lines, 0 if best.accepted else DIFFERENT_SPEAKERS


def _list(options: argparse.Namespace) -> Result:
    prints = VoicePrintStore(options.store).voice_prints()
    speakers: list[dict[str, Any]] = [
        {
            "name": own.name,
            "utterances": len(own.embeddings),
            "enrolled_at": own.enrolled_at,
            "model": own.model,
        }
        for own in prints
    ]
    lines = [f"{own['name']}: {_recordings(own['utterances'])}, since {own['enrolled_at']}" for own in speakers]
    return {"speakers": speakers}, lines or [f"nobody is enrolled in {options.store}"], 0


def _recordings(count: int) -> str:
    return f"{count} recording{'s' * (count != 1)}"


def _forget(options: argparse.Namespace) -> Result:
    VoicePrintStore(options.store).forget(options.name)
    return {"forgotten": options.name}, [f"{options.name} is forgotten"], 0


def _info(options: argparse.Namespace) -> Result:
    if options.model.suffix == ".safetensors":
        raise ModelFileError(options.model, "is a packed file; `python -m experiments.export` makes an ONNX file of it")
    model = read_sealed(options.model)
    own = checked_description(options.model, model.description)
    arguments = ", ".join(f"{name}={value}" for name, value in own["network"]["arguments"].items())
    weights = {text: len(paths) for text, paths in own.get("plan", {}).items()}
    fields = {
        "file": str(options.model),
        "bytes": options.model.stat().st_size,
        "sha256": model.digest,
        "network": own["network"],
        "input": own["input"],
        "sample_rate_hz": own["sample_rate_hz"],
        "embedding_size": own["embedding_size"],
        "threshold": own.get("threshold"),
        "activation_bits": own.get("activation_bits"),
        "weights": weights,
        "provenance": own.get("provenance", {}),
        "qsv_version": own.get("qsv_version"),
    }
    threshold = "none" if own.get("threshold") is None else f"{own['threshold']:.4f}"
    seconds = own["min_samples"] / own["sample_rate_hz"]
    lines = [
        f"{options.model}: {fields['bytes']:,} bytes, written by qsv {fields['qsv_version']}",
        f"network    {own['network']['name']}({arguments})",
        f"input      {own['input']}, of speech at {own['sample_rate_hz']} Hz, {seconds:.3f} s or longer",
        f"embedding  {own['embedding_size']} values",
        f"threshold  {threshold}",
        *(f"weights    {text}: {count} tensors" for text, count in weights.items()),
        f"arithmetic {own.get('activation_bits', 32)}-bit activations",
        f"sha256     {model.digest}",
    ]
    return fields, lines, 0

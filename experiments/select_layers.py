"""Which layers to quantize at all, one after the other, and what that costs at every size.

    python -m experiments.select_layers --pretrained=campplus_cn_en_common.pt --bits=8 --target_share=0.5 \
        --data_dir=DATA/librispeech251 --noise_dir=DATA/noise --test_dir=DATA/an4 \
        --workdir=runs/selected --output=results/select_layers.json

Each layer is quantized alone; those whose loss for a byte saved is least are quantized first. The loss is the drift of
the embeddings, which needs no labels, or with `--rank_by=eer` the rise of the EER on `--dev_dir`. At every size of the
front the selection is measured on the test trials beside the one that an integer program makes of the Hessian's
sensitivities; layers are rounded there, not calibrated. The folder gets `model.safetensors`, the selection of
`--target_share` (or, with `--max_eer_rise`, the smallest of the front that keeps it on `--dev_dir`), calibrated and
fine-tuned as the flags say, `front.png` and `selection.json`. What each layer costs is kept in files there, which the
same command again reads.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.allocation import kernels, plan_of
from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization, unquantized
from experiments.models import MODEL_FILE, FloatModel, load_float_model, model_digest
from experiments.quantize import SCHEMES, QuantizeConfig, WrittenModel, write_model
from experiments.run_settings import claim_folder, require_same, shaping_settings
from experiments.scoring import measure, score
from experiments.sensitivity import SensitivityConfig, sensitivities
from experiments.speech import corpus_digest
from experiments.stages import finetune_in_stages
from experiments.study_tables import selection_table
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.analysis import plot_trade_off
from qsv.data import CorpusLayout
from qsv.deploy import Embedder
from qsv.models import count_parameters
from qsv.precision import (
    FLOAT_BITS,
    Allocation,
    Budget,
    Choice,
    Layer,
    allocate,
    greedy_order,
    greedy_selection,
    layers_or_float,
    one_stage,
    storage_bytes,
)
from qsv.quant import Plan, Quantizer, fake_quantize, init, leaf_paths
from qsv.scoring import eer

_RISES_FILE = "eer_rises.json"


@dataclasses.dataclass(frozen=True)
class SelectLayersConfig:
    """Flags of a selection."""

    workdir: str = setting("", "Folder of the run.", incidental=True)
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    scheme: str = setting("uniform", "Levels of the weights.", choices=SCHEMES)
    bits: int = setting(8, "Bits a weight of the layers that are quantized.", minimum=1)
    rank_by: str = setting(
        "drift",
        "What a layer alone costs: drift of the embeddings, or the rise of the eer on --dev_dir.",
        choices=["drift", "eer"],
    )
    dev_dir: str = setting("", "Folder of speech of other speakers than the test's, for eer and --max_eer_rise.")
    dev_layout: str = setting(
        "folder", "How it is laid out, see --test_layout.", choices=[layout.value for layout in CorpusLayout]
    )
    target_share: float = setting(0.5, "Bytes of the parameters that are wanted, over those in float.", minimum=0.0)
    max_eer_rise: float = setting(
        0.0, "In place of --target_share: EER that may be lost on --dev_dir, in percent absolute.", minimum=0.0
    )
    points: int = setting(6, "Sizes of the front, evenly between float and all layers quantized.", minimum=2)
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.", incidental=True)
    sensitivities: SensitivityConfig = SensitivityConfig()
    finetune: FinetuneConfig = FinetuneConfig(steps=0)
    test: TestConfig = setting(TestConfig(), "Trials.", incidental=True)

    def __post_init__(self) -> None:
        if not 0 < self.target_share <= 1:
            raise ValueError(f"--target_share must be in (0, 1], got {self.target_share}")
        if (self.rank_by == "eer" or self.max_eer_rise) and not self.dev_dir:
            raise ValueError("--rank_by=eer and --max_eer_rise need --dev_dir")

    def quantization(self) -> QuantizeConfig:
        """How the layers that are selected are quantized."""
        return QuantizeConfig(pretrained=self.pretrained, scheme=self.scheme, bits=self.bits, finetune=self.finetune)


@dataclasses.dataclass(frozen=True)
class Selector:
    """What makes and measures selections of one network."""

    config: SelectLayersConfig
    model: FloatModel
    quantizer: Quantizer

    def plan(self, allocation: Allocation) -> Plan:
        """Quantizers of the selected layers."""
        chosen = {path: bits for path, bits in allocation.bits.items() if bits != FLOAT_BITS}
        return plan_of(chosen, {self.quantizer.bits: self.quantizer}, self.model)

    def embedder(self, plan: Plan) -> Embedder:
        """The network with its layers rounded to their levels."""
        params = fake_quantize(plan, self.model.params, init(plan, self.model.params))
        return Embedder(self.model.network, {"params": params, "batch_stats": self.model.batch_stats})

    def scores(self, plan: Plan, test_set: TestSet) -> np.ndarray:
        """[trials] of that network."""
        return score(self.embedder(plan), test_set)


def run(config: SelectLayersConfig) -> dict[str, Any]:
    """Rank, select, measure; returns and writes the results."""
    require(workdir=config.workdir, pretrained=config.pretrained, test_dir=config.test.test_dir)
    workdir = pathlib.Path(config.workdir)
    test_set = load_test_set(config.test)
    development = _development(config, test_set) if config.dev_dir else None
    claim_folder(workdir, shaping_settings(config) | (_development_settings(development) if development else {}))
    selector = Selector(config, load_float_model(config.pretrained), config.quantization().quantizer())
    network = unquantized(config.finetune, selector.model)
    paths = kernels(selector.quantizer, config.finetune.float_layers, selector.model.params)
    ranked, order = _ranked(selector, network, paths, development)
    hessian = layers_or_float(_measured(selector, network, paths, "hessian"))
    nothing = Allocation.of(ranked, dict.fromkeys(paths, FLOAT_BITS))
    everything = greedy_selection(ranked, order, max_bytes=_least_bytes(ranked))
    # What isn't a kernel is float at every size.
    rest = 4 * count_parameters(selector.model.params) - nothing.size_bytes
    sizes = np.linspace(nothing.size_bytes, everything.size_bytes, config.points)
    reference = selector.scores(selector.plan(nothing), test_set)
    fronts = []
    for size in sizes[1:]:
        fronts.append(("greedy", greedy_selection(ranked, order, max_bytes=size)))
        fronts.append(("hessian", allocate(hessian, Budget(max_bytes=float(size)))))
    # Several are the same, such as all layers.
    plans = dict.fromkeys(selector.plan(allocation) for _, allocation in fronts)
    figures = {
        plan: measure(selector.scores(plan, test_set), test_set, reference)
        for plan in tqdm(plans, "front", unit="selection")
    }
    rows = [
        {
            "front": name,
            "layers": sum(bits != FLOAT_BITS for bits in allocation.bits.values()),
            "parameter_bytes": allocation.size_bytes + rest,
            **figures[selector.plan(allocation)],
        }
        for name, allocation in fronts
    ]
    selected = _selected(selector, ranked, order, sizes, development, rest)
    written, embedder = _write(selector, network, selected)
    results = {
        "experiment": "select_layers",
        "network": pathlib.Path(config.pretrained).name,
        "scheme": config.scheme,
        "bits": config.bits,
        "ranked_by": config.rank_by,
        "test": pathlib.Path(config.test.test_dir).name,
        "layers": len(paths),
        "order": list(order),
        "float_parameter_bytes": nothing.size_bytes + rest,
        "float": measure(reference, test_set),
        "rows": rows,
        "selected": {
            "layers": sum(bits != FLOAT_BITS for bits in selected.bits.values()),
            "parameter_bytes": selected.size_bytes + rest,
            "file_bytes": written.path.stat().st_size,
            **measure(score(embedder, test_set), test_set, reference),
        },
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or workdir / "results.json"), results)
    write_json(workdir / "selection.json", {"order": list(order), "bits": dict(selected.bits)})
    print(selection_table(results))
    _plot(results, workdir / "front.png")
    return results


def _development(config: SelectLayersConfig, test_set: TestSet) -> TestSet:
    """All pairs of the development speech, which shares no speaker with the trials."""
    own = dataclasses.replace(config.test, test_dir=config.dev_dir, test_layout=config.dev_layout, trials="")
    development = load_test_set(own)
    shared = sorted(set(development.speakers) & set(test_set.speakers))
    if shared:
        raise ValueError(f"speakers {shared[:5]} are in --dev_dir and in the trials; choose others")
    return development


def _development_settings(development: TestSet) -> dict[str, Any]:
    """What an EER on development speech hangs on, but for the network."""
    cohort = development.cohort
    return {
        "dev_dir": corpus_digest(development.corpus),
        "cohort_dir": corpus_digest(cohort) if cohort else "",
        **{name: getattr(development.config, name) for name in ("subtract_mean", "as_norm", "top_n")},
    }


def _least_bytes(layers: Sequence[Layer]) -> int:
    return sum(min(choice.size_bytes for choice in layer.choices) for layer in layers)


def _measured(selector: Selector, network: Quantization, paths: Sequence[str], sensitivity: str) -> tuple[Layer, ...]:
    config = selector.config
    return sensitivities(
        dataclasses.replace(config.sensitivities, sensitivity=sensitivity),
        config.finetune,
        network,
        paths,
        (selector.quantizer,),
        file=pathlib.Path(config.workdir) / f"sensitivity_{sensitivity}.json",
    ).layers


def _ranked(
    selector: Selector, network: Quantization, paths: Sequence[str], development: TestSet | None
) -> tuple[list[Layer], tuple[str, ...]]:
    """The layers with what each costs alone, and the order to quantize them in."""
    if selector.config.rank_by == "drift":
        layers = layers_or_float(_measured(selector, network, paths, "drift"))
        return layers, greedy_order(layers)
    assert development is not None
    weights = dict(leaf_paths(selector.model.params))
    rises = _rises(selector, paths, development)
    alone = []
    for path in paths:
        size = storage_bytes(weights[path], selector.quantizer)
        alone.append(Layer(path, int(weights[path].size), (Choice(selector.quantizer.bits, rises[path], size),)))
    layers = layers_or_float(alone)
    return layers, greedy_order(layers)


def _rises(selector: Selector, paths: Sequence[str], development: TestSet) -> dict[str, float]:
    """By how much each layer alone raises the EER on development speech; those in the file aren't measured again."""
    file = pathlib.Path(selector.config.workdir) / _RISES_FILE
    settings = {
        "pretrained": model_digest(selector.config.pretrained),
        "quantizer": repr(selector.quantizer),
        **_development_settings(development),
    }
    rises: dict[str, float] = {}
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        require_same(content["settings"], settings, file)
        rises = content["rises"]
    bits, labels = selector.quantizer.bits, development.trials.labels
    missing = [path for path in paths if path not in rises]
    if missing:
        unchanged = eer(selector.scores(plan_of({}, {}, selector.model), development), labels)
    for path in tqdm(missing, "each layer alone", unit="layer"):
        plan = plan_of({path: bits}, {bits: selector.quantizer}, selector.model)
        rises[path] = eer(selector.scores(plan, development), labels) - unchanged
        write_json(file, {"settings": settings, "rises": rises})
    return rises


def _selected(
    selector: Selector,
    layers: Sequence[Layer],
    order: Sequence[str],
    sizes: np.ndarray,
    development: TestSet | None,
    rest: int,
) -> Allocation:
    """The selection of the wanted share, or the smallest of the front that keeps the EER on development speech."""
    config = selector.config
    if not config.max_eer_rise:
        return greedy_selection(layers, order, max_bytes=config.target_share * (sizes[0] + rest) - rest)
    assert development is not None
    labels = development.trials.labels
    front = [greedy_selection(layers, order, max_bytes=size) for size in sizes]
    errors = [100 * eer(selector.scores(selector.plan(one), development), labels) for one in front]
    # Float itself always does.
    return next(
        one
        for one, error in zip(reversed(front), reversed(errors), strict=True)
        if error <= errors[0] + config.max_eer_rise
    )


def _write(selector: Selector, network: Quantization, selected: Allocation) -> tuple[WrittenModel, Embedder]:
    """The selection calibrated, fine-tuned as far as the flags want it, and packed."""
    config = selector.config
    workdir, settings = pathlib.Path(config.workdir), config.finetune
    stages = one_stage(selector.plan(selected), steps=settings.steps)
    trained = finetune_in_stages(settings, network, stages, workdir=workdir)
    write_run_record(workdir, "select_layers", config)
    return write_model(trained, workdir / MODEL_FILE, compact=True), trained.embedder


def _plot(results: dict[str, Any], path: pathlib.Path) -> None:
    whole = results["float_parameter_bytes"]
    curves = {}
    for name, shown in (("greedy", "greedy, one layer alone"), ("hessian", "integer program, Hessian")):
        own = [row for row in results["rows"] if row["front"] == name]
        curves[shown] = (
            [row["parameter_bytes"] / whole * 100 for row in own],
            [row["eer_percent"] for row in own],
        )
    points = {
        "float": (100.0, results["float"]["eer_percent"]),
        "selected, calibrated": (
            results["selected"]["parameter_bytes"] / whole * 100,
            results["selected"]["eer_percent"],
        ),
    }
    plot_trade_off(curves, points, path, xlabel="Bytes of the parameters (% of float)", ylabel="EER (%)")


if __name__ == "__main__":
    launch(SelectLayersConfig, run)

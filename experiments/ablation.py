"""What each ingredient of post-training quantization buys, added one after the other.

    python -m experiments.ablation --pretrained=campplus_cn_en_common.pt --bits=4 --data_dir=DATA/librispeech251 \
        --noise_dir=DATA/noise --test_dir=DATA/an4 --output=results/campplus_ablation.json

Nothing is trained. The models are measured in memory and not kept; `experiments.quantize --steps=0` makes the last one.
"""

import dataclasses
import pathlib
from typing import Any

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import calibration_waveforms
from experiments.models import load_float_model
from experiments.quantize import SCHEMES, QuantizeConfig, measure_agreement
from experiments.scoring import measure, score
from experiments.speech import training_corpus
from experiments.tables import ablation_table
from experiments.testing import TestConfig, load_test_set
from qsv.deploy import Embedder
from qsv.quant import fake_quantize
from qsv.training import calibrate

# Each with all that come before it.
INGREDIENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("levels fitted to the weights", {}),
    ("levels weighted by the inputs", {"weighted_codebooks": True}),
    ("compensated rounding", {"rounding": "compensated"}),
    ("layer after layer", {"sequential": True}),
    ("bias correction", {"bias_correction": True}),
    ("shifted statistics", {"recalibration": "shift"}),
    ("channel scales", {"per_channel": True}),
)
_NOTHING: dict[str, Any] = {
    "weighted_codebooks": False,
    "rounding": "nearest",
    "sequential": False,
    "bias_correction": False,
    "recalibration": "none",
    "per_channel": False,
}


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Flags of an ablation; those of the ingredients themselves have no effect."""

    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    scheme: str = setting("kmeans", "Levels of the weights.", choices=SCHEMES)
    bits: int = setting(4, "Bits a weight.", minimum=1)
    output: str = setting("", "JSON file for the results; printed in any case.")
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = TestConfig()


def run(config: AblationConfig) -> dict[str, Any]:
    """Quantize and measure; returns and writes the results."""
    require(pretrained=config.pretrained, test_dir=config.test.test_dir)
    test_set = load_test_set(config.test)
    model = load_float_model(config.pretrained)
    corpus = training_corpus(config.finetune.speech, labelled=False)
    waveforms = calibration_waveforms(config.finetune, corpus, model.network)
    if not waveforms:
        raise ValueError("an ablation needs speech to calibrate on; give --calibration_crops")
    float_embedder = Embedder(model.network, model.variables)
    reference = score(float_embedder, test_set)
    rows = [{"ingredient": "float", **measure(reference, test_set)}]
    settings = dict(_NOTHING)
    for ingredient, change in INGREDIENTS:
        settings |= change
        finetune = dataclasses.replace(config.finetune, **settings)
        quantization = QuantizeConfig(scheme=config.scheme, bits=config.bits, finetune=finetune)
        plan = quantization.plan(model.params)
        params, batch_stats, qstate = calibrate(model.network, model.variables, plan, waveforms, finetune.calibration)
        variables = {"params": fake_quantize(plan, params, qstate), "batch_stats": batch_stats}
        embedder = Embedder(model.network, variables)
        agreement = measure_agreement(float_embedder, embedder, corpus)
        figures = measure(score(embedder, test_set), test_set, reference)
        rows.append({"ingredient": ingredient, "median_cosine": agreement.median, **figures})
        print(f"{ingredient}: EER {figures['eer_percent']:.2f} %, median cosine {agreement.median:.4f}")
    results = {
        "experiment": "ablation",
        "scheme": config.scheme,
        "bits": config.bits,
        "test": pathlib.Path(config.test.test_dir).name,
        "rows": rows,
        "machine": machine(),
    }
    if config.output:
        write_json(pathlib.Path(config.output), results)
    print(ablation_table(results))
    return results


if __name__ == "__main__":
    launch(AblationConfig, run)

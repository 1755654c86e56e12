"""Tables of the studies: schemes on several networks, cascades, integers, speech quality, selections of layers."""

from typing import Any

from experiments.table_cells import correlation_cell, interval_cell

_LOOKS = ("smoothness", "kurtosis")


def weight_study_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each network, scheme and width of `experiments.weight_study`."""
    columns = [f"EER % on {test} (95 % interval), ratio" for test in results["tests"]]
    looks = [f"{name} and weight error" for name in _LOOKS]
    header = ["network", "levels", "bits", "steps", "median weight error", *looks, *columns]
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'--:|' * (len(header) - 2)}"]
    for network in results["networks"]:
        unchanged = [interval_cell(errors, "eer_percent", 2) for errors in network["float_tests"]]
        empty = ["–" for _ in _LOOKS]
        lines.append(f"| {network['network']} | float | 32 | 0 | 0 | {' | '.join([*empty, *unchanged])} |")
        for row in network["rows"]:
            errors = [_error_and_ratio(errors) for errors in row["tests"]]
            distortion = f"{100 * row['median_relative_error']:.1f} %"
            correlations = [correlation_cell(row.get(f"{name}_and_error")) for name in _LOOKS]
            cells = [network["network"], row["scheme"], str(row["bits"]), str(row["steps"]), distortion]
            cells += [*correlations, *errors]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for network in results["networks"]:
        low, high = network["smoothness_quartiles"]
        lines.append(
            f"{network['network']}: {network['layers']} layers, median smoothness {network['median_smoothness']:.2f} "
            f"(quartiles {low:.2f} to {high:.2f}), median kurtosis {network['median_kurtosis']:.1f}."
        )
    lines.append(
        "Smoothness (kurtosis) and weight error: rank correlation over a model's layers with its 95 % interval; errors "
        "are of the float weights moved to the nearest of the model's levels."
    )
    if results["distortion_and_errors"]:
        each = ", ".join(f"{name} {value:.2f}" for name, value in results["distortion_and_errors"].items())
        lines.append(
            f"Rank correlation of weight error and EER ratio over a network's untrained models: {each}; no interval, "
            "since models of one network are no independent draws."
        )
    return "\n".join(lines) + "\n"


def cascade_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each stage of `experiments.cascade`, and one for the cascade."""
    lines = [
        f"| system | EER % (95 % interval) | minDCF | actDCF at {results['prior']:g} | Cllr "
        "| EER / last stage's (95 % interval) | bit operations of a trial | bytes read for a trial | bytes resident |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    own = results["cascade"]
    systems = [(row["name"], row["relative_operations"], row["file_bytes"], row) for row in results["rows"]]
    systems.append(("cascade", own["relative_operations_of_a_trial"], own["bytes_read_of_a_trial"], own))
    for name, operations, size, row in systems:
        ratio = interval_cell(row, "eer_ratio", 2) if "eer_ratio" in row else "–"
        lines.append(
            f"| {name} | {interval_cell(row, 'eer_percent', 2)} | {row['min_dcf']:.3f} "
            f"| {row['act_dcf_at_prior']:.3f} | {row['cllr']:.3f} | {ratio} | {100 * operations:.1f} % | {size:,.0f} "
            f"| {row['resident_bytes']:,} |"
        )
    settled, utterances = (
        " / ".join(f"{100 * share:.1f} %" for share in own[name]) for name in ("settled", "utterances_settled")
    )
    flips, development = own["flips"], results["development"]
    activations = " / ".join(str(row["activation_bits"]) for row in results["rows"])
    text = (
        f"Trials settled at each stage: {settled}; utterances by the last stage that one of their trials reaches: "
        f"{utterances}; against the last stage {flips['harmful']} decisions got worse, {flips['beneficial']} better; "
        "every utterance embedded once at each stage that a trial of it reaches, the embeddings of all trials take "
        f"{100 * own['relative_operations']:.1f} % of the operations. A trial that comes alone reads the files of the "
        "stages that it reaches; the memory is that of the parameters, as float32, of all stages that any trial "
        f"reaches. Calibrated on {development['trials']:,} trials of {development['speakers']} other speakers; test on "
        f"{results['test']}; activations of {activations} bits, 32 being float."
    )
    if results["runtime"]:
        runtime = results["runtime"]
        text += f" From audio, {runtime['decisions_equal']:,} of {runtime['trials']:,} decisions are the same."
    return "\n".join([*lines, "", text]) + "\n"


def integer_table(*results: dict[str, Any]) -> str:
    """Markdown: one line for each network of `experiments.integer_network`."""
    lines = [
        "| network | weights, bits | scales | activations, bits | steps | EER % (95 % interval) "
        "| above float (95 % interval) | ONNX file above it (95 % interval) | file bytes "
        "| ONNX file bytes | cosine in integers | codes apart |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in results:
        exported, integers = one.get("exported"), one["integers"]
        above = interval_cell(exported, "eer_percent_difference", 3, sign="+") if exported else "–"
        size = f"{exported['file_bytes']:,}" if exported else "–"
        cosine, step = ("–", "–")
        if integers["utterances"]:
            cosine, step = f"{integers['least_cosine']:.6f}", str(integers["largest_step"])
        lines.append(
            f"| {one['network']} | {one['weight_bits']} | {one['scales']} | {one['activation_bits']} | {one['steps']} "
            f"| {interval_cell(one, 'eer_percent', 2)} | {interval_cell(one, 'eer_percent_difference', 2, sign='+')} "
            f"| {above} | {one['file_bytes']:,} | {size} | {cosine} | {step} |"
        )
    floats = {one["network"]: f"{one['network']} in float {one['float']['eer_percent']:.2f} %" for one in results}
    first = results[0]
    lines += [
        "",
        f"{', '.join(floats.values())}; test on {first['test']}: {first['trials']:,} trials; intervals by resampling "
        f"{first['resampled']}, paired. "
        f"In integers {first['integers']['utterances']} utterances were computed: the least cosine of an embedding "
        "with that of fake quantization, and the most that codes of a layer differ where it is given the same inputs.",
    ]
    return "\n".join(lines) + "\n"


def quality_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each network of `experiments.speech_quality`."""
    lines = [
        "| maps and weights | MSE (95 % interval) | PCC (95 % interval) | SRCC | PCC minus float's (95 % interval) "
        "| memory, all maps | times less | memory, largest layer | times less |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = results["rows"][0]
    for row in results["rows"]:
        behind = interval_cell(row, "pcc_difference", 3) if "pcc_difference" in row else ""
        lines.append(
            f"| {row['name']} | {interval_cell(row, 'mse', 3)} | {interval_cell(row, 'pcc', 3)} | {row['srcc']:.3f} "
            f"| {behind} "
            f"| {row['memory_bytes']:,} | {first['memory_bytes'] / row['memory_bytes']:.1f} "
            f"| {row['memory_bytes_at_peak']:,} "
            f"| {first['memory_bytes_at_peak'] / row['memory_bytes_at_peak']:.1f} |"
        )
    clips = results["clips"]
    validated = ", ".join(
        f"{name} {figures['mse']:.3f} and {figures['pcc']:.3f}{' (chosen)' if figures['chosen'] else ''}"
        for name, figures in results["validation"].items()
    )
    lines += [
        "",
        f"{results['network']}, {results['parameters']:,} parameters, predicts {results['label'].upper()} of clips of "
        f"{results['clip_seconds']:g} s; {clips['train']:,} to train on, {clips['test']:,} to test on, of "
        f"{results['test_speakers']} other speakers and other noise; {results['scheme']} levels; intervals by "
        f"resampling speakers. MSE and PCC of float weights on the validation clips: {validated}. "
        "Memory in bytes: weights as stored, and either the outputs of all convolutions together or the input and "
        "output of the largest one.",
    ]
    return "\n".join(lines) + "\n"


def selection_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each size and front of `experiments.select_layers`."""
    lines = [
        "| chosen by | layers quantized | bytes of the parameters | of float | EER % (95 % interval) "
        "| above float (95 % interval) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    names = {
        "float": "float",
        "greedy": f"each layer's {results['ranked_by']}",
        "hessian": "Hessian",
        "selected": "selected, calibrated",
    }
    whole = results["float_parameter_bytes"]
    rows = [{"front": "float", "layers": 0, "parameter_bytes": whole} | results["float"], *results["rows"]]
    for row in [*rows, {"front": "selected"} | results["selected"]]:
        above = interval_cell(row, "eer_percent_difference", 2) if "eer_percent_difference" in row else ""
        lines.append(
            f"| {names[row['front']]} | {row['layers']} | {row['parameter_bytes']:,} "
            f"| {100 * row['parameter_bytes'] / whole:.1f} % | {interval_cell(row, 'eer_percent', 2)} | {above} |"
        )
    resampled = results["float"].get("resampled")
    intervals = f"by resampling {resampled}, paired" if resampled else "left out, with so many trials"
    lines += [
        "",
        f"{results['network']}, {results['layers']} layers, {results['scheme']} levels of {results['bits']} bits, the "
        f"other layers float; the selected file has {results['selected']['file_bytes']:,} bytes; test on "
        f"{results['test']}; intervals {intervals}.",
    ]
    return "\n".join(lines) + "\n"


def _error_and_ratio(errors: dict[str, Any]) -> str:
    ratio = f", {errors['eer_ratio']:.2f}" if "eer_ratio" in errors else ""
    return interval_cell(errors, "eer_percent", 2) + ratio

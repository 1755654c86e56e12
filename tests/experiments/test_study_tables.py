"""Tables of the studies where there are too many trials for intervals."""

from experiments.study_tables import selection_table


def test_a_selection_on_very_many_trials_has_no_intervals():
    figures = {"eer_percent": 1.25, "parameter_bytes": 100, "layers": 1}
    results = {
        "ranked_by": "drift",
        "float_parameter_bytes": 400,
        "float": {"eer_percent": 1.0},
        "rows": [{"front": "greedy", "eer_percent_difference": 0.25, **figures}],
        "selected": {"eer_percent_difference": 0.125, "file_bytes": 120, **figures},
        "network": "resnet10",
        "layers": 3,
        "scheme": "uniform",
        "bits": 8,
        "test": "voxceleb1",
    }
    table = selection_table(results)
    assert "| each layer's drift | 1 | 100 | 25.0 % | 1.25 | 0.25 |" in table
    assert "intervals left out, with so many trials" in table
    results["float"] |= {"eer_percent_interval": [0.5, 1.5], "resampled": "speakers"}
    assert "| 1.00 (0.50 to 1.50) |" in selection_table(results)
    assert "intervals by resampling speakers, paired" in selection_table(results)

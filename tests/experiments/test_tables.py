"""Tables of results in Markdown."""

import json
import pathlib

import pytest

from experiments import tables

REPOSITORY = pathlib.Path(__file__).parents[2]


def row(scheme, bits, **more):
    return {
        "scheme": scheme,
        "bits": bits,
        "scales": "none" if scheme == "float" else "tensor",
        "steps": 0 if scheme == "float" else 100,
        "eer_percent": 5.126,
        "eer_percent_interval": [4.0, 6.5],
        "min_dcf": 0.4,
        "min_dcf_interval": [0.31, 0.5],
        "file_bytes": 1234567,
        "compression_ratio": 7.5,
        "target_trials": 1000,
        "non_target_trials": 2000,
        "speakers": 20,
        "resampled": "speakers",
        **more,
    }


RESULTS = {
    "experiment": "bit_widths",
    "parameters": 6630000,
    "test": "an4",
    "rows": [
        row("float", 32),
        row("kmeans", 4, eer_ratio=1.02, eer_ratio_interval=[0.9, 1.1]),
        row("uniform", 4),
    ],
}
TEXT = """# Title
before
<!-- table results/a.json -->
stale
<!-- end table -->
between
<!-- table results/a.json --> in a sentence is no marker
after
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_rows_show_figures_with_their_intervals():
    lines = tables.bit_width_table(RESULTS).splitlines()
    assert lines[2] == "| float | none | 32 | 0 | 5.13 (4.00 to 6.50) | 0.400 (0.310 to 0.500) | 1 | 1,234,567 | 7.50 |"
    assert lines[3].startswith("| kmeans | tensor | 4 | 100 |") and "| 1.02 (0.90 to 1.10) |" in lines[3]
    assert lines[-1].startswith(
        "6,630,000 parameters; steps of fine-tuning; test on an4: 1,000 target and 2,000 non-target trials of 20 "
    )


def test_a_ratio_to_a_faultless_float_model_is_left_out():
    assert "| – |" in tables.bit_width_table(RESULTS).splitlines()[4]


def test_only_what_is_between_the_markers_is_replaced(folder):
    text = tables.with_tables(TEXT, folder)
    marker = "<!-- table results/a.json -->\n"
    start, _, rest = TEXT.partition(marker)
    end = rest.partition("<!-- end table -->")[2]
    assert text == f"{start}{marker}\n{tables.bit_width_table(RESULTS)}\n<!-- end table -->{end}"


def test_tables_of_the_same_results_stay_as_they_are(folder):
    once = tables.with_tables(TEXT, folder)
    assert tables.with_tables(once, folder) == once


def test_text_without_markers_stays_as_it_is(folder):
    assert tables.with_tables("no table\n", folder) == "no table\n"


def test_files_are_rewritten_in_place(folder):
    readme = folder / "README.md"
    readme.write_text(TEXT)
    tables.run(tables.TablesConfig(arguments=(str(readme),)))
    assert readme.read_text() == tables.with_tables(TEXT, folder)


def test_figures_are_drawn_anew_to_the_byte(folder):
    page = folder / "page.md"
    page.write_text("<!-- figure results/a.json -->\n![Errors](drawn.svg)\n")
    drawn = []
    for _ in range(2):
        tables.run(tables.TablesConfig(arguments=(str(page),)))
        drawn.append((folder / "drawn.svg").read_bytes())
    assert drawn[0] == drawn[1] and b"</svg>" in drawn[0]
    assert page.read_text().startswith("<!-- figure")


def test_training_speed_rows():
    results = {
        "experiment": "benchmark_training",
        "setting": "resnet18 of width 16",
        "rounds": 9,
        "machine": {"cores": 2},
        "rows": [
            {
                "name": "float",
                "milliseconds": 100.4,
                "milliseconds_quartiles": [99.6, 102.0],
                "crops_per_second": 318.72,
                "ratio_to_float": 1.0,
            }
        ],
    }
    text = tables.training_speed_table(results)
    assert "| float | 100 | 100 to 102 | 318.7 | 1.000 |" in text
    assert "resnet18 of width 16; 9 interleaved rounds on 2 cores." in text


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/voxceleb.md"])
def test_tables_of_the_pages_are_those_of_the_results(page):
    path = REPOSITORY / page
    text = path.read_text(encoding="utf-8")
    assert "<!-- table " in text
    assert tables.with_tables(text, path.parent) == text

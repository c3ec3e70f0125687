"""What comes out of `tvae reproduce`: a table from evaluations, as Markdown, CSV and JSON, and inside of a page."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from acting import room_for

from tvae import evaluation
from tvae.metrics import Row
from tvae.paper import tables
from tvae.paper.exhibits import EXHIBITS, Exhibit
from tvae.paper.runs import Job, budgeted
from tvae.paper.tables import BOUND, EQUIVARIANCE_ERROR, LOG_LIKELIHOOD
from tvae.presets import PRESETS
from tvae.training import RunError

EXHIBIT = Exhibit(
    "Table 0: likelihood",
    {"mnist-tvae-w5-k3": {LOG_LIKELIHOOD: (-186.8, 0.1), EQUIVARIANCE_ERROR: (574, 2)}, "mnist-vae": {}},
)


@pytest.fixture
def jobs(tmp_path):
    """Two seeds of two models, with evaluations that nobody measured."""
    jobs = []
    for seed in (0, 1):
        for i, name in enumerate(EXHIBIT.models):
            training = replace(PRESETS[name].config.training, steps=6000, seed=seed)
            job = Job(name, tmp_path / name / str(seed), replace(PRESETS[name].config, training=training))
            job.path.mkdir(parents=True)
            for file, shift in (("evaluation.json", 0), ("untrained.json", 1000)):
                values = {  # label, value, digits
                    ("elbo", None): ("ELBO", -1.0, 1),
                    LOG_LIKELIHOOD: ("log p(x), as published, 10 samples", -200.25 - i - 2 * seed, 1),
                    BOUND: ("log p(x), bound, 10 samples", -210.0, 1),
                    EQUIVARIANCE_ERROR: ("E_eq", 3000.0 * (i + 1), 0),
                    ("capcorr", "hue"): ("CapCorr hue", math.nan if i else 0.5, 2),
                }
                rows = [
                    Row(*metric, label, value - shift, -435.5, digits=digits)
                    for metric, (label, value, digits) in values.items()
                ]
                evaluation.save(rows, 1000, job.path / file)
            jobs.append(job)
    return jobs


def collect(jobs):
    return tables.collect(EXHIBIT.title, EXHIBIT.models, jobs)


def test_a_table_holds_paper_ours_chance_and_untrained_by_metric_and_model(jobs, tmp_path):
    markdown, table, values = tables.write(collect(jobs), "table0", tmp_path / "out")
    title = "Table 0: likelihood (reduced budget: 6,000 of 600,000 training steps)"
    text = markdown.read_text()
    assert text.startswith(f"**{title}**\n\n| metric | model | L | K | weights | paper | ours | chance | untrained |\n")
    std = math.sqrt(2)  # of x and x - 2
    for line in (
        "| log p(x), published | TVAE | 5/36 | 3 | free | -186.8 ± 0.1 | -201.2 ± 1.4 | -435.5 | -1,201.2 ± 1.4 |",
        "|  | VAE |  |  | free |  | -202.2 ± 1.4 | -435.5 | -1,202.2 ± 1.4 |",
        "| log p(x), bound | TVAE | 5/36 | 3 | free |  | -210.0 ± 0.0 | -435.5 | -1,210.0 ± 0.0 |",
        "| E_eq | TVAE | 5/36 | 3 | free | 574 ± 2 | 3,000 ± 0 | -436 | 2,000 ± 0 |",
        "|  | VAE |  |  | free |  | nan ± nan | -435.50 | nan ± nan |",
    ):
        assert line in text.splitlines()
    assert "ELBO" not in text
    assert "over 2 seeds, evaluated on 1,000 sequences" in text.replace("\n", " ")

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert [rows[0][name] for name in ("preset", "paper", "paper std")] == ["mnist-tvae-w5-k3", "-186.8", "0.1"]
    assert [rows[0][name] for name in ("key", "part", "L", "K")] == ["log_likelihood", "published", "5/36", "3"]
    assert float(rows[0]["ours"]) == -201.25
    assert float(rows[0]["ours std"]) == pytest.approx(std)
    assert rows[1]["paper"] == rows[1]["L"] == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(values.read_text(), parse_constant=refuse)
    assert content["title"] == title
    assert content["rows"][0]["ours by seed"] == [-200.25, -202.25]
    assert content["rows"][-1]["ours"] is None


def test_where_the_paper_prints_nothing_models_are_described(jobs):
    models = {name: {} for name in EXHIBIT.models}
    text = tables.to_markdown(tables.collect(EXHIBIT.title, models, jobs, note="Look at the frames."))
    lines = text.splitlines()
    assert lines[2:4] == ["| metric | model | ours | chance | untrained |", "|---|---|---:|---:|---:|"]
    assert "| E_eq | TVAE, L=5/36, K=3 | 3,000 ± 0 | -436 | 2,000 ± 0 |" in lines
    assert "|  | VAE | 6,000 ± 0 | -436 | 5,000 ± 0 |" in lines
    bounds = [line for line in lines if "bound" in line]
    assert bounds == ["| log p(x), bound | all | -210.0 ± 0.0 | -435.5 | -1,210.0 ± 0.0 |"]  # of both models
    assert text.endswith("before training. Look at the frames.\n")
    assert tables._description("mnist-vae", models) == "VAE"
    assert tables._description("mnist-vae", [*models, "sprites-vae"]) == "mnist: VAE"


def test_a_part_of_a_metric_may_be_reported_alone(jobs):
    models = {name: {} for name in EXHIBIT.models}
    results = tables.collect(EXHIBIT.title, models, jobs, [BOUND, "capcorr"])
    assert [(line.key, line.part) for line in results.lines] == [BOUND] * 2 + [("capcorr", "hue")] * 2


def test_what_a_label_says_does_not_matter(jobs):
    """Files of before 0.2, which know metrics by their labels alone, give the same table."""
    before = tables.to_markdown(collect(jobs))
    for job in jobs:
        for file in (job.path / "evaluation.json", job.untrained_file):
            content = json.loads(file.read_text())
            for row in content["metrics"]:
                del row["key"], row["part"], row["digits"]
            file.write_text(json.dumps(content))
    assert tables.to_markdown(collect(jobs)) == before


def test_a_title_names_the_data_and_the_budget_where_they_are_not_the_papers():
    def title(name, sprites, budget):
        exhibit = EXHIBITS[name].with_data(sprites)
        jobs = [Job(name, Path(name), budgeted(PRESETS[name].config, budget)[1]) for name in exhibit.models]
        return tables._title(exhibit.title, jobs)

    assert title("table2", "dsprites", "full") == "Table 2: CapCorr and equivariance error on dSprites"
    assert title("table2", "sprites", "6000") == (
        "Table 2: CapCorr and equivariance error on dSprites, here on sprites drawn in the manner of dSprites "
        "(reduced budget: 6,000 of 632,800 training steps)"
    )
    assert title("fig4", "dsprites", "0.5").endswith(
        "(reduced budget: 300,000 of 600,000 and 316,400 of 632,800 training steps)"
    )


def test_one_seed_has_no_standard_deviation(jobs):
    text = tables.to_markdown(collect(jobs[:2]))
    assert "| -200.2 | -435.5 | -1,200.2 |" in text
    assert "Ours: one seed" in text


def test_a_result_is_included_in_its_block_of_a_page_and_no_other(tmp_path):
    page, table = tmp_path / "docs" / "page.md", tmp_path / "out" / "fig5.md"
    for file in (page, table):
        file.parent.mkdir()
    table.write_text("**A title**\n\n| table |\n")
    text = "before\n<!-- reproduce: fig5 -->\nold\n<!-- end -->\nbetween\n<!-- reproduce: fig50 -->\n<!-- end -->\n"
    page.write_text(text)
    for _ in range(2):  # the second time changes nothing
        tables.include(page, "fig5", table, tmp_path / "out" / "fig5.png")
        block = "\n![A title](../out/fig5.png)\n\n**A title**\n\n| table |\n\n"
        assert page.read_text() == text.replace("old\n", block)
    with pytest.raises(ValueError, match=r"page.md has no block for the result: the lines <!-- reproduce: table9 -->"):
        tables.include(page, "table9", table, None)


def test_tables_and_pages_that_cannot_be_written_leave_the_old_ones(jobs, tmp_path):
    results, page = collect(jobs), tmp_path / "page.md"
    page.write_text("<!-- reproduce: table0 -->\nold\n<!-- end -->\n")
    written = tables.write(results, "table0", tmp_path / "out")
    before = {file: file.read_bytes() for file in (*written, page)}
    with room_for(10):
        with pytest.raises(OSError, match=r"File too large: .*table0.md'"):
            tables.write(results, "table0", tmp_path / "out")
        with pytest.raises(OSError, match=r"File too large: .*page.md'"):
            tables.include(page, "table0", written[0], None)
    assert {file: file.read_bytes() for file in (*written, page)} == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_link_to_a_figure_may_have_spaces_and_brackets(tmp_path):
    page, table = tmp_path / "page.md", tmp_path / "table.md"
    table.write_text("**A title**\n")
    page.write_text("<!-- reproduce: fig5 -->\n<!-- end -->\n")
    tables.include(page, "fig5", table, tmp_path / "out (1)" / "fig5.png")
    assert "![A title](<out (1)/fig5.png>)" in page.read_text()


def test_a_page_that_is_no_text_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"page.md is not a page of UTF-8 text"):
        tables.read_block(page, "fig5")


def test_evaluations_that_do_not_belong_together_are_refused(jobs):
    evaluation.save([Row(*LOG_LIKELIHOOD, "log p(x)", -1.0, -2.0)], 1000, jobs[0].path / "evaluation.json")
    with pytest.raises(RunError, match="the evaluations of mnist-tvae-w5-k3 have different metrics"):
        collect(jobs)
    with pytest.raises(RunError, match="the runs have none of the metrics nothing"):
        tables.collect(EXHIBIT.title, EXHIBIT.models, jobs, ["nothing"])

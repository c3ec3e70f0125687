"""The benchmarks' common parts: the format of results, sampling in turn, progress, the report and the command line."""

import io
import math
from dataclasses import dataclass, replace
from itertools import count

import pytest
import torch
from benchmarked import CPU_TIMES, operation_result, training_records, written
from rich.console import Console

from benchmarks import __main__, devices, environment, records, registry, report
from benchmarks.measuring import in_turn, matching, measure_all, progress
from benchmarks.records import Record, Result

CPU = torch.device("cpu")


def test_written_results_have_a_line_for_each_record(tmp_path):
    case = {"shape": (8, 18), "window": 3}
    found = [
        Record(case, "torch", {"forward": [1234.5678, 0.00123456]}, {"forward": 2**20}, 0.123456, {"E_eq": math.nan}),
        Record(case, "broken", not_measured="it broke"),
    ]
    file = tmp_path / "new" / "speed-cpu.json"
    described = environment.describe()
    Result(file, "speed", described, "cpu", "us", {"samples": 2}, found).write()
    *_, first, second, _, _ = file.read_text().splitlines()
    assert first == (
        '  {"case": {"shape": [8, 18], "window": 3}, "variant": "torch", "samples": {"forward": [1235.0, 0.001235]},'
        ' "memory": {"forward": 1048576}, "error": 0.1235, "values": {"E_eq": null}},'
    )
    assert second == '  {"case": {"shape": [8, 18], "window": 3}, "variant": "broken", "not_measured": "it broke"}'
    read = Result.read(file)
    assert (read.command, read.environment, read.device, read.unit) == ("speed", described, "cpu", "us")
    assert [record.variant for record in read.records] == ["torch", "broken"]
    assert read.records[0].median("forward") == pytest.approx(617.5006175)
    assert read.records[0].median("backward") is None
    ((first, second),) = (case.values() for case in read.by_case())
    assert first == read.records[0]
    assert second == Record({"shape": [8, 18], "window": 3}, "broken", not_measured="it broke")


def test_the_samples_of_stages_that_follow_each_other_add_up():
    assert Record({}, "eager", {"data": [1, 2], "forward": [10, 20]}).whole() == [11, 22]
    assert records.tenths([1000, 2000, 8000]) == pytest.approx((1200, 6800))  # a tenth of the way from 1000 to 2000


@pytest.mark.parametrize("text", ["", "[]", '{"records": []}', '{"records": [{"peer": "torch"}]}'])
def test_a_file_of_another_format_is_refused_with_its_name(text, tmp_path):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ValueError, match=r"old\.json is no result of this version"):
        records.load(tmp_path)


def test_the_committed_results_are_of_this_format_and_in_their_places():
    results = records.load()
    assert {result.command for result in results} == set(registry.COMMANDS)
    for result in results:
        assert result.file == records.path(result.command, result.environment, result.device)
        assert all(bool(r.samples or r.values) != bool(r.not_measured) for r in result.records)


def test_slow_variants_are_sampled_less_and_the_first_of_a_block_never():
    calls = {"fast": [], "slow": []}

    def fake(name, time):
        def take(count):
            calls[name].append(count)
            return [{"data": time + i} for i in range(count)]

        return take

    timed = {"fast": fake("fast", 1), "slow": fake("slow", 10)}
    taken = in_turn(timed, 12, patience=40, block=5, skipped=1)
    assert calls == {"fast": [1, 6, 6, 3], "slow": [1, 5]}
    assert taken["slow"]["data"] == [11, 12, 13, 14]
    assert len(taken["fast"]["data"]) == 12
    assert min(taken["fast"]["data"]) == 2


def test_variants_take_turns():
    order = []
    timed = {name: lambda count, name=name: [order.append(name) or {"all": 1.0}] for name in "ab"}
    assert in_turn(timed, 4, patience=3) == {name: {"all": [1.0] * 3} for name in "ab"}
    assert "".join(order) == "ab" * 4


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_in_lines_where_no_terminal_is(terminal):
    text = io.StringIO()
    seconds = count(step=10)
    console = Console(file=text, force_terminal=terminal, color_system=None, width=80)
    with progress("speed", 5, console, pause=30, clock=lambda: next(seconds)) as show:
        for number in range(4):
            show(number, f"case {number}")
    if terminal:
        assert "case 3 3/5" in text.getvalue()
    else:  # the clock goes on by 10 whenever it is read: at the start, by each case, by each line, at the end
        lines = ["speed: 5 cases", "speed: 2 of 5 after 40 s; case 2", "speed: done after 60 s"]
        assert text.getvalue().splitlines() == lines


@dataclass(frozen=True)
class Window:
    """A case."""

    window: int

    @property
    def name(self):
        return f"W{self.window}"

    @property
    def fields(self):
        return {"window": (self.window,)}


def test_cases_are_written_one_by_one_and_resumed(tmp_path):
    file, measured = tmp_path / "speed.json", []

    def measure(case, say):
        say("measure")
        measured.append((case.window, file.exists()))
        if case.window == 3 and len(measured) == 3:
            raise KeyboardInterrupt
        return [Record(case.fields, "ours", {"forward": [len(measured)]})]

    def run(**settings):
        return measure_all("speed", [Window(1), Window(2), Window(3)], measure, "cpu", settings, file, **options)

    options = {}
    with pytest.raises(KeyboardInterrupt):
        run(samples=1)
    assert measured == [(1, False), (2, True), (3, True)]
    first = Result.read(file)
    assert [record.case for record in first.records] == [{"window": [1]}, {"window": [2]}]
    options["resume"] = True
    replace(first, environment=first.environment | {"date": "2026-01-02"}).write()  # only the date may change
    second = run(samples=2)
    assert second.records[:2] == first.records
    assert [record.median("forward") for record in second.records] == [1, 2, 4]
    assert second.settings == {"samples": 2}
    assert second.environment["date"] == "2026-01-02"
    replace(second, environment=second.environment | {"torch": "another"}).write()
    with pytest.raises(SystemExit, match="cannot resume: torch changed"):
        run(samples=2)
    options["resume"] = False
    assert [record.median("forward") for record in run(samples=2).records] == [5, 6, 7]


def test_cases_are_chosen_by_their_names():
    cases = [Window(1), Window(2), Window(3)]
    assert matching(cases, "W[12]") == cases[:2]
    assert matching(cases, "") == cases


def test_results_are_named_by_command_and_machine(tmp_path):
    described = {"gpu": "NVIDIA H100 80GB (SXM)"}
    names = {device: records.path("speed", described, device, tmp_path).name for device in ("cpu", "cuda", "none")}
    assert names == {"cpu": "speed-cpu.json", "cuda": "speed-nvidia-h100-80gb-sxm.json", "none": "speed.json"}


def test_peak_memory_is_what_is_held_at_once():
    def run():
        a = torch.ones(1000)
        b = a + 1  # 8,000 bytes
        del a
        return b + 1  # and again

    assert 8000 <= devices.peak_memory(CPU, run) < 8100  # the numbers 1 become tensors, too


def test_rotation_outgrows_the_cache():
    assert devices.rotation(100, cache=2**10) * 100 >= 2 * 2**10
    assert devices.rotation(2**20, cache=2**10) == 2
    assert devices.cache_bytes(CPU) >= 2**15


PAGE = """# Before

<!-- benchmark: operation-cpu -->
old
<!-- end -->

between

<!-- benchmark: operation-gpu -->
<!-- end -->
after
"""
FILLED = """# Before

<!-- benchmark: operation-cpu -->

Measured on a CPU, 2 threads; torch 2, triton 3, Python 3.11; commit abc, 2026-01-02.

| shape (B, S, C, D) | W | type | ours, `torch` | of the copy's bandwidth | eager reference | compiled reference | `torch`, compiled | convolution |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 8, 18, 18, 18 | 18 | float32 | 2 ms (1.2 to 6.8) | 5 % | 8 ms (4x) | 4.6 ms (2.3x) | 1 ms (0.5x) | - |

<!-- end -->

between

<!-- benchmark: operation-gpu -->

Not measured on a GPU.

<!-- end -->
after
"""  # noqa: E501 - a table's row


def test_report_fills_the_blocks_and_leaves_the_text_between(tmp_path):
    results = [operation_result(tmp_path, "cpu", CPU_TIMES, memory=1.25)]
    assert report.fill(PAGE, results) == FILLED
    assert report.fill(FILLED, results) == FILLED


def test_every_block_says_what_was_not_measured():
    for name, (_, shown, _) in report.blocks().items():
        missing = {"cpu": ["Not measured."], "cuda": ["Not measured on a GPU."], "none": ["Not measured."]}
        assert report.render_block(name, []) == "\n\n".join(x for device in shown for x in missing[device])
    assert report.render_block("operation-gpu-targets", []) == "Not measured on a GPU."
    assert report.render_block("training-stages", []) == "Not measured.\n\nNot measured on a GPU."


@pytest.mark.parametrize("name", ["operation-tpu", "speed-cpu", "operation-cpu-best", "overhead-cpu"])
def test_an_unknown_block_is_refused(name):
    with pytest.raises(ValueError, match=f"no benchmark '{name}'.*operation-cpu-targets"):
        report.render_block(name, [])


def test_blocks_have_a_part_for_each_machine(tmp_path):
    case = training_records("sprites-tvae-w10-k1", 8, {"eager": 80.0}, products=40.0)
    results = [written(tmp_path, "training", "cpu", case)]
    text = report.render_block("training", results)
    assert "ours, eager" in text
    assert text.endswith("\n\nNot measured on a GPU.")
    results.append(written(tmp_path, "training", "cuda", case))
    text = report.render_block("training", results)
    assert "Measured on a CPU, 2 threads;" in text
    assert "Measured on NVIDIA Tiny, driver 1, CUDA 13;" in text
    assert "Not measured" not in text
    assert "Measured on a CPU" not in report.render_block("training-gpu", results)


def test_update_writes_documents_and_pictures(tmp_path):
    folder, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    operation_result(folder, "cpu", CPU_TIMES, memory=1.25)
    written(folder, "training", "cuda", training_records("a", 8, {"eager": 80.0}, products=40.0))
    page = "<!-- benchmark: {} -->\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(page.format("operation-cpu-targets") + page.format("operation-figure"))
    (docs / "performance.md").write_text(page.format("training-figure"))
    pictures = [docs / name for name in ("roofline-cpu.png", "training-nvidia-tiny.png")]
    documents = [tmp_path / "README.md", docs / "performance.md"]
    assert report.update(tmp_path, folder) == pictures + documents
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    readme, performance = (document.read_text() for document in documents)
    assert "| target | measured | holds |" in readme
    assert "](docs/roofline-cpu.png)" in readme
    assert "](training-nvidia-tiny.png)" in performance
    documents[0].unlink()
    assert report.update(tmp_path, folder) == pictures  # nothing else has changed


def test_the_documents_say_what_was_measured():
    results = records.load()
    for document, docs in (("README.md", "docs"), ("docs/performance.md", ".")):
        text = (report.ROOT / document).read_text(encoding="utf-8")
        assert report.fill(text, results, docs) == text


def test_the_command_line_lists_every_command_and_its_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"• {name} " in text for name in (*registry.COMMANDS, "report"))
    options = {"operation": ["--samples", "--match", "--output", "--resume"], "topographies": ["--samples", "--output"]}
    options |= {"overhead": ["--samples", "--output"], "machine-code": ["--output"], "report": []}
    options |= {"training": ["--data-dir", "--samples", "--output"]}
    options |= {"agreement": ["--data-dir", "--steps", "--sequences", "--output"]}
    for name, wanted in options.items():
        with pytest.raises(SystemExit, match="0"):
            __main__.main([name, "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in wanted), name


def test_the_command_line_refuses_what_no_case_matches(tmp_path):
    with pytest.raises(SystemExit, match=r"no case matches 'W99'; there is '\d+x18x18x18 W1 K1 float32'"):
        __main__.main(["operation", "--match", "W99", "--output", str(tmp_path / "x.json")])


def test_a_result_is_shown_with_its_tables(tmp_path, capsys):
    __main__.show(operation_result(tmp_path, "cpu", CPU_TIMES, memory=1.25))
    text = capsys.readouterr().out
    assert "of the copy's" in text
    assert "never slower" in text
    assert f"written to {tmp_path / 'operation-cpu.json'}" in text


def test_the_suite_is_not_part_of_the_default_run(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]

"""The benchmark of agreement: trainings are compared by their metrics, and a wrong layer is seen."""

import math
from dataclasses import replace

import torch
from benchmarked import written

from benchmarks import agreement
from benchmarks.agreement import FUSED, Case
from benchmarks.records import Record
from benchmarks.variants import SPRITES, GivenNoise, Variant
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.models import TVAE
from tvae.presets import PRESETS
from tvae_kernels import Neighborhood

CPU = torch.device("cpu")
CONFIG = Config(DataSettings(), TVAE.Settings(2, neighborhood=Neighborhood(10, 1)), TrainingSettings(batch_size=2))
DIFFERENCE = agreement.DIFFERENCE


class Wrong(GivenNoise):
    """A layer whose `u` is a little off."""

    def sample(self, z, u, *arguments, **settings):
        mean, log_variance = u.unbind(2)
        return super().sample(z, torch.stack((1.001 * mean, log_variance), 2), *arguments, **settings)


def test_training_fused_and_in_other_precisions_is_compared_by_its_metrics(tmp_path):
    wrong = replace(FUSED, name="wrong", variant=Variant(Wrong))
    chosen = [*agreement.trainings(SPRITES, CPU), wrong]
    found = agreement.measure(Case(SPRITES, CONFIG), device=CPU, steps=3, sequences=24, chosen=chosen)
    values = {record.variant: record.values for record in found}
    assert [*values] == ["unfused", "unfused, nudged", "fused", "fused, bf16-mixed", "wrong"]
    assert {"elbo", "equivariance_error", "capcorr scale"} < values["fused"].keys()
    assert values["unfused"][DIFFERENCE] == 0
    assert 0 < values["unfused, nudged"][DIFFERENCE] < 1e-5
    assert values["fused"][DIFFERENCE] < 1e-5 < values["fused, bf16-mixed"][DIFFERENCE] < 0.05
    assert values["wrong"][DIFFERENCE] > 1e-5
    result = written(tmp_path, "agreement", "cpu", found, steps=3, sequences=24)
    assert f"| `{SPRITES}` | `bf16-mixed` |" in agreement.precision_table(result)
    assert f"| `{SPRITES}` |" in agreement.table(result)


def test_presets_to_compare_are_those_with_a_topography_whose_data_is_there(tmp_path):
    chosen = agreement.cases(tmp_path)
    assert all(hasattr(PRESETS[case.preset].config.model, "neighborhood") for case in chosen)
    without = sum(not hasattr(preset.config.model, "neighborhood") for preset in PRESETS.values())
    assert without + len(chosen) == len(PRESETS)
    assert all(case.config.data.folder == tmp_path for case in chosen)
    assert all(case.config.data.name.startswith(("sprites", "shapes", "rooms")) for case in agreement.cases(None))
    assert [training.precision for training in agreement.trainings("quickstart", CPU)] == ["32-true"] * 3


def test_presets_whose_data_is_missing_are_named(tmp_path):
    case = Case("dsprites-tvae-w10-k1", replace(CONFIG, data=DataSettings("dsprites", folder=tmp_path)))
    (missing,) = agreement.measure(case, device=CPU, steps=1, sequences=24)
    assert missing.case == {"preset": "dsprites-tvae-w10-k1"}
    assert str(tmp_path) in missing.not_measured
    result = written(tmp_path, "agreement", "cpu", [missing], steps=1, sequences=24)
    text = agreement.table(result)
    assert "1 steps of each training, evaluated on 24 sequences. Computed on a CPU, 2 threads;" in text
    assert text.endswith("\n\nLeft out, for their data was not there: `dsprites-tvae-w10-k1`.")


def test_tables_show_metrics_side_by_side(tmp_path):
    metrics = {"elbo": -1234.56, "equivariance_error": 567.89, "capcorr x": 0.5, "capcorr y": 1.0}
    unmoved = {"elbo": -1000.0, "capcorr x": math.nan}
    a = {"unfused": (metrics, 0.0), "fused": (metrics, 1.23e-6), "unfused, nudged": (metrics, 0.5)}
    b = {"unfused": (unmoved, 0.0), "fused": (unmoved, 0.0), "fused, tf32": (metrics, 0.25)}
    b["unfused, nudged"] = unmoved, 0.0
    found = [
        Record({"preset": preset}, training, values=values | {DIFFERENCE: difference})
        for preset, trained in (("a", a), ("b", b))
        for training, (values, difference) in trained.items()
    ]
    result = written(tmp_path, "agreement", "cpu", found, steps=1, sequences=24)
    assert "NaN" not in result.file.read_text()
    table = agreement.table(result)
    assert "| `a` | -1235.0 | -1235.0 | 567.9 | 567.9 | 0.750 | 0.750 | 1.2e-06 | 0.5 |" in table
    assert "Left out" not in table
    table = agreement.precision_table(result)
    assert "`a`" not in table
    assert "| `b` | `32-true` | -1000.0 |  | nan | 0 |\n| `b` | `tf32` | -1235.0 | 567.9 | 0.750 | 0.25 |" in table

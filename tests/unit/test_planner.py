"""Plans: order, advice, refusals, what-if, comparison, files, the report and the verbs' errors."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cenacle.calibration import validate
from cenacle.core.plan import Plan
from cenacle.errors import CenacleError, InputError, PlanError
from cenacle.planning import catalog, planner, report
from cenacle.planning.perf_model import PHASES, PaperConstants, Workload

KNOWN = catalog.load_catalog()
CONSTANTS = PaperConstants.from_fits(KNOWN.fits["paper"])


def plan(model, machines, link=None, quant="4", **usage):
    workload = Workload(KNOWN.model(model), catalog.parse_quantization(quant), **usage)
    return planner.evaluate_options(workload, *planner.resolve_cluster(KNOWN, machines, link, None))


def test_json_has_the_promised_keys():
    data = json.loads(json.dumps(plan("dbrx", "2xm3-ultra-512", "tb5-rdma").to_json()))
    assert list(data) == ["model", "options", "best", "advice"]
    for option in data["options"]:
        assert list(option) == [
            *("scheme", "placement", "trunk", "nodes", "fits", "tok_per_s"),
            *("tok_per_s_all_users", "ttft_s", "step_timings_ms", "bound_by", "bytes_per_node"),
            *("usd", "usd_per_tok_per_s", "watts", "reason"),
        ]
        assert tuple(option["step_timings_ms"]) == PHASES
        if option["fits"]:
            total = sum(option["step_timings_ms"].values())
            assert 1000 / option["tok_per_s"] == pytest.approx(total)
    assert data["best"] == 0


def test_the_best_comes_first_and_every_other_says_why():
    result = plan("qwen3-235b-a22b", "4xm3-ultra-512", "tb5-rdma", "8")
    speeds = [o.prediction.tok_per_s for o in result.options if o.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert all(o.reason for o in result.options)
    assert {o.scheme for o in result.options} >= {"single", "pipeline", "tensor", "expert"}
    assert {o.scheme for o in result.options} >= {"naive", "P-LB", "P-LR", "P-LR-D"}
    fits = [o.fits for o in result.options]
    assert fits == sorted(fits, reverse=True)


def test_advice_against_a_cluster_of_small_experts_on_ethernet():
    result = plan("qwen3-30b-a3b", "2xm4-max-128", "10gbe")
    assert "One machine is faster" in result.advice
    assert len(result.options[0].machines) == 1


def test_advice_against_two_machines_for_two_bits():
    result = plan("deepseek-v4-flash", "2xm5-max-128", "tb5-rdma", "2")
    assert "Do not buy this for speed" in result.advice


def test_advice_for_a_cluster_that_pays():
    result = plan("qwen3-235b-a22b", "4xm3-ultra-512", "tb5-rdma", "8")
    assert result.advice.startswith("Take sliced experts")


def test_what_does_not_fit_says_by_how_much():
    result = plan("kimi-k2", "2xm4-max-128", "tb5-rdma", "4")
    assert result.best is None
    assert "Do not buy this" in result.advice
    assert all("too much" in o.reason or "not possible" in o.reason for o in result.options)
    # 164 GB in 75 % of 192 GiB does not fit; wiring more does, and the command is named.
    result = plan("qwen3-235b-a22b", "1xm2-ultra-192", None, "5")
    assert "sudo sysctl iogpu.wired_limit_mb=" in result.options[0].reason


def test_unlike_machines_are_weighted():
    result = plan("qwen3-235b-a22b", "1xm3-ultra-256,1xm4-max-128", "tb5-rdma", "4")
    assert any(o.placement == "weighted" and o.fits for o in result.options)
    assert not any(o.placement == "sliced" and o.scheme == "expert" for o in result.options)


def test_comparison_per_dollar():
    result = plan("dbrx", "2xm2-ultra-192", "10gbe-grpc", "16")
    other = planner.compare_per_dollar(result, KNOWN.parse_machines("8xh100"), None, CONSTANTS)
    assert 1 < other.ratio < 3
    assert "unverified" in other.sentence()
    assert re.search(r"\d\.\d\dx the tokens", other.sentence())


@pytest.mark.parametrize(
    ("text", "points"), [("nodes=1..5", 5), ("latency=3us..1ms", 25), ("price=2000..9000", 25)]
)
def test_what_if(text, points):
    nodes, link, constants = planner.resolve_cluster(KNOWN, "2xm3-ultra-512", "tb5-rdma", None)
    workload = Workload(KNOWN.model("qwen3-235b-a22b"), catalog.parse_quantization(4))
    curve = planner.what_if_curve(text, workload, nodes, link, constants)
    assert len(curve.x) == points
    ys = curve.series["experts sliced"]
    if curve.quantity != "nodes":  # a slower link, a dearer machine
        assert list(ys) == sorted(ys, reverse=True)
    assert "tokens/s" in report.render_terminal(curve)


@pytest.mark.parametrize(
    "text",
    [
        *("", "nodes", "nodes=0..4", "nodes=1..2.5", "nodes=4..1", "price=-5..10"),
        *("latency=3..4..5", "latency=3lightyears..1ms", "color=1..2", "nodes=1..900"),
    ],
)
def test_a_wrong_what_if(text):
    nodes, link, constants = planner.resolve_cluster(KNOWN, "2xm3-ultra-512", "tb5-rdma", None)
    with pytest.raises(InputError, match="what-if"):
        planner.what_if_curve(
            text,
            Workload(KNOWN.model("dbrx"), catalog.parse_quantization(4)),
            nodes,
            link,
            constants,
        )


def test_a_plan_file_is_a_plan(tmp_path):
    result = plan("dbrx", "1xm3-ultra-256,1xm4-max-128", "tb5-rdma", "4")
    best, note = planner.best_plan(result, planner.spec_from_workload(result.workload, "dbrx"))
    best.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.nodes == len(result.options[0].machines)
    # By name only, nothing says where experts may be cut; a checkpoint's folder does.
    assert result.options[0].placement == "weighted"  # slices by the machines' bandwidth
    assert best.placement == "whole"
    assert "give the checkpoint's folder" in note
    spec = planner.spec_from_workload(result.workload, "dbrx")
    spec = replace(spec, moe=tuple(replace(m, units=168) for m in spec.moe))
    best, note = planner.best_plan(result, spec)
    assert best.placement == "sliced"
    with pytest.raises(PlanError, match="only the sizes of"):
        planner.spec_from_workload(
            plan("deepseek-v4-flash", "m3-ultra-512").workload, "deepseek_v4"
        )


def test_the_report_asks_nobody_for_anything():
    result = plan("dbrx", "2xm2-ultra-192", "10gbe-grpc", "16")
    nodes, link, constants = planner.resolve_cluster(KNOWN, "2xm2-ultra-192", "10gbe-grpc", None)
    curve = planner.what_if_curve("nodes=1..4", result.workload, nodes, link, constants)
    page = report.render_html(result, [curve])
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "unverified" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "dbrx", "--machines", "m3-ulta-512"], "nearest: .*m3-ultra-512"),
        (["plan", "dbrxx", "--machines", "m3-ultra-512"], "nearest: dbrx"),
        (["plan", "dbrx", "--machines", "2xm3-ultra-512"], "link"),
        (["plan", "dbrx", "--machines", "2xm3-ultra-512", "--link", "tb6"], "nearest: tb"),
        (["plan", "dbrx", "--machines", "0xm3-ultra-512"], "expected 1 to 64"),
        (["plan", "dbrx", "--machines", "m3-ultra-512", "--quant", "7"], "expected bits"),
        (["plan", "./nowhere", "--machines", "m3-ultra-512"], "no such file"),
        (["plan", "dbrx", "--machines", "m4-32", "--json"], "nothing fits"),
        (["plan", "dbrx", "--machines", "m3-ultra-512", "--png", "x.gif"], "png or .svg"),
        (
            ["plan", "dbrx", "--machines", "m3-ultra-512", "--routing-trace", "none.npz"],
            "expected a file of `cenacle record-routing`",
        ),
        (["plan", "dbrx", "--machines", "this"], "cenacle calibrate"),
        (["validate", "--rows", "none.csv"], "cannot read"),
    ],
)
def test_wrong_arguments_are_errors_with_a_sentence(arguments, message, tmp_path, monkeypatch):
    from cenacle.cli.main import make_app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(make_app(), arguments)
    assert isinstance(result.exception, CenacleError), result.output
    assert re.search(message, str(result.exception))


def test_a_dense_config_is_refused(tmp_path):
    from cenacle.cli.main import make_app

    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}')
    result = CliRunner().invoke(make_app(), ["plan", str(file), "--machines", "m3-ultra-512"])
    assert "no experts" in str(result.exception)


HEADER = ",".join(validate.COLUMNS)


def rows(tmp_path, *lines):
    file = tmp_path / "rows.csv"
    file.write_text("\n".join([HEADER, *lines]))
    return validate.read_csv(file, KNOWN)


def test_an_owners_rows(tmp_path):
    measurements, problems = rows(
        tmp_path,
        "Qwen/Qwen3-30B-A3B,4,M4 Max 128GB,1,,single,512,100,me",
        "mlx-community/DeepSeek-V3-0324-4bit,4.5,m3-ultra-512,2,TB5 RDMA,tensor,0,27,me",
        "gpt-oss-120b,mxfp4,dgx-spark,2,roce,expert,1024,60,me",
        "deepseek-v3,4,m3-ultra-512;m2-ultra-192,2,10gbe,pipeline,512,12,me",
    )
    assert problems == []
    checked = [validate.validate_one(r, KNOWN) for r in measurements]
    assert all(0 < c.prediction.tok_per_s < 1000 for c in checked)
    assert validate.Summary.of(checked).rows == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("qwen3-30b-a4b,4,m4-max-128,1,,single,0,9,x", "line 2: model: .*nearest: qwen3-30b-a3b"),
        ("dbrx,4,m9-max,1,,single,0,9,x", "line 2: machine"),
        ("dbrx,4,m4-max-128,2,tb7,tensor,0,9,x", "line 2: link: .*nearest"),
        ("dbrx,4,m4-max-128,2,,tensor,0,9,x", "link: several nodes need a link"),
        ("dbrx,4,m4-max-128,0,,single,0,9,x", "nodes"),
        ("dbrx,4,m4-max-128,1,,single,0,-9,x", "tok_per_s"),
        ("dbrx,4,m4-max-128,1,,magic,0,9,x", "scheme: expected one of single"),
        ("dbrx,4,m4-max-128,2,10gbe,single,0,9,x", "cannot be used with 2 nodes"),
        ("dbrx,99,m4-max-128,1,,single,0,9,x", "expected bits"),
        ("dbrx,4,m4-max-128,3,10gbe,tensor,0,9,x", "do not divide over 3 nodes"),
        ("dbrx,4", "line 2: "),
    ],
)
def test_wrong_rows(tmp_path, line, message):
    right = "dbrx,4,m4-max-128,1,,single,0,9,x"
    measurements, problems = rows(tmp_path, line, right)
    assert len(measurements) == len(problems) == 1
    assert re.search(message, problems[0])


def test_rows_that_are_right_are_shown_beside_an_error(tmp_path):
    from cenacle.cli.main import make_app

    file = tmp_path / "rows.csv"
    lines = ["dbrx,4,m9-max,1,,single,0,9,x", "dbrx,4,m4-max-128,1,,single,0,9,x"]
    file.write_text("\n".join([HEADER, *lines]))
    result = CliRunner().invoke(make_app(), ["validate", "--rows", str(file), "--json"])
    assert "1 of 2 rows cannot be predicted" in str(result.exception)
    data = json.loads(result.output.splitlines()[-1])
    assert (len(data["rows"]), len(data["errors"])) == (1, 1)


def test_wrong_files(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        validate.read_csv(tmp_path / "rows.csv", KNOWN)
    (tmp_path / "rows.csv").write_text(HEADER + "\n")
    with pytest.raises(InputError, match="no rows"):
        validate.read_csv(tmp_path / "rows.csv", KNOWN)
    (tmp_path / "rows.csv").write_text("model,speed\n")
    with pytest.raises(InputError, match="missing quant_bits"):
        validate.read_csv(tmp_path / "rows.csv", KNOWN)


def test_published_speeds():
    """The stated tolerance; `cenacle validate` shows the rows."""
    checked = validate.validate_all(validate.load_published(), KNOWN)
    fitted = validate.Summary.of([c for c in checked if c.measurement.fit])
    others = validate.Summary.of([c for c in checked if not c.measurement.fit])
    assert fitted.worst <= 0.15
    assert others.median <= 0.25
    assert others.rows > 1.5 * fitted.rows
    assert all(c.measurement.reason for c in checked if not c.measurement.fit and c.error > 0.25)


def test_the_stored_fit_is_the_fit():
    """fits.toml is what `validate --refit` gives: nobody edited it, no row was forgotten."""
    marked = [r for r in validate.load_published() if r.fit and not r.skip]
    again = validate.fit(marked, KNOWN)
    for p in validate.PARAMETERS:
        stored, fitted = KNOWN.fits, again.fits
        for key in p.path:
            stored, fitted = stored[key], fitted[key]
        assert stored["v"] == pytest.approx(fitted["v"], rel=2e-3), p.path


def test_the_papers_numbers():
    section = {what: (stated, ours) for what, stated, ours, _ in validate.compare_with_paper(KNOWN)}
    for what, (stated, ours) in section.items():
        exact = what.startswith("E[max]") or "per dollar against" in what
        assert ours == pytest.approx(stated, rel=0.005 if exact else 0.2), what


def test_stored_runs_are_predicted():
    from statistics import median

    from cenacle.calibration import local_fit

    stored = local_fit.load_runs(local_fit.RUNS_FILE)
    assert len(stored.rows) >= 12
    _, rows = local_fit.fit_runs(stored)
    unfitted = [abs(p.tok_per_s / r.tok_per_s - 1) for r, p in rows if not r.is_fitted]
    assert len(unfitted) >= 7
    assert median(unfitted) <= 0.15

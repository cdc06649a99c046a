"""Which operators build, and compute rightly, in which precision.

    python tests/tools/coverage_sweep.py                    # every case; on a machine with a GPU, engines are run too
    python tests/tools/coverage_sweep.py --sample 20        # every 20th case
    python tests/tools/coverage_sweep.py --cases test_relu  # these alone: names, or files of names, one a line
    python tests/tools/coverage_sweep.py --findings DIR     # keep the findings there, as they come
    python tests/tools/coverage_sweep.py --seconds 400      # begin no case after that
    python tests/tools/coverage_sweep.py --patience 60      # give a worker up that is silent for so long

The cases are those of `onnx.backend.test` with float32 inputs, which come with expected outputs, and the real models of
the tests. In 16 bits, each float input of a case passes through a product with 1 where TensorRT takes it, so that its
operator is not left in float32 for lack of neighbours. Each goes the whole way: precision pass, engine, and where there
is a GPU a session, whose outputs are compared with the expected ones within the default tolerance of the precision. As
at log time, what fails the accuracy gate, or has outputs of other shapes than on ONNX Runtime, is refused before it is
run.

What does not build in fp32 is not tried in another precision. Each worker is a process of its own that writes a line
for every case, so that one which crashes TensorRT costs itself; where there are several GPUs, they are shared out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "examples", "tests/support")]

PRECISIONS = ("fp32", "fp16", "bf16")
REAL_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
OUTCOMES = ("correct", "built", "refused", "wrong", "not built", "not run", "crashed", "hung")
"""Right on a GPU; built, where there is no GPU; refused before it answers, by the accuracy gate or for the shapes of
its outputs; wrong although it was not refused; no engine; an engine that cannot be loaded or run; the end of the
process; not a word from it for as long as `--patience` says."""
PATIENCE = 300.0
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    case: str
    precision: str
    outcome: str
    detail: str = ""
    kept: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: object
    recipe: dict
    data: object
    expected: dict | None
    precisions: tuple[str, ...]


def operator_cases() -> list[Case]:
    from onnx.backend.test.loader import load_model_tests

    cases = []
    for test in load_model_tests(kind="node"):
        case = _operator_case(test.name, test.model, test.data_sets)
        if case is not None:
            cases.append(case)
    return cases


def _operator_case(name, model, data_sets) -> Case | None:
    initializers = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in initializers]
    if not data_sets:
        return None
    inputs, outputs = data_sets[0]
    arrays = [*inputs, *outputs]
    if len(inputs) != len(names) or not all(isinstance(array, np.ndarray) for array in arrays):
        return None
    if not any(array.dtype == np.float32 for array in inputs):
        return None
    feeds = dict(zip(names, inputs, strict=True))
    expected = dict(zip([value.name for value in model.graph.output], outputs, strict=True))
    return Case(name=name, model=model, recipe={}, data=[feeds], expected=expected, precisions=PRECISIONS)


def real_cases() -> list[Case]:
    from real_models import ON_THE_GPU, calibration_data

    return [
        Case(
            name=model.name,
            model=model.path(),
            recipe=dict(model.recipe),
            data=calibration_data(model),
            expected=None,
            precisions=REAL_PRECISIONS,
        )
        for model in ON_THE_GPU
    ]


def cases_by_name(names: list[str]) -> dict[str, Case]:
    """All that there are; but the real models, which may have to be fetched, only where one of them is named."""
    cases = {case.name: case for case in operator_cases()}
    if not cases.keys() >= set(names):
        cases |= {case.name: case for case in real_cases()}
    return cases


def examine(case: Case, precision: str) -> Finding:
    if case.expected is None or precision == "fp32":
        return _examined(case, precision, case.model)
    found = _examined(case, precision, _with_neighbours(case.model))
    # Some operators must read an input of the network itself.
    return found if found.outcome != "not built" else _examined(case, precision, case.model)


def _examined(case: Case, precision: str, model) -> Finding:
    from mlflow_trt import BuildError, MlflowTrtError, Precision, Recipe, Tolerance
    from mlflow_trt.convert.conversion import ConversionTask, convert_source
    from mlflow_trt.convert.onnx.model import read_onnx
    from mlflow_trt.convert.samples import SampleData, SampleOrigin

    def finding(outcome: str, detail: str = "", kept: int = 0) -> Finding:
        return Finding(case=case.name, precision=precision, outcome=outcome, detail=detail[:300], kept=kept)

    tolerance = Tolerance.default(Precision(precision))
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = read_onnx(model, Path(folder))
            recipe = Recipe(**case.recipe, precision=precision)
            data = SampleData(arrays=case.data, origin=SampleOrigin.CALIBRATION_DATA)
            conversion = convert_source(
                ConversionTask(source=source, recipe=recipe, workdir=Path(folder), data=data, tolerance=tolerance)
            )
        except BuildError as error:
            return finding("not built", error.message)
        except MlflowTrtError as error:
            return finding("not built", f"{type(error).__name__}: {error.message}")
        kept = len(conversion.typed.report.kept)
        comparison = conversion.typed.comparison
        if comparison is not None and comparison.problems:
            return finding("refused", "; ".join(comparison.problems), kept)
        reference = _reference(conversion)
        other_shapes = _other_shapes(conversion, reference)
        if other_shapes:
            return finding("refused", other_shapes, kept)
        outcome, detail = _execute(conversion, reference if case.expected is None else [case.expected], tolerance)
        return finding(outcome, detail, kept)


def _reference(conversion) -> tuple:
    """What ONNX Runtime computes; nothing where it cannot."""
    from mlflow_trt import MlflowTrtError
    from mlflow_trt.convert.onnx.reference import reference_outputs

    try:
        return conversion.typed.reference or reference_outputs(conversion.source, conversion.samples.feeds)
    except MlflowTrtError:
        return ()


def _other_shapes(conversion, reference) -> str:
    """What is wrong with the shapes of the engine's outputs; empty, as at log time, where there is no reference."""
    from mlflow_trt import UnsupportedModelError
    from mlflow_trt.convert.engine.output_shapes import check_output_shapes

    try:
        pairs = zip(conversion.samples.feeds, reference, strict=False)
        check_output_shapes(conversion.engine, conversion.shapes, pairs, conversion.profiles.batch_axis)
    except UnsupportedModelError as error:
        return error.message
    return ""


def _with_neighbours(model):
    """The model with a product before each float32 input, which computes nothing new."""
    import onnx
    from onnx import TensorProto, helper

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    initializers = {tensor.name for tensor in graph.initializer}
    floats = {
        value.name
        for value in graph.input
        if value.name not in initializers and value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in floats:
                node.input[position] = f"{name}_times_one"
    products = [helper.make_node("Mul", [name, "the_one"], [f"{name}_times_one"]) for name in sorted(floats)]
    nodes = [*products, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(helper.make_tensor("the_one", TensorProto.FLOAT, [], [1.0]))
    if changed.ir_version < 4:  # where an initializer had to be an input too
        graph.input.append(helper.make_tensor_value_info("the_one", TensorProto.FLOAT, []))
    return changed


def _execute(conversion, expected, tolerance) -> tuple[str, str]:
    from mlflow_trt import MlflowTrtError, RuntimeUnavailableError
    from mlflow_trt.core.comparing import compare
    from mlflow_trt.core.settings import LoadSettings
    from mlflow_trt.pipeline.verify import engine_session
    from mlflow_trt.runtime.cuda.device import open_device

    try:
        open_device(0)
    except RuntimeUnavailableError:
        return "built", ""
    try:
        with engine_session(conversion, LoadSettings()) as session:
            actual = [session.run(one) for one in conversion.samples.feeds]
        comparison = compare("engine", "case", zip(actual, expected, strict=True), tolerance)
    except (MlflowTrtError, ValueError) as error:
        return "not run", str(error)
    return ("wrong", "; ".join(comparison.problems)) if comparison.problems else ("correct", "")


def work(names: list[str], out: Path, until: float) -> None:
    """Examine these cases until that time; lines in `out` say which is begun and what was found."""
    number = int(out.stem)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[number % len(cpus)]})  # or each worker would start a thread for every CPU
    gpus = visible_gpus()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    cases = cases_by_name(names)
    with out.open("a") as lines:
        for name in names:
            if time.time() > until:
                break
            lines.write(json.dumps({"begun": name}) + "\n")
            lines.flush()
            for precision in cases[name].precisions:
                finding = examine(cases[name], precision)
                lines.write(json.dumps(asdict(finding)) + "\n")
                lines.flush()
                if precision == "fp32" and finding.outcome == "not built":
                    break


def visible_gpus() -> list[str]:
    """UUIDs, asked of a process of its own: this one must not have seen GPUs before it chooses one."""
    command = "from mlflow_trt.backends.cuda_driver import probe; print(*(gpu.uuid for gpu in probe().gpus))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return done.stdout.split()


def supervise(names: list[str], out: Path, until: float, patience: float) -> list[Finding]:
    """Run a worker until all its cases are done, or time is up; one that ends it counts as crashed, or as hung."""
    findings: list[Finding] = []
    left = list(names)
    while left and time.time() < until:
        before = out.read_text() if out.exists() else ""
        command = [sys.executable, __file__, "--work", str(out), "--until", str(until)]
        failure = _watched(command, json.dumps(left), out, patience)
        lines = [json.loads(line) for line in out.read_text().removeprefix(before).splitlines()]
        begun = [line["begun"] for line in lines if "begun" in line]
        findings += [Finding(**line) for line in lines if "begun" not in line]
        left = left[len(begun) :]
        if failure:
            last = begun[-1] if begun else left.pop(0)
            seen = {finding.precision for finding in findings if finding.case == last}
            findings += [
                Finding(case=last, precision=precision, outcome=failure)
                for precision in PRECISIONS
                if precision not in seen
            ]
    return findings


def _watched(command: list[str], text: str, out: Path, patience: float) -> str:
    """Run a worker for as long as it writes to `out`. How it failed; empty where it did not."""
    out.touch()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        worker.stdin.write(text)
        worker.stdin.close()
        started = time.time()
        while worker.poll() is None:
            if time.time() - max(started, out.stat().st_mtime) > patience:
                worker.kill()
                return "hung"
            time.sleep(0.2)
        return "crashed" if worker.returncode else ""


def sweep(
    names: list[str], workers: int, folder: Path, until: float = math.inf, patience: float = PATIENCE
) -> list[Finding]:
    shards = [shard for start in range(workers) if (shard := names[start::workers])]
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        outs = [folder / f"{number}.jsonl" for number in range(workers)]
        results = pool.map(supervise, shards, outs, itertools.repeat(until), itertools.repeat(patience))
        return [finding for findings in results for finding in findings]


def names_in(arguments: list[str]) -> list[str]:
    """Names of cases, each given as it is or in a file."""
    files = {text: Path(text).read_text().split() for text in arguments if Path(text).is_file()}
    return list(dict.fromkeys(name for text in arguments for name in files.get(text, [text])))


def print_table(findings: list[Finding]) -> None:
    precisions = [name for name in REAL_PRECISIONS if any(finding.precision == name for finding in findings)]
    print(f"| outcome | {' | '.join(precisions)} |\n| --- {'| --- ' * len(precisions)}|")
    counts = Counter((finding.outcome, finding.precision) for finding in findings)
    for outcome in OUTCOMES:
        row = [counts[outcome, precision] for precision in precisions]
        if any(row):
            print(f"| {outcome} | {' | '.join(map(str, row))} |")
    built = {finding.case for finding in findings if finding.precision == "fp32" and finding.outcome != "not built"}
    count = len({finding.case for finding in findings})
    print(f"\nOf {count} cases, built in fp32 and not as well in another precision:")
    for finding in sorted(findings, key=lambda finding: (finding.outcome, finding.precision, finding.case)):
        if finding.case in built and finding.outcome not in ("correct", "built"):
            print(f"- {finding.outcome} in {finding.precision}: {finding.case}: {finding.detail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=1, help="take every Nth of the operator cases")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many cases at the beginning")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--operators", action="store_true", help="leave the real models out")
    parser.add_argument("--findings", type=Path, help="keep the workers' findings in this new folder")
    parser.add_argument("--cases", nargs="+", default=[], help="these alone: names, or files of names, one a line")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds without a word before one is killed")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(json.load(sys.stdin), arguments.work, arguments.until)
        return
    if arguments.cases:
        names = names_in(arguments.cases)
        unknown = sorted({*names} - cases_by_name(names).keys())
        if unknown:
            parser.error(f"there is no case {', '.join(unknown)}")
    else:
        names = [case.name for case in operator_cases()][arguments.skip :: arguments.sample]
        if not arguments.operators:
            names += [case.name for case in real_cases()]
    with tempfile.TemporaryDirectory() as folder:
        until = time.time() + arguments.seconds
        findings = sweep(names, arguments.workers, arguments.findings or Path(folder), until, arguments.patience)
        print_table(findings)


if __name__ == "__main__":
    main()

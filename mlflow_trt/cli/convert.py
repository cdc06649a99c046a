"""mlflow-trt convert"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlflow_trt.cli import recipe_options as options
from mlflow_trt.cli.options import NOTHING_DONE, default_name, results_on_stdout, select_device
from mlflow_trt.cli.render import print_outcomes, print_plan, print_record
from mlflow_trt.cli.tables import print_json
from mlflow_trt.cli.trtexec import translate
from mlflow_trt.core.scratch import scratch_folder

if TYPE_CHECKING:
    from mlflow_trt.pipeline.options import ConversionOptions


def _take_over(context: typer.Context, line: str) -> str:
    """Make a trtexec line the defaults of this command, which options that are given come before."""
    if line:
        translation = translate(line)
        context.default_map = translation.parameters()
        typer.echo(f"The same as: {translation.command}", err=True)
        for remark in translation.remarks:
            typer.echo(remark, err=True)
    return line


def convert(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="An ONNX file, or the MLflow URI of a model: models:/name/version, models:/name@alias, runs:/..."
        ),
    ] = "",
    onnx: Annotated[str, typer.Option(help="The ONNX file, instead of SOURCE.")] = "",
    all_: Annotated[
        str,
        typer.Option(
            "--all", help="Convert the newest version of every registered model that this filter of MLflow finds."
        ),
    ] = "",
    from_trtexec: Annotated[
        str,
        typer.Option(
            help="A command line of trtexec, whose options are taken over; what it becomes is printed.",
            is_eager=True,
            callback=_take_over,
        ),
    ] = "",
    register_as: Annotated[
        str,
        typer.Option(
            help="Register the result as a version of this model. With --all a pattern. Default: {name}-trt, where the "
            "source is registered as {name} and no file or folder is to be written."
        ),
    ] = "",
    alias: Annotated[str, typer.Option(help="Set this alias on the version, after everything else succeeded.")] = "",
    output: Annotated[
        Path | None, typer.Option(path_type=Path, help="Write the result to this new folder instead.")
    ] = None,
    save_engine: Annotated[
        Path | None, typer.Option(path_type=Path, help="Write the engine to this file as well, or only.")
    ] = None,
    build_only: Annotated[
        bool, typer.Option("--build-only", help="For lines of trtexec: this command always only builds.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make a new version, even where there is one of this source and recipe.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    precision: options.Precision = "",
    fp16: options.Fp16 = False,
    bf16: options.Bf16 = False,
    int8: options.Int8 = False,
    fp8: options.Fp8 = False,
    best: options.Best = False,
    no_tf32: options.NoTf32 = False,
    keep_float32: options.KeepFloat32 = None,
    calibration_method: options.CalibrationMethod = "",
    batch: options.Batch = "",
    min_shapes: options.MinShapes = None,
    opt_shapes: options.OptShapes = None,
    max_shapes: options.MaxShapes = None,
    target: options.Target = None,
    workspace: options.Workspace = None,
    mem_pool_size: options.MemPoolSize = "",
    avg_timing: options.AvgTiming = None,
    builder_optimization_level: options.OptimizationLevel = None,
    timing_cache_file: options.TimingCacheFile = "",
    no_builder_cache: options.NoBuilderCache = False,
    tactic_sources: options.TacticSources = "",
    sparsity: options.Sparsity = "",
    version_compatible: options.VersionCompatible = False,
    hardware_compatibility_level: options.HardwareCompatibilityLevel = "",
    refit: options.Refit = False,
    strip_weights: options.StripWeights = False,
    weight_streaming: options.WeightStreaming = False,
    dynamic_plugins: options.DynamicPlugins = None,
    profiling_verbosity: options.ProfilingVerbosity = "",
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            "--calibration-data",
            "--data",
            path_type=Path,
            help="An .npz or .npy file of real inputs: int8 and fp8 need it, all are compared on it. For a whole "
            "model a .csv, .jsonl, .parquet or .txt of what it takes, or a folder of images.",
        ),
    ] = None,
    allow_external_data_from: Annotated[
        Path | None,
        typer.Option(
            path_type=Path, help="A folder that links among the model's external data may lead into: blobs of a cache."
        ),
    ] = None,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(path_type=Path, help="A file of JSON that int8 and fp8 write their ranges to, and use again."),
    ] = None,
    device: Annotated[
        int | None,
        typer.Option(help="The GPU to build, verify and measure on, of those that CUDA_VISIBLE_DEVICES shows."),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Let the result of a scikit-learn model answer as its predict does, with labels.",
        ),
    ] = False,
    network: Annotated[
        str, typer.Option(help="Which network of a PythonModel to convert, where it has several: self.encoder.")
    ] = "",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Convert a model that brings Python code, which loading it runs."),
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare with the source model, and store no golden sample.")
    ] = False,
    store_kernels: Annotated[
        bool,
        typer.Option(
            "--store-kernels",
            help="Compile the kernels of TensorRT-RTX on this machine's GPU, and store them with the model.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a model, from a file or from MLflow, into an MLflow model with a TensorRT engine.

    With --all it exits with 1 where one of the models failed, and with 3 where the filter finds none.
    """
    # Hence path_type above: without it, typer before 0.29 leaves paths as text here.
    given: dict[str, Any] = dict(context.params)
    if sum(map(bool, (source, onnx, all_))) != 1:
        raise typer.BadParameter("give one source: SOURCE, --onnx FILE or --all FILTER")
    if not (output or save_engine or all_):
        given["register_as"] = register_as = register_as or default_name(source)
    if bool(register_as) + (output is not None) > 1 or not (register_as or output or save_engine or all_ or dry_run):
        raise typer.BadParameter("give either --register-as NAME or --output DIR")
    if store_kernels and save_engine and not (register_as or output):
        raise typer.BadParameter("--store-kernels stores them with a model: give --register-as NAME or --output DIR")
    if alias and not (register_as or all_):
        raise typer.BadParameter("--alias needs --register-as NAME")
    if all_ and (output or save_engine):
        raise typer.BadParameter("--all registers what it makes: leave --output and --save-engine out")
    if device is not None:
        select_device(device)
    with results_on_stdout(as_json):
        conversion = _options_from(context)
        if save_engine:
            from mlflow_trt.deploy.engine_file import check_engine_path

            check_engine_path(save_engine)
    command = _convert_all if all_ else _plan if dry_run else _convert_one
    command(given, source or onnx, conversion)


def _options_from(context: typer.Context) -> ConversionOptions:
    """The options of the conversion. What the command line has no option for is taken from the context's object."""
    from mlflow_trt.pipeline.options import ConversionOptions

    given = context.params
    base = context.obj if isinstance(context.obj, ConversionOptions) else ConversionOptions()
    return replace(
        base,
        recipe=options.recipe_from(given),
        calibration_data=given["calibration_data"],
        calibration_cache=given["calibration_cache"],
        verify=not given["no_verify"],
        store_kernels=given["store_kernels"],
        allow_external_data_from=given["allow_external_data_from"],
        whole=given["whole"],
        network=given["network"] or None,
        trust_remote_code=given["trust_remote_code"],
    )


def _convert_one(given: dict[str, Any], source: str, conversion: ConversionOptions) -> None:
    from mlflow_trt.deploy.engine_file import save_engine
    from mlflow_trt.flavor.fetch import read_record
    from mlflow_trt.pipeline.make import prepare_conversion
    from mlflow_trt.registry.convert_version import convert_to_folder, converted_version
    from mlflow_trt.store.record import record_to_dict

    name, alias, force = given["register_as"], given["alias"] or None, given["force"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(results_on_stdout(given["as_json"]))
        workdir = stack.enter_context(scratch_folder())
        if name:
            prepared = prepare_conversion(conversion)
            # A version stays only if what comes after it succeeds, too.
            version = stack.enter_context(converted_version(source, name, prepared, alias=alias, force=force))
            uri = f"models:/{version.name}/{version.version}"
        else:
            path = given["output"] or workdir / "model"
            convert_to_folder(source, path, conversion)
            uri = str(path)
        record = read_record(uri)
        if given["save_engine"] is not None:
            save_engine(uri, given["save_engine"])
            uri = uri if name or given["output"] else str(given["save_engine"])
    if given["as_json"]:
        print_json({"uri": uri, **record_to_dict(record)})
    else:
        print_record(uri, record)


def _plan(given: dict[str, Any], source: str, conversion: ConversionOptions) -> None:
    from mlflow_trt.pipeline.make import prepare_conversion
    from mlflow_trt.registry.plan import plan_conversion

    with results_on_stdout(given["as_json"]):
        plan = plan_conversion(
            source,
            prepare_conversion(conversion),
            registered_model_name=given["register_as"] or None,
            alias=given["alias"] or None,
            path=given["output"],
            force=given["force"],
        )
    if given["as_json"]:
        print_json(asdict(plan))
    else:
        print_plan(plan)


def _convert_all(given: dict[str, Any], _source: str, conversion: ConversionOptions) -> None:
    from mlflow_trt.registry.convert_all import Outcome, convert_all

    outcomes: list[Outcome] = []
    try:
        with results_on_stdout(given["as_json"]):
            convert_all(
                given["all_"],
                conversion,
                name_pattern=given["register_as"] or "{name}-trt",
                alias=given["alias"] or None,
                force=given["force"],
                dry_run=given["dry_run"],
                on_outcome=outcomes.append,
            )
    except (KeyboardInterrupt, SystemExit):  # what was converted before it stays
        _render_outcomes(given, outcomes)
        raise
    _render_outcomes(given, outcomes)
    if not outcomes:
        raise typer.Exit(NOTHING_DONE)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _render_outcomes(given: dict[str, Any], outcomes: list[Any]) -> None:
    if given["as_json"]:
        print_json([vars(outcome) for outcome in outcomes])
    else:
        print_outcomes(outcomes)

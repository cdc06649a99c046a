"""trtexec's options: what each becomes. docs/trtexec.md is generated from this table."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import typer


class Option(NamedTuple):
    """An option of trtexec.

    `becomes` is ours, or one of: `dropped`, since it changes nothing here; `benchmark`, since it is about running the
    engine, which `mlflow-trt benchmark` does; `refused`. `word` says why. `flag` options take no value.
    """

    name: str
    becomes: str
    word: str = ""
    flag: bool = False


OPTIONS = (
    Option("--onnx", "--onnx"),
    Option("--saveEngine", "--save-engine"),
    Option("--buildOnly", "--build-only", "convert always only builds", flag=True),
    Option("--skipInference", "--build-only", "convert always only builds", flag=True),
    Option("--minShapes", "--min-shapes"),
    Option("--optShapes", "--opt-shapes", "alone it stands for all three, as in trtexec"),
    Option("--maxShapes", "--max-shapes"),
    Option("--shapes", "--opt-shapes", "where nothing else gives shapes; else it is about running"),
    Option("--profile", "--min-shapes", "several profiles: repeat --min-shapes, --opt-shapes and --max-shapes"),
    Option("--workspace", "--workspace", "MiB; removed from trtexec in favour of --memPoolSize"),
    Option("--memPoolSize", "--mem-pool-size", "workspace, tacticSharedMem and tacticDRAM; no DLA"),
    Option("--avgTiming", "--avg-timing"),
    Option("--minTiming", "dropped", "TensorRT removed it; --avg-timing is what is left"),
    Option("--builderOptimizationLevel", "--builder-optimization-level"),
    Option("--timingCacheFile", "--timing-cache-file", "shared under a lock, merged; TensorRT-RTX has none"),
    Option("--noBuilderCache", "--no-builder-cache", flag=True),
    Option("--tacticSources", "--tactic-sources", "TensorRT 11 removed CUBLAS, CUBLAS_LT and CUDNN"),
    Option("--noTF32", "--no-tf32", "without it, and without another precision, a line becomes --precision tf32", True),
    Option("--sparsity", "--sparsity", "force is refused: it overwrites the model's weights"),
    Option("--versionCompatible", "--version-compatible", "not with TensorRT-RTX", flag=True),
    Option("--vc", "--version-compatible", "not with TensorRT-RTX", flag=True),
    Option("--hardwareCompatibilityLevel", "--hardware-compatibility-level", "not with TensorRT-RTX: see --target"),
    Option("--computeCapabilities", "--target", "TensorRT-RTX only"),
    Option("--refit", "--refit", flag=True),
    Option("--stripWeights", "--strip-weights", flag=True),
    Option("--stripAllWeights", "--strip-weights", flag=True),
    Option("--allowWeightStreaming", "--weight-streaming", flag=True),
    Option("--weightStreamingBudget", "dropped", "TensorRT's automatic budget is taken at each load"),
    Option("--profilingVerbosity", "--profiling-verbosity"),
    Option("--fp16", "--fp16", "the graph is retyped; TensorRT 11 removed the flag of the builder", flag=True),
    Option("--bf16", "--bf16", "the graph is retyped; TensorRT 11 removed the flag of the builder", flag=True),
    Option("--int8", "--int8", "the graph gets Q/DQ nodes; TensorRT 11 removed the flag of the builder", flag=True),
    Option("--fp8", "--fp8", "the graph gets Q/DQ nodes; TensorRT 11 removed the flag of the builder", flag=True),
    Option("--best", "--best", "tries each, and keeps the fastest whose accuracy passes; needs a GPU", flag=True),
    Option("--stronglyTyped", "dropped", "networks are always strongly typed", flag=True),
    Option("--explicitBatch", "dropped", "networks always have an explicit batch", flag=True),
    Option("--verbose", "dropped", "set the logger mlflow.mlflow_trt to DEBUG", flag=True),
    Option("--calib", "refused", "TensorRT 11 removed calibration caches; --calibration-data takes inputs instead"),
    Option("--loadEngine", "refused", "a model folder holds the ONNX that an engine was made of; give --onnx"),
    Option("--batch", "refused", "TensorRT removed implicit batches; give --batch min:opt:max to mlflow-trt"),
    Option("--maxBatch", "refused", "TensorRT removed implicit batches; give --batch min:opt:max to mlflow-trt"),
    Option("--uff", "refused", "TensorRT removed UFF; export the model to ONNX"),
    Option("--deploy", "refused", "TensorRT removed Caffe; export the model to ONNX"),
    Option("--layerPrecisions", "refused", "networks are strongly typed: a layer's precision is in the graph"),
    Option("--layerOutputTypes", "refused", "networks are strongly typed: a layer's types are in the graph"),
    Option("--precisionConstraints", "refused", "networks are strongly typed: precisions are in the graph"),
    Option("--inputIOFormats", "refused", "inputs are linear arrays of the dtype that the graph says"),
    Option("--outputIOFormats", "refused", "outputs are linear arrays of the dtype that the graph says"),
    Option("--plugins", "--dynamic-plugins", "whoever loads the model names them again; not TensorRT-RTX"),
    Option("--staticPlugins", "--dynamic-plugins", "whoever loads the model names them again; not TensorRT-RTX"),
    Option("--dynamicPlugins", "--dynamic-plugins", "whoever loads the model names them again; not TensorRT-RTX"),
    Option("--setPluginsToSerialize", "refused", "a library in the plan would be executed by whoever loads it"),
    Option("--useDLACore", "refused", "DLA is not supported"),
    Option("--allowGPUFallback", "refused", "DLA is not supported", flag=True),
    Option("--device", "--device"),
    Option("--safe", "refused", "the safety runtime is not supported", flag=True),
    *(
        Option(name, "benchmark")
        for name in (
            "--loadInputs", "--iterations", "--warmUp", "--duration", "--sleepTime", "--idleTime", "--streams",
            "--infStreams", "--avgRuns", "--percentile", "--exportTimes", "--exportOutput", "--exportProfile",
            "--exportLayerInfo", "--persistentCacheRatio",
        )
    ),
    *(
        Option(name, "benchmark", flag=True)
        for name in (
            "--exposeDMA", "--noDataTransfers", "--useManagedMemory", "--useSpinWait", "--threads", "--useCudaGraph",
            "--timeDeserialize", "--timeRefit", "--separateProfileRun", "--dumpOutput", "--dumpRawBindingsToFile",
            "--dumpProfile", "--dumpLayerInfo", "--dumpRefit",
        )
    ),
)  # fmt: skip

_MOST_PROFILES = 256
_BY_NAME = {option.name.lower(): option for option in OPTIONS}
_SHAPES = ("--min-shapes", "--opt-shapes", "--max-shapes")


@dataclass(kw_only=True)
class Translation:
    """A trtexec line as options of `mlflow-trt convert`, and what there is to say about it."""

    options: list[tuple[str, str | None]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The same as a command line."""
        words = ["mlflow-trt", "convert", *(w for name, value in self.options for w in (name, value) if w is not None)]
        return shlex.join(words)

    def parameters(self) -> dict[str, Any]:
        """The same as values of the command's parameters."""
        values: dict[str, Any] = {}
        for name, value in self.options:
            key = name.removeprefix("--").replace("-", "_")
            if name in (*_SHAPES, "--target", "--dynamic-plugins"):
                values.setdefault(key, []).append(value)
            else:
                values[key] = True if value is None else value
        return values


def translate(line: str) -> Translation:
    """Read a command line of trtexec. Raises BadParameter for what has no counterpart, and says why."""
    translation = Translation()
    shapes: list[dict[str, str]] = [{}]
    shapes_to_run = None
    for word in _split_words(line):
        given, _, value = word.partition("=")
        option = _BY_NAME.get(given.lower())
        if option is None or option.becomes == "refused":
            raise typer.BadParameter(f"trtexec's {given} has no counterpart: {_reason(option, given)}")
        if not option.flag and not value:
            raise typer.BadParameter(f"trtexec's {given} wants a value: {given}=...")
        if option.name == "--profile":
            shapes += [{} for _ in range(_profile(value) + 1 - len(shapes))]
        elif option.name == "--shapes":
            shapes_to_run = value
        elif option.becomes in _SHAPES:
            shapes[-1][option.becomes] = value.replace("'", "")
        elif option.becomes == "--target":
            translation.options += [("--target", target) for target in value.split("+" if "+" in value else ",")]
        elif option.becomes.startswith("--"):
            translation.options.append((option.becomes, None if option.flag else value))
        else:
            translation.remarks.append(f"{given} is left out: {_reason(option)}")
    translation.options += _shape_options([profile for profile in shapes if profile], shapes_to_run)
    _add_default_precision(translation)
    return translation


def _split_words(line: str) -> list[str]:
    """What stands behind the name of the program, which may be left out."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise typer.BadParameter(f"--from-trtexec: {line!r} cannot be read: {error}") from None
    return words[1:] if words and not words[0].startswith("-") else words


def _profile(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) >= _MOST_PROFILES:
        raise typer.BadParameter(f"trtexec's --profile={value}: expected a number below {_MOST_PROFILES}")
    return int(value)


def _reason(option: Option | None, given: str = "") -> str:
    if option is None:
        close = difflib.get_close_matches(given.lower(), _BY_NAME, n=1, cutoff=0.75)
        if close:
            return f"mlflow-trt does not know it; did you mean {_BY_NAME[close[0]].name}?"
        return "mlflow-trt does not know it; docs/trtexec.md lists what it knows"
    return option.word or "it is about running the engine; see mlflow-trt benchmark"


def _shape_options(profiles: list[dict[str, str]], shapes_to_run: str | None) -> list[tuple[str, str | None]]:
    """All three shapes for each profile, where trtexec fills in what is missing."""
    options: list[tuple[str, str | None]] = []
    for profile in profiles or ([{"--opt-shapes": shapes_to_run}] if shapes_to_run else []):
        usual = profile.get("--opt-shapes") or profile.get("--max-shapes") or profile["--min-shapes"]
        options += [(name, profile.get(name, usual)) for name in _SHAPES]
    return options


def _add_default_precision(translation: Translation) -> None:
    """Trtexec lets float32 layers use TF32 unless it is told not to; here that is asked for."""
    names = {name for name, _ in translation.options}
    if not names & {"--fp16", "--bf16", "--int8", "--fp8", "--best", "--no-tf32"}:
        translation.options.append(("--precision", "tf32"))


def table() -> str:
    """The table of docs/trtexec.md."""
    rows = ["| trtexec | mlflow-trt convert | |", "| --- | --- | --- |"]
    for option in OPTIONS:
        if option.becomes != "benchmark":
            ours = f"`{option.becomes}`" if option.becomes.startswith("--") else option.becomes
            rows.append(f"| `{option.name}{'' if option.flag else '=...'}` | {ours} | {option.word} |")
    names = ", ".join(f"`{option.name}`" for option in OPTIONS if option.becomes == "benchmark")
    return "\n".join([*rows, "", f"About running the engine, so left out, with a pointer to `benchmark`: {names}."])

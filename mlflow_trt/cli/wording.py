"""Messages in the command line's own words: the library names keywords, and who types a command knows options."""

from __future__ import annotations

import re
from collections.abc import Callable

OPTIONS = {
    "batch": "--batch",
    "batches": "--batch",
    "calibration_data": "--calibration-data",
    "calibration_cache": "--calibration-cache",
    "calibration_method": "--calibration-method",
    "keep_float32": "--keep-float32",
    "targets": "--target",
    "shapes": "--min-shapes, --opt-shapes and --max-shapes",
    "inputs": "--input",
    "outputs": "--output-tensor",
    "precision": "--precision",
    "workspace_bytes": "--workspace",
    "memory_pools": "--mem-pool-size",
    "optimization_level": "--builder-optimization-level",
    "avg_timing_iterations": "--avg-timing",
    "timing_cache": "--timing-cache-file",
    "tactic_sources": "--tactic-sources",
    "hardware_compatibility": "--hardware-compatibility-level",
    "profiling_verbosity": "--profiling-verbosity",
    "store_kernels": "--store-kernels",
    "save_engine": "--save-engine",
    "registered_model_name": "--register-as",
    "path": "--output",
    "wheels": "--wheel",
    "follow_aliases": "--follow-aliases",
    "front_ends": "--front-ends",
    "drain_seconds": "--drain-seconds",
    "pending_bytes": "--max-pending-mib",
    "api_key_file": "--api-key-file",
    "shared_memory_prefix": "--shared-memory-prefix",
    "ssl_keyfile": "--ssl-keyfile",
    "ssl_certfile": "--ssl-certfile",
    "ssl_ca_certs": "--ssl-ca-certs",
    "queue_delay": "--queue-delay",
    **{
        name: f"--{name}"
        for name in ("port", "server", "name", "base", "backend", "instances", "repository", "seconds")
    },
}
"""By the library's keyword, the option that means it."""

_WEIGHTS: dict[str, str] = {"stripped": "--strip-weights", "refittable": "--refit"}
_SETTINGS = "runtime|on_mismatch|kernel_specialization|cuda_graphs|warm_up"
_SUBJECTS = (
    "port|batches|seconds|instances|queue_delay|follow_aliases|front_ends|drain_seconds|avg_timing_iterations|optimization_level|"
    "workspace_bytes|pending_bytes|memory_pools|name|backend|server|base|targets|wheels"
)
_CHOOSERS = r"\bsave_model, log_model, convert_model_version and `mlflow-trt convert`, which choose"
_PHRASES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r" or input_example=(?=[ ,.]|$)", ""),
    (r"\bbatch=\(([^()]*)\)", lambda found: f"--batch {_joined(found[1])}"),
    (r"\bbatch is \(([^()]*)\)", lambda found: f"--batch is {_joined(found[1])}"),
    (r"\bexpected a number, or \(min, opt, max\)", "expected a number, or min:opt:max"),
    (r"\bshapes=\{'([^']+)': \(\(\.\.\.\), \(\.\.\.\), \(\.\.\.\)\)\}",
     r"--min-shapes \1:..., --opt-shapes \1:... and --max-shapes \1:..."),
    (r"\bshapes\[('[^']*')\]", r"the shapes of \1"),
    (r"\bshapes names ('[^']*')", r"the shapes name \1"),
    (r"\bprecision='(\w+)' and allow_tf32=False", r"--precision \1 and --no-tf32"),
    (r"\ballow_tf32=False", "--no-tf32"),
    (r"\bbuilder_cache=False", "--no-builder-cache"),
    (r"\bverify=False", "--no-verify"),
    (r", or allow more with verify=Tolerance\(\.\.\.\)", ""),
    (r"\bweight_streaming=True is for weights='included', not for (\w+)",
     lambda found: f"--weight-streaming is for engines with their weights, not for {_WEIGHTS.get(found[1], found[1])}"),
    (r"\bversion_compatible=True", "--version-compatible"),
    (r"; force makes another version", "; --force makes another version"),
    (rf"\b({_SETTINGS})='(\w+)'", r"""--model-config '{"\1": "\2"}'"""),
    (r"\bseveral profiles in shapes\b", "--min-shapes, --opt-shapes and --max-shapes given several times"),
    (rf"\b({'|'.join(OPTIONS)})='(\w+)'", lambda found: f"{OPTIONS[found[1]]} {found[2]}"),
    (rf"(?<![\w.`'\"-])({'|'.join(OPTIONS)})=(?=[\s,;.:)]|$)", lambda found: OPTIONS[found[1]]),
    (r"(?<![\w.`'\"-])(keep_float32|calibration_data|calibration_method|calibration_cache)\b(?!=)",
     lambda found: OPTIONS[found[1]]),
    (rf"^({_SUBJECTS})(?= is\b|:)", lambda found: OPTIONS[found[1]]),
    (_CHOOSERS, "convert, which chooses"),
    (r"\bleave splits_batches out", "leave --split-batches out"),
    (r"\bgive both of inputs and outputs, or none", "give both of --input and --output-tensor, or neither"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in _PHRASES)


def in_own_words(text: str) -> str:
    """A message of the library as one of the command line."""
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def _joined(numbers: str) -> str:
    return ":".join(part.strip() for part in numbers.split(","))

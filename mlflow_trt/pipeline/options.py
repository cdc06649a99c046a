"""What a user decides about a conversion, in one object that is handed on whole."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.settings import LoadSettings, ModelConfig, read_model_config
from mlflow_trt.core.types import Precision
from mlflow_trt.errors import OptionError
from mlflow_trt.pipeline.bench import Bench
from mlflow_trt.pipeline.compile_kernels import KernelCompiler

_CALIBRATED = (Precision.INT8, Precision.FP8, Precision.BEST)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Everything that decides about a conversion besides its source; the keywords of `save_model` explain each.

    `bench` is where the candidates for `best` are measured, and `compiler` where kernels are compiled; None takes the
    GPU of this machine for both. `whole`, `network` and `trust_remote_code` are for whole models.

    Raises OptionError for a `verify` that is neither a bool nor a Tolerance, for load settings that do not exist,
    for external data from what is no folder, and for a calibration cache of a precision that is not calibrated.
    """

    recipe: Recipe = field(default_factory=Recipe)
    calibration_data: Any = None
    calibration_cache: str | os.PathLike[str] | None = None
    verify: Tolerance | bool = True
    store_kernels: bool = False
    model_config: ModelConfig = None
    allow_external_data_from: str | os.PathLike[str] | None = None
    save_as_external_data: bool | None = None
    progress: Progress | None = None
    bench: Bench | None = None
    compiler: KernelCompiler | None = None
    whole: bool = False
    network: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.verify, (bool, Tolerance)):
            raise OptionError(f"verify is {self.verify!r}; expected True, False or a Tolerance", option="verify")
        object.__setattr__(self, "model_config", read_model_config(self.model_config))
        LoadSettings.of(self.model_config)
        LoadSettings.check_logged(read_model_config(self.model_config))
        folder = self.external_data_folder
        if folder is not None and not folder.is_dir():
            raise OptionError(
                f"allow_external_data_from is {str(folder)!r}; expected a folder", option="allow_external_data_from"
            )
        if self.calibration_cache is not None and self.recipe.precision not in _CALIBRATED:
            raise OptionError(
                f"calibration_cache is for int8, fp8 and best, and the precision is {self.recipe.precision}",
                option="calibration_cache",
            )

    @property
    def calibration_cache_file(self) -> Path | None:
        """The file that ranges for int8 and fp8 are read from, or written to."""
        return None if self.calibration_cache is None else Path(self.calibration_cache)

    @property
    def external_data_folder(self) -> Path | None:
        """The folder beside the model's own that symbolic links of its external data may lead into."""
        return None if self.allow_external_data_from is None else Path(self.allow_external_data_from)

    @property
    def settings(self) -> LoadSettings:
        """The load settings that the model gets as its defaults."""
        return LoadSettings.of(self.model_config)

    @property
    def required_tolerance(self) -> Tolerance | None:
        """The tolerance that the user set; None where what is usual for the precision will do."""
        return self.verify if isinstance(self.verify, Tolerance) else None

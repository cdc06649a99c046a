"""mlflow-trt sign, mlflow-trt verify-signature"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.tables import print_line

_Uri = Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")]


def sign(
    uri: _Uri,
    signature: Annotated[Path, typer.Option(help="The file to write the signature to, outside of the model.")],
    private_key: Annotated[
        Path | None, typer.Option(help="A private key on a NIST curve, as PEM. Without: by Sigstore, as who you are.")
    ] = None,
    password: Annotated[
        str | None, typer.Option(help="The password of the key.", envvar="MLFLOW_TRT_SIGNING_PASSWORD")
    ] = None,
) -> None:
    """Sign every file of a model, so that `verify-signature` and loading can tell that it is yours. Extra: signing."""
    from mlflow_trt.flavor.fetch import open_folder
    from mlflow_trt.store.signature import sign_folder

    with open_folder(uri) as folder:
        sign_folder(folder.path, signature, private_key=private_key, password=password)
    print_line(f"{signature}: the signature of {uri}, whose record has the sha256 {folder.digest}")


def verify_signature(
    uri: _Uri,
    signature: Annotated[Path, typer.Option(help="The file that `sign` wrote.")],
    signed_by: Annotated[
        str, typer.Option(help='The file of a public key; or "IDENTITY ISSUER" of Sigstore, with a space between.')
    ],
) -> None:
    """Check that a model is what somebody signed. Fails where it is not. Extra: signing."""
    from mlflow_trt.flavor.fetch import open_folder
    from mlflow_trt.store.signature import check_signature

    with open_folder(uri) as folder:
        check_signature(folder.path, signature, signed_by)
    print_line(f"{uri} is what {signed_by} signed; its record has the sha256 {folder.digest}")

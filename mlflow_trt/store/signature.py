"""Signatures of model folders, by Sigstore's model-signing: who vouches for every file of a model.

A signature is a file of its own, since nothing is written into a folder that was logged. It covers all files but the
one that MLflow writes when it downloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow_trt.core.optional import is_installed
from mlflow_trt.errors import ArtifactError, MissingDependencyError, OptionError, SignatureError

_WRITTEN_BY_MLFLOW = ("registered_model_meta",)


def sign_folder(folder: Path, signature: Path, *, private_key: Path | None, password: str | None = None) -> None:
    """Sign a model folder: with a private key on a NIST curve, or by Sigstore with the identity of whoever asks.

    Raises OptionError for a key that is none, ArtifactError where the folder or the signature is not to be accessed.
    """
    from_library = _import()
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder of a model", path=folder)
    config = from_library.signing.Config().set_hashing_config(_hashing(from_library, folder))
    try:
        if private_key is None:
            config.use_sigstore_signer(use_ambient_credentials=True)
        else:
            config.use_elliptic_key_signer(private_key=private_key, password=password)
    except (ValueError, TypeError, OSError) as error:
        raise OptionError(f"the private key {private_key} cannot be used: {error}", option="private_key") from error
    try:
        config.sign(folder, signature)
    except (ValueError, OSError) as error:  # a symbolic link, or nothing to write to
        raise ArtifactError(f"{folder} cannot be signed into {signature}: {error}", path=folder) from error


def check_signature(folder: Path, signature: Path, signed_by: str) -> None:
    """Raise SignatureError unless `signature` is that of this folder, as it is, by `signed_by`.

    Args:
        signed_by: the file of a public key, or an identity of Sigstore and its issuer, separated by a space.

    Raises OptionError for a key that is none.
    """
    from_library = _import()
    config = from_library.verifying.Config().set_hashing_config(_hashing(from_library, folder))
    identity, _, issuer = signed_by.partition(" ")
    try:
        if issuer:
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
        else:
            config.use_elliptic_key_verifier(public_key=Path(signed_by))
    except (ValueError, TypeError, OSError) as error:
        raise OptionError(
            f"signed_by is {signed_by!r}: {error}; expected the file of a public key, or IDENTITY ISSUER",
            option="signed_by",
        ) from error
    if not signature.is_file():
        raise SignatureError(f"there is no signature {signature} for {folder}; it is not used", path=signature)
    try:
        config.verify(folder, signature)
    except Exception as error:  # whatever is wrong with a signature, it does not hold
        raise SignatureError(
            f"{folder} is not what {signed_by} signed, by {signature}: {error}. It is not used; ask for the model and "
            "its signature again",
            path=folder,
        ) from error


def _import() -> Any:
    if not (is_installed("model_signing") and is_installed("OpenSSL")):
        raise MissingDependencyError(
            "model-signing is not installed: `pip install 'mlflow-trt[signing]'`", packages=("model-signing",)
        )
    import model_signing

    return model_signing


def _hashing(from_library: Any, folder: Path) -> Any:
    config = from_library.hashing.Config()
    return config.set_ignored_paths(paths=[folder / name for name in _WRITTEN_BY_MLFLOW], ignore_git_paths=False)
